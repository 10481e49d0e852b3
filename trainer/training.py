"""From labelled clips to a model bundle, from top to bottom.

1. Decode each clip and cut it into the very windows that the worker will cut: train as you serve.
2. Score every window by a forest that has not seen its clip, nor any clip of its group.
3. Measure those scores, and keep their mean and spread as what normal looks like.
4. Fit the forest that is shipped, on everything.
5. Pick golden clips, run them through all of serving, and write the bundle.

With the same clips, settings and versions the forest is the same to the bit, on any number of cores.
"""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from trainer import evaluation
from trainer.dataset import Dataset, data_hash
from trainer.evaluation import Index
from trainer.extract import Progress, Skipped, Windows, featurize
from trainer.splits import splits
from worker import bundle
from worker.audio import UNLIMITED, from_container
from worker.bundle import Manifest
from worker.errors import Fatal
from worker.features import FeatureSpec, Featurizer
from worker.forest import Forest

GOLDEN_CLIPS: Final = 8
"""Enough to meet most classes; each costs a few milliseconds whenever the bundle is loaded."""

GOLDEN_WINDOWS: Final = 2.0
"""The length of a golden clip in windows: more than one, so that windowing is replayed as well."""


class Fitted(NamedTuple):
    """What a training has brought."""

    manifest: Manifest
    skipped: list[Skipped]


def fit(
    dataset: Dataset,
    out: Path,
    *,
    name: str,
    spec: FeatureSpec,
    trees: int = 100,
    seed: int = 0,
    jobs: int = -1,
    on_progress: Progress = lambda _stage, _done, _total: None,
) -> Fitted:
    """Train a model on ``dataset`` and write it to ``out``.

    Args:
        dataset: the labelled clips; its task decides between a classifier and a regressor.
        out: the folder of the bundle; a bundle that stands there is replaced.
        name: what predictions call the model.
        spec: the features, and the windows they are computed from.
        trees: the size of the forest.
        seed: of the forest and of the splits.
        jobs: processor cores to use; -1 is all of them. The result does not depend on it.
        on_progress: told how far the work is.

    Raises:
        Fatal: too many clips are unusable, nothing can be held out, the features cannot be computed
            at this rate, or ``out`` is something else.
    """
    bundle.check_replaceable(out)
    try:
        featurizer = Featurizer(spec)
    except ValueError as error:
        raise Fatal(str(error)) from error
    windows = featurize(dataset, featurizer, jobs=jobs, on_progress=on_progress)
    targets, classes = _targets(windows)
    held_out = _held_out(windows, targets, classes, trees=trees, seed=seed, jobs=jobs, on_progress=on_progress)
    metrics = (
        evaluation.classification_metrics(held_out, targets, windows.owner)
        if classes
        else evaluation.regression_metrics(held_out, targets, windows.owner)
    )
    labels = np.array(classes)[targets] if classes else targets
    on_progress("fitting the forest", 0, 1)
    forest = _forest(dataset.task, trees, seed, jobs).fit(windows.features, labels)
    forest.n_jobs = None  # how many cores trained it is nobody's business, and would change its bytes
    on_progress("fitting the forest", 1, 1)
    watched = evaluation.watched_features(forest.feature_importances_, featurizer.feature_names)
    flat = Forest.from_sklearn(forest)
    manifest = bundle.write(
        out,
        {
            "name": name,
            "created": datetime.now(UTC).replace(microsecond=0),
            "task": dataset.task,
            "label": dataset.label,
            "classes": classes,
            "watched": watched,
            "metrics": metrics,
            "seed": seed,
            "trees": trees,
            "clips": len(windows.dataset.clips),
            "windows": len(windows.owner),
            "data_hash": data_hash(windows.dataset),
        },
        featurizer=featurizer,
        forest=forest,
        profile=evaluation.reference_profile(
            held_out, windows.features, classes=classes, watched=watched, names=featurizer.feature_names
        ),
        goldens=[
            bundle.golden(featurizer, flat, _excerpt(windows.dataset.clips[clip].path, spec))
            for clip in _golden_clips(windows.owner, targets)
        ],
    )
    return Fitted(manifest, windows.skipped)


def _targets(windows: Windows) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return what each window should be predicted as: class indices and the classes, or values and no class."""
    labels = [clip.label for clip in windows.dataset.clips]
    if windows.dataset.task == "regression":
        return np.array([float(label) for label in labels])[windows.owner], ()
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise Fatal(f"all usable clips have the label {labels[0]!r}: a classifier needs at least two classes")
    return codes[windows.owner], tuple(classes.tolist())


def _held_out(
    windows: Windows,
    targets: NDArray[Any],
    classes: tuple[str, ...],
    *,
    trees: int,
    seed: int,
    jobs: int,
    on_progress: Progress,
) -> NDArray[np.float64]:
    folds = splits(windows.dataset, seed=seed)

    def announced() -> Any:
        for done, fold in enumerate(folds):
            on_progress("testing on held-out clips", done, len(folds))
            yield fold
        on_progress("testing on held-out clips", len(folds), len(folds))

    return evaluation.held_out_scores(
        lambda: _forest(windows.dataset.task, trees, seed, jobs),
        windows.features,
        targets,
        windows.owner,
        announced(),
        outputs=len(classes) or 2,
    )


def _forest(task: str, trees: int, seed: int, jobs: int) -> Any:
    kind = RandomForestRegressor if task == "regression" else RandomForestClassifier
    return kind(n_estimators=trees, random_state=seed, n_jobs=jobs)


def _golden_clips(owner: Index, targets: NDArray[Any]) -> list[int]:
    """Return the clips to keep as golden: the first of each class or value, spread over all of them."""
    _, first = np.unique(targets, return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, min(GOLDEN_CLIPS, len(first))).round().astype(int)]
    return [int(clip) for clip in owner[chosen]]


def _excerpt(path: Path, spec: FeatureSpec) -> bytes:
    """Return the beginning of a clip as a WAV file at its own rate, so that resampling is replayed too."""
    sound = from_container(path.read_bytes(), UNLIMITED)
    samples = sound.samples[: round(GOLDEN_WINDOWS * spec.window_seconds * sound.sample_rate)]
    buffer = io.BytesIO()
    wavfile.write(buffer, sound.sample_rate, samples)  # libsndfile would put the time into a WAV file of floats
    return buffer.getvalue()
