"""The log: one event a line, with its action and fields, on standard error."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest
import structlog

from worker import telemetry


@pytest.fixture(autouse=True)
def _unconfigured() -> Iterator[None]:
    """Leave neither structlog nor logging configured for the other tests."""
    level = logging.getLogger("kafka").level
    yield
    structlog.reset_defaults()
    logging.getLogger("kafka").setLevel(level)


@pytest.mark.parametrize("style", ["json", "auto"])
def test_json(style: Literal["json", "auto"], capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal, or as told, a line is one JSON object with action, level, time and fields."""
    log = telemetry.configure(style, "info")

    log.warning("session.lost", why="line\nbreak", next_try_seconds=0.5)
    log.info("assigned", new=[0, 1])

    output = capsys.readouterr()
    first, second = (json.loads(line) for line in output.err.splitlines())
    assert output.out == ""
    assert first.pop("timestamp").endswith("Z")
    assert {"action": "session.lost", "level": "warning", "why": "line\nbreak", "next_try_seconds": 0.5} == first
    assert ("assigned", [0, 1]) == (second["action"], second["new"])


def test_console(capsys: pytest.CaptureFixture[str]) -> None:
    """For people, a line begins with time, level and action; without a terminal it is not coloured."""
    telemetry.configure("console", "info").info("committed", records=3)

    line = capsys.readouterr().err
    assert "committed" in line
    assert "records=3" in line
    assert "\x1b" not in line


def test_auto_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal, auto means for people."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)

    telemetry.configure("auto", "info").info("committed", records=3)

    line = capsys.readouterr().err
    assert "committed" in line
    assert not line.startswith("{")


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_level(level: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is less important than the level is left out."""
    log = telemetry.configure("json", level)
    for method in ("debug", "info", "warning", "error"):
        getattr(log, method)(method)

    assert expected == [json.loads(line)["action"] for line in capsys.readouterr().err.splitlines()]


def test_kafka_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """The client's own story of its retries, which goes to logging, is not told."""
    telemetry.configure("json", "debug")

    logging.getLogger("kafka.conn").error("a traceback that nobody asked for")

    assert capsys.readouterr().err == ""
