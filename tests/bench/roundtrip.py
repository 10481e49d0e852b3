"""One chunk there and back: published, read, answered, and the answer committed together with the offset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Final

from kafka import KafkaConsumer, KafkaProducer

from tests import apache_kafka
from tests.apache_kafka import ApacheKafka
from tests.bench import floor, streams
from tests.bench.measure import Row, Task, by_turns
from worker.broker import Broker, Session
from worker.broker_kafka import KafkaBroker
from worker.broker_sqlite import SqliteBroker
from worker.messages import Message, Topics

ANSWER: Final = b"x" * floor.ANSWER_BYTES
TOPICS: Final = Topics()
POLL_SECONDS: Final = 1.0


def on_brokers(work: Path, chunk: bytes) -> Iterator[Row]:
    """Yield what a round trip takes on each broker, and with kafka-python as it comes; nothing is computed.

    CPU time is of the whole process, in which the threads of the other clients are never quite idle.
    """
    (work / "broker").mkdir()
    with (
        ApacheKafka(apache_kafka.fetch(), work / "broker") as kafka,
        closing(KafkaBroker([kafka.address], TOPICS)) as cluster,
        closing(SqliteBroker(work / "broker.db", TOPICS)) as file,
    ):
        streams.create(kafka.address, ["chunks", "answers"], partitions=1)
        consumer, producer = floor.clients(kafka.address, "chunks", "answers")
        publisher = KafkaProducer(bootstrap_servers=kafka.address)
        for broker in (cluster, file):
            broker.create_topics(TOPICS.layout(1))
        with (
            closing(consumer),
            closing(producer),
            closing(publisher),
            closing(cluster.join("round-trips", "bench")) as in_cluster,
            closing(file.join("round-trips", "bench")) as in_file,
        ):
            contestants: dict[str, Task] = {
                "Apache Kafka, kafka-python as it comes": partial(_by_hand, chunk, publisher, consumer, producer),
                "Apache Kafka, Earshot": partial(_round_trip, chunk, cluster, in_cluster),
                "SQLite, Earshot": partial(_round_trip, chunk, file, in_file),
            }
            yield from by_turns("broker round trip, one chunk", contestants, items=1, seconds=20, waiting=True)


def _round_trip(chunk: bytes, broker: Broker, session: Session) -> None:
    broker.publish([Message(TOPICS.audio_in, b"mic-1", chunk, partition=0)])
    while not (records := session.poll(POLL_SECONDS, 1).records):
        pass
    (record,) = records
    with session.transaction() as transaction:
        transaction.send([Message(TOPICS.predictions_out, record.key, ANSWER, partition=record.partition)])
        transaction.commit_offsets({record.partition: record.offset + 1})


def _by_hand(chunk: bytes, publisher: KafkaProducer, consumer: KafkaConsumer, producer: KafkaProducer) -> None:
    publisher.send("chunks", chunk, b"mic-1", partition=0).get()
    while not (polled := consumer.poll(timeout_ms=1000 * POLL_SECONDS, max_records=1)):
        pass
    floor.answer_all(polled, ANSWER, "answers", consumer, producer)
