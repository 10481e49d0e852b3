"""The command line of the worker, where everything is put together; nothing else builds a part."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any, Final

from worker import telemetry
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

EPILOG: Final = """\
Every option is also an environment variable (--max-batch-records: EARSHOT_MAX_BATCH_RECORDS)
and a setting in the TOML file that --config names; the command line wins, then the environment.

exit status: 0 done or drained, 1 something has to be changed first, 2 wrong usage,
3 the model was refused, 4 the broker stayed away, 130 stopped at once by a second signal
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = vars(_parser().parse_args(argv))
    command: Callable[[Config, dict[str, Any]], int] = arguments.pop("command")
    own = {name: arguments.pop(name) for name in list(arguments) if name not in _SETTINGS}
    try:
        return command(resolve(arguments, os.environ), own)
    except (BadModel, Fatal, Retryable) as error:
        print(f"earshot-worker: {error}", file=sys.stderr)
        return {BadModel: EXIT_BAD_MODEL, Fatal: EXIT_FATAL}.get(type(error), EXIT_GAVE_UP)
    except BrokenPipeError:
        # The reader has gone (`| head`); nothing more can be said, not even by the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def _run(config: Config, _: dict[str, Any]) -> int:
    from worker.audio import Limits
    from worker.bundle import load
    from worker.drift import DriftPolicy
    from worker.pipeline import Pipeline
    from worker.service import Service

    if not config.model:
        raise Fatal("no model is given: --model FOLDER, a bundle written by `earshot-trainer fit`")
    log = telemetry.configure(config.log_format, config.log_level)
    stop = _stop_on_signals()
    bundle = load(Path(config.model))
    topics = Topics(config.topic_prefix)
    pipeline = Pipeline(
        bundle,
        topics,
        Limits(max_bytes=config.max_record_bytes, max_seconds=config.max_record_seconds),
        DriftPolicy(block_seconds=config.drift_block_seconds, delta=config.drift_delta, quorum=config.drift_quorum),
    )
    broker = _broker(config.broker, topics)
    log.info("started", model=bundle.id.name, version=bundle.id.version, hash=bundle.id.hash, broker=config.broker)
    try:
        Service(
            broker,
            pipeline,
            group=config.group,
            instance=config.instance,
            max_batch_records=config.max_batch_records,
            poll_seconds=config.poll_seconds,
            give_up_seconds=config.give_up_seconds,
            stop=stop,
            log=log,
        ).run()
    finally:
        broker.close()
    return EXIT_OK


def _topics(config: Config, own: dict[str, Any]) -> int:
    topics = Topics(config.topic_prefix)
    broker = _broker(config.broker, topics)
    try:
        specs = topics.layout(own["partitions"])
        created = set(broker.create_topics(specs))
    finally:
        broker.close()
    width = max(len(spec.name) for spec in specs)
    for spec in specs:
        kind = "compacted" if spec.compacted else "plain"
        news = "created" if spec.name in created else "already there"
        print(f"{spec.name:{width}}  {spec.partitions:3} partitions  {kind:9}  {news}")
    return EXIT_OK


def _play(config: Config, own: dict[str, Any]) -> int:
    from worker import play

    topics = Topics(config.topic_prefix)
    stop = _stop_on_signals()
    chunks = play.chunks(
        own["files"],
        topics,
        source=own["source"],
        chunk_seconds=own["chunk"],
        degradations=own["degrade"],
        start_time=own["start"] or datetime.now(UTC),
        shuffle_seed=own["shuffle"],
    )
    broker = _broker(config.broker, topics)
    try:
        sent = play.play(broker, chunks, speed=own["speed"], chunk_seconds=own["chunk"], stop=stop)
    finally:
        broker.close()
    print(f"{sent} chunks of {own['source']} sent to {topics.audio_in}")
    return EXIT_OK


def _watch(config: Config, own: dict[str, Any]) -> int:
    from worker.watch import watch

    topics = Topics(config.topic_prefix)
    style = "json" if own["json"] else "live" if sys.stdout.isatty() else "plain"
    broker = _broker(config.broker, topics)
    try:
        watch(
            broker,
            topics,
            style=style,
            from_beginning=own["from_beginning"],
            count=own["count"],
            stop=_stop_on_signals(),
        )
    finally:
        broker.close()
    return EXIT_OK


def _asyncapi(config: Config, _: dict[str, Any]) -> int:
    print(json.dumps(asyncapi(Topics(config.topic_prefix)), indent=2))
    return EXIT_OK


def _broker(url: str, topics: Topics) -> Broker:
    """Open the broker that a URL names."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "kafka" and rest:
        from worker.broker_kafka import KafkaBroker

        return KafkaBroker(rest.rstrip("/").split(","), topics)
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


_SETTINGS: Final = frozenset({*Config.__struct_fields__, "config"})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earshot-worker",
        description="Machine hearing on a stream: audio from Kafka in, predictions and drift events out, exactly once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(
        commands, "run", _run, "serve a model", "earshot-worker run --model bundle --broker kafka://localhost:9092"
    )
    _setting(run, "--model", metavar="FOLDER", help="the bundle to serve")
    _setting(run, "--group", help="the consumer group; its members share the partitions")
    _setting(run, "--instance", metavar="NAME", help="this worker's name, stable over restarts and unique in the group")
    _setting(run, "--max-batch-records", metavar="N", help="records in one transaction at the most")
    _setting(run, "--poll-seconds", metavar="S", help="how long one poll waits for records")
    _setting(run, "--give-up-seconds", metavar="S", help="end with status 4 after so long without the broker")
    _setting(run, "--max-record-bytes", metavar="N", help="a larger record is rejected")
    _setting(run, "--max-record-seconds", metavar="S", help="a longer record is rejected")
    _setting(run, "--drift-block-seconds", metavar="S", help="sound averaged before a detector sees it")
    _setting(run, "--drift-delta", metavar="D", help="ADWIN's confidence parameter")
    _setting(run, "--drift-quorum", metavar="N", help="signals that must have changed for one event")
    _setting(run, "--log-format", metavar="auto|console|json", help="what the log on standard error looks like")
    _setting(run, "--log-level", metavar="LEVEL", help="debug, info, warning or error")

    play = _command(
        commands,
        "play",
        _play,
        "stream sound files as chunks, like a microphone",
        "earshot-worker play clips/*.wav --source mic-1 --degrade lowpass:2000@60s",
    )
    play.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what libsndfile reads, or folders of it")
    play.add_argument("--source", required=True, metavar="NAME", help="the key of the records")
    play.add_argument("--chunk", type=_positive, default=1.0, metavar="SECONDS", help="length of a chunk (%(default)s)")
    play.add_argument(
        "--speed",
        type=_not_negative,
        default=1.0,
        metavar="X",
        help="1 is real time, 0 as fast as it goes (%(default)s)",
    )
    play.add_argument(
        "--degrade",
        type=_degradation,
        action="append",
        default=[],
        metavar="HOW",
        help="lowpass:HZ, gain:DB or noise:SNR_DB, from the start or as in noise:20@60s; may be repeated",
    )
    play.add_argument("--shuffle", type=int, metavar="SEED", help="play the files in a random order")
    play.add_argument(
        "--start",
        type=datetime.fromisoformat,
        metavar="TIME",
        help="event time of the first chunk, with its offset (now)",
    )

    watch = _command(
        commands,
        "watch",
        _watch,
        "show predictions, rejections and drift events",
        "earshot-worker watch --from-beginning",
    )
    watch.add_argument("--json", action="store_true", help="one JSON object a line")
    watch.add_argument("--from-beginning", action="store_true", help="not only what comes from now on")
    watch.add_argument("--count", type=int, metavar="N", help="end after N predictions and rejections")

    topics = _command(
        commands, "topics", _topics, "create the topics that are not there yet", "earshot-worker topics --partitions 6"
    )
    topics.add_argument(
        "--partitions", type=int, default=4, metavar="N", help="how far a group can spread (%(default)s)"
    )

    _command(commands, "asyncapi", _asyncapi, "print the AsyncAPI document of the wire", "earshot-worker asyncapi")
    return parser


def _command(
    commands: Any, name: str, function: Callable[[Config, dict[str, Any]], int], purpose: str, example: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=function)
    _setting(command, "--broker", metavar="URL", help="kafka://host:port[,host:port] or sqlite:///file")
    _setting(command, "--topic-prefix", metavar="TEXT", help="put before the name of every topic")
    _setting(command, "--config", metavar="FILE", help="a TOML file of settings", default="none")
    return command


def _setting(
    parser: argparse.ArgumentParser, flag: str, *, metavar: str | None = None, help: str, default: str = ""
) -> None:
    """Add a flag of `Config`; it leaves no trace if it is not given, so that the other layers show."""
    name = flag.removeprefix("--").replace("-", "_")
    shown = default or str(getattr(_DEFAULTS, name)) or "none"
    parser.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=f"{help} ({shown})")


_DEFAULTS: Final = Config()


def _degradation(text: str) -> Any:
    from worker.play import parse_degradation

    try:
        return parse_degradation(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> float:
    return _number(text, lambda value: value > 0, "more than 0")


def _not_negative(text: str) -> float:
    return _number(text, lambda value: value >= 0, "0 or more")


def _number(text: str, fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of {expected}")
    return value


if __name__ == "__main__":
    sys.exit(main())
