"""The container files cannot be run by these tests; here is what keeps them from rotting unnoticed.

They are read line by line and not as YAML, for which no parser is installed.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, Final

import pytest

import trainer.arguments
import worker.arguments
from tests.system import demo
from worker.config import resolve

ROOT: Final = Path(__file__).resolve().parents[2]
COMPOSE: Final = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text()
DOCKERIGNORE: Final = (ROOT / ".dockerignore").read_text()

PARSERS: Final = {"earshot-trainer": trainer.arguments.parser(), "earshot-worker": worker.arguments.parser()}


def _commands(text: str) -> list[str]:
    """Return each of the project's commands, up to where the shell would end it."""
    code = re.sub(r"^\s*#.*", "", text, flags=re.MULTILINE)
    return [" ".join(found.split()) for found in re.findall(r"earshot-(?:worker|trainer) [^&|\\\n]+", code)]


def _parsed(command: str) -> dict[str, Any]:
    program, *arguments = shlex.split(command)
    return vars(PARSERS[program].parse_args(arguments))


def _of(kind: str) -> list[dict[str, Any]]:
    return [_parsed(command) for command in _commands(COMPOSE) if command.startswith(kind)]


def test_the_commands_are_found() -> None:
    """Otherwise the tests below would pass for want of anything to test."""
    expected = ["worker topics", "trainer simulate", "trainer simulate", "trainer fit"]
    expected += ["worker run", "worker play", "worker watch"]
    assert [f"earshot-{each}" for each in expected] == [" ".join(c.split()[:2]) for c in _commands(COMPOSE)]


@pytest.mark.parametrize("command", [*_commands(COMPOSE), *_commands(DOCKERFILE)])
def test_every_command_is_one_that_the_command_line_takes(command: str) -> None:
    """An option that is renamed or taken away fails here, and not when somebody runs the demo."""
    try:
        _parsed(command)
    except SystemExit:
        pytest.fail(f"the command line does not take: {command}")


def test_every_variable_is_a_setting() -> None:
    """What the containers find in their environment is understood by the worker."""
    variables = dict(re.findall(r"^\s+(EARSHOT_\w+): (\S+)$", COMPOSE, flags=re.MULTILINE))
    assert "kafka://redpanda:9092" == resolve({}, variables).broker


def test_what_one_service_writes_is_what_the_next_one_reads(machines: Path) -> None:
    """The worker serves the bundle that is trained, on the clips that are simulated; others are played to it."""
    known, live = (each["out"] for each in _of("earshot-trainer simulate"))
    (fit,) = _of("earshot-trainer fit")
    (run,) = _of("earshot-worker run")
    (play,) = _of("earshot-worker play")
    assert known == fit["data"]
    assert fit["out"] == Path(run["model"])
    assert [live / "audio"] == play["files"]
    assert (machines / "audio").is_dir()


def test_the_build_context_holds_what_the_image_is_made_of() -> None:
    """Each path that the Dockerfile copies from the repository exists, and `.dockerignore` lets it through."""
    sources = [
        path for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()
    ]
    let_through = {line[1:] for line in DOCKERIGNORE.splitlines() if line.startswith("!")}
    assert let_through == set(sources)
    assert [] == [path for path in sources if not (ROOT / path).exists()]


def test_it_is_the_demo() -> None:
    """The microphone works as long, is covered in the same way, and goes on as long as in `make demo`."""
    (play,) = _of("earshot-worker play")
    _, live = _of("earshot-trainer simulate")
    assert [demo.DEGRADATION] == play["degrade"]
    assert demo.SOURCE == play["source"]
    assert live["clips"] * live["seconds"] >= demo.CLEAN_SECONDS + demo.DEGRADED_SECONDS
    assert f'"--seed", "{live["seed"]}", "--clips", "{live["clips"]}"' in Path(demo.__file__).read_text()
