"""Timing by turns: contestants run alternately in one process, so that what disturbs one disturbs all.

This module owns how a time is taken and summed up, and knows nothing of what is timed.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Final

import msgspec
import numpy as np

ROUNDS: Final = 5
"""At least so many turns for each contestant: a median of fewer is one run's luck."""

TURN: Final = 0.02
"""About the seconds of a turn, in as many calls as that takes: what a contestant finds in the caches is then its own,
as in a loop that does nothing else. Only the first call of each turn finds nothing, and is told apart."""

FORGOTTEN: Final = 64 << 20
"""Bytes that are written before each turn: more than the caches hold, so that nothing of anybody is left in them."""

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

    The ratio is the median of the ratios of each round, in which both ran one after the other. ``cold``
    and ``cold_ratio`` are of the first call of each turn, which has empty caches.
    What is not a time an item has no timing, and says in ``note`` what it is.
    """

    section: str
    contestant: str
    timing: Timing | None
    peer: str = ""
    ratio: float | None = None
    note: str = ""
    cold: Timing | None = None
    cold_ratio: float | None = None


def by_turns(
    section: str,
    contestants: Mapping[str, Task],
    *,
    items: int,
    seconds: float = 3.0,
    second: str | None = None,
    waiting: bool = False,
) -> list[Row]:
    """Run the contestants in turn until ``seconds`` are over; the first is the peer of all others.

    Args:
        section: what the rows are about.
        contestants: what to call; each call handles ``items`` items.
        items: how many items a call handles.
        seconds: how long to go on, for all of them together, after two calls of each that do not count.
        second: another contestant to be a peer of the others, in their notes.
        waiting: whether most of the time is spent waiting; then wall time is compared, and CPU time otherwise.
    """
    calls = {name: _calls(task) for name, task in contestants.items()}
    times: dict[str, _Times] = {name: [] for name in contestants}
    cold: dict[str, _Times] = {name: [] for name in contestants}
    other = np.zeros(FORGOTTEN, np.uint8)
    deadline = time.perf_counter() + seconds
    gc.collect()
    gc.disable()  # a collection would be charged to whoever's turn it is
    try:
        while min(map(len, times.values())) < ROUNDS or time.perf_counter() < deadline:
            for name, task in contestants.items():
                other += 1
                cold[name].append(_timed(task, 1))
                times[name].append(_timed(task, calls[name]))
    finally:
        gc.enable()
    clock = 1 if waiting else 0
    peer, *others = contestants
    rows = [Row(section, peer, _timing(times[peer], items), cold=_timing(cold[peer], items))]
    for name in others:
        note = "" if second is None or second == name else f"{_ratio(times[second], times[name], clock):.1f} x {second}"
        ratio, cold_ratio = _ratio(times[peer], times[name], clock), _ratio(cold[peer], cold[name], clock)
        timing, cold_timing = _timing(times[name], items), _timing(cold[name], items)
        rows.append(Row(section, name, timing, peer, ratio, note, cold_timing, cold_ratio))
    return rows


def _calls(task: Task) -> int:
    """Call a task twice, to see how many calls a turn has."""
    return max(1, math.ceil(TURN / min(_timed(task, 1)[1], _timed(task, 1)[1])))


def _timed(task: Task, calls: int) -> tuple[float, float]:
    """Return the CPU time of the process and the wall time of a call, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        task()
    return (time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls


def _ratio(peer: _Times, ours: _Times, clock: int) -> float:
    return median(a[clock] / max(b[clock], 1e-9) for a, b in zip(peer, ours, strict=True))


def _timing(times: _Times, items: int) -> Timing:
    cpu = [each[0] / items for each in times]
    low, _, high = quantiles(cpu, n=4)
    return Timing(median(cpu), median(each[1] / items for each in times), low, high, len(times))
