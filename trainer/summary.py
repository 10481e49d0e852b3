"""What a training or an evaluation has found out, as plain text for a terminal.

This module owns lines and columns. Words and figures are those of the report (`trainer.wording`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from trainer import wording
from trainer.results import ClassResult, Evaluation, Search
from worker.bundle import Manifest

RANKS: Final = 15
"""Candidates of a search that are listed; the report has all of them."""

LEAKY: Final = "a random split has windows of one clip on both sides: nobody will ever see its figure"


def model(manifest: Manifest) -> str:
    """Return in one line what was trained on what."""
    what = f"{len(manifest.classes)} classes" if manifest.classes else f"{manifest.label} (regression)"
    trees = f"{manifest.forest['n_estimators']} trees ({manifest.forest['kind']})"
    return wording.printable(f"{manifest.clips} clips, {manifest.windows} windows, {what}, {trees}")


def evaluation(found: Evaluation) -> str:
    """Return how clips were held out, all measures with their 95 % intervals, and how each class fares."""
    rows = [
        (
            row.title,
            _with_interval(row.clip, row.clip_interval),
            _with_interval(row.window, row.window_interval),
            _with_interval(row.sounding, row.sounding_interval),
            row.leaky,
        )
        for row in wording.rows(found)
    ]
    sounding = "windows with sound" if found.sounding else ""
    head = ("", "clips", "windows", sounding, "random split" if found.leaky else "")
    lines = [f"held out: {found.how}", *_aligned(_told([head, *rows]))]
    if found.sounding:
        lines.append(f"({wording.silence(found)})")
    if found.leaky:
        lines.append(f"({LEAKY})")
    if found.per_class:
        classes = [("class", "clips", "precision", "recall", "F1", "AUROC", "AUPRC"), *map(_class, found.per_class)]
        lines += ["", *_aligned(classes)]
    return "\n".join(lines)


def search(found: Search, label: str) -> str:
    """Return the best candidates with their scores, and what the best is worth on clips that it was not chosen by."""
    rows = [
        (
            str(rank),
            wording.parameters(each.parameters),
            f"{each.score:.3f} ± {each.deviation:.3f}",
            f"{each.seconds:.1f}",
        )
        for rank, each in enumerate(found.candidates[:RANKS], start=1)
    ]
    lines = [
        f"{wording.count(len(found.candidates), 'candidate')} ({found.strategy} search), by {found.scoring} of clips:",
        *_aligned([("", "parameters", f"{found.scoring} over the folds", "seconds"), *rows], left=2),
    ]
    if len(found.candidates) > RANKS:
        lines.append(f"  … and {len(found.candidates) - RANKS} more")
    lines.append("the first of them, on clips that were laid aside before:")
    held_out = [
        (wording.title(name, label), _with_interval(wording.figure(name, each.value), wording.interval(name, each)))
        for name, each in found.held_out.items()
    ]
    return "\n".join([*lines, *_aligned(held_out)])


def _with_interval(figure: str, interval: str) -> str:
    return f"{figure} ({interval})" if figure else ""


def _class(result: ClassResult) -> tuple[str, ...]:
    figures = (result.precision, result.recall, result.f1, result.auroc, result.auprc)
    name = f"{result.name} (background)" if result.background else result.name
    return (name, str(result.clips), *("" if figure is None else f"{figure:.2f}" for figure in figures))


def _told(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return rows without the columns that have no head, but for the first."""
    return [[cell for cell, head in zip(row, ("first", *rows[0][1:]), strict=True) if head] for row in rows]


def _aligned(rows: Sequence[Sequence[str]], left: int = 1) -> Iterator[str]:
    """Yield rows with their columns below each other, the first so many of them to the left."""
    clean = [[wording.printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    for row in clean:
        padded = zip(row, widths, strict=True)
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width) for column, (cell, width) in enumerate(padded)
        ]
        yield f"  {'  '.join(cells)}".rstrip()
