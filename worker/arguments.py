"""What can be typed after ``earshot-worker``: commands, options, help.

Knows the settings of `worker.config` and nothing of what a command does with them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final, get_args

from worker.config import Config
from worker.errors import Reason

SETTINGS: Final = frozenset({*Config.__struct_fields__, "config"})
"""The options that are settings, and may come from the environment or a file as well."""

LONGEST: Final = 3600.0
"""Seconds that one piece of sound may last; whoever asks for more has mistyped it."""

DLQ_REPLAY: Final = """\
Every record goes back once, with its key, value, headers and timestamp, to the partition where it
stood. The copy and a note of it on audio.dlq are written in one transaction, and a second replay
fences the first: whatever is killed, and however often it is tried, what has a note is not sent
again, except by --again. A copy that is rejected once more is a dead letter of its own, which
`dlq list` shows as rejected again.

The worker takes a copy for a new record: it is processed now, behind what came since, so that a
drift detector hears it late."""

_DEFAULTS: Final = Config()

EPILOG: Final = """\
The options of `run`, and --broker and --topic-prefix everywhere, are settings: they may also come from
the environment (EARSHOT_MAX_BATCH_RECORDS=64) or from the TOML file that --config names
(max_batch_records = 64). The command line wins, then the environment.

exit status: 0 done or drained, 1 something has to be changed first, a setting too, 2 wrong usage,
3 the model was refused, 4 the broker stayed away, 130 stopped at once by a second signal
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser; what it parses has the name of the command in ``command``."""
    parser = argparse.ArgumentParser(
        prog="earshot-worker",
        description="Machine hearing on a stream: audio from Kafka in, predictions and drift events out, exactly once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _run(commands)

    play = _command(
        commands,
        "play",
        "stream sound files as chunks, like a microphone",
        "earshot-worker play clips/*.wav --source mic-1 --degrade lowpass:2000@60s",
    )
    play.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what libsndfile reads, or folders of it")
    play.add_argument("--source", required=True, type=_name, metavar="NAME", help="the key of the records")
    play.add_argument(
        "--chunk",
        type=number(float, 0.001, LONGEST),
        default=1.0,
        metavar="SECONDS",
        help="length of a chunk (%(default)s)",
    )
    play.add_argument(
        "--speed",
        type=number(float, 0),
        default=1.0,
        metavar="X",
        help="1 is real time, 0 as fast as it goes (%(default)s)",
    )
    play.add_argument(
        "--degrade",
        action="append",
        default=[],
        metavar="HOW",
        help="lowpass:HZ, gain:DB or noise:SNR_DB, from the start or as in noise:20@60s; may be repeated",
    )
    play.add_argument("--shuffle", type=number(int, 0), metavar="SEED", help="play the files in a random order")
    play.add_argument(
        "--start",
        type=_time,
        metavar="TIME",
        help="event time of the first chunk, with its offset (now)",
    )

    watch = _command(
        commands,
        "watch",
        "show predictions, rejections and drift events",
        "earshot-worker watch --from-beginning",
    )
    watch.add_argument("--json", action="store_true", help="one JSON object a line")
    watch.add_argument("--from-beginning", action="store_true", help="not only what comes from now on")
    watch.add_argument("--count", type=number(int, 1), metavar="N", help="end after N predictions and rejections")

    dlq = commands.add_parser("dlq", help="`dlq list` shows rejected records, `dlq replay` sends them back")
    actions = dlq.add_subparsers(required=True, metavar="ACTION")
    shown = _command(
        actions,
        "list",
        "show the rejected records by reason; with a filter or --json, each of them",
        "earshot-worker dlq list --reason undecodable",
    )
    shown.set_defaults(command="dlq list")
    shown.add_argument("--json", action="store_true", help="one JSON object a line")
    sent = _command(
        actions,
        "replay",
        "send the rejected records back to audio.in",
        "earshot-worker dlq replay --reason too-large --dry-run",
        details=DLQ_REPLAY,
    )
    sent.set_defaults(command="dlq replay")
    sent.add_argument("--dry-run", action="store_true", help="only say what would be sent")
    sent.add_argument("--again", action="store_true", help="also what was sent back before")
    for each in (shown, sent):
        each.add_argument("--reason", choices=get_args(Reason), metavar="R", help=f"only {', '.join(get_args(Reason))}")
        each.add_argument("--source", metavar="NAME", help="only records with this key")

    topics = _command(
        commands, "topics", "create the topics that are not there yet", "earshot-worker topics --partitions 6"
    )
    topics.add_argument(
        "--partitions", type=number(int, 1), default=4, metavar="N", help="how far a group can spread (%(default)s)"
    )

    _command(commands, "asyncapi", "print the AsyncAPI document of the wire", "earshot-worker asyncapi")
    return parser


def number(kind: type[int | float], low: float, high: float = sys.maxsize) -> Callable[[str], float]:
    """Return what argparse needs to read a number from ``low`` to ``high``; infinity and NaN are none."""
    bounds = f"of {low:g} or more" if high == sys.maxsize else f"from {low:g} to {high:.10g}"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bounds}")
        return value

    return read


def _run(commands: Any) -> None:
    run = _command(
        commands, "run", "serve a model", "earshot-worker run --model bundle --broker kafka://localhost:9092"
    )
    _setting(run, "--model", metavar="FOLDER", help="the bundle to serve")
    _setting(run, "--group", help="the consumer group; its members share the partitions")
    _setting(run, "--instance", metavar="NAME", help="this worker's name, stable over restarts and unique in the group")
    _setting(
        run,
        "--processes",
        metavar="N",
        help="members of the group to run, NAME-0 to NAME-(N-1), the health port of each the one after; Kafka only",
    )
    _setting(
        run,
        "--on-lost-offset",
        metavar="stop|earliest",
        help="what to do when records were deleted before they were read",
    )
    _setting(run, "--max-batch-records", metavar="N", help="records in one transaction at the most")
    _setting(run, "--max-batch-bytes", metavar="N", help="bytes in one transaction at the most, or one larger record")
    _setting(run, "--poll-seconds", metavar="S", help="how long one poll waits for records")
    _setting(run, "--give-up-seconds", metavar="S", help="end with status 4 after so long without the broker")
    _setting(run, "--max-record-bytes", metavar="N", help="a larger record is rejected")
    _setting(run, "--max-record-seconds", metavar="S", help="a longer record is rejected")
    _setting(
        run,
        "--min-record-seconds",
        metavar="S",
        help="a shorter record is rejected",
        default="half of the model's window",
    )
    _setting(run, "--drift-block-seconds", metavar="S", help="sound averaged before a detector sees it")
    _setting(run, "--drift-delta", metavar="D", help="ADWIN's confidence parameter")
    _setting(run, "--drift-quorum", metavar="N", help="signals that must have changed for one event")
    _setting(run, "--max-sources", metavar="N", help="sources a partition remembers; the least recent is forgotten")
    _setting(
        run, "--forget-after", metavar="N", help="a source silent for so many records of its partition is forgotten"
    )
    run.add_argument(
        "--reset-state",
        action="store_true",
        default=argparse.SUPPRESS,
        help="where a drift state cannot be read, start the detectors of that source anew (end with status 1)",
    )
    _setting(run, "--health-port", metavar="N", help="answer GET /livez and /readyz here; 0: any free", default="off")
    _setting(run, "--health-host", metavar="HOST", help="the address to answer on; whoever reaches it is answered")
    _setting(run, "--log-format", metavar="auto|console|json", help="what the log on standard error looks like")
    _setting(run, "--log-level", metavar="LEVEL", help="debug, info, warning or error")


def _command(commands: Any, name: str, purpose: str, example: str, details: str = "") -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.\n\n{details}".rstrip(),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # or a password behind --kafka-sasl-password would be taken for the name of its file
    )
    command.set_defaults(command=name)
    _setting(command, "--broker", metavar="URL", help="kafka://host:port[,host:port] or sqlite:///file")
    _setting(command, "--topic-prefix", metavar="TEXT", help="put before the name of every topic")
    _setting(command, "--config", metavar="FILE", help="a TOML file of settings", default="none")
    secured = command.add_argument_group(
        "a secured cluster", "The password comes from EARSHOT_KAFKA_SASL_PASSWORD or a file, since flags show in `ps`."
    )
    _setting(
        secured,
        "--kafka-security-protocol",
        metavar="PROTOCOL",
        help="PLAINTEXT, SSL, SASL_SSL, or SASL_PLAINTEXT on a network that nobody else is on",
    )
    _setting(
        secured,
        "--kafka-ssl-cafile",
        metavar="FILE",
        help="PEM: who may sign the servers' certificates",
        default="whom the system trusts",
    )
    _setting(secured, "--kafka-ssl-certfile", metavar="FILE", help="PEM: our certificate, if the servers ask for one")
    _setting(secured, "--kafka-ssl-keyfile", metavar="FILE", help="PEM: its key, not encrypted")
    _setting(
        secured, "--kafka-sasl-mechanism", metavar="NAME", help="PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER"
    )
    _setting(secured, "--kafka-sasl-username", metavar="NAME", help="for PLAIN and SCRAM")
    _setting(secured, "--kafka-sasl-password-file", metavar="FILE", help="for PLAIN and SCRAM: the password")
    _setting(
        secured, "--kafka-sasl-token-file", metavar="FILE", help="for OAUTHBEARER: the token, read at each connection"
    )
    return command


def _setting(
    parser: argparse._ActionsContainer, flag: str, *, metavar: str | None = None, help: str, default: str = ""
) -> None:
    """Add a flag of `Config`; it leaves no trace if it is not given, so that the other layers show."""
    name = flag.removeprefix("--").replace("-", "_")
    shown = default or str(getattr(_DEFAULTS, name)) or "none"
    parser.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=f"{help} ({shown})")


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is None:
            raise ValueError("no offset from UTC")
    except ValueError:
        message = f"{text!r} is not a time with its offset, as in 2026-05-04T12:00:00Z"
        raise argparse.ArgumentTypeError(message) from None
    return time


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty, and a record without a source is rejected")
    return text
