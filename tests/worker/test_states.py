"""Which sources are remembered, and that forgetting is a function of the log."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.drift import DriftPolicy, Shift, SourceState
from worker.errors import Fatal
from worker.profile import ReferenceProfile, Signal
from worker.states import Changes, Retention, Sources

PROFILE = ReferenceProfile((Signal("value", 0.0, 1.0), Signal("spread", 0.0, 1.0)))
POLICY = DriftPolicy(block_seconds=2.0, delta=0.2, quorum=1)
OTHER = DriftPolicy(block_seconds=3.0)
PLENTY = Retention()

Log = list[tuple[int, str]]
"""Offsets, which may leave gaps, and sources."""

Saved = dict[bytes, bytes]
"""A partition of drift.state."""

logs = st.lists(st.tuples(st.integers(1, 4), st.sampled_from("abcdefg")), max_size=80).map(
    lambda steps: list(zip(np.cumsum([step for step, _ in steps]).tolist(), (s for _, s in steps), strict=True))
)
retentions = st.builds(Retention, max_sources=st.integers(1, 8), forget_after=st.integers(1, 40))


def fresh(retention: Retention = PLENTY) -> Sources:
    return Sources(PROFILE, POLICY, retention)


def reopened(saved: Saved, retention: Retention) -> Sources:
    """What a new owner of the partition has; its broker gives the keys in any order."""
    sources = fresh(retention)
    for key in sorted(saved):
        assert sources.restore(key, saved[key])
    return sources


def hear(sources: Sources, source: str, offset: int) -> Shift | None:
    signals = np.random.default_rng(offset).normal(size=2) + (5.0 if offset > 60 else 0.0)
    return sources.update(source, signals, seconds=1.0, offset=offset, time=1000 * offset)


def commit(sources: Sources, saved: Saved) -> tuple[int, int]:
    """Write the changes as a compacted topic would keep them; return (silent, crowded out)."""
    changes = sources.changes()
    for key, value in changes.values.items():
        saved.pop(key, None)
        if value is not None:
            saved[key] = value
    return changes.silent, changes.crowded_out


def names(sources: Sources) -> list[str]:
    """Who is remembered, the least recently heard first."""
    return [key.decode() for key in sources._states]


def remembered(log: Log, retention: Retention) -> tuple[list[str], int, int]:
    """Say the rules again in the plainest way: who is remembered after a log, and how many were forgotten."""
    last: dict[str, int] = {}
    silent = crowded_out = 0
    for offset, source in log:
        gone = [each for each, heard in last.items() if offset - heard > retention.forget_after]
        silent += len(gone)
        last = {each: heard for each, heard in last.items() if each not in gone} | {source: offset}
        if len(last) > retention.max_sources:
            del last[min(last, key=lambda each: last[each])]
            crowded_out += 1
    return sorted(last, key=lambda each: last[each]), silent, crowded_out


class TestRules:
    def test_the_least_recently_heard_makes_room(self) -> None:
        """One source too many: whoever was heard least recently is forgotten, not who came first."""
        sources = fresh(Retention(max_sources=2))
        for offset, source in enumerate("abac"):
            hear(sources, source, offset)

        assert ["a", "c"] == names(sources)
        changes = sources.changes()
        assert (0, 1, None) == (changes.silent, changes.crowded_out, changes.values[b"b"])
        assert {b"a", b"b", b"c"} == set(changes.values)

    def test_a_silent_source_is_forgotten(self) -> None:
        """A source is remembered for exactly so many records of its partition."""
        sources = fresh(Retention(forget_after=10))
        hear(sources, "a", 0)
        hear(sources, "b", 10)
        assert ["a", "b"] == names(sources)

        hear(sources, "b", 11)
        assert ["b"] == names(sources)
        assert (1, 0) == commit(sources, {})

    def test_who_comes_back_too_late_starts_anew(self) -> None:
        """The record that ends a silence which was too long finds no state, like one of a new source."""
        sources, other = fresh(Retention(forget_after=10)), fresh()
        for offset in (0, 1, 20):
            hear(sources, "a", offset)
        hear(other, "a", 20)

        assert other.changes().values == sources.changes().values

    def test_no_clock_has_a_say(self) -> None:
        """A record from the next millennium makes nobody silent."""
        sources = fresh(Retention(forget_after=100))
        hear(sources, "a", 0)
        sources.update("b", np.zeros(2), seconds=1.0, offset=1, time=2**53)
        hear(sources, "c", 2)

        assert ["a", "b", "c"] == names(sources)

    def test_changes_are_told_once(self) -> None:
        """What was told is not told again."""
        sources = fresh()
        hear(sources, "a", 0)
        assert [b"a"] == list(sources.changes().values)
        assert Changes({}, 0, 0) == sources.changes()

    @given(log=logs, retention=retentions)
    def test_as_the_rules_say(self, log: Log, retention: Retention) -> None:
        """After any log those are remembered whom the rules, said more slowly, remember."""
        sources = fresh(retention)
        for offset, source in log:
            hear(sources, source, offset)

        changes = sources.changes()
        assert remembered(log, retention) == (names(sources), changes.silent, changes.crowded_out)
        assert len(names(sources)) == len(sources) <= retention.max_sources


class TestRestart:
    @settings(max_examples=60, deadline=None)
    @given(log=logs, retention=retentions, cuts=st.lists(st.tuples(st.integers(0, 80), st.booleans()), max_size=20))
    def test_anywhere(self, log: Log, retention: Retention, cuts: Sequence[tuple[int, bool]]) -> None:
        """Cut into batches anywhere, restarted after any of them: the same shifts, states and numbers forgotten."""
        expected_saved: Saved = {}
        whole = fresh(retention)
        expected = [hear(whole, source, offset) for offset, source in log]
        expected_counts = commit(whole, expected_saved)

        saved: Saved = {}
        sources = fresh(retention)
        shifts, counts = [], (0, 0)
        restarts = dict(cuts)
        for index, (offset, source) in enumerate(log):
            if index in restarts:
                silent, crowded_out = commit(sources, saved)
                counts = counts[0] + silent, counts[1] + crowded_out
                if restarts[index]:
                    sources = reopened(saved, retention)
            shifts.append(hear(sources, source, offset))
        silent, crowded_out = commit(sources, saved)

        assert expected == shifts
        assert expected_saved == saved
        assert names(whole) == names(sources)
        assert expected_counts == (counts[0] + silent, counts[1] + crowded_out)

    def test_with_fewer_sources_than_before(self) -> None:
        """If fewer are to be remembered than were saved, the least recently heard go with the next record."""
        saved: Saved = {}
        sources = fresh()
        for offset, source in enumerate("dcba"):
            hear(sources, source, offset)
        commit(sources, saved)

        fewer = reopened(saved, Retention(max_sources=2))
        hear(fewer, "c", 4)

        assert ["a", "c"] == names(fewer)
        assert (0, 2) == commit(fewer, saved)
        assert {b"a", b"c"} == set(saved)


class TestUseless:
    def test_of_another_policy(self) -> None:
        """A state of another model or policy is not restored, and drift.state is told to forget it."""
        sources = fresh()
        state = SourceState(PROFILE, OTHER)

        assert not sources.restore(b"a", state.encode())
        assert ({b"a": None}, 0) == (sources.changes().values, len(sources))

    def test_unreadable(self) -> None:
        """A value that is no state is Fatal, and nothing is forgotten unasked."""
        sources = fresh()
        with pytest.raises(Fatal, match="drift state"):
            sources.restore(b"a", b"garbage")
        assert {} == sources.changes().values

    def test_heard_before_it_was_forgotten(self) -> None:
        """A source that was given up and is heard before anything is committed has its new state saved."""
        sources = fresh()
        sources.give_up(b"a")
        hear(sources, "a", 7)
        assert sources.changes().values[b"a"] is not None
