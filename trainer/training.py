"""From labelled clips to a model bundle, from top to bottom.

1. Decode each clip and cut it into the very windows that the worker will cut: train as you serve.
2. Score every window by a forest that has not seen its clip, nor any clip of its group.
3. Measure those scores, calibrate them, and keep their mean and spread as what normal looks like.
4. Fit the forest that is shipped, on everything.
5. Pick golden clips, run them through all of serving, and write the bundle.

With the same clips, settings and versions the forest is the same to the bit, on any number of cores.
"""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile

from trainer.augment import augmented, check
from trainer.augmentation import Augmentation
from trainer.cache import Cache
from trainer.dataset import Clip, Dataset, Index, data_hash
from trainer.documents import documents
from trainer.extract import Windows, featurize
from trainer.holdout import Truth, truth_of
from trainer.listening import Progress, Skipped, silent, sound_of
from trainer.models import ForestSpec, grown
from trainer.reference import reference_profile, watched_features
from trainer.report import Findings
from trainer.results import Evaluation, FamilyImportance, Search, Survey
from trainer.survey import survey as surveyed
from trainer.validation import Validation, cross_validate
from worker import bundle
from worker.bundle import Manifest
from worker.errors import Fatal
from worker.features import FeatureSpec, Featurizer
from worker.forest import Forest
from worker.golden import golden
from worker.profile import ReferenceProfile

COMPACT_SPEC: Final = FeatureSpec()
HUNDRED_TREES: Final = ForestSpec()

GOLDEN_CLIPS: Final = 8
"""Enough to meet most classes; each costs a few milliseconds whenever the bundle is loaded."""

GOLDEN_WINDOWS: Final = 2.0
"""The length of a golden clip in windows: more than one, so that windowing is replayed as well."""

UNNAMEABLE: Final = re.compile(r"[^A-Za-z0-9._-]+")
"""What cannot stand in a URI, and so not in the name of a model."""


class Fitted(NamedTuple):
    """What a training has brought."""

    manifest: Manifest
    evaluation: Evaluation
    importances: tuple[FamilyImportance, ...]
    skipped: list[Skipped]


def fit(
    dataset: Dataset,
    out: Path | str,
    *,
    name: str | None = None,
    spec: FeatureSpec = COMPACT_SPEC,
    forest: ForestSpec = HUNDRED_TREES,
    trees: int | None = None,
    folds: int = 5,
    augmentation: Augmentation | None = None,
    search: Search | None = None,
    survey: Survey | None = None,
    report: bool = False,
    seed: int = 0,
    jobs: int = -1,
    cache: Cache | None = None,
    on_progress: Progress = silent,
) -> Fitted:
    """Train a model on ``dataset`` and write it to ``out``.

    Args:
        dataset: the labelled clips; its task decides between a classifier and a regressor.
        out: the folder of the bundle; a bundle that stands there is replaced.
        name: what predictions call the model; by default what the folder is called.
        spec: the features, and the windows they are computed from.
        forest: what is grown.
        trees: how many, if ``forest`` is to have another number than it says.
        folds: how many, if the data set has none of its own.
        augmentation: what copies of the clips are trained on as well.
        search: how the settings of the forest were found, to be told with the model.
        survey: of ``dataset``, if it is known already.
        report: whether to write the report too, which takes a few seconds.
        seed: of the forest, the splits and the copies.
        jobs: processor cores to use; -1 is all of them. The result does not depend on it.
        cache: where features may be kept; the result does not depend on it either.
        on_progress: told how far the work is.

    Raises:
        Fatal: too many clips are unusable, nothing can be held out, the features cannot be computed
            at this rate, or ``out`` is something else.
    """
    out = Path(out)
    bundle.check_replaceable(out)
    if trees is not None:
        forest = msgspec.structs.replace(forest, n_estimators=trees)
    try:
        featurizer = Featurizer(spec)
    except ValueError as error:
        raise Fatal(str(error)) from error
    if augmentation is not None:
        check(augmentation, dataset.task, spec.sample_rate)
    survey = survey or surveyed(
        dataset, shortest_seconds=spec.shortest_seconds, jobs=jobs, cache=cache, on_progress=on_progress
    )
    windows = featurize(dataset, featurizer, jobs=jobs, cache=cache, on_progress=on_progress)
    if augmentation is not None:
        windows = augmented(
            windows, featurizer, augmentation, seed=seed, jobs=jobs, cache=cache, on_progress=on_progress
        )
    truth = truth_of(windows)
    validation = cross_validate(
        windows, truth, featurizer, forest, n_splits=folds, seed=seed, jobs=jobs, on_progress=on_progress
    )
    labels = np.array(truth.classes)[truth.targets] if truth.classes else truth.targets
    on_progress("fitting the forest", 0, 1)
    model = grown(forest.make(dataset.task, seed=seed, jobs=jobs), windows.features, labels)
    model.n_jobs = None  # how many cores trained it is nobody's business, and would change its bytes
    on_progress("fitting the forest", 1, 1)
    flat = Forest.from_sklearn(model)
    watched = watched_features(model.feature_importances_, featurizer.feature_names)
    profile = _profile(windows, truth, validation, featurizer, watched)
    clips = windows.dataset.clips

    def documents_for(manifest: Manifest) -> dict[str, str]:
        findings = Findings(
            manifest=manifest,
            survey=survey,
            evaluation=validation.evaluation,
            profile=profile,
            dataset=windows.dataset,
            importances=validation.importances,
            search=search,
            skipped=tuple(windows.skipped),
        )
        on_progress("writing what was found", 0, 1)
        found = documents(findings, with_report=report)
        on_progress("writing what was found", 1, 1)
        return found

    manifest = bundle.write(
        out,
        {
            "name": UNNAMEABLE.sub("-", name or out.resolve().name),
            "created": datetime.now(UTC).replace(microsecond=0),
            "task": dataset.task,
            "label": dataset.label,
            "classes": truth.classes,
            "watched": watched,
            "metrics": _metrics(validation.evaluation),
            "calibration": validation.calibration,
            "forest": msgspec.to_builtins(forest.settled(dataset.task)),
            "augmentation": msgspec.to_builtins(augmentation),
            "validation": {"folds": folds, "group": dataset.group},
            "search": _told(search),
            "seed": seed,
            "clips": len(clips),
            "windows": int((windows.copies == 0).sum()),
            "data_hash": data_hash(windows.dataset),
        },
        featurizer=featurizer,
        forest=model,
        profile=profile,
        goldens=[
            golden(featurizer, flat, _excerpt(clips[number], spec))
            for number in _golden_clips(windows.owner, truth.targets)
        ],
        documents=documents_for,
    )
    return Fitted(manifest, validation.evaluation, validation.importances, windows.skipped)


def _metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return the measures of clips by their names, and those of windows with ``window_`` before it."""
    clips = {name: measure.value for name, measure in evaluation.clip.items()}
    return clips | {f"window_{name}": measure.value for name, measure in evaluation.window.items()}


def _told(search: Search | None) -> dict[str, Any] | None:
    """Return what a manifest tells of a search: nothing that differs between two runs, as seconds do."""
    if search is None:
        return None
    return {
        "strategy": search.strategy,
        "scoring": search.scoring,
        "candidates": len(search.candidates),
        "best": search.best,
    }


def _profile(
    windows: Windows, truth: Truth, validation: Validation, featurizer: Featurizer, watched: tuple[str, ...]
) -> ReferenceProfile:
    tested = validation.held.fold >= 0
    return reference_profile(
        validation.calibration.apply(validation.held.scores[tested]),
        windows.features[tested],
        windows.gains[tested] if featurizer.spec.level_dbfs is not None else None,
        classes=truth.classes,
        watched=watched,
        names=featurizer.feature_names,
    )


def _golden_clips(owner: Index, targets: NDArray[Any]) -> list[int]:
    """Return the clips to keep as golden: the first of each class or value, spread over all of them."""
    _, first = np.unique(targets, return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, min(GOLDEN_CLIPS, len(first))).round().astype(int)]
    return [int(clip) for clip in owner[chosen]]


def _excerpt(clip: Clip, spec: FeatureSpec) -> bytes:
    """Return the beginning of a clip as a WAV file at its own rate, so that resampling is replayed too."""
    sound = sound_of(clip)
    samples = sound.samples[: round(GOLDEN_WINDOWS * spec.window_seconds * sound.sample_rate)]
    buffer = io.BytesIO()
    wavfile.write(buffer, sound.sample_rate, samples)  # libsndfile would put the time into a WAV file of floats
    return buffer.getvalue()
