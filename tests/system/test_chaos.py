"""The chaos test in short, and the test of the test: its oracle must see what it is there to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests import apache_kafka
from tests.apache_kafka import ApacheKafka
from tests.conftest import missing
from tests.system import chaos, oracle
from tests.system.oracle import PLAIN, WRITTEN
from worker.errors import BadRecord
from worker.messages import Record, rejection_message

SHORT = chaos.Plan(records=600, kills=6, broker_restarts=1)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_nothing_is_lost_doubled_or_differing(machine_bundle: Path, tmp_path: Path) -> None:
    """Workers and the broker are killed and started again, and what they have committed shows no trace of it."""
    try:
        jars = apache_kafka.fetch()
    except apache_kafka.Unavailable as why:
        missing(str(why))
    clips = chaos.recordings(tmp_path, needed=SHORT.records // 5)
    with ApacheKafka(jars, tmp_path) as kafka:
        outcome = chaos.chaos(kafka, machine_bundle, clips, SHORT, tmp_path)
    chaos.report(outcome)
    assert [] == outcome.verdict.mismatches
    assert outcome.verdict.flawless


# -- the oracle ----------------------------------------------------------------------------------


def event(topic: str, place: int, *, key: bytes = b"mic-1", what: str = "", value: bytes = b"said") -> Record:
    """One of the worker's results about the record of partition 2 at ``place``."""
    headers = (("ce_id", f"hash/audio.in/2/{place}{what}".encode()), ("ce_type", b"a type"))
    return Record(topic, 0, place, 1_000 + place, key, value, headers)


def rejection(place: int) -> Record:
    heard = Record(PLAIN.audio_in, 2, place, 1_000 + place, b"mic-1", b"poison", (("content-type", b"audio/wav"),))
    message = rejection_message(PLAIN, heard, BadRecord("undecodable", "it is poison"))
    return Record(message.topic, 0, place, 1_000 + place, message.key, message.value, message.headers)


def state(place: int, value: bytes | None, key: bytes = b"mic-1") -> Record:
    return Record(PLAIN.drift_state, 2, place, 5_000 + place, key, value)


def a_run() -> dict[str, list[Record]]:
    """What a run over ten records of two sources might have written."""
    keys = (b"mic-1", b"mic-2")
    predictions = [event(PLAIN.predictions_out, place, key=keys[place % 2]) for place in range(8)]
    drifts = [event(PLAIN.drift_events, 5, what=what) for what in ("/drift", "/retrain")]
    states = [state(0, b"old"), state(1, b"new"), state(2, b"new", b"mic-2"), state(3, None, b"silent")]
    return dict(zip(WRITTEN, (predictions, [rejection(8), rejection(9)], drifts, states), strict=True))


def counts(actual: dict[str, list[Record]]) -> tuple[int, int, int]:
    verdict = oracle.compare(a_run(), actual)
    assert verdict.flawless is (verdict.mismatches == [])
    return verdict.lost, verdict.doubled, verdict.differing


def test_equal_runs_are_equal() -> None:
    """What a comparison must not see: other places in the output, sources side by side, superseded states."""
    actual = a_run()
    moved = [replace(each, offset=each.offset + 3) for each in actual[PLAIN.predictions_out]]
    actual[PLAIN.predictions_out] = moved[0::2] + moved[1::2]
    actual[PLAIN.drift_state] = [state(7, b"another"), *actual[PLAIN.drift_state][1:3]]
    assert (0, 0, 0) == counts(actual)


@pytest.mark.parametrize("topic", WRITTEN)
def test_sees_what_is_lost(topic: str) -> None:
    """One record less, on whichever topic, is one lost."""
    actual = a_run()
    del actual[topic][2 if topic == PLAIN.drift_state else 0]
    assert (1, 0, 0) == counts(actual)


@pytest.mark.parametrize("topic", WRITTEN[:3])
@pytest.mark.parametrize("times", [1, 2])
def test_sees_what_is_doubled(topic: str, times: int) -> None:
    """Each time that a record is there once more counts, wherever it stands, and as nothing else."""
    actual = a_run()
    actual[topic] += actual[topic][:1] * times
    assert (0, times, 0) == counts(actual)


CHANGES: Sequence[Callable[[Record], Record]] = (
    lambda record: replace(record, key=b"another"),
    lambda record: replace(record, value=(record.value or b"") + b" "),
    lambda record: replace(record, value=None),
    lambda record: replace(record, timestamp=record.timestamp + 1),
    lambda record: replace(record, headers=(*record.headers, ("more", b""))),
    lambda record: replace(record, headers=tuple(reversed(record.headers))),
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("topic", WRITTEN[:3])
def test_sees_what_differs(topic: str, change: Callable[[Record], Record]) -> None:
    """Another key, value, header or timestamp is one that differs."""
    actual = a_run()
    actual[topic][1] = change(actual[topic][1])
    assert (0, 0, 1) == counts(actual)


def test_sees_a_state_that_differs() -> None:
    """A detector that has counted something else differs, although nothing has come of it yet."""
    actual = a_run()
    actual[PLAIN.drift_state][1] = state(1, b"ahead")
    assert (0, 0, 1) == counts(actual)


def test_sees_a_record_that_nobody_expects() -> None:
    """A result, or a state of a source, that the undisturbed run does not have differs from it."""
    actual = a_run()
    actual[PLAIN.drift_events].append(event(PLAIN.drift_events, 6, what="/drift"))
    actual[PLAIN.drift_state].append(state(9, b"resurrected", b"silent"))
    assert (0, 0, 2) == counts(actual)


def test_sees_what_is_out_of_order() -> None:
    """Two results of one source that have changed places are two that differ."""
    actual = a_run()
    records = actual[PLAIN.predictions_out]
    records[2], records[4] = records[4], records[2]
    assert (0, 0, 2) == counts(actual)


def test_only_the_prefix_of_the_topics_is_left_out_of_account() -> None:
    """Runs under two prefixes compare equal, in their headers and values, and audio is left as it is."""
    there = Record(
        "storm.predictions.out",
        *(0, 0, 0, b"mic-1", b'{"topic":"storm.audio.in"}'),
        (("ce_id", b"hash/storm.audio.in/2/0"),),
    )
    here = oracle.without("storm.", there)
    assert ("predictions.out", b'{"topic":"audio.in"}') == (here.topic, here.value)
    assert (("ce_id", b"hash/audio.in/2/0"),) == here.headers
    sound = replace(there, topic="storm.audio.dlq")
    assert sound.value == oracle.without("storm.", sound).value
