"""From labelled clips to the features of all their windows.

This module owns how a clip is read and cut, and how that is spread over processor cores. What is
read, mixed, resampled and cut is what the worker would: train as you serve. It must not know about
folds or models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import joblib
import msgspec
import numpy as np
from numpy.typing import NDArray

from trainer.dataset import Dataset, Index
from worker.audio import from_container, resample
from worker.errors import BadRecord, Fatal
from worker.features import Featurizer

MOST_SKIPPED: Final = 0.1
"""A larger share of unusable clips is a mistake in the data set, and not a few bad files."""

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""


class Skipped(NamedTuple):
    """A clip that cannot be used, and why."""

    path: Path
    reason: str


class Windows(NamedTuple):
    """All windows of all clips that can be used.

    ``features`` has shape (windows, features). Of each window, ``owner`` says which clip of ``dataset`` it
    is from, ``starts`` where in that clip it begins, in seconds, and ``copies`` is 0 if it is as it was
    recorded, or the number of the augmented copy that it is from. No clip is without a window.
    """

    dataset: Dataset
    features: NDArray[np.float32]
    owner: Index
    starts: NDArray[np.float64]
    copies: Index
    skipped: list[Skipped]


def featurize(
    dataset: Dataset, featurizer: Featurizer, *, jobs: int = -1, on_progress: Progress = lambda _s, _d, _t: None
) -> Windows:
    """Decode all clips and compute the features of all their windows.

    Raises:
        Fatal: more clips are unreadable or empty than a data set may have.
    """
    usable, parts, starts, skipped = [], [], [], []
    tasks = (joblib.delayed(_features_of)(clip.path, featurizer) for clip in dataset.clips)
    results = joblib.Parallel(n_jobs=jobs, prefer="threads", return_as="generator")(tasks)
    for done, (clip, result) in enumerate(zip(dataset.clips, results, strict=True), start=1):
        if isinstance(result, BadRecord):
            skipped.append(Skipped(clip.path, result.detail))
        else:
            usable.append(clip)
            parts.append(result[0])
            starts.append(result[1])
        on_progress("listening to the clips", done, len(dataset.clips))
    too_many_skipped(skipped, len(dataset.clips))
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Windows(
        msgspec.structs.replace(dataset, clips=tuple(usable)),
        np.concatenate(parts),
        owner,
        np.concatenate(starts),
        np.zeros_like(owner),
        skipped,
    )


def read_clip(path: Path, sample_rate: int) -> NDArray[np.float32]:
    """Read any file that libsndfile reads as a mono waveform, shape (samples,), at ``sample_rate`` in Hz.

    Decoding, mixing and resampling are the worker's, so that a model is trained on what it is served.

    Raises:
        BadRecord: the file cannot be read, or holds no usable sound.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadRecord("undecodable", f"the file cannot be read: {error.strerror}") from error
    sound = from_container(data)
    return resample(sound.samples, sound.sample_rate, sample_rate)


def too_many_skipped(skipped: Sequence[Skipped], clips: int) -> None:
    """Do nothing if ``skipped`` are few among so many ``clips``.

    Raises:
        Fatal: they are more than `MOST_SKIPPED` of them.
    """
    if len(skipped) > MOST_SKIPPED * clips:
        examples = "; ".join(f"{path}: {reason}" for path, reason in skipped[:3])
        raise Fatal(
            f"{len(skipped)} of {clips} clips are unusable, more than {MOST_SKIPPED:.0%}; repair or remove them. "
            f"The first are {examples}"
        )


def _features_of(path: Path, featurizer: Featurizer) -> tuple[NDArray[np.float32], NDArray[np.float64]] | BadRecord:
    """Return the features of a clip's windows, and where they start in seconds."""
    spec = featurizer.spec
    try:
        waveform = read_clip(path, spec.sample_rate)
    except BadRecord as error:
        return error
    features = featurizer.transform(featurizer.windows(waveform))
    last = max(waveform.size - spec.window_samples, 0)
    starts = np.minimum(np.arange(len(features)) * spec.window_hop_samples, last) / spec.sample_rate
    return features, starts
