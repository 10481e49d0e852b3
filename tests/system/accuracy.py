"""`make accuracy`: how well a forest hears, by the public commands on public recordings, against marks.

It trains as a user would, on folds that say something: ESC-10's official ones, and notes of an instrument, or
of an instrument and a pitch, that the forest has not heard. What it prints is what `earshot-trainer fit`
found out about held-out clips; it ends with status 1 if a mark is missed.

Windows are told twice. One clip in five of ESC-10 is a shorter sound that was padded, mostly with digital silence, of
which nobody can say what it is: the mark is for windows that hold sound. What all windows give stands below it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.conftest import SHARED_DATA
from tests.system.processes import BIN

WORK: Final = Path("build/accuracy")

FOREST: Final = ("--forest", "extra-trees", "--trees", "500")
WHOLE_CLIPS: Final = ("--sample-rate", "22050", "--level", "-23", "--window-seconds", "5", "--window-hop-seconds", "5")
CLIPS: Final = ("--features", "rich", *WHOLE_CLIPS, *FOREST, "--max-features", "0.1")
COPIES: Final = ("--augment", "shift=0.2,stretch=0.9:1.1,pitch=-1:1,gain=-12:6")
WINDOWS: Final = ("--features", "rich+compact", "--sample-rate", "22050", *COPIES, *FOREST, "--max-features", "0.1")
NOTES: Final = ("--features", "pitch", *FOREST, "--label", "midi_pitch")


class Mark(NamedTuple):
    """A measure of held-out clips or windows, of a training with ``options``, and what it has to be.

    ``level`` is "clip", "window" or "sounding", as in `trainer.results.Evaluation`. ``at_least`` tells whether more
    is better; ``stretch`` is what would be better than that. Without a ``mark`` it is told and cannot be missed.
    """

    title: str
    data: str
    options: tuple[str, ...]
    level: str
    measure: str
    mark: float | None
    stretch: float | None
    at_least: bool

    def missed(self, value: float) -> bool:
        """Return whether ``value`` is worse than the mark."""
        if self.mark is None:
            return False
        return value < self.mark if self.at_least else value > self.mark

    def text(self, value: float | None) -> str:
        """Return a value as it is read."""
        if value is None:
            return ""
        return f"{100 * value:.2f} %" if self.measure == "accuracy" else f"{value:.2f} semitones"


MARKS: Final = (
    Mark("ESC-10, official folds, clips", "esc10", CLIPS, "clip", "accuracy", 0.905, 0.92, at_least=True),
    Mark(
        "ESC-10, official folds, windows of 1 s that hold sound",
        "esc10",
        WINDOWS,
        "sounding",
        "accuracy",
        0.82,
        0.84,
        at_least=True,
    ),
    Mark("  all of these windows, silent ones too", "esc10", WINDOWS, "window", "accuracy", None, None, at_least=True),
    Mark(
        "notes, grouped by instrument and pitch",
        "notes",
        (*NOTES, "--group", "group+midi_pitch"),
        "clip",
        "mae",
        1.0,
        0.7,
        at_least=False,
    ),
    Mark("notes, one instrument left out", "notes", (*NOTES, "--folds", "6"), "clip", "mae", 2.2, 1.5, at_least=False),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(prog="make accuracy", description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, default=SHARED_DATA, help="a folder with esc10 and notes")
    data: Path = parser.parse_args(argv).data
    missed = 0
    rows = [("", "measured", "95 % interval", "mark", "stretch", "")]
    for mark in MARKS:
        found = trained(data / mark.data, mark.options)["evaluation"][mark.level][mark.measure]
        value, low, high = found["value"], found["low"], found["high"]
        missed += mark.missed(value)
        verdict = "MISSED" if mark.missed(value) else "" if mark.mark is None else "ok"
        between = f"{mark.text(low).partition(' ')[0]} to {mark.text(high)}"
        rows.append((mark.title, mark.text(value), between, mark.text(mark.mark), mark.text(mark.stretch), verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for first, *others in rows:
        print("  ".join([first.ljust(widths[0]), *(map(str.rjust, others, widths[1:]))]).rstrip())
    return 1 if missed else 0


@cache
def trained(data: Path, options: tuple[str, ...]) -> Any:
    """Run `earshot-trainer fit` on ``data`` and return everything that it found out."""
    command = ["fit", str(data), "--out", str(WORK / data.name), *options, "--no-report"]
    print("$ earshot-trainer " + " ".join(command), flush=True)
    began = time.monotonic()
    done = subprocess.run([BIN / "earshot-trainer", *command, "--json"], stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise SystemExit(f"`earshot-trainer fit` ended with status {done.returncode}")
    print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
