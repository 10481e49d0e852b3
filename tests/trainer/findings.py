"""Findings of a small training, made with scikit-learn alone: something true to show, without the trainer."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score
from sklearn.model_selection import GroupKFold

from trainer.dataset import Clip, Dataset
from trainer.listening import read_clip
from trainer.report import Findings
from trainer.results import (
    Answer,
    Candidate,
    ClassResult,
    Evaluation,
    FamilyImportance,
    Measure,
    Reliability,
    ReliabilityBin,
    Search,
)
from trainer.survey import survey
from worker.bundle import Manifest
from worker.features import FeatureSpec, Featurizer
from worker.profile import ReferenceProfile, Signal


def learned(dataset: Dataset, manifest: Manifest) -> Findings:
    """Hold whole groups out, train on the rest, and put what was said of them beside made-up details."""
    featurizer = Featurizer(FeatureSpec())
    features = np.array([_features(clip, featurizer) for clip in dataset.clips])
    labels = np.array([clip.label for clip in dataset.clips])
    folds = list(GroupKFold(5).split(features, groups=[clip.group for clip in dataset.clips]))
    make = _classification if dataset.task == "classification" else _regression
    evaluation = make(dataset, features, labels, folds)
    watched = featurizer.feature_names[:3]
    signals = ("confidence", *(f"share.{name}" for name in evaluation.classes)) if evaluation.classes else ("value",)
    return Findings(
        manifest=msgspec.structs.replace(
            manifest,
            task=dataset.task,
            label=dataset.label,
            classes=evaluation.classes,
            clips=len(dataset.clips),
            watched=watched,
        ),
        survey=survey(dataset, jobs=1),
        evaluation=evaluation,
        importances=tuple(
            FamilyImportance(name, size, drop, 0.004)
            for name, size, drop in (
                ("mfcc", 40, 0.112),
                ("contrast", 14, 0.067),
                ("rms", 2, 0.021),
                ("zcr", 2, -0.001),
            )
        ),
        profile=ReferenceProfile(
            tuple(Signal(name, 0.2, 0.1) for name in (*signals, *(f"feature.{w}" for w in watched)))
        ),
        dataset=dataset,
        search=searched(evaluation.clip),
    )


def searched(held_out: dict[str, Measure]) -> Search:
    """A grid of two parameters that matter and one that does not."""
    return Search(
        strategy="grid",
        scoring="accuracy",
        candidates=tuple(
            Candidate(
                {"n_estimators": trees, "max_depth": depth, "min_samples_leaf": leaf},
                0.6 + 0.04 * math.log10(trees) + (0.05 if depth is None else 0.004 * depth) - 0.002 * leaf,
                0.02,
                trees / 50,
            )
            for trees in (50, 100, 200)
            for depth in (5, 10, None)
            for leaf in (1, 2)
        ),
        best={"n_estimators": 200, "max_depth": None, "min_samples_leaf": 1},
        held_out=held_out,
    )


def _features(clip: Clip, featurizer: Featurizer) -> NDArray[np.float64]:
    waveform = read_clip(clip, featurizer.spec.sample_rate)
    features: NDArray[np.float64] = featurizer.transform(featurizer.windows(waveform)).mean(axis=0, dtype=np.float64)
    return features


def _classification(dataset: Dataset, features: Any, labels: Any, folds: Any) -> Evaluation:
    classes = tuple(sorted(set(labels.tolist())))
    scores = np.zeros((len(labels), len(classes)))
    for train, test in folds:
        forest = ExtraTreesClassifier(60, random_state=0).fit(features[train], labels[train])
        scores[np.ix_(test, np.searchsorted(classes, forest.classes_))] = forest.predict_proba(features[test])
    said = np.array(classes)[scores.argmax(axis=1)]
    right, confidence = said == labels, scores.max(axis=1)
    precision, recall, f1, clips = precision_recall_fscore_support(labels, said, labels=classes, zero_division=0.0)
    auroc = [roc_auc_score(labels == name, scores[:, column]) for column, name in enumerate(classes)]
    measures = {"accuracy": _about(float(right.mean())), "macro_f1": _about(float(f1.mean()))}
    return Evaluation(
        task="classification",
        label=dataset.label,
        classes=classes,
        how="Five folds of whole groups: no clip was scored by a forest that knew its recording.",
        clip={**measures, "auroc": _about(float(np.mean(auroc))), "calibration_error": Measure(0.061, 0.05, 0.08)},
        window={name: _about(measure.value - 0.06) for name, measure in measures.items()},
        leaky={"accuracy": min(1.0, float(right.mean()) + 0.07)},
        silent=0.125,
        sounding={name: _about(measure.value - 0.02) for name, measure in measures.items()},
        per_class=tuple(
            ClassResult(name, int(clips[n]), float(precision[n]), float(recall[n]), float(f1[n]), float(auroc[n]), None)
            for n, name in enumerate(classes)
        ),
        confusion=tuple(map(tuple, confusion_matrix(labels, said, labels=classes).tolist())),
        reliability=Reliability(
            before=_bins(confidence, right),
            after=_bins(np.sqrt(confidence), right),
            error_before=0.14,
            error_after=0.03,
        ),
        answers=tuple(
            Answer(clip.name, clip.label, str(name), confidence=float(score))
            for clip, name, score in zip(dataset.clips, said, confidence, strict=True)
        ),
    )


def _regression(dataset: Dataset, features: Any, labels: Any, folds: Any) -> Evaluation:
    truth = labels.astype(float)
    said, spread = np.zeros(len(truth)), np.zeros(len(truth))
    for train, test in folds:
        forest = ExtraTreesRegressor(60, random_state=0, min_samples_leaf=2).fit(features[train], truth[train])
        trees = np.array([tree.predict(features[test]) for tree in forest.estimators_])
        said[test], spread[test] = trees.mean(axis=0), trees.std(axis=0)
    error = np.abs(said - truth)
    measures = {"mae": float(error.mean()), "rmse": float(np.sqrt((error**2).mean())), "r2": 0.9, "coverage": 0.88}
    return Evaluation(
        task="regression",
        label=dataset.label,
        classes=(),
        how="Five folds of whole groups: no clip was scored by a forest that knew its recording.",
        clip={name: Measure(value, 0.9 * value, 1.1 * value) for name, value in measures.items()},
        window={name: Measure(value, 0.9 * value, 1.1 * value) for name, value in measures.items()},
        leaky={"mae": 0.2 * measures["mae"]},
        answers=tuple(
            Answer(clip.name, clip.label, f"{value:.2f}", low=value - 1.6 * deviation, high=value + 1.6 * deviation)
            for clip, value, deviation in zip(dataset.clips, said.tolist(), spread.tolist(), strict=True)
        ),
    )


def _about(value: float) -> Measure:
    return Measure(value, max(0.0, value - 0.04), min(1.0, value + 0.03))


def _bins(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[ReliabilityBin, ...]:
    tenth = np.minimum((confidence * 10).astype(int), 9)
    return tuple(
        ReliabilityBin(float(confidence[tenth == n].mean()), float(right[tenth == n].mean()), int((tenth == n).sum()))
        for n in np.unique(tenth)
    )
