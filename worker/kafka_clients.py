"""A producer and a consumer: what the client's own do not do by themselves, or do slowly.

It owns how messages go into batches and what becomes of them, how a transaction is ended that was left open, and
where a consumer begins, what it asks for ahead and how it joins its group. It knows nothing of how a cluster is
reached, of sessions, or of audio.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from kafka import ConsumerRebalanceListener, KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka import errors as kafka_errors
from kafka.producer.producer_batch import ProducerBatch
from kafka.record.memory_records import MemoryRecordsBuilder

from worker.errors import Fatal
from worker.messages import Message, Record

# Seconds. Each bound says which failure it ends.
REQUEST_TIMEOUT: Final = 10.0  # a broker that takes a request and never answers it
DELIVERY_TIMEOUT: Final = 15.0  # records that a partition's leader does not take
CLOSE_TIMEOUT: Final = 2.0  # a farewell that nobody answers
TRANSACTION_TIMEOUT: Final = 30.0  # a session that was killed: what it left open holds up every reader of committed;
# and one that hangs, for what it does in a transaction later than that the cluster has aborted

# What a session has to know of the client by name.
Partition: Final = TopicPartition
RebalanceListener: Final = ConsumerRebalanceListener
NoOffset: Final = kafka_errors.NoOffsetForPartitionError
OffsetOutOfRange: Final = kafka_errors.OffsetOutOfRangeError


class Written:
    """A message that was handed to the client, and the batch it is in: where, and what will be its result.

    It stands for the client's own future of a record.
    """

    __slots__ = ("_future", "_index", "message")

    def __init__(self, message: Message, future: Any, index: int) -> None:
        self.message = message
        self._future = future
        self._index = index

    def rebind(self, future: Any, index: int) -> None:
        """Be in another batch: the client calls it when it divides the one that this is in."""
        former, self._future, self._index = self._future, future, index
        former._latch.set()  # noqa: SLF001 - it is never done; whoever waits for it has to wait for the new one

    def wait(self, deadline: float) -> None:
        """Return when the message is written, or raise why it was not."""
        while not self._future.is_done:  # one that waits may have been woken by `rebind`, which is no end
            left = deadline - time.monotonic()
            if left <= 0 or not self._future.wait(left):
                raise kafka_errors.KafkaTimeoutError(
                    f"a record for {self.message.topic!r} was not taken within {DELIVERY_TIMEOUT:.0f} s"
                )
        _, _, why = self._future.value
        if why is not None:
            self._raise(why(self._index))

    def _raise(self, error: Exception) -> None:
        if isinstance(error, (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)):
            size = len(self.message.value or b"") + len(self.message.key or b"")
            raise Fatal(
                f"a record of {size} bytes is too large for topic {self.message.topic!r}: "
                "raise its max.message.bytes, or send shorter chunks"
            ) from error
        raise error


class Producer(KafkaProducer):  # type: ignore[misc]  # the client ships no types
    """A producer of messages that can be closed.

    The client's own flush raises at its timeout, and close then leaves its thread.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._epochs: dict[Any, int | None] = {}

    def flush(self, timeout: float | None = None) -> None:
        """Wait at most ``timeout`` seconds for each batch; what was not delivered says so in its result.

        The client calls it when it closes, and takes a batch that was divided meanwhile for an unknown error.
        """
        with contextlib.suppress(kafka_errors.KafkaTimeoutError, kafka_errors.UnknownError):
            super().flush(timeout)

    def write(self, messages: Iterable[Message]) -> list[Written]:
        """Take messages, and send them in the background; of each partition in the order in which they come.

        The client takes one message at a time, asks of each all that it has asked of the last one, and has a result
        for each that calls back. Here those of a partition are put into its batches at once: a fifth of the time.
        """
        groups: dict[Any, list[Message]] = {}
        places: dict[tuple[str, int | None, bytes | None], Any] = {}
        for message in messages:
            target = message.topic, message.partition, message.key
            if target not in places:
                places[target] = self._place(*target)
            groups.setdefault(places[target], []).append(message)
        written: list[Written] = []
        for place, group in groups.items():
            if self._transaction_manager.is_transactional():
                self._transaction_manager.maybe_add_partition_to_transaction(place)
            for batch in self._batches(place, group):
                self._enqueue(batch)
                written += batch._record_futures  # noqa: SLF001 - they are ours, see `_batches`
        self._sender.wakeup()
        return written

    def deliver(self, written: Iterable[Written]) -> None:
        """Wait until every message is written, or raise why one was not."""
        deadline = time.monotonic() + DELIVERY_TIMEOUT
        self._accumulator.begin_flush()
        try:
            self._sender.wakeup()
            for each in written:
                each.wait(deadline)
        finally:
            self._accumulator._flushes_in_progress.decrement()  # noqa: SLF001 - so does the client, which waits itself

    def _place(self, topic: str, partition: int | None, key: bytes | None) -> Any:
        """Return the partition that is meant, or the one that the key belongs to."""
        self._wait_on_metadata(topic, self.config["max_block_ms"])
        return Partition(topic, self._partition(topic, partition, key, None, key, None))

    def _batches(self, place: Any, messages: Iterable[Message]) -> Iterator[ProducerBatch]:
        """Put messages for one partition into as many batches as they need."""
        batch = self._batch(place)
        for message in messages:
            content = message.timestamp, message.key, message.value, message.headers
            taken = batch.records.append(*content)
            if taken is None:  # it is full
                yield batch
                batch = self._batch(place)
                taken = batch.records.append(*content)
            self._ensure_valid_record_size(taken.size)
            # What the client moves to another batch, if a topic does not take this one and it has to be divided.
            batch._record_futures.append(Written(message, batch.produce_future, taken.offset))  # noqa: SLF001
        yield batch

    def _batch(self, place: Any) -> ProducerBatch:
        config = self._accumulator.config
        records = MemoryRecordsBuilder(config["message_version"], config["compression_attrs"], config["batch_size"])
        return ProducerBatch(place, records)

    def _enqueue(self, batch: ProducerBatch) -> None:
        """Hand a batch to the thread that sends."""
        accumulator, place = self._accumulator, batch.topic_partition
        with accumulator._tp_lock(place):  # noqa: SLF001 - there is no other way in
            if accumulator._closed:  # noqa: SLF001 - after this it takes no more
                raise kafka_errors.IllegalStateError("the producer is closed")
            accumulator._batches[place].append(batch)  # noqa: SLF001
            accumulator._incomplete.add(batch)  # noqa: SLF001

    def send_offsets_to_transaction(self, offsets: Any, group_metadata: Any) -> None:
        """Add offsets to the transaction, in a time that is bounded: the client itself waits for ever."""
        self._finish(self._transaction_manager.send_offsets_to_transaction(offsets, group_metadata))

    def commit_transaction(self) -> None:
        """Commit, in a time that is bounded."""
        self._finish(self._transaction_manager.begin_commit())

    def abort_transaction(self) -> None:
        """Abort, in a time that is bounded."""
        self._finish(self._transaction_manager.begin_abort())

    def _finish(self, result: Any) -> None:
        self._sender.wakeup()
        if not result.wait(ms(TRANSACTION_TIMEOUT)):
            raise kafka_errors.KafkaTimeoutError(f"a transaction has not gone on for {TRANSACTION_TIMEOUT:.0f} s")

    def send_offsets(self, topic: str, offsets: Mapping[int, int], member: Any) -> None:
        """Send, for each partition of ``topic``, the next offset that the group of ``member`` has to read."""
        self.send_offsets_to_transaction(
            {Partition(topic, partition): OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()},
            member,
        )

    @property
    def id(self) -> int:
        """The number under which the cluster knows this producer and those before it of its transactional id."""
        number: int = self._transaction_manager.producer_id_and_epoch.producer_id
        return number

    def settle(self, partitions: Iterable[Any], group: str, *, commit: bool) -> None:
        """End what the producer before has left open in ``partitions`` and in the offsets of ``group``.

        The cluster holds its last transaction for complete by now. But a broker that sees a partition
        without a leader may pass over the marker that ends the transaction there (KAFKA-20734, Apache
        Kafka 4.1 to 4.3), and then it stays open for ever, for readers of committed records and for the
        offsets. The marker of an empty transaction ends it as well, so this one has to end as that one did.
        """
        self.begin_transaction()
        for partition in partitions:
            self._transaction_manager.maybe_add_partition_to_transaction(partition)
        self.send_offsets_to_transaction({}, group)  # comes back when the partitions are added, too
        if commit:
            self.commit_transaction()
        else:
            self.abort_transaction()

    def moved(self) -> bool:
        """Return whether a partition that is written to has another leader than when this was last asked."""
        known = self._metadata
        epochs = {
            each: known.leader_epoch_for_partition(each)
            for topic in known.topics()
            for each in (Partition(topic, number) for number in known.partitions_for_topic(topic) or ())
        }
        moved = any(self._epochs.get(each, epoch) != epoch for each, epoch in epochs.items())
        self._epochs |= epochs
        return moved

    def end(self) -> None:
        """Close within `CLOSE_TIMEOUT`."""
        self.close(timeout=CLOSE_TIMEOUT)


class Consumer(KafkaConsumer):  # type: ignore[misc]  # the client ships no types
    """A consumer of records."""

    def start(self, partitions: Sequence[Any], *, from_beginning: bool = True) -> None:
        """Read these partitions from one end of their logs, or the other."""
        self.assign(partitions)
        seek = self.seek_to_beginning if from_beginning else self.seek_to_end
        seek(*partitions)

    def locate(self, partitions: Iterable[Any]) -> None:
        """Wait until the client knows the offset of each partition, which it looks for only when it needs it."""
        for partition in partitions:
            if self.position(partition, timeout_ms=ms(REQUEST_TIMEOUT)) is None:
                raise kafka_errors.KafkaTimeoutError(f"no offset of {partition} within {REQUEST_TIMEOUT:.0f} s")

    def records(self, timeout: float, max_records: int | None = None) -> list[Record]:
        """Poll for at most ``timeout`` seconds, and on a backlog ask for what comes next.

        It comes while this is worked on. The client asks by the same rule, that no partition of the last fetch is left
        untouched, but only when it is polled, and then waits. Of records that trickle in nothing is asked ahead: the
        first of them would be brought alone, the rest only after it, and what else that broker is asked would wait
        behind the question.
        """
        polled = self.poll(timeout_ms=ms(timeout), max_records=max_records)
        if self.is_behind(polled) and not self._fetcher._completed_fetches:  # noqa: SLF001 - there is no other way in
            self._fetcher.send_fetches()
        return [
            Record(
                each.topic,
                each.partition,
                each.offset,
                each.timestamp,
                each.key,
                each.value,
                tuple((name, value or b"") for name, value in each.headers),
            )
            for records in polled.values()
            for each in records
        ]

    def is_behind(self, partitions: Iterable[Any]) -> bool:
        """Return whether one of these has more to read than was polled, as far as the last fetch has told.

        The position counts, and not the last record: it has passed the marker that ends a transaction.
        """
        places = (self._subscription.assignment.get(each) for each in partitions)
        return any(place and place.position and place.position.offset < (place.highwater or 0) for place in places)

    def resume_joining(self) -> None:
        """See a rebalance through that was under way when the last poll ended.

        The client forgets about it if its reason has gone by then, as when topics have changed and are
        known now: it would send no heartbeat any more and wait to be shown out. And it takes no notice
        of a join that came to its end between two polls, but begins another, which costs all others
        one too: members that are busy between their polls would keep each other from ever serving.
        """
        coordinator = self._coordinator
        if coordinator.rejoining:
            coordinator.request_rejoin()
            if coordinator._join_task is not None:  # noqa: SLF001 - nothing else keeps it
                coordinator._join_task = _Kept(coordinator._join_task)  # noqa: SLF001

    def has_joined(self) -> bool:
        """Return whether the group has told what is ours, as far as is known."""
        return self.group_metadata().generation_id > 0 and not self.rebalances()

    def rejoin(self) -> None:
        """Have the next poll join the group anew."""
        self._coordinator.request_rejoin()

    def rebalances(self) -> bool:
        """Return whether the next poll will join the group anew, as far as is known."""
        return bool(self._coordinator.rejoining or self._coordinator.need_rejoin())

    def unplaced(self) -> frozenset[int]:
        """Return the partitions that are ours, and of which it is not known yet where to go on from."""
        placed = self._subscription.has_valid_position
        return frozenset(each.partition for each in self.assignment() if not placed(each))

    def end(self) -> None:
        """Close within `CLOSE_TIMEOUT`, and commit nothing."""
        self.close(autocommit=False, timeout_ms=ms(CLOSE_TIMEOUT))


class _Kept:
    """A join under way that is waited for even if it has ended: the client looks at ``is_done`` before it does so."""

    is_done: Final = False

    def __init__(self, join: Any) -> None:
        self.add_callback = join.add_callback
        self.add_errback = join.add_errback


def ms(seconds: float) -> int:
    """Return seconds as the client wants them."""
    return round(seconds * 1000)
