"""What a training finds out, as plain data: the command line, the report and the model card all tell it from here.

This module owns the shapes of results and nothing else: it must not know how any of them is
computed or shown. Everything is a `msgspec.Struct` of numbers and text, so that ``--json`` is one call.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Measure(msgspec.Struct, frozen=True):
    """A number and its 95 % interval, from drawing whole groups again (the bootstrap of Efron 1979).

    A single group drawn again is the same group, and tells nothing of how groups differ: then there is no interval.
    """

    value: float
    low: float | None
    high: float | None


Measures = dict[str, Measure]
"""By name. Classification: accuracy, macro_f1, auroc, auprc, top3, calibration_error. Regression: mae, rmse, r2,
coverage. Shares are between 0 and 1; errors are in the unit of the label."""


class ClassResult(msgspec.Struct, frozen=True):
    """How well one class is told from all others, at clip level; ``background`` is one that is learnt to be ignored.

    AUROC and AUPRC are None where the held-out clips are all of this class, or none is.
    """

    name: str
    clips: int
    precision: float
    recall: float
    f1: float
    auroc: float | None
    auprc: float | None
    background: bool = False


class ReliabilityBin(msgspec.Struct, frozen=True):
    """Of ``count`` windows whose mean confidence is ``confidence``, the share ``accuracy`` was right."""

    confidence: float
    accuracy: float
    count: int


class Reliability(msgspec.Struct, frozen=True):
    """Windows by confidence, and the expected calibration error (Guo et al. 2017), before and after calibration."""

    before: tuple[ReliabilityBin, ...]
    after: tuple[ReliabilityBin, ...]
    error_before: float
    error_after: float


class Answer(msgspec.Struct, frozen=True):
    """What was said of one held-out clip.

    ``name`` is the clip's in its data set. ``truth`` and ``said`` are classes, or values as text;
    ``confidence`` is that of ``said`` (classification), ``low`` and ``high`` the interval (regression).
    """

    name: str
    truth: str
    said: str
    confidence: float | None = None
    low: float | None = None
    high: float | None = None


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is worth on clips that it has not heard.

    ``how`` says in one sentence how clips were held out. ``clip`` and ``window`` are the measures
    of whole clips (the mean of their windows) and of single windows. ``leaky`` is what a random split
    of the windows would have claimed at window level, empty where it was not asked for.
    ``silent`` is the share of windows that hold nothing of their clip's sound (see `trainer.extract.SILENCE`),
    and ``sounding`` are the measures of all others, empty where none is silent.
    ``confusion[i][j]`` counts clips of class i called j. ``answers`` holds every held-out clip.
    """

    task: Literal["classification", "regression"]
    label: str
    classes: tuple[str, ...]
    how: str
    clip: Measures
    window: Measures
    leaky: dict[str, float]
    silent: float = 0.0
    sounding: Measures = {}
    per_class: tuple[ClassResult, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    reliability: Reliability | None = None
    answers: tuple[Answer, ...] = ()


class ClipFacts(msgspec.Struct, frozen=True):
    """What can be said of a clip without a model.

    Seconds, Hz; ``peak`` and ``rms`` are in dB relative to full scale (-inf is written as -120); ``clipped`` is the
    share of samples at full scale in runs, ``silent`` the share of time under -60 dBFS.
    """

    name: str
    seconds: float
    sample_rate: int
    channels: int
    peak: float
    rms: float
    clipped: float
    silent: float


class Survey(msgspec.Struct, frozen=True):
    """A data set at a glance. ``counts`` has the clips of each class, background classes among them."""

    clips: int
    groups: int
    seconds: float
    counts: dict[str, int]
    background: tuple[str, ...]
    facts: tuple[ClipFacts, ...]
    warnings: tuple[str, ...]


class Candidate(msgspec.Struct, frozen=True):
    """One set of hyper-parameters, its mean score over the folds, and their standard deviation."""

    parameters: dict[str, Any]
    score: float
    deviation: float
    seconds: float


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """A hyper-parameter search: ``candidates`` from the best to the worst by ``scoring``, accuracy or mae.

    ``held_out`` are the measures of the best one on clips that the search never saw.
    """

    strategy: Literal["grid", "random", "halving"]
    scoring: str
    candidates: tuple[Candidate, ...]
    best: dict[str, Any]
    held_out: Measures


class FamilyImportance(msgspec.Struct, frozen=True):
    """How much worse held-out windows are scored when all features of a family are shuffled together (Breiman 2001)."""

    family: str
    features: int
    drop: float
    deviation: float
