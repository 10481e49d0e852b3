"""`make demo`: Earshot's public commands strung together, on a microphone that goes bad.

It trains a model, streams chunks of sound through a worker, shows what it predicts, covers the
microphone halfway, and waits for the one event that says so. It ends by itself, and with status 1
if anything of that did not happen. Nothing is used here that a user could not type.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any, Final

import soundfile

WORK: Final = Path("build/demo")
SOURCE: Final = "mic-1"
CLEAN_SECONDS: Final = 400
DEGRADED_SECONDS: Final = 300
DEGRADATION: Final = f"lowpass:1000@{CLEAN_SECONDS}s"
DEADLINE: Final = 120.0
"""Seconds that the worker may take for the stream; it takes a few."""

GRACE: Final = 5.0
"""Seconds to wait for a drift event once every chunk is answered; it was committed with one of them."""

PREDICTION: Final = "earshot.prediction"
REJECTION: Final = "earshot.rejection"
DRIFT: Final = "earshot.drift.detected"
RETRAIN: Final = "earshot.retrain.requested"

BIN: Final = Path(sys.executable).parent


class DemoFailed(Exception):
    """Something that the demo is there to show did not happen."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, help="your own labelled clips, instead of simulated machines")
    parser.add_argument("--label", help="the column to predict")
    parser.add_argument("--broker", default=f"sqlite:///{WORK / 'earshot.db'}")
    parser.add_argument("--work", type=Path, default=WORK)
    arguments = parser.parse_args(argv)
    try:
        demonstrate(arguments.data, arguments.label, arguments.broker, arguments.work)
    except DemoFailed as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    return 0


def demonstrate(data: Path | None, label: str | None, broker: str, work: Path) -> None:
    """Go through the whole of it; raise `DemoFailed` at the first thing that does not happen."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    bundle = work / "bundle"

    if data is None:
        title("1. Sounds of six machines, healthy and with five faults, from published fault models")
        data = work / "clips"
        run("earshot-trainer", "simulate", data)
        live = work / "live"
        run("earshot-trainer", "simulate", live, "--seed", "1", "--clips", "180")
    else:
        title(f"1. Your clips in {data} (the stream below is made of clips that the model has seen)")
        live = data

    title("2. Train: the forest, and what it is worth on machines or recordings it has not heard")
    run("earshot-trainer", "fit", data, "--out", bundle, *(["--label", label] if label else []))

    title(f"3. Serve: a worker, and a microphone that is covered after {CLEAN_SECONDS} seconds of sound")
    at = ["--broker", broker]
    run("earshot-worker", "topics", *at)
    with worker(work, "run", "--model", bundle, *at):
        files = stream_of(live)
        options = ["--source", SOURCE, "--speed", "0", "--degrade", DEGRADATION, *at]
        played = run("earshot-worker", "play", *files, *options, shown=[live / "…", *options])
        run("earshot-worker", "watch", "--from-beginning", "--count", "8", *at)
        chunks = int(played.split()[0])
        seen = follow(at, chunks=chunks)

    title("4. What happened")
    report(chunks, seen)


def follow(at: Sequence[str], *, chunks: int) -> dict[str, list[Any]]:
    """Read what the worker publishes, by type, until every chunk is answered and retraining is requested."""
    seen: dict[str, list[Any]] = {kind: [] for kind in (PREDICTION, REJECTION, DRIFT, RETRAIN)}
    command: list[str | Path] = [BIN / "earshot-worker", "watch", "--json", "--from-beginning", *at]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        too_late = threading.Timer(DEADLINE, watch.terminate)
        too_late.start()
        try:
            for line in watch.stdout or ():
                record = json.loads(line)
                seen[record["type"]].append(record)
                if len(seen[PREDICTION]) + len(seen[REJECTION]) < chunks:
                    continue
                if seen[RETRAIN]:
                    break
                if too_late.interval == DEADLINE:
                    too_late.cancel()
                    too_late = threading.Timer(GRACE, watch.terminate)
                    too_late.start()
        finally:
            too_late.cancel()
            watch.terminate()
    return seen


def report(chunks: int, seen: dict[str, list[Any]]) -> None:
    """Print what came of the chunks, and raise `DemoFailed` unless it is what a demo has to show."""
    predictions, rejections = [each["data"] for each in seen[PREDICTION]], seen[REJECTION]
    drifts = [each["data"] for each in seen[DRIFT]]
    print(f"{chunks} chunks in, {len(predictions)} predictions and {len(rejections)} rejections out")
    if predictions and "confidence" in predictions[0]:
        for label, times in Counter(each["label"] for each in predictions).most_common():
            confidence = mean(each["confidence"] for each in predictions if each["label"] == label)
            print(f"  {label:16} {times:4} times, confidence {confidence:.2f} on average")
    for drift in drifts:
        since, detected = drift["since"], drift["detected"]
        print(
            f"drift of {drift['source']}: since chunk {since['offset']}, known at chunk {detected['offset']}; it blames"
        )
        for signal_ in drift["signals"]:
            print(f"  {signal_['signal']:32} {signal_['before']:+7.2f} -> {signal_['after']:+7.2f} training spreads")
    answered = {(each["record"]["partition"], each["record"]["offset"]) for each in predictions}
    if len(predictions) != chunks or len(answered) != chunks:
        raise DemoFailed("not every chunk has exactly one prediction")
    if not drifts:
        raise DemoFailed(
            f"every chunk was answered, but nobody noticed within {DEGRADED_SECONDS} s that the microphone was covered:"
            " these clips differ more from each other than the cover changes them (README, `Not guaranteed yet`)"
        )
    if len(drifts) != 1 or len(seen[RETRAIN]) != 1:
        raise DemoFailed(f"one microphone went bad once, and there were {len(drifts)} drift events")
    late = drifts[0]["since"]["offset"] - CLEAN_SECONDS
    if not -20 <= late <= 20:
        raise DemoFailed(f"the microphone was covered at chunk {CLEAN_SECONDS}, and the event is {late} chunks off")
    print(f"The microphone was covered at chunk {CLEAN_SECONDS}. Retraining has been requested on drift.events.")


@contextmanager
def worker(work: Path, *command: str | Path) -> Iterator[None]:
    """Run a worker in the background; at the end tell it to stop, and insist that it drains and says 0."""
    announce("earshot-worker", *command, "&")
    log = work / "worker.log"
    with log.open("w") as errors, subprocess.Popen([BIN / "earshot-worker", *command], stderr=errors) as process:
        try:
            yield
        except BaseException:
            process.kill()
            print(log.read_text()[-2000:], file=sys.stderr)
            raise
        process.send_signal(signal.SIGTERM)
        if process.wait(timeout=30) != 0:
            raise DemoFailed(f"the worker ended with status {process.returncode}:\n{log.read_text()[-2000:]}")


def stream_of(live: Path) -> list[Path]:
    """Return sound files in a random order, repeated if need be, that last for the whole demo."""
    formats = {f".{name.lower()}" for name in soundfile.available_formats()}
    seconds_of = {path: _duration(path) for path in sorted(live.rglob("*")) if path.suffix.lower() in formats}
    clips = [path for path, seconds in seconds_of.items() if seconds > 0]
    if not clips:
        raise DemoFailed(f"there are no sound files in {live}")
    random.Random(0).shuffle(clips)
    files: list[Path] = []
    seconds = 0.0
    for clip in itertools.cycle(clips):
        files.append(clip)
        seconds += seconds_of[clip]
        if seconds >= CLEAN_SECONDS + DEGRADED_SECONDS:
            return files
    raise AssertionError("a cycle does not end")


def _duration(path: Path) -> float:
    """Return the seconds of a sound; none for what cannot be read, which training has listed already."""
    try:
        return float(soundfile.info(path).duration)
    except soundfile.LibsndfileError:
        return 0.0


def run(*command: str | Path, shown: Sequence[str | Path] | None = None) -> str:
    """Run one of Earshot's commands, print it and what it says, and return that."""
    announce(*(command if shown is None else (*command[:2], *shown)))
    done = subprocess.run([BIN / command[0], *command[1:]], stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        raise DemoFailed(f"`{command[0]} {command[1]}` ended with status {done.returncode}")
    return done.stdout


def announce(*command: str | Path) -> None:
    """Print a command as it would be typed."""
    print("$ " + " ".join(str(word) if str(word) == "&" else shlex.quote(str(word)) for word in command), flush=True)


def title(text: str) -> None:
    """Print the heading of a part."""
    print(f"\n{text}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
