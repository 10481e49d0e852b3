"""The command line of the worker, where everything is put together; nothing else builds a part."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Final

from msgspec import structs

from worker import telemetry
from worker.arguments import SETTINGS, parser
from worker.broker import Broker
from worker.config import Config, resolve
from worker.errors import BadModel, Fatal, Retryable
from worker.messages import Topics, asyncapi

EXIT_OK: Final = 0
EXIT_FATAL: Final = 1
EXIT_USAGE: Final = 2  # argparse's own
EXIT_BAD_MODEL: Final = 3
EXIT_GAVE_UP: Final = 4
EXIT_KILLED: Final = 130

SERVER: Final = re.compile(r"(\[[\da-fA-F:.]+\]|[\w.-]+):(?P<port>\d{1,5})")
"""One server of a Kafka URL: a name or an address, in brackets if it is one of IPv6, and a port."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that its encoding lacks must not end a command
        sys.stdout.reconfigure(errors="replace")
    own = vars(parser().parse_args(argv))
    command = COMMANDS[own.pop("command")]
    settings = {name: own.pop(name) for name in SETTINGS if name in own}
    return _status(lambda: command(resolve(settings, os.environ), own))


def _status(command: Callable[[], int]) -> int:
    """Return the exit status of a command, also where it is that of an error, which is told."""
    try:
        status = command()
        sys.stdout.flush()  # here, where a reader that has gone is no surprise
    except (BadModel, Fatal, Retryable) as error:
        print(f"earshot-worker: {error}", file=sys.stderr)
        return {BadModel: EXIT_BAD_MODEL, Fatal: EXIT_FATAL}.get(type(error), EXIT_GAVE_UP)
    except BrokenPipeError:
        _silence()  # the reader has gone (`| head`)
        return EXIT_OK
    except OSError as error:  # what a disk or its permissions may raise, of which standard output may be full as well
        _silence()
        print(f"earshot-worker: {error}", file=sys.stderr)
        return EXIT_FATAL
    except KeyboardInterrupt:
        return EXIT_KILLED
    return status


def _silence() -> None:
    """Write nothing more to standard output, not even in the interpreter's last flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(config: Config, _: dict[str, Any]) -> int:
    stop = _stop_on_signals()  # before the imports, which take a second or two
    if not config.model:
        raise Fatal("no model is given: --model FOLDER, a bundle written by `earshot-trainer fit`")
    log = telemetry.configure(config.log_format, config.log_level)
    if config.processes == 1:
        return _serve(config, stop, log)
    from worker.supervisor import supervise

    members = {
        each.instance: partial(_status, partial(_serve, each, stop, log.bind(member=each.instance)))
        for each in _members(config)
    }
    return supervise(members, stop, log)


def _members(config: Config) -> list[Config]:
    """Return the settings of each of ``config.processes`` members: names and ports of their own."""
    if config.broker.startswith("sqlite:"):
        raise Fatal(
            f"--processes is {config.processes}, but the embedded broker serves one member of a group at a time, and"
            " all others would only wait: leave --processes at 1, or use Kafka (--broker kafka://host:port)"
        )
    ports: Sequence[int | None] = [config.health_port] * config.processes
    if config.health_port:
        ports = range(config.health_port, config.health_port + config.processes)
        if ports[-1] > 65535:
            raise Fatal(f"--health-port {config.health_port} leaves no port for each of {config.processes} processes")
    return [
        structs.replace(config, processes=1, instance=f"{config.instance}-{number}", health_port=port)
        for number, port in enumerate(ports)
    ]


def _serve(config: Config, stop: Event, log: telemetry.Log) -> int:
    from worker.audio import Limits
    from worker.bundle import load
    from worker.drift import DriftPolicy
    from worker.health import STUCK, Pulse, endpoint
    from worker.memory import keep_memory_small
    from worker.pipeline import Pipeline
    from worker.service import Service
    from worker.states import Retention

    keep_memory_small()
    bundle = load(Path(config.model))
    topics = Topics(config.topic_prefix)
    pipeline = Pipeline(
        bundle,
        topics,
        Limits(
            max_bytes=config.max_record_bytes,
            max_seconds=config.max_record_seconds,
            min_seconds=_min_seconds(config, bundle.featurizer.spec.shortest_seconds),
        ),
        DriftPolicy(block_seconds=config.drift_block_seconds, delta=config.drift_delta, quorum=config.drift_quorum),
        Retention(max_sources=config.max_sources, forget_after=config.forget_after),
        reset_state=config.reset_state,
    )
    pulse = Pulse(stuck_after=STUCK + config.poll_seconds)
    with ExitStack() as stack:
        if config.health_port is not None:
            port = stack.enter_context(endpoint(pulse, config.health_host, config.health_port))
            log.info("health", host=config.health_host, port=port)
        broker = stack.enter_context(closing(_broker(config, topics, log)))
        log.info("started", model=bundle.id.name, version=bundle.id.version, hash=bundle.id.hash, broker=config.broker)
        Service(
            broker,
            pipeline,
            group=config.group,
            instance=config.instance,
            max_batch_records=config.max_batch_records,
            max_batch_bytes=config.max_batch_bytes,
            poll_seconds=config.poll_seconds,
            give_up_seconds=config.give_up_seconds,
            stop=stop,
            pulse=pulse,
            log=log,
        ).run()
    return EXIT_OK


def _min_seconds(config: Config, half_a_window: float) -> float:
    """Return how short a record may be, for a model of such windows."""
    shortest, origin = half_a_window, "half of the model's window"
    if config.min_record_seconds is not None:
        shortest, origin = config.min_record_seconds, "--min-record-seconds"
    if shortest > config.max_record_seconds:
        raise Fatal(
            f"every record would be rejected: it may have {config.max_record_seconds:g} s (--max-record-seconds) and"
            f" needs {shortest:g} s ({origin}); raise --max-record-seconds, or lower --min-record-seconds"
        )
    return shortest


def _topics(config: Config, own: dict[str, Any]) -> int:
    topics = Topics(config.topic_prefix)
    specs = topics.layout(own["partitions"])
    with closing(_broker(config, topics)) as broker:
        created = set(broker.create_topics(specs))
    width = max(len(spec.name) for spec in specs)
    for spec in specs:
        kind = "compacted" if spec.compacted else "plain"
        news = "created" if spec.name in created else "already there"
        print(f"{spec.name:{width}}  {spec.partitions:3} partitions  {kind:9}  {news}")
    return EXIT_OK


def _play(config: Config, own: dict[str, Any]) -> int:
    stop = _stop_on_signals()
    from worker import play

    topics = Topics(config.topic_prefix)
    try:
        degradations = [play.parse_degradation(text) for text in own["degrade"]]
    except ValueError as error:
        raise Fatal(f"--degrade: {error}") from error
    chunks = play.chunks(
        _sound_files(own["files"]),
        topic=topics.audio_in,
        source=own["source"],
        chunk_seconds=own["chunk"],
        start_time=own["start"] or datetime.now(UTC),
        degradations=degradations,
        shuffle_seed=own["shuffle"],
    )
    with closing(_broker(config, topics)) as broker, _counter("chunks played") as count:
        sent = play.play(
            broker,
            chunks,
            speed=own["speed"],
            chunk_seconds=own["chunk"],
            stop=stop,
            on_sent=count,
            clock=time.monotonic,
            sleep=stop.wait,
        )
    print(f"{sent} chunks of {own['source']} sent to {topics.audio_in}")
    return EXIT_OK


def _sound_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files, and for a folder what lies in it and has the name of a sound."""
    import soundfile

    endings = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"}
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings) if path.is_dir() else [path]
        if not inside:
            raise Fatal(f"{path} is a folder without any sound file")
        found += inside
    return found


@contextmanager
def _counter(what: str) -> Iterator[Callable[[int], None]]:
    """Show a running count on standard error, if somebody is looking at it."""
    from rich.console import Console

    console = Console(stderr=True)
    total = 0
    with console.status(what) if console.is_terminal else nullcontext() as status:

        def count(more: int) -> None:
            nonlocal total
            total += more
            if status is not None:
                status.update(f"{total} {what}")

        yield count


def _watch(config: Config, own: dict[str, Any]) -> int:
    stop = _stop_on_signals()
    from rich.console import Console

    from worker.watch import Style, watch

    topics = Topics(config.topic_prefix)
    console = Console()
    style: Style = "json" if own["json"] else "live" if console.is_terminal else "plain"
    with closing(_broker(config, topics)) as broker:
        watch(
            broker,
            topics,
            style=style,
            from_beginning=own["from_beginning"],
            count=own["count"],
            console=console,
            stop=stop,
        )
    return EXIT_OK


def _dlq_list(config: Config, own: dict[str, Any]) -> int:
    from worker import dlq

    topics = Topics(config.topic_prefix)
    selection = dlq.Selection(own["reason"], own["source"])
    with closing(_broker(config, topics)) as broker:
        letters = (letter for batch in dlq.letters(broker, topics, selection) for letter in batch)
        if selection == dlq.Selection() and not own["json"]:
            print(*dlq.table(letters), sep="\n")
            return EXIT_OK
        for letter in letters:
            print(dlq.json_line(letter) if own["json"] else dlq.line(letter))
    return EXIT_OK


def _dlq_replay(config: Config, own: dict[str, Any]) -> int:
    stop = _stop_on_signals()
    from worker import dlq

    topics = Topics(config.topic_prefix)
    selection = dlq.Selection(own["reason"], own["source"])
    tally = dlq.Tally()
    try:
        with closing(_broker(config, topics)) as broker:
            dlq.replay(broker, topics, selection, tally, again=own["again"], dry_run=own["dry_run"], stop=stop)
    finally:  # what was committed is so, whatever happened then
        for line in dlq.report(tally, topics, dry_run=own["dry_run"]):
            print(line)
    return EXIT_OK


def _asyncapi(config: Config, _: dict[str, Any]) -> int:
    print(json.dumps(asyncapi(Topics(config.topic_prefix)), indent=2))
    return EXIT_OK


def _broker(config: Config, topics: Topics, log: telemetry.Log | None = None) -> Broker:
    """Open the broker that the settings name; ``log`` hears of lost offsets, if they do not end the worker."""
    url = config.broker
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "kafka" and rest:
        from worker.broker_kafka import KafkaBroker
        from worker.security import security

        servers = rest.rstrip("/").split(",")
        for server in servers:
            address = SERVER.fullmatch(server)
            if address is None or not 0 < int(address["port"]) < 2**16:
                raise Fatal(f"--broker is {url!r}; {server!r} is not host:port, with a port from 1 to 65535")
        if log is None or config.on_lost_offset == "stop":
            return KafkaBroker(servers, topics, security(config))
        warn = log.warning
        return KafkaBroker(
            servers, topics, security(config), on_lost_offset=lambda lost: warn("offset.lost", **lost._asdict())
        )
    if separator and scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        from worker.broker_sqlite import SqliteBroker

        return SqliteBroker(Path(rest[1:]), topics)
    raise Fatal(
        f"--broker is {url!r}; expected kafka://host:port[,host:port], sqlite:///relative/file or sqlite:////absolute/file"
    )


def _stop_on_signals() -> Event:
    """Return an event that SIGTERM or SIGINT sets; a second signal ends the process at once."""
    stop = Event()

    def on_signal(_number: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(EXIT_KILLED)
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return stop


COMMANDS: Final[dict[str, Callable[[Config, dict[str, Any]], int]]] = {
    "run": _run,
    "play": _play,
    "watch": _watch,
    "dlq list": _dlq_list,
    "dlq replay": _dlq_replay,
    "topics": _topics,
    "asyncapi": _asyncapi,
}


if __name__ == "__main__":
    sys.exit(main())
