"""What a training or an evaluation has found out, as plain text for a terminal.

This module owns lines and columns. Words and figures are those of the report (`trainer.wording`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from trainer import wording
from trainer.results import ClassResult, Evaluation
from worker.bundle import Manifest

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
            row.leaky,
        )
        for row in wording.rows(found)
    ]
    lines = [
        f"held out: {found.how}",
        *_aligned([("", "clips", "windows", "random split" if found.leaky else ""), *rows]),
    ]
    if found.leaky:
        lines.append(f"({LEAKY})")
    if found.per_class:
        classes = [("class", "clips", "precision", "recall", "F1", "AUROC", "AUPRC"), *map(_class, found.per_class)]
        lines += ["", *_aligned(classes)]
    return "\n".join(lines)


def _with_interval(figure: str, interval: str) -> str:
    return f"{figure} ({interval})" if figure else ""


def _class(result: ClassResult) -> tuple[str, ...]:
    figures = (result.precision, result.recall, result.f1, result.auroc, result.auprc)
    name = f"{result.name} (background)" if result.background else result.name
    return (name, str(result.clips), *("" if figure is None else f"{figure:.2f}" for figure in figures))


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows with their first column to the left, and the others below each other."""
    clean = [[wording.printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    for first, *others in clean:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        yield f"  {'  '.join(cells)}".rstrip()
