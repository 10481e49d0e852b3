"""The worker's command line: as processes where signals and pipes matter, and by `main` where they do not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.system.processes import BIN, Worker, wait_for, worker
from worker import telemetry
from worker.__main__ import COMMANDS, _broker, main
from worker.arguments import parser
from worker.broker_kafka import KafkaBroker, LostOffset
from worker.broker_sqlite import SqliteBroker
from worker.config import Config
from worker.errors import Fatal
from worker.messages import Message, Topics

SOURCE = "Hörer-1"
CHUNK = 0.125
CHUNKS = 1152  # of 72 clips of two seconds: seconds of work, one record at a time


@pytest.fixture(autouse=True)
def as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what commands set for a whole process; and let a forgotten --broker be a file that goes away."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    structlog.reset_defaults()


@pytest.fixture(scope="module", autouse=True)
def without_a_broker(machine_bundle: Path) -> Iterator[subprocess.Popen[str]]:
    """A worker whose cluster is not there; it takes its time to see that, so it starts before all tests."""
    settings = ("--broker", "kafka://localhost:1", "--give-up-seconds", "1")
    with subprocess.Popen(
        [BIN / "earshot-worker", "run", "--model", machine_bundle, *settings], stderr=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of an embedded broker with topics, and one record that is there to be seen."""
    url = f"sqlite:///{tmp_path_factory.mktemp('broker') / 'earshot.db'}"
    assert 0 == main(["topics", "--broker", url])
    publish(url, b"{}")
    return url


def publish(url: str, value: bytes) -> None:
    """Write a line for whoever watches, past any worker."""
    with closing(SqliteBroker(Path(url.removeprefix("sqlite:///")), Topics())) as broker:
        broker.publish([Message("predictions.out", SOURCE.encode(), value)])


def refusal(argv: Sequence[str], capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    """Insist on a status and on one line on standard error, and return it."""
    assert status == main(argv)
    printed = capsys.readouterr()
    assert "" == printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("earshot-worker: ")
    return line


def usage_error(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Insist on argparse's refusal, with status 2 and no traceback, and return its last line."""
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert 2 == exit_.value.code
    return capsys.readouterr().err.splitlines()[-1]


def records_of(log: Worker) -> int:
    """Return how many records a worker says it has committed."""
    return sum(entry["records"] for entry in log.events("committed"))


class TestServing:
    def test_play_run_and_watch(
        self, machine_bundle: Path, machines: Path, database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A folder is played; one worker is stopped in the middle by SIGTERM, the next by SIGINT; nothing is lost."""
        at = ("--broker", database)
        debug = ("--log-level", "debug", "--min-record-seconds", str(CHUNK))
        options = ("--source", SOURCE, "--speed", "0", "--chunk", str(CHUNK))
        assert 0 == main(["play", str(machines / "audio"), *options, *at])
        assert f"{CHUNKS} chunks of {SOURCE} sent to audio.in\n" == capsys.readouterr().out

        with worker(
            tmp_path / "first.log", "--model", machine_bundle, *at, *debug, "--max-batch-records", "1"
        ) as first:
            wait_for(lambda: first.events("committed"), "a first commit")
            assert 0 == first.stop(signal.SIGTERM)
        with worker(tmp_path / "second.log", "--model", machine_bundle, *at, *debug) as second:
            wait_for(lambda: records_of(first) + records_of(second) >= CHUNKS, "the rest of the chunks")
            assert 0 == second.stop(signal.SIGINT)
        assert 0 < records_of(first) < CHUNKS, "it was not stopped in the middle, and nothing is shown"
        assert CHUNKS == records_of(first) + records_of(second)

        entries = [json.loads(line) for name in ("first", "second") for line in open_log(tmp_path / f"{name}.log")]
        assert all({"action", "level", "timestamp"} <= set(entry) for entry in entries)
        assert {"started", "restoring", "assigned", "committed", "stopped"} == {entry["action"] for entry in entries}
        assert "stopped" == entries[-1]["action"]

        assert 0 == main(["watch", "--json", "--from-beginning", "--count", str(CHUNKS), *at])
        seen: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        predictions = [each for each in seen if each["type"] == "earshot.prediction"]
        places = Counter(
            (each["data"]["record"]["partition"], each["data"]["record"]["offset"]) for each in predictions
        )
        assert {1} == set(places.values())
        assert CHUNKS == len(places)
        assert {SOURCE} == {each["key"] for each in predictions}
        assert {CHUNK} == {each["data"]["duration"] for each in predictions}

    def test_a_second_signal_ends_it_at_once(self, machine_bundle: Path, database: str, tmp_path: Path) -> None:
        """A worker that would go on waiting for a poll of minutes ends with 130."""
        quiet = ("--broker", database, "--topic-prefix", "quiet.")
        assert 0 == main(["topics", *quiet])
        with worker(tmp_path / "log", "--model", machine_bundle, *quiet, "--poll-seconds", "600") as idle:
            wait_for(lambda: idle.events("assigned"), "its partitions")

            def ended() -> bool:
                # Two signals that wait together are one, so there is a third, until it has taken notice.
                idle.process.send_signal(signal.SIGTERM)
                return idle.process.poll() is not None

            wait_for(ended, "the end", 10)
            assert 130 == idle.process.returncode
            assert [] == idle.events("stopped")

    def test_what_it_cannot_serve(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """No model is a setting to give (1); a folder that is no bundle is a model to refuse (3)."""
        assert "no model is given: --model FOLDER" in refusal(["run"], capsys)
        assert "is no model bundle: it has no manifest.json" in refusal(["run", "--model", str(tmp_path)], capsys, 3)
        assert "there is no model bundle at nowhere" in refusal(["run", "--model", "nowhere"], capsys, 3)

    @pytest.mark.parametrize(
        ("settings", "shortest"),
        [
            (["--min-record-seconds", "61"], r"needs 61 s \(--min-record-seconds\)"),
            (["--max-record-seconds", "0.1"], r"needs [\d.]+ s \(half of the model's window\)"),
        ],
    )
    def test_limits_that_nothing_can_keep(
        self, settings: list[str], shortest: str, machine_bundle: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A worker that would reject every record says so, and what to change, before it takes one."""
        said = refusal(["run", "--model", str(machine_bundle), *settings], capsys)
        assert re.search(shortest + "; raise --max-record-seconds, or lower --min-record-seconds$", said)

    def test_interrupted_before_it_listens_to_signals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ctrl-C is no traceback."""

        def interrupted(*_: object) -> int:
            raise KeyboardInterrupt

        monkeypatch.setitem(COMMANDS, "topics", interrupted)
        assert 130 == main(["topics"])


def open_log(path: Path) -> list[str]:
    return path.read_text().splitlines()


class TestPipes:
    def test_watch_ends_quietly_when_nobody_reads_any_more(self, database: str) -> None:
        """As in `watch | head -1`, and in ASCII: a name that it lacks is shown as well as it can be."""
        with subprocess.Popen(
            [BIN / "earshot-worker", "watch", "--from-beginning", "--broker", database],
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as watch:
            assert watch.stdout is not None
            assert watch.stderr is not None
            assert b"H?rer-1" in watch.stdout.readline()
            watch.stdout.close()
            publish(database, b"one more line than anybody reads")
            assert (0, b"") == (watch.wait(timeout=30), watch.stderr.read())

    def test_watch_ends_when_it_is_interrupted(self, database: str) -> None:
        """Ctrl-C is how a view is left: status 0, and no traceback."""
        with subprocess.Popen(
            [BIN / "earshot-worker", "watch", "--json", "--from-beginning", "--broker", database],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as watch:
            assert watch.stdout is not None
            watch.stdout.readline()
            watch.send_signal(signal.SIGINT)
            assert b"" == watch.communicate(timeout=30)[1]
            assert 0 == watch.returncode

    @pytest.mark.parametrize("command", ["topics", "asyncapi"])
    def test_a_result_that_nobody_reads(self, command: str, database: str) -> None:
        """Whether its text fills a buffer or waits in one until the end, it is status 0 and no complaint."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [BIN / "earshot-worker", command, "--broker", database],
            env=environment,
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
        os.close(writer)
        assert (0, b"") == (done.returncode, done.stderr)

    @pytest.mark.parametrize("command", [["topics"], ["asyncapi"], ["watch", "--json", "--from-beginning"]])
    def test_a_result_for_which_there_is_no_room(self, command: list[str], database: str) -> None:
        """A full disk is status 1 and a line that says so."""
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                [BIN / "earshot-worker", *command, "--broker", database],
                stdout=full,
                stderr=subprocess.PIPE,
                check=False,
                timeout=30,
            )
        expected = b"earshot-worker: [Errno 28] No space left on device\n"
        assert (1, expected) == (done.returncode, done.stderr)


class TestTopics:
    def test_the_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A line for each topic, in columns, saying what is new; asking again changes nothing."""
        topics = ["topics", "--broker", "sqlite:///new.db", "--partitions", "12"]
        assert 0 == main(topics)
        assert [
            "audio.in          12 partitions  plain      created",
            "predictions.out   12 partitions  plain      created",
            "audio.dlq         12 partitions  plain      created",
            "drift.events       1 partitions  plain      created",
            "drift.state       12 partitions  compacted  created",
        ] == capsys.readouterr().out.splitlines()
        assert 0 == main(topics)
        again = capsys.readouterr().out.splitlines()
        assert 5 == len(again)
        assert all(line.endswith("  already there") for line in again)

    def test_another_number_of_partitions(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Partitions cannot be changed, and both numbers are named."""
        assert 0 == main(["topics", "--broker", "sqlite:///new.db"])
        capsys.readouterr()
        text = refusal(["topics", "--broker", "sqlite:///new.db", "--partitions", "6"], capsys)
        assert "'audio.in'" in text
        assert "4 partitions" in text
        assert "6" in text


class TestBrokerUrl:
    @pytest.mark.parametrize(
        ("url", "blamed"),
        [
            ("kafka://host:abc", "host:abc"),
            ("kafka://host", "host"),
            ("kafka://:9092", ":9092"),
            ("kafka://host:0", "host:0"),
            ("kafka://host:65536", "host:65536"),
            ("kafka://host:9092:9093", "host:9092:9093"),
            ("kafka://good:9092,,bad:9092", ""),
            ("kafka://user@host:9092", "user@host:9092"),
            ("kafka://host:9092/topic", "host:9092/topic"),
        ],
    )
    def test_a_server_is_a_host_and_a_port(self, url: str, blamed: str, capsys: pytest.CaptureFixture[str]) -> None:
        """The one that is not is named, before anybody tries to reach it."""
        expected = f"--broker is {url!r}; {blamed!r} is not host:port, with a port from 1 to 65535"
        assert expected in refusal(["topics", "--broker", url], capsys)

    @pytest.mark.parametrize("url", ["", "kafka://", "kafka", "sqlite://file", "sqlite:///", "http://host:80"])
    def test_the_forms_are_named(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        """What is no URL of a broker is told what one looks like."""
        text = refusal(["topics", "--broker", url], capsys)
        assert f"--broker is {url!r}; expected kafka://host:port[,host:port], sqlite:///relative/file" in text

    @pytest.mark.parametrize(
        "url", ["kafka://localhost:9092", "kafka://a-b.example:1,under_score:65535/", "kafka://[::1]:9092"]
    )
    def test_clusters(self, url: str) -> None:
        """Names, addresses and several servers are taken; nothing is connected yet."""
        broker = _broker(Config(broker=url), Topics())
        assert isinstance(broker, KafkaBroker)
        broker.close()

    def test_a_lost_offset_stops_it_or_is_an_event(self) -> None:
        """As configured, and with what was lost; only a command that has a log can go on."""
        lost = LostOffset("audio.in", partition=1, committed=2, earliest=4, end=6)
        lenient = Config(broker="kafka://localhost:9092", on_lost_offset="earliest")
        with structlog.testing.capture_logs() as events:
            log: telemetry.Log = structlog.get_logger()
            for config, own_log in ((Config(broker=lenient.broker), log), (lenient, None)):
                stopping = _broker(config, Topics(), own_log)
                assert isinstance(stopping, KafkaBroker)
                with pytest.raises(Fatal, match="--on-lost-offset earliest"):
                    stopping._on_lost_offset(lost)
            going_on = _broker(lenient, Topics(), log)
            assert isinstance(going_on, KafkaBroker)
            going_on._on_lost_offset(lost)

        assert [{"event": "offset.lost", "log_level": "warning", **lost._asdict()}] == events

    def test_a_file_that_cannot_be(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The file is named."""
        assert "nowhere/x.db" in refusal(["topics", "--broker", "sqlite:///nowhere/x.db"], capsys)


class TestSettings:
    def test_every_layer_reaches_the_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The broker from the environment, the prefix from a file, and the command line over both."""
        monkeypatch.setenv("EARSHOT_BROKER", f"sqlite:///{tmp_path / 'from-environment.db'}")
        (tmp_path / "earshot.toml").write_text('topic_prefix = "from-file."')
        assert 0 == main(["topics", "--config", "earshot.toml"])
        assert (tmp_path / "from-environment.db").is_file()
        assert capsys.readouterr().out.startswith("from-file.audio.in ")
        assert 0 == main(["topics", "--config", "earshot.toml", "--topic-prefix", "typed."])
        assert capsys.readouterr().out.startswith("typed.audio.in ")

    @pytest.mark.parametrize("value", ["inf", "nan", "0", "soon"])
    def test_a_wait_ends(self, value: str, capsys: pytest.CaptureFixture[str]) -> None:
        """No time is infinite, and the setting and its origin are named."""
        for name in ("poll", "give-up", "max-record", "drift-block"):
            text = refusal(["run", f"--{name}-seconds", value], capsys)
            assert "from the command line" in text
            assert f"{name.replace('-', '_')}_seconds" in text

    def test_asyncapi(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The document is JSON, with the topics as they are called here."""
        assert 0 == main(["asyncapi", "--topic-prefix", "hall-2."])
        document = json.loads(capsys.readouterr().out)
        assert "3.0.0" == document["asyncapi"]
        assert "hall-2.predictions.out" == document["channels"]["predictionsOut"]["address"]


class TestPlay:
    def test_a_degradation_that_there_is_not(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The ones that there are are listed."""
        text = refusal(["play", "x.wav", "--source", "mic", "--degrade", "nonsense"], capsys)
        assert "--degrade: 'nonsense' is no degradation; expected lowpass:HERTZ" in text

    def test_nothing_to_play(self, tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str]) -> None:
        """A folder without sound, a file that is not there and one that is no sound are named."""
        (tmp_path / "notes.txt").write_text("not a sound")
        at = ("--source", "mic", "--broker", database)
        assert f"{tmp_path} is a folder without any sound file" in refusal(["play", str(tmp_path), *at], capsys)
        assert "nowhere.wav cannot be played" in refusal(["play", "nowhere.wav", *at], capsys)
        assert "notes.txt cannot be played" in refusal(["play", "notes.txt", *at], capsys)


class TestUsage:
    @pytest.mark.parametrize(
        ("command", "option", "values"),
        [
            (["topics"], "--partitions", ("0", "-1", "1.5", "four", "")),
            (["watch"], "--count", ("0", "-1", "nan")),
            (["play", "x.wav", "--source", "mic"], "--chunk", ("0", "-1", "nan", "inf", "1e9", "1s")),
            (["play", "x.wav", "--source", "mic"], "--speed", ("-1", "nan", "inf", "fast")),
            (["play", "x.wav", "--source", "mic"], "--shuffle", ("-1", "0.5")),
            (["play", "x.wav", "--source", "mic"], "--start", ("noon", "2026-05-04T12:00:00")),
        ],
    )
    def test_nonsense_is_refused_where_it_is_typed(
        self, command: list[str], option: str, values: Sequence[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Status 2, with the option, what was given and what was expected."""
        for value in values:
            assert f"argument {option}: {value!r} is not a" in usage_error([*command, option, value], capsys)

    def test_a_source_has_a_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Records without one would all be rejected."""
        assert "argument --source: it is empty" in usage_error(["play", "x.wav", "--source", ""], capsys)

    def test_help_lists_the_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Each command, where settings come from, and what the exit statuses mean."""
        with pytest.raises(SystemExit) as exit_:
            main(["--help"])
        assert 0 == exit_.value.code
        text = capsys.readouterr().out
        for part in (*COMMANDS, "EARSHOT_MAX_BATCH_RECORDS", "exit status: 0 done or drained"):
            assert part in text

    @pytest.mark.parametrize("command", COMMANDS)
    def test_each_command_has_an_example(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Its help ends with a command line to copy, which the parser takes."""
        with pytest.raises(SystemExit) as exit_:
            main([*command.split(), "--help"])
        assert 0 == exit_.value.code
        *_, heading, example = capsys.readouterr().out.strip().splitlines()
        assert "example:" == heading
        assert f"{example} ".startswith(f"  earshot-worker {command} ")
        parser().parse_args(example.split()[1:])

    def test_help_is_fast(self) -> None:
        """It imports nothing that takes its time, and neither does the embedded broker."""
        code = (
            "import sys, worker.__main__ as w\n"
            "w.main(['topics', '--broker', 'sqlite:///new.db'])\n"
            "try: w.main(['--help'])\n"
            "except SystemExit: pass\n"
            "print({'numba', 'sklearn', 'librosa', 'scipy', 'joblib', 'numpy', 'kafka', 'river'} & {*sys.modules})"
        )
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert "set()" == printed.splitlines()[-1]


def test_a_broker_that_stays_away(without_a_broker: subprocess.Popen[str]) -> None:
    """After --give-up-seconds the worker says so and ends with 4, so that whoever runs it can start it elsewhere."""
    _, errors = without_a_broker.communicate(timeout=60)
    assert 4 == without_a_broker.returncode
    *log, last = errors.splitlines()
    assert "started" == json.loads(log[0])["action"]
    assert last.startswith("earshot-worker: gave up after ")
    assert "localhost:1" in last
