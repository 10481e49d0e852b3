"""Drift: what is watched for each source, what counts as a change, and when to say so once.

The chain, from a record to an event:

1. The *signals* of a record (`worker.profile`) arrive in standard deviations of the training data,
   since ADWIN is not scale-free.
2. Neighbouring chunks of sound resemble each other, and a detector fed with each of them takes
   that for drift. So signals are averaged over *blocks* of seconds, longer than the sound's own
   memory, and only the means go on.
3. Each signal has a *detector*: River's ADWIN (Bifet and Gavaldà, "Learning from Time-Changing
   Data with Adaptive Windowing", SIAM SDM 2007). One that fires makes its signal a suspect.
4. When a quorum of signals are suspects at once, an *episode* opens, and that is the one event.
   It stays open, and silent, for as long as detectors keep firing. Where it began is the
   least-squares change point of the suspects' block means (Bai, "Least Squares Estimation of a
   Shift in Linear Processes", J. Time Series Analysis 1994): ADWIN says that, not when.

This module knows neither a broker nor a clock. All of it is a function of the log: restored from
the bytes of `SourceState.encode`, a `SourceState` goes on exactly as if it had never been stopped. ADWIN
cannot be saved (and must not be: it would tie the log to a version of River), so the state keeps
the block means that ADWIN has seen, and feeds them to a new one.
"""

from __future__ import annotations

import hashlib
import math
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from river.drift import ADWIN

from worker.errors import Fatal
from worker.messages import SignalShift
from worker.profile import ReferenceProfile, Vector

STATE_VERSION: Final = 2

MAX_BLOCKS: Final = 128
"""Block means a source remembers: bounds a state at 13 kB for 20 signals. On reaching it the older half
is forgotten, by the detectors as well."""

MOST_BLOCKS: Final = 1 << 62
"""More than any source lives to see; MessagePack's integers end at four times as many."""

MIN_WINDOW: Final = 5
"""The fewest blocks ADWIN holds against the rest: a shift is proven after this many at the earliest."""

GRACE_PERIOD: Final = 10
"""The fewest blocks before ADWIN looks for a change at all."""


class DriftPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a change is one.

    ``block_seconds`` of sound are averaged before a detector sees them; it should be longer than
    twice the time over which the sound resembles itself. ``delta`` is ADWIN's confidence
    parameter. ``quorum`` signals (or all, if fewer are watched) must have fired within
    ``horizon`` blocks of each other.
    """

    block_seconds: float = 10.0
    delta: float = 0.002
    quorum: int = 3
    horizon: int = 12


class Shift(msgspec.Struct, frozen=True):
    """A change that was found: its signals, the largest first, and the first record that belongs to it."""

    signals: tuple[SignalShift, ...]
    since_offset: int
    since_time: int


class _Saved(msgspec.Struct, frozen=True, array_like=True):
    """The layout of a value of drift.state, in MessagePack. A change of it is a new STATE_VERSION."""

    version: int
    fingerprint: str
    seconds: float
    sums: bytes
    counts: bytes
    offset: int
    time: int
    next_block: int
    block_offsets: list[int]
    block_times: list[int]
    block_means: bytes
    starts: list[int]
    suspects: dict[int, int]
    baseline: int
    last_fired: int | None
    heard: int


def fingerprint(profile: ReferenceProfile, policy: DriftPolicy) -> str:
    """Return what a saved state must have been made with to be of any use."""
    return hashlib.sha256(msgspec.json.encode((profile, policy))).hexdigest()[:16]


class SourceState:
    """The detectors of one source in one partition.

    `update` changes it in place. If the transaction that carries the result fails, the state is
    thrown away with the session and read again from the log. ``heard`` is the offset of the last
    record that it has taken in.
    """

    def __init__(self, profile: ReferenceProfile, policy: DriftPolicy) -> None:
        self._names = profile.names
        self._policy = policy
        self._fingerprint = fingerprint(profile, policy)
        self.heard = -1
        size = len(self._names)
        self._seconds = 0.0
        self._sums = np.zeros(size)
        self._counts = np.zeros(size, np.int64)
        self._offset = 0
        self._time = 0
        # The finished blocks that are remembered: where and when each began, and the means of its signals (NaN: none).
        self._block_offsets: list[int] = []
        self._block_times: list[int] = []
        self._block_means = np.empty((0, size), np.float32)
        self._next_block = 0
        self._starts = [0] * size
        self._suspects: dict[int, int] = {}  # signal -> the block at which its detector fired
        self._baseline = 0  # the first block after the last episode: what "before" means
        self._last_fired: int | None = None
        self._detectors = [self._detector() for _ in range(size)]

    def update(self, observation: Vector, *, seconds: float, offset: int, time: int) -> Shift | None:
        """Take in one record.

        Args:
            observation: its standardised signals, shape (signals,); a value that is not finite
                is left out, since a single one would silence ADWIN for good.
            seconds: how much sound it held.
            offset: its place in the partition.
            time: its event time in milliseconds.

        Returns:
            The shift, if this record has proven one.
        """
        self.heard = offset
        if self._seconds == 0:
            self._offset, self._time = offset, time
        finite = np.isfinite(observation)
        self._sums += np.where(finite, observation, 0.0)
        self._counts += finite
        self._seconds += seconds
        if self._seconds < self._policy.block_seconds - 1e-9:
            return None
        return self._close_block()

    def _close_block(self) -> Shift | None:
        means = np.full(len(self._names), np.nan, np.float32)
        np.divide(self._sums, self._counts, out=means, where=self._counts > 0, casting="same_kind")
        self._block_offsets.append(self._offset)
        self._block_times.append(self._time)
        self._block_means = np.vstack((self._block_means, means))
        number = self._next_block
        self._next_block += 1
        self._seconds = 0.0
        self._sums[:] = 0
        self._counts[:] = 0
        fired = self._feed(number, means)
        if len(self._block_means) >= MAX_BLOCKS:
            fired |= self._forget()
        return self._judge(fired, number)

    def _feed(self, number: int, means: NDArray[np.float32]) -> set[int]:
        """Show a block to the detectors and return those that fired."""
        fired = set()
        for index, mean in enumerate(means.tolist()):
            if number < self._starts[index] or not math.isfinite(mean):
                continue
            detector = self._detectors[index]
            detector.update(mean)
            if detector.drift_detected:
                # ADWIN starts over, empty, at its next update.
                self._starts[index] = number + 1
                fired.add(index)
        return fired

    def _judge(self, fired: set[int], now: int) -> Shift | None:
        """Open an episode if enough signals are suspects, and keep an open one silent."""
        horizon = self._policy.horizon
        self._suspects.update(dict.fromkeys(sorted(fired), now))
        self._suspects = {i: fired_at for i, fired_at in self._suspects.items() if now - fired_at < horizon}
        if self._last_fired is not None and now - self._last_fired >= horizon:
            self._last_fired = None
        if not fired:
            return None
        if self._last_fired is not None:
            self._last_fired = now
            self._suspects.clear()
            return None
        if len(self._suspects) < min(self._policy.quorum, len(self._names)):
            return None
        self._last_fired = now
        return self._conclude()

    def _conclude(self) -> Shift:
        first = max(0, self._baseline - self._oldest_block)
        suspects = sorted(self._suspects)
        split, before, after = _change_point(self._block_means[first:, suspects].astype(np.float64))
        shifts = [
            SignalShift(self._names[suspect], round(float(was), 4), round(float(now), 4))
            for suspect, was, now in zip(suspects, before, after, strict=True)
        ]
        shifts.sort(key=lambda shift: (-abs(shift.after - shift.before), shift.signal))
        # Every detector starts over in the new regime, so that a slow one does not report the same shift again.
        self._suspects.clear()
        self._baseline = self._next_block
        self._starts = [self._next_block] * len(self._names)
        self._detectors = [self._detector() for _ in self._names]
        return Shift(tuple(shifts), self._block_offsets[first + split], self._block_times[first + split])

    def _forget(self) -> set[int]:
        """Drop the older half of the blocks and return the detectors that fire without it.

        One may: an outlier among the forgotten blocks can have hidden a shift among the others.
        """
        half = MAX_BLOCKS // 2
        del self._block_offsets[:half], self._block_times[:half]
        self._block_means = self._block_means[half:]
        return self._replay()

    def _replay(self) -> set[int]:
        """Show the blocks to new detectors; those of a restored state cannot fire, since they did not before."""
        self._detectors = [self._detector() for _ in self._names]
        blocks = enumerate(self._block_means, self._oldest_block)
        return {index for number, means in blocks for index in self._feed(number, means)}

    @property
    def _oldest_block(self) -> int:
        return self._next_block - len(self._block_means)

    def _detector(self) -> ADWIN:
        return ADWIN(delta=self._policy.delta, clock=1, min_window_length=MIN_WINDOW, grace_period=GRACE_PERIOD)

    def encode(self) -> bytes:
        """Return the state as a value of drift.state."""
        return msgspec.msgpack.encode(
            _Saved(
                version=STATE_VERSION,
                fingerprint=self._fingerprint,
                seconds=self._seconds,
                sums=self._sums.astype("<f8").tobytes(),
                counts=self._counts.astype("<i8").tobytes(),
                offset=self._offset,
                time=self._time,
                next_block=self._next_block,
                block_offsets=self._block_offsets,
                block_times=self._block_times,
                block_means=self._block_means.astype("<f4", copy=False).tobytes(),
                starts=self._starts,
                suspects=self._suspects,
                baseline=self._baseline,
                last_fired=self._last_fired,
                heard=self.heard,
            )
        )

    @classmethod
    def decode(cls, value: bytes, profile: ReferenceProfile, policy: DriftPolicy) -> SourceState | None:
        """Return the state that `encode` wrote, or None if it belongs to another model or policy.

        Raises:
            Fatal: the value is no state, or one of a version that this Earshot does not know.
        """
        try:
            version = msgspec.msgpack.decode(value)[0]
            if version != STATE_VERSION:
                raise Fatal(f"drift state of version {version!r}; this Earshot reads version {STATE_VERSION}")
            saved = msgspec.msgpack.decode(value, type=_Saved)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError, LookupError) as error:
            raise Fatal(f"drift state of {len(value)} bytes is not readable: {error}") from error
        state = cls(profile, policy)
        if saved.fingerprint != state._fingerprint:
            return None
        state._load(saved)
        return state

    def _load(self, saved: _Saved) -> None:
        size = len(self._names)
        try:
            self._sums = np.frombuffer(saved.sums, "<f8").astype(np.float64).reshape(size)
            self._counts = np.frombuffer(saved.counts, "<i8").astype(np.int64).reshape(size)
            shape = len(saved.block_times), size
            self._block_means = np.frombuffer(saved.block_means, "<f4").astype(np.float32).reshape(shape)
            if len(saved.block_offsets) != len(saved.block_times):
                raise ValueError(f"{len(saved.block_offsets)} offsets of {len(saved.block_times)} blocks")
            if not len(saved.block_times) <= saved.next_block < MOST_BLOCKS or len(saved.block_times) >= MAX_BLOCKS:
                raise ValueError(f"{len(saved.block_times)} blocks before block {saved.next_block}")
            if not 0 <= saved.baseline <= saved.next_block:
                raise ValueError(f"baseline {saved.baseline} before block {saved.next_block}")
            if len(saved.starts) != size or not saved.suspects.keys() <= set(range(size)):
                raise ValueError(f"{len(saved.starts)} starts, suspects {sorted(saved.suspects)}")
        except ValueError as error:
            raise Fatal(f"drift state does not fit together, or {size} signals: {error}") from error
        self._seconds, self._offset, self._time = saved.seconds, saved.offset, saved.time
        self._block_offsets, self._block_times = saved.block_offsets, saved.block_times
        self._next_block, self._starts = saved.next_block, saved.starts
        self._suspects, self._baseline, self._last_fired = saved.suspects, saved.baseline, saved.last_fired
        self.heard = saved.heard
        self._replay()


def _change_point(means: Vector) -> tuple[int, Vector, Vector]:
    """Return the split of ``means``, shape (blocks, signals), that leaves the least squared residue.

    Also returns the mean of each signal before and from the split on. NaN is no value.
    """
    known = np.isfinite(means)
    sums = np.cumsum(np.where(known, means, 0.0), axis=0)
    counts = np.cumsum(known, axis=0)
    before, n_before = sums[:-1], counts[:-1]
    after, n_after = sums[-1] - before, counts[-1] - n_before
    before, after = before / np.maximum(n_before, 1), after / np.maximum(n_after, 1)
    gain = (n_before * n_after / np.maximum(n_before + n_after, 1) * (after - before) ** 2).sum(axis=1)
    split = int(np.argmax(gain))
    return split + 1, before[split], after[split]
