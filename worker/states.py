"""The states of a partition's sources: found, saved, restored, and forgotten in time.

This module decides which sources are remembered; what a state is it leaves to `worker.drift`, and
of a broker it knows nothing. What it remembers is bounded twice: a source that was not heard among
the last so many records of its partition is forgotten, and so is the one that was heard least
recently when there are too many.

Both are decided record by record and by offsets alone, so that forgetting is a function of the
log: batches, restarts and rebalances change nothing. Clocks have no say, not even that of the
records. Whoever may write one record could otherwise date it in the next century and have every
source of the partition forgotten at once, as would a device whose clock is merely wrong; by
offsets that takes as many records as the operator has named.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import msgspec

from worker.drift import DriftPolicy, Shift, SourceState
from worker.profile import ReferenceProfile, Vector


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """Which sources of a partition are remembered.

    ``max_sources`` bounds the memory: with twenty signals a source takes up to 64 KiB, and 13 kB
    of ``drift.state``. ``forget_after`` is how many records of its partition a source may be
    silent; at 100 records a second the default is eleven days.
    """

    max_sources: int = 1_000
    forget_after: int = 100_000_000


class Changes(NamedTuple):
    """What has happened to the states of a partition since the last time somebody asked.

    ``values`` holds what ``drift.state`` is to say of each key: the state, or None to forget it.
    ``silent`` and ``crowded_out`` count the sources that were forgotten, by the reason.
    """

    values: dict[bytes, bytes | None]
    silent: int
    crowded_out: int


class Sources:
    """The states of the sources of one partition."""

    def __init__(self, profile: ReferenceProfile, policy: DriftPolicy, retention: Retention) -> None:
        self._profile = profile
        self._policy = policy
        self._retention = retention
        self._states: OrderedDict[bytes, SourceState] = OrderedDict()  # the least recently heard first
        self._in_order = True
        self._touched: dict[bytes, None] = {}
        self._silent = 0
        self._crowded_out = 0

    def __len__(self) -> int:
        return len(self._states)

    def update(self, source: str, observation: Vector, *, seconds: float, offset: int, time: int) -> Shift | None:
        """Take in one record of ``source`` (see `SourceState.update`), and forget whose time has come."""
        key = source.encode()
        self._arrange()
        while self._states and offset - next(iter(self._states.values())).heard > self._retention.forget_after:
            self._forget_eldest()
            self._silent += 1
        state = self._states.pop(key, None) or SourceState(self._profile, self._policy)
        while len(self._states) >= self._retention.max_sources:
            self._forget_eldest()
            self._crowded_out += 1
        self._states[key] = state
        self._touched[key] = None
        return state.update(observation, seconds=seconds, offset=offset, time=time)

    def restore(self, key: bytes, value: bytes) -> bool:
        """Put back what `changes` said of a key; False, and it is given up, if it is another model's.

        Raises:
            Fatal: the value cannot be read.
        """
        state = SourceState.decode(value, self._profile, self._policy)
        if state is None:
            self.give_up(key)
            return False
        self._states[key] = state
        self._in_order = False
        return True

    def give_up(self, key: bytes) -> None:
        """Have ``drift.state`` forget a value that is of no use."""
        self._touched[key] = None

    def changes(self) -> Changes:
        """Return what has changed since the last call."""
        states = {key: self._states.get(key) for key in self._touched}
        values = {key: None if state is None else state.encode() for key, state in states.items()}
        changes = Changes(values, self._silent, self._crowded_out)
        self._touched, self._silent, self._crowded_out = {}, 0, 0
        return changes

    def _arrange(self) -> None:
        """Bring restored states into the order in which they were heard; a broker may give them in another."""
        if not self._in_order:
            self._states = OrderedDict(sorted(self._states.items(), key=lambda item: item[1].heard))
            self._in_order = True

    def _forget_eldest(self) -> None:
        key, _ = self._states.popitem(last=False)
        self._touched[key] = None
