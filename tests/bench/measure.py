"""Timing by turns: contestants run alternately in one process, so that what disturbs one disturbs all.

This module owns how a time is taken and summed up, and knows nothing of what is timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Final

import msgspec

ROUNDS: Final = 5
"""At least so many turns for each contestant: a median of fewer is one run's luck."""

TURN: Final = 0.02
"""Seconds that a turn lasts at least, in as many calls as that takes: what a contestant finds in the caches is then
its own, as in a loop that does nothing else. The first call after another's turn can take three times as long."""

Task = Callable[[], object]
_Times = list[tuple[float, float]]


class Timing(msgspec.Struct, frozen=True):
    """Medians of the CPU time of the process and of wall time, seconds an item; quartiles are of the CPU time."""

    cpu: float
    wall: float
    low: float
    high: float
    rounds: int


class Row(msgspec.Struct, frozen=True):
    """One line of the table: who did what, how long an item took, and how many times faster than ``peer`` that is.

    The ratio is the median of the ratios of each round, in which both ran one after the other.
    What is not a time an item has no timing, and says in ``note`` what it is.
    """

    section: str
    contestant: str
    timing: Timing | None
    peer: str = ""
    ratio: float | None = None
    note: str = ""


def by_turns(
    section: str, contestants: Mapping[str, Task], *, items: int, seconds: float = 3.0, second: str | None = None
) -> list[Row]:
    """Run the contestants in turn until ``seconds`` are over; the first is the peer of all others.

    Args:
        section: what the rows are about.
        contestants: what to call; each call handles ``items`` items.
        items: how many items a call handles.
        seconds: how long to go on, for all of them together, after one round that does not count.
        second: another contestant to be a peer of the others, in their notes.
    """
    calls = {name: _calls(task) for name, task in contestants.items()}
    times: dict[str, _Times] = {name: [] for name in contestants}
    deadline = time.perf_counter() + seconds
    gc.collect()
    gc.disable()  # a collection would be charged to whoever's turn it is
    try:
        while min(map(len, times.values())) < ROUNDS or time.perf_counter() < deadline:
            for name, task in contestants.items():
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(calls[name]):
                    task()
                passed = time.process_time() - cpu, time.perf_counter() - wall
                times[name].append((passed[0] / calls[name], passed[1] / calls[name]))
    finally:
        gc.enable()
    peer, *others = contestants
    rows = [Row(section, peer, _timing(times[peer], items))]
    for name in others:
        note = "" if second is None or second == name else f"{_ratio(times[second], times[name]):.1f} x {second}"
        rows.append(Row(section, name, _timing(times[name], items), peer, _ratio(times[peer], times[name]), note))
    return rows


def _calls(task: Task) -> int:
    """Call a task twice, the second time to see how many calls a turn has."""
    task()
    began = time.perf_counter()
    task()
    return max(1, round(TURN / (time.perf_counter() - began)))


def _ratio(peer: _Times, ours: _Times) -> float:
    return median(a[0] / max(b[0], 1e-9) for a, b in zip(peer, ours, strict=True))


def _timing(times: _Times, items: int) -> Timing:
    cpu = [each[0] / items for each in times]
    low, _, high = quantiles(cpu, n=4)
    return Timing(median(cpu), median(each[1] / items for each in times), low, high, len(times))
