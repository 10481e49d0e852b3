"""What a bundle is worth on other clips.

This module owns which clips a model may be judged by: those that it was trained on are known by their
bytes, and left out. If there are no others, its kind is judged instead: forests by its settings, on
folds. It must not know how anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from trainer import validation
from trainer.augment import augmented
from trainer.augmentation import Augmentation
from trainer.cache import Cache
from trainer.dataset import Dataset, load
from trainer.documents import kept
from trainer.evaluation import of_scores
from trainer.extract import Windows, featurize
from trainer.holdout import HeldOut, Truth, truth_of
from trainer.layouts import find_manifest
from trainer.listening import Progress, silent
from trainer.models import ForestSpec
from trainer.results import Evaluation
from worker import bundle
from worker.bundle import Bundle
from worker.errors import Fatal


class Verdict(NamedTuple):
    """An evaluation, and what has to be known about the clips behind it."""

    evaluation: Evaluation
    warnings: tuple[str, ...]


def evaluate(
    path: Path | str,
    data: Path | str,
    *,
    jobs: int = -1,
    cache: Cache | None = None,
    on_progress: Progress = silent,
) -> Verdict:
    """Say what the bundle at ``path`` is worth on the labelled clips in ``data``.

    Args:
        path: the folder of the bundle.
        data: clips with labels in the column, or folders, that the model was trained with.
        jobs: processor cores to use; -1 is all of them. The result does not depend on it.
        cache: where features may be kept.
        on_progress: told how far the work is.

    Raises:
        BadModel: the bundle cannot be loaded.
        Fatal: the clips cannot be used, or one has a class that the model does not know.
    """
    path, data = Path(path), Path(data)
    model = bundle.load(path)
    manifest = model.manifest
    label = "label" if find_manifest(data) is None else manifest.label
    dataset = load(data, label=label, task=manifest.task, group=manifest.validation["group"])
    _check_classes(dataset, manifest.classes)
    heard = set(kept(path).clips.values())
    fresh = tuple(clip for clip in dataset.clips if clip.sha256 not in heard)
    known = len(dataset.clips) - len(fresh)
    warnings = dataset.warnings
    if fresh:
        if known:
            warnings += (f"{known} of {len(dataset.clips)} clips are those that the model was trained on; left out",)
        dataset = msgspec.structs.replace(dataset, clips=fresh)
    windows = featurize(dataset, model.featurizer, jobs=jobs, cache=cache, on_progress=on_progress)
    warnings += tuple(f"{path} cannot be used: {reason}" for path, reason in windows.skipped)
    if fresh:
        return Verdict(_of_model(model, windows), warnings)
    warnings += (
        "the model was trained on all of these clips, so others of its kind are measured, trained on folds of them",
    )
    return Verdict(_of_its_kind(model, windows, jobs=jobs, cache=cache, on_progress=on_progress), warnings)


def _check_classes(dataset: Dataset, classes: Sequence[str]) -> None:
    unknown = sorted({clip.label for clip in dataset.clips} - set(classes)) if classes else []
    if unknown:
        example = next(clip.name for clip in dataset.clips if clip.label == unknown[0])
        raise Fatal(
            f"{example} is labelled {unknown[0]!r}, and the model knows {', '.join(classes)}; label it as one of "
            f"these, or leave it out{f' (so too {len(unknown) - 1} more classes)' if len(unknown) > 1 else ''}"
        )


def _of_model(model: Bundle, windows: Windows) -> Evaluation:
    manifest, labels = model.manifest, [clip.label for clip in windows.dataset.clips]
    if manifest.classes:
        codes = np.array([manifest.classes.index(label) for label in labels])
        truth = Truth(codes[windows.owner], manifest.classes)
    else:
        truth = truth_of(windows)
    held = HeldOut(model.scores(windows.features), np.zeros(len(windows.owner), np.intp))
    how = f"{len(labels)} clips that the model was not trained on."
    return of_scores(windows, truth, held, [manifest.calibration], how=how, seed=manifest.seed)


def _of_its_kind(
    model: Bundle, windows: Windows, *, jobs: int, cache: Cache | None, on_progress: Progress
) -> Evaluation:
    manifest = model.manifest
    if manifest.augmentation is not None:
        augmentation = msgspec.convert(manifest.augmentation, Augmentation)
        windows = augmented(
            windows, model.featurizer, augmentation, seed=manifest.seed, jobs=jobs, cache=cache, on_progress=on_progress
        )
    return validation.cross_validate(
        windows,
        truth_of(windows),
        model.featurizer,
        msgspec.convert(manifest.forest, ForestSpec),
        n_splits=manifest.validation["folds"],
        seed=manifest.seed,
        jobs=jobs,
        on_progress=on_progress,
    ).evaluation
