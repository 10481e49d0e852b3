"""Drift: what becomes an event, where it is said to begin, and that a restart changes nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from river.drift import ADWIN
from scipy.signal import lfilter

from worker.drift import MAX_BLOCKS, DriftPolicy, Shift, SourceState, _change_point
from worker.errors import Fatal
from worker.profile import ReferenceProfile, Signal, Vector

POLICY = DriftPolicy()
BLOCK = 10
"""Records of one second in a block of the default policy."""

EACH_RECORD = DriftPolicy(block_seconds=1.0)

FIELDS = (
    *("version", "fingerprint", "seconds", "sums", "counts", "offset", "time", "next_block"),
    *("block_offsets", "block_times", "block_means", "starts", "suspects", "baseline", "last_fired", "heard"),
)
"""The layout of a state, written down again: changing it without a new version must break a test."""

EXACT = [
    (649, 500, [("feature.f0", 0.0255, 3.9434), ("feature.f1", -0.0717, 2.9035), ("feature.f2", 0.0127, -1.8235)]),
]
"""What `TestEvents.test_exact_index` finds: where it was detected and began, and its signals."""

Events = list[tuple[int, Shift]]


def profile(signals: int) -> ReferenceProfile:
    return ReferenceProfile(tuple(Signal(f"feature.f{index}", 0.0, 1.0) for index in range(signals)))


def white(seed: int, records: int, signals: int) -> Vector:
    return np.random.default_rng(seed).normal(size=(records, signals))


def autocorrelated(seed: int, records: int, signals: int) -> Vector:
    """AR(1) with coefficient 0.9 and unit variance: neighbours resemble each other as those of sound do."""
    noise: Vector = lfilter([np.sqrt(1 - 0.9**2)], [1.0, -0.9], white(seed, records, signals), axis=0)
    return noise


def feed(state: SourceState, series: Vector, *, first: int = 0, seconds: Sequence[float] | None = None) -> Events:
    """Take in a series and return the events with the offsets at which they came."""
    events = []
    for index, observation in enumerate(series):
        offset = first + index
        duration = seconds[index] if seconds else 1.0
        shift = state.update(observation, seconds=duration, offset=offset, time=1000 * offset)
        if shift is not None:
            events.append((offset, shift))
    return events


def watch(series: Vector, policy: DriftPolicy = POLICY, seconds: Sequence[float] | None = None) -> Events:
    return feed(SourceState(profile(series.shape[1]), policy), series, seconds=seconds)


def reopen(state: SourceState, signals: int, policy: DriftPolicy) -> SourceState:
    restored = SourceState.decode(state.encode(), profile(signals), policy)
    assert restored is not None
    return restored


def names(shift: Shift) -> set[str]:
    return {signal.signal for signal in shift.signals}


class TestEvents:
    @pytest.mark.parametrize("at", [200, 333, 487, 700, 901, 1270, 1281, 1305, 1926])
    @pytest.mark.parametrize("seed", [1, 2])
    def test_one_shift_is_one_event(self, seed: int, at: int) -> None:
        """Five of eight signals shift by 3: one event says which, by how much, and since when.

        The times lie inside blocks and between them, and around those at which old blocks are forgotten.
        """
        series = white(seed, at + 400, 8)
        series[at:, [0, 2, 4, 5, 7]] += [3.0, -3.0, 3.0, 3.0, 3.0]

        ((detected, shift),) = watch(series)

        assert at < detected < at + 20 * BLOCK
        assert abs(shift.since_offset - at) <= BLOCK
        assert shift.since_offset % BLOCK == 0
        assert 1000 * shift.since_offset == shift.since_time
        assert POLICY.quorum <= len(shift.signals)
        assert names(shift) <= {"feature.f0", "feature.f2", "feature.f4", "feature.f5", "feature.f7"}
        for signal in shift.signals:
            assert signal.before == pytest.approx(0.0, abs=0.6)
            assert signal.after == pytest.approx(-3.0 if signal.signal == "feature.f2" else 3.0, abs=0.6)
        sizes = [abs(signal.after - signal.before) for signal in shift.signals]
        assert sorted(sizes, reverse=True) == sizes

    def test_exact_index(self) -> None:
        """One fixed series is detected at exactly this record, with exactly these numbers."""
        series = white(7, 1000, 4)
        series[500:, :3] += [4.0, 3.0, -2.0]

        events = [
            (offset, shift.since_offset, [(s.signal, s.before, s.after) for s in shift.signals])
            for offset, shift in watch(series)
        ]

        assert EXACT == events

    @pytest.mark.parametrize("seed", range(4))
    def test_a_shift_back_is_a_second_event(self, seed: int) -> None:
        """What returns to normal has changed again; the event says from where to where."""
        series = white(seed, 1600, 6)
        series[500:1000, :4] += 3.0

        (_, there), (_, back) = watch(series)

        assert abs(there.since_offset - 500) <= BLOCK
        assert abs(back.since_offset - 1000) <= BLOCK
        assert 1000 * back.since_offset == back.since_time
        for signal in back.signals:
            assert signal.before == pytest.approx(3.0, abs=0.6)
            assert signal.after == pytest.approx(0.0, abs=0.6)

    @pytest.mark.parametrize("shifted", [1, 2])
    def test_below_the_quorum(self, shifted: int) -> None:
        """Fewer signals than the quorum make no event, however far they shift."""
        series = white(0, 2000, 8)
        series[500:, :shifted] += 10.0

        assert [] == watch(series)

    @pytest.mark.parametrize("signals", [1, 2])
    def test_quorum_of_all(self, signals: int) -> None:
        """Where fewer signals are watched than the quorum, all of them make it."""
        series = white(0, 1000, signals)
        series[500:] += 5.0

        assert 1 == len(watch(series))

    def test_suspicion_expires(self) -> None:
        """Signals that shift one after the other, further apart than the horizon, are never a quorum."""
        series = white(0, 2500, 3)
        for signal, at in enumerate((500, 1000, 1500)):
            series[at:, signal] += 5.0

        assert [] == watch(series)
        assert 1 == len(watch(series, DriftPolicy(horizon=200)))

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("length", [200, 700, 2000])
    def test_gradual_drift_is_no_storm(self, seed: int, length: int) -> None:
        """A slow change, on which detectors fire again and again, is an event for each two spreads at the most."""
        series = white(seed, 3500, 8)
        series[1000:, :5] += 6 * np.minimum(np.arange(2500) / length, 1.0)[:, None]

        assert 1 <= len(watch(series)) <= 3

    @pytest.mark.parametrize(("seed", "common"), [(1, 0.0), (2, 0.0), (3, 0.7), (4, 0.7)])
    def test_no_alarm_without_a_shift(self, seed: int, common: float) -> None:
        """Twenty autocorrelated signals, alone or moving together, raise no alarm in 20,000 records."""
        series = np.sqrt(1 - common) * autocorrelated(seed, 20_000, 20)
        series += np.sqrt(common) * autocorrelated(seed + 100, 20_000, 1)

        assert [] == watch(series)

    def test_blocks_are_why(self) -> None:
        """The same sound without blocks raises alarms: the test above can fail."""
        assert watch(autocorrelated(1, 3000, 20), EACH_RECORD)


class TestAdwin:
    @pytest.mark.parametrize("size", [0.0, 1.0, 30.0])
    @pytest.mark.parametrize("delta", [0.002, 0.2])
    def test_fires_where_a_plain_one_does(self, size: float, delta: float) -> None:
        """With one signal, one record a block and a quorum of one, an episode opens where River's ADWIN fires."""
        policy = DriftPolicy(block_seconds=1.0, quorum=1, delta=delta)
        indices = []
        for seed in range(40):
            series = 0.3 * white(seed, MAX_BLOCKS - 1, 1)
            series[5 + seed :] += size
            plain = ADWIN(delta=delta, clock=1, min_window_length=5, grace_period=10)
            fired = []
            for index, value in enumerate(series[:, 0].astype(np.float32).tolist()):
                plain.update(value)
                if plain.drift_detected:
                    fired.append(index)

            events = watch(series, policy)

            assert fired[:1] == [index for index, _ in events[:1]]
            indices += fired[:1]

        assert size == 0.0 or len(set(indices)) >= 10

    def test_change_point(self) -> None:
        """The split is the one that leaves the least squared residue, found by trying all of them."""
        rng = np.random.default_rng(0)
        for case in range(200):
            blocks, signals = int(rng.integers(2, 30)), int(rng.integers(1, 5))
            means = rng.normal(size=(blocks, signals))
            means[blocks // 2 :] += rng.normal(size=signals) * 2
            means[rng.random(means.shape) < (case % 4) * 0.2] = np.nan

            split, before, after = _change_point(means)

            residues = [residue(means[:at]) + residue(means[at:]) for at in range(1, blocks)]
            assert residues[split - 1] == pytest.approx(min(residues), abs=1e-9)
            np.testing.assert_allclose(before, [average(column) for column in means[:split].T], atol=1e-12)
            np.testing.assert_allclose(after, [average(column) for column in means[split:].T], atol=1e-12)


class TestNonFinite:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_no_detector_is_silenced(self, value: float) -> None:
        """A signal that was not finite now and then, or for whole blocks, is found to shift later."""
        series = white(0, 1500, 1)
        series[5] = series[333] = series[400:450] = value
        series[1000:] += 3.0

        ((_, shift),) = watch(series)

        assert abs(shift.since_offset - 1000) <= BLOCK
        assert shift.signals[0].after == pytest.approx(3.0, abs=0.6)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_the_others_are_unaffected(self, value: float) -> None:
        """One signal that is never finite changes nothing in what the others say."""
        series = white(0, 1500, 5)
        series[1000:, :4] += 3.0
        gone = series.copy()
        gone[:, 4] = value

        events = watch(series)

        assert 1 == len(events)
        assert events == watch(gone)

    def test_the_rest_of_a_block(self) -> None:
        """A mean is that of the finite values of its block, not weighed down by those left out."""
        series = np.full((1000, 1), 2.0)
        series[500:] = 5.0
        series[::3] = np.nan

        ((_, shift),) = watch(series)

        assert (2.0, 5.0) == (shift.signals[0].before, shift.signals[0].after)

    @pytest.mark.parametrize("value", [1e40, 1e308, -1e308])
    def test_too_large_for_a_block(self, value: float) -> None:
        """A finite value whose mean is not is left out like one that is not finite."""
        series = white(0, 1500, 1)
        series[330:333] = value
        series[1000:] += 3.0

        with np.errstate(over="ignore"):
            ((detected, shift),) = watch(series)

        assert detected < 1000 + 20 * BLOCK
        assert abs(shift.since_offset - 1000) <= BLOCK

    @pytest.mark.parametrize("value", [1e4, 1e6, 1e12, 1e30])
    def test_hidden_by_an_outlier(self, value: float) -> None:
        """A shift that one absurd value hides from ADWIN is found when that value is forgotten."""
        series = white(0, 1500, 4)
        series[330] = value
        series[1000:, :3] += 3.0

        ((detected, shift),) = watch(series)

        assert MAX_BLOCKS * BLOCK - 1 == detected
        assert abs(shift.since_offset - 1000) <= BLOCK
        assert names(shift) == {"feature.f0", "feature.f1", "feature.f2"}


class TestBlocks:
    @pytest.mark.parametrize("seed", range(3))
    def test_records_of_varying_duration(self, seed: int) -> None:
        """A block ends with the record that fills it; the detectors see its mean, the event its first record."""
        rng = np.random.default_rng(seed)
        series = white(seed, 900, 5)
        series[500:, :4] += 3.0
        seconds: list[float] = rng.choice([0.25, 1.0, 2.5, 3.0, 25.0], size=900).tolist()
        starts, means = blocks_of(series, seconds, POLICY.block_seconds)

        events = watch(series, seconds=seconds)
        by_block = watch(means, EACH_RECORD)

        assert len(events) == 1
        assert [shift.signals for _, shift in by_block] == [shift.signals for _, shift in events]
        assert [starts[shift.since_offset] for _, shift in by_block] == [shift.since_offset for _, shift in events]
        assert [starts[block + 1] - 1 for block, _ in by_block] == [offset for offset, _ in events]

    def test_a_long_record_is_a_block(self) -> None:
        """A record longer than a block closes it alone, and one block only."""
        series = white(0, 120, 3)
        series[60:] += 4.0

        assert watch(series, EACH_RECORD) == watch(series, seconds=[60.0] * 120)

    def test_tenths_add_up(self) -> None:
        """A hundred tenths of a second are ten seconds, whatever floating point makes of it."""
        series = white(0, 8000, 3)
        series[5000:] += 4.0

        ((offset, shift),) = watch(series, seconds=[0.1] * 8000)

        assert 99 == offset % 100
        assert 0 == shift.since_offset % 100


class TestState:
    @pytest.mark.parametrize("policy", [DriftPolicy(block_seconds=2.0), DriftPolicy(block_seconds=1.0, horizon=60)])
    def test_restored_after_every_update(self, policy: DriftPolicy) -> None:
        """A state that is written and read after every record goes on as one that never was."""
        series, seconds = eventful(1, 500)
        whole = SourceState(profile(6), policy)
        restored = SourceState(profile(6), policy)
        events = 0
        for offset, (observation, duration) in enumerate(zip(series, seconds, strict=True)):
            record: Any = {"seconds": duration, "offset": offset, "time": 1000 * offset}
            expected = whole.update(observation, **record)
            assert expected == restored.update(observation, **record)
            assert whole.encode() == restored.encode()
            restored = reopen(restored, 6, policy)
            assert whole.encode() == restored.encode()
            events += expected is not None

        assert events >= 2

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 800), max_size=8), block=st.sampled_from([1.0, 2.5]))
    def test_restored_anywhere(self, seed: int, cuts: list[int], block: float) -> None:
        """However often and wherever it is stopped, the same shifts come at the same records, and the same bytes."""
        policy = DriftPolicy(block_seconds=block, delta=0.05, horizon=40)
        series, seconds = eventful(seed, 800)
        whole = SourceState(profile(6), policy)
        expected = feed(whole, series, seconds=seconds)

        state = SourceState(profile(6), policy)
        events: Events = []
        for start, end in zip(sorted([0, *cuts]), sorted([*cuts, 800]), strict=True):
            state = reopen(state, 6, policy)
            events += feed(state, series[start:end], first=start, seconds=seconds[start:end])

        assert expected == events
        assert whole.encode() == state.encode()

    def test_an_open_episode_stays_open(self) -> None:
        """What fires within the horizon of the last firing is the same episode, also if a restart came in between."""
        policy = DriftPolicy(block_seconds=1.0, horizon=80)
        series = 0.2 * white(0, 400, 4)
        for at in (40, 70, 130, 300):
            series[at:] += 3.0
        state = SourceState(profile(4), policy)
        events: Events = []
        for offset in range(len(series)):
            state = reopen(state, 4, policy)
            events += feed(state, series[offset : offset + 1], first=offset)

        assert [40, 300] == [shift.since_offset for _, shift in events]
        assert [40, 70, 130, 300] == [shift.since_offset for _, shift in watch(series, EACH_RECORD)]

    def test_deterministic(self) -> None:
        """Two runs over the same records give the same events and the same bytes."""
        series, seconds = eventful(3, 600)
        first, second = SourceState(profile(6), EACH_RECORD), SourceState(profile(6), EACH_RECORD)

        assert feed(first, series, seconds=seconds) == feed(second, series, seconds=seconds)
        assert first.encode() == second.encode()

    def test_bounded(self) -> None:
        """However long a source is heard, it remembers 64 to 127 blocks: for twenty signals 13 kB."""
        state = SourceState(profile(20), EACH_RECORD)
        sizes, blocks = [], []
        for index, observation in enumerate(white(0, 3 * MAX_BLOCKS, 20)):
            state.update(observation, seconds=1.0, offset=2**40 + index, time=1_800_000_000_000 + index)
            value = state.encode()
            sizes.append(len(value))
            blocks.append(len(msgspec.msgpack.decode(value)[FIELDS.index("block_offsets")]))

        half = MAX_BLOCKS // 2
        assert [*range(1, MAX_BLOCKS), *range(half, MAX_BLOCKS), *range(half, MAX_BLOCKS)] == blocks[
            : 2 * MAX_BLOCKS - 1
        ]
        assert max(sizes) < 13_000

    def test_a_restored_state_is_its_own(self) -> None:
        """What happens to a restored state does not reach the one it came from."""
        state = SourceState(profile(3), POLICY)
        feed(state, white(0, 55, 3))
        before = state.encode()

        feed(reopen(state, 3, POLICY), white(1, 55, 3), first=55)

        assert before == state.encode()


class TestDecode:
    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"\xc1",
            b"\x01",
            b"\x80",
            b"\x90",
            b"\x91\x02",
            b"garbage",
            b"\x92\x02\xa2\xff\xff",
            b"\x91" * 100_000,
        ],
    )
    def test_garbage(self, value: bytes) -> None:
        """What is no state stops the worker with a message, not with a traceback of the decoder."""
        with pytest.raises(Fatal, match="drift state"):
            SourceState.decode(value, profile(3), POLICY)

    @given(st.binary(max_size=60))
    def test_any_bytes(self, value: bytes) -> None:
        """No bytes at all raise anything but Fatal."""
        with pytest.raises(Fatal, match="drift state"):
            SourceState.decode(value, profile(3), POLICY)

    @given(st.data())
    def test_damaged(self, data: st.DataObject) -> None:
        """A state with a damaged byte is Fatal, of another model, or a state that takes in records."""
        value = bytearray(LIVED.encode())
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
        try:
            state = SourceState.decode(bytes(value), profile(3), POLICY)
        except Fatal:
            return
        if state is not None:
            with np.errstate(all="ignore"):  # its numbers may be anything
                feed(state, np.vstack((white(1, 150, 3), 5 + white(2, 150, 3))), first=100)
            state.encode()

    def test_cut_short(self) -> None:
        """A state of which the end is missing is Fatal at every length."""
        value = LIVED.encode()
        for length in range(len(value)):
            with pytest.raises(Fatal, match="drift state"):
                SourceState.decode(value[:length], profile(3), POLICY)

    def test_another_version(self) -> None:
        """A state of another version is Fatal, and the message names both."""
        saved = msgspec.msgpack.decode(LIVED.encode())
        saved[0] = 1

        with pytest.raises(Fatal, match=re.escape("version 1; this Earshot reads version 2")):
            SourceState.decode(msgspec.msgpack.encode(saved), profile(3), POLICY)

    @pytest.mark.parametrize(
        "field", ["sums", "counts", "block_offsets", "block_times", "block_means", "starts"], ids=str
    )
    @pytest.mark.parametrize("longer", [False, True])
    def test_arrays_of_another_length(self, field: str, longer: bool) -> None:  # noqa: FBT001  # pytest passes by name
        """An array that does not fit the others, or the signals, is Fatal when read, not an IndexError later."""
        saved = msgspec.msgpack.decode(LIVED.encode())
        array = saved[FIELDS.index(field)]
        one = 8 if isinstance(array, bytes) else 1
        saved[FIELDS.index(field)] = array + array[-one:] if longer else array[:-one]

        with pytest.raises(Fatal, match="3 signals"):
            SourceState.decode(msgspec.msgpack.encode(saved), profile(3), POLICY)

    @pytest.mark.parametrize(
        "damage",
        [
            {"baseline": 10**6},
            {"baseline": -1},
            {"next_block": 1},
            {"next_block": 2**64 - 1},
            {
                "block_offsets": [0] * MAX_BLOCKS,
                "block_times": [0] * MAX_BLOCKS,
                "block_means": bytes(12 * MAX_BLOCKS),
                "next_block": MAX_BLOCKS,
            },
        ],
        ids=["baseline to come", "baseline before all", "too few before", "too many to count", "too many"],
    )
    def test_blocks_that_cannot_be(self, damage: dict[str, Any]) -> None:
        """What no source could have seen is Fatal when read: later it would end the worker, and each one after it."""
        saved = msgspec.msgpack.decode(LIVED.encode())
        for field, value in damage.items():
            saved[FIELDS.index(field)] = value

        with pytest.raises(Fatal, match="block"):
            SourceState.decode(msgspec.msgpack.encode(saved), profile(3), POLICY)

    def test_suspect_that_is_not_watched(self) -> None:
        """A suspect beyond the signals is Fatal when read."""
        saved = msgspec.msgpack.decode(LIVED.encode())
        saved[FIELDS.index("suspects")] = {3: 1}

        with pytest.raises(Fatal, match="3 signals"):
            SourceState.decode(msgspec.msgpack.encode(saved), profile(3), POLICY)

    @pytest.mark.parametrize(
        ("other", "policy"),
        [
            (profile(4), POLICY),
            (ReferenceProfile((*profile(3).signals[:2], Signal("feature.f2", 0.0, 1.5))), POLICY),
            (ReferenceProfile(profile(3).signals[::-1]), POLICY),
            (profile(3), DriftPolicy(block_seconds=11.0)),
            (profile(3), DriftPolicy(delta=0.003)),
            (profile(3), DriftPolicy(quorum=2)),
            (profile(3), DriftPolicy(horizon=13)),
        ],
    )
    def test_another_model_or_policy(self, other: ReferenceProfile, policy: DriftPolicy) -> None:
        """A state made with another profile or policy is of no use, and says nothing worse than that."""
        assert SourceState.decode(LIVED.encode(), other, policy) is None


def lived() -> SourceState:
    state = SourceState(profile(3), POLICY)
    feed(state, white(0, 55, 3))
    return state


LIVED = lived()
"""A state that holds five blocks and half of the next."""


def eventful(seed: int, records: int) -> tuple[Vector, list[float]]:
    """A series with shifts, gaps and records of varying length, long enough to forget blocks.

    Of each pair of shifts the second comes while the episode of the first is still open.
    """
    rng = np.random.default_rng(seed)
    series = autocorrelated(seed, records, 6)
    for at in [*range(100, records, 200), *range(140, records, 200)]:
        series[at:, rng.permutation(6)[:4]] += rng.choice([-4.0, 4.0])
    series[rng.random(series.shape) < 0.02] = np.nan
    series[rng.random(series.shape) < 0.002] = np.inf
    return series, rng.choice([0.5, 1.0, 3.0], size=records).tolist()


def blocks_of(series: Vector, seconds: Sequence[float], block_seconds: float) -> tuple[list[int], Vector]:
    """The first record of each block, also of the one after the last, and the mean of each."""
    starts, means = [0], []
    for end in range(1, len(series) + 1):
        if sum(seconds[starts[-1] : end]) >= block_seconds:
            means.append(sum(series[starts[-1] : end]) / (end - starts[-1]))
            starts.append(end)
    return starts, np.array(means)


def residue(means: Vector) -> float:
    return float(sum(np.sum((column - average(column)) ** 2, where=np.isfinite(column)) for column in means.T))


def average(column: NDArray[np.float64]) -> float:
    known = column[np.isfinite(column)]
    return float(known.mean()) if known.size else 0.0
