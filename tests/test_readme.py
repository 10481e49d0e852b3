"""The README cannot rot: its commands are run, and its examples are decoded, by these tests."""

from __future__ import annotations

import os
import re
import subprocess
import uuid
from pathlib import Path

import msgspec
import pytest

from tests.system.processes import BIN
from trainer.arguments import parser as trainer_parser
from worker.arguments import parser as worker_parser
from worker.config import resolve
from worker.features import Featurizer, read_spec
from worker.messages import Classification, DriftDetected, Regression, RetrainRequested

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
TOML = re.findall(r"^```toml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
EXAMPLES = re.findall(r"<!-- example: (\w+) -->\n```json\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run_script(script: str, folder: Path, **environment: str) -> str:
    """Run a script of the README as its reader would, and return what it prints; a failed command fails it."""
    done = subprocess.run(
        ["bash", "-e", "-m", "-c", f"{script}\nwait"],
        cwd=folder,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_the_steps_work_as_written(tmp_path: Path, kafka_address: str) -> None:
    """The scripts run one after the other in an empty folder, the second on a real Kafka."""
    embedded, on_kafka = SCRIPTS
    printed = run_script(embedded, tmp_path)
    assert "960 chunks of mic-1 sent to audio.in" in printed
    assert 960 == printed.count("  prediction  ")
    assert '"action": "stopped"' in (tmp_path / "worker.log").read_text()

    assert "kafka://localhost:9092" in on_kafka
    script = on_kafka.replace("localhost:9092", kafka_address)
    printed = run_script(script, tmp_path, EARSHOT_TOPIC_PREFIX=f"{uuid.uuid4()}.")
    assert 1920 == printed.count("  prediction  ")
    for name in ("left.log", "right.log"):
        assert '"action": "stopped"' in (tmp_path / name).read_text()


def test_the_two_commands_are_those_of_the_makefile() -> None:
    """What is said of `make demo` and `make test` is what they do; the demo has tests of its own."""
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\$ make (\w+)$", README, re.MULTILINE):
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE), target
    assert "-m tests.system.demo" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(("name", "text"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_examples_are_what_the_wire_carries(name: str, text: str) -> None:
    """Each example decodes as its type, with every field and no other."""
    kind = {kind.__name__: kind for kind in (Classification, Regression, DriftDetected, RetrainRequested)}[name]
    decoded = msgspec.json.decode(text, type=kind)
    assert msgspec.json.decode(text) == msgspec.json.decode(msgspec.json.encode(decoded))


def test_the_settings_file_is_one(tmp_path: Path) -> None:
    """The example in TOML is read, and says what it seems to say."""
    text = next(each for each in TOML if "[[sets]]" not in each)
    (tmp_path / "settings.toml").write_text(text)
    config = resolve({"config": str(tmp_path / "settings.toml")}, {"EARSHOT_MAX_BATCH_RECORDS": "8"})
    assert ("bundle", 8) == (config.model, config.max_batch_records)


def test_the_feature_file_is_one() -> None:
    """The example is read, and what it says can be computed."""
    text = next(each for each in TOML if "[[sets]]" in each)
    names = Featurizer(read_spec(text)).feature_names
    assert ("mel.0.mean", "rms.p90") == (names[0], names[-1])


def test_every_command_is_in_the_table() -> None:
    """A new command is not forgotten."""
    listed = set(re.findall(r"^\| `(earshot-\w+ \w+)", README, re.MULTILINE))
    for parser in (worker_parser(), trainer_parser()):
        (commands,) = [action for action in parser._actions if action.choices and action.metavar == "COMMAND"]
        for command in commands.choices or ():
            assert f"{parser.prog} {command}" in listed
            listed.discard(f"{parser.prog} {command}")
    assert not listed
