"""How results are said: the names of measures, their units and their rounding.

This module owns the words and figures that the report and the model card share, so that the two never differ. It
must not know what a page looks like, or how anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from trainer.extract import SILENCE
from trainer.results import Evaluation, Measure, Search
from worker.bundle import Manifest

TITLES: Final = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "auroc": "macro-AUROC",
    "auprc": "macro-AUPRC",
    "top3": "truth among the first three",
    "calibration_error": "expected calibration error",
    "mae": "mean absolute error",
    "rmse": "root mean square error",
    "r2": "R²",
    "coverage": "truths inside their interval",
}

SHARES: Final = frozenset({"accuracy", "top3", "coverage", "calibration_error"})
"""Measures that are said in percent."""

IN_UNITS: Final = frozenset({"mae", "rmse"})
"""Measures that are in the unit of the label."""

NO_INTERVAL: Final = "one group: no interval"


class Row(NamedTuple):
    """One measure in words; what was not measured is an empty text."""

    title: str
    clip: str
    clip_interval: str
    window: str
    window_interval: str
    sounding: str
    sounding_interval: str
    leaky: str


def printable(text: str) -> str:
    """Return ``text`` on one line with nothing invisible in it; file names and labels may hold any character."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))


def title(name: str, label: str) -> str:
    """Return what the measure ``name`` is called, and its unit if that is the ``label``; a new one keeps its name."""
    called = TITLES.get(name, name.replace("_", " "))
    return f"{called} in {label}" if name in IN_UNITS else called


def figure(name: str, value: float) -> str:
    """Return the measure ``name`` as it is read: a percentage, or a number with about three digits."""
    if name in SHARES:
        return percent(value)
    return number(value) if name in IN_UNITS else f"{value:.3f}"


def interval(name: str, measure: Measure) -> str:
    """Return the 95 % interval of the measure ``name``, or why it has none; the sign of a percentage stands before."""
    if measure.low is None or measure.high is None:
        return NO_INTERVAL
    low, high = (figure(name, value).removesuffix(" %") for value in (measure.low, measure.high))
    return f"{low} to {high}"


def number(value: float) -> str:
    """Return a number to three digits at least, and without an exponent unless it is tiny."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def percent(share: float, decimals: int = 1) -> str:
    """Return a share between 0 and 1 as a percentage."""
    return f"{100 * share:.{decimals}f} %"


def duration(seconds: float) -> str:
    """Return a length to about three digits."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number and what is counted."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def headline(evaluation: Evaluation, search: Search | None = None) -> str:
    """Return in one sentence what the model is worth, from its first measure at clip level.

    After a search that is its measure on what the search never heard: the folds have chosen the settings.
    """
    unheard = search.held_out if search else {}
    name, measure = next(iter((unheard or evaluation.clip).items()))
    value, between = figure(name, measure.value), interval(name, measure)
    if between != NO_INTERVAL:
        between = f"95 % interval {between}"
    clips = f"clips that {'the search' if unheard else 'it'} had never heard"
    if name == "accuracy":
        return f"Of {clips}, it named {value} right ({between})."
    return f"On {clips}, its {title(name, evaluation.label)} is {value} ({between})."


def silence(evaluation: Evaluation) -> str:
    """Return how many windows are silent, and what that means; nothing if none is."""
    if not evaluation.silent:
        return ""
    return (
        f"{percent(evaluation.silent)} of the windows are silent: more than {-SILENCE:g} dB under the loudest of their "
        "clip. A worker hears such windows too."
    )


def rows(evaluation: Evaluation) -> list[Row]:
    """Return every measure of an evaluation: of clips, of windows, of those with sound, and as a leaky split claims."""

    def told(name: str, measures: Mapping[str, Measure]) -> tuple[str, str]:
        return (figure(name, measures[name].value), interval(name, measures[name])) if name in measures else ("", "")

    return [
        Row(
            title(name, evaluation.label),
            *told(name, evaluation.clip),
            *told(name, evaluation.window),
            *told(name, evaluation.sounding),
            figure(name, evaluation.leaky[name]) if name in evaluation.leaky else "",
        )
        for name in dict.fromkeys((*evaluation.clip, *evaluation.window, *evaluation.leaky))
    ]


def settings(manifest: Manifest) -> dict[str, str]:
    """Return every setting of a bundle by its dotted name; what it was measured and made of is told elsewhere."""
    plain = msgspec.to_builtins(manifest)
    return dict(_flat({name: plain[name] for name in plain if name not in {"classes", "metrics", "versions", "files"}}))


def parameters(chosen: Mapping[str, Any]) -> str:
    """Return a set of hyper-parameters on one line."""
    return ", ".join(f"{name} {value_of(value)}" for name, value in chosen.items())


def value_of(value: Any) -> str:
    """Return a setting as it is read: floats without a tail of digits, and a word where there is none."""
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(each, dict) for each in value):
        for number, each in enumerate(value):
            yield from _flat(each, f"{name}.{each.get('name', number)}")
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(value_of, value)) or "none"
    else:
        yield name, value_of(value)
