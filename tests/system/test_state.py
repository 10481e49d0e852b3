"""drift.state in operation: what cannot be read, the documented way out, and sources that are forgotten."""

from __future__ import annotations

import uuid
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.system.processes import run, wait_for, worker
from worker.broker import Broker
from worker.broker_kafka import KafkaBroker
from worker.broker_sqlite import SqliteBroker
from worker.messages import Message, Topics

PCM = (("content-type", b"audio/pcm;rate=16000;format=s16le"),)
NOISE = (1000 * np.random.default_rng(0).standard_normal(16_000)).astype("<i2").tobytes()


@pytest.fixture(params=["sqlite", "kafka"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'earshot.db'}"
    return f"kafka://{request.getfixturevalue('kafka_address')}"


def connect(url: str, topics: Topics) -> Broker:
    scheme, _, rest = url.partition("://")
    return KafkaBroker([rest], topics) if scheme == "kafka" else SqliteBroker(Path(rest[1:]), topics)


def saved(broker: Broker, topics: Topics) -> dict[bytes | None, bytes]:
    """Return what drift.state says of each key that it has not been told to forget."""
    latest = {record.key: record.value for records in broker.read([topics.drift_state]) for record in records}
    return {key: value for key, value in latest.items() if value is not None}


def test_an_unreadable_state_has_a_way_out(url: str, machine_bundle: Path, tmp_path: Path) -> None:
    """The worker stops and names --reset-state; with it, that source starts anew, once and for all.

    Meanwhile more sources are heard than are remembered: the earliest get a tombstone.
    """
    topics = Topics(f"{uuid.uuid4()}.")
    at = ("--model", machine_bundle, "--broker", url, "--topic-prefix", topics.prefix, "--max-sources", "2")
    run("earshot-worker", "topics", "--partitions", "1", *at[2:6])
    with closing(connect(url, topics)) as broker:
        broker.publish([Message(topics.drift_state, b"mic-0", b"of another time", partition=0)])

        with worker(tmp_path / "refuses.log", *at) as refuses:
            assert 1 == refuses.process.wait(60)
        told = (tmp_path / "refuses.log").read_text()
        assert f"the state of source b'mic-0' in partition 0 of {topics.drift_state}: drift state of 15 bytes" in told
        assert "`earshot-worker run --reset-state` starts the detectors of such sources anew" in told
        assert {b"mic-0": b"of another time"} == saved(broker, topics)

        broker.publish(Message(topics.audio_in, b"mic-%d" % number, NOISE, PCM) for number in (1, 2, 3, 4))
        with worker(tmp_path / "resets.log", *at, "--reset-state") as resets:
            wait_for(lambda: {b"mic-3", b"mic-4"} == saved(broker, topics).keys(), "the last two sources")
            assert 0 == resets.stop()
        assert [1] == [entry["sources"] for entry in resets.events("state.reset")]
        assert 2 == sum(entry["sources"] for entry in resets.events("sources.forgotten"))

        with worker(tmp_path / "goes-on.log", *at) as goes_on:
            (assigned,) = wait_for(lambda: goes_on.events("assigned"), "its partition")
            assert 2 == assigned["sources"]
            assert 0 == goes_on.stop()
