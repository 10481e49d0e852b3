"""`make demo`, and the same chain of commands on real recordings and on Apache Kafka."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import pytest

from tests.system import demo


def test_the_demo_shows_what_it_promises(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Simulated machines on the embedded broker: every chunk answered once, one drift event, status 0."""
    status = demo.main(["--work", str(tmp_path / "demo"), "--broker", f"sqlite:///{tmp_path / 'demo' / 'earshot.db'}"])
    printed = capfd.readouterr().out
    assert 0 == status, printed
    assert "700 chunks in, 700 predictions and 0 rejections out" in printed
    assert "drift of mic-1" in printed


def test_the_demo_runs_on_real_recordings_and_apache_kafka(
    kafka_address: str, esc10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """ESC-10 through a real broker ends in the same way."""
    monkeypatch.setenv("EARSHOT_TOPIC_PREFIX", f"{uuid.uuid4()}.")
    status = demo.main([str(esc10), "--work", str(tmp_path / "demo"), "--broker", f"kafka://{kafka_address}"])
    printed = capfd.readouterr().out
    assert 0 == status, printed
    assert "dog_bark" in printed
    assert "drift of mic-1" in printed


def test_the_demo_fails_when_something_does_not_happen(
    machines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With no microphone covered there is no drift event, and the demo says so and ends with status 1."""
    monkeypatch.setattr(demo, "DEGRADATION", "gain:0")
    data = shutil.copytree(machines, tmp_path / "my clips")
    (data / "audio" / "broken.wav").write_bytes(b"RIFF and no sound")
    work = tmp_path / "demo"
    status = demo.main([str(data), "--work", str(work), "--broker", f"sqlite:///{work / 'earshot.db'}"])
    printed = capfd.readouterr()
    assert 1 == status
    assert "700 predictions and 0 rejections out" in printed.out
    assert "nobody noticed within 300 s that the microphone was covered" in printed.err
