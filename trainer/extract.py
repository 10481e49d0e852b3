"""From labelled clips to the features of all their windows.

This module owns what is extracted from a clip, and how the clips of a data set become one matrix. It
must not know about folds or models, nor where files are read and where the work is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from trainer.cache import Cache
from trainer.dataset import Clip, Dataset, Index, join_equal_sounds
from trainer.listening import Progress, Skipped, fingerprint, listen, silent
from worker.audio import Sound, resample
from worker.errors import Fatal
from worker.features import FeatureSpec, Featurizer

MOST_SKIPPED: Final = 0.1
"""A larger share of unusable clips is a mistake in the data set, and not a few bad files."""

SILENCE: Final = -60.0
"""Windows whose RMS is so many dB under the loudest window's of their clip hold no sound of it: recordings are cut and
padded, and a bark is over before its clip is. The worker hears such windows too, so they are learnt as all others."""

Waveform = NDArray[np.float32]


class Windows(NamedTuple):
    """All windows of all clips that can be used.

    ``features`` has shape (windows, features). Of each window, ``owner`` says which clip of ``dataset`` it
    is from, ``starts`` where in that clip it begins, in seconds, ``copies`` is 0 if it is as it was
    recorded, or the number of the augmented copy that it is from, and ``gains`` is by how many dB the
    featurizer levelled it, and ``silent`` whether it is under `SILENCE`. No clip is without a window, and
    none without one that is not silent.
    """

    dataset: Dataset
    features: NDArray[np.float32]
    owner: Index
    starts: NDArray[np.float64]
    copies: Index
    gains: NDArray[np.float32]
    silent: NDArray[np.bool_]
    skipped: list[Skipped]


class Change(Protocol):
    """What makes another sound of a clip's; it is sent to other processes."""

    @property
    def identity(self) -> Any:
        """All that decides what comes out, apart from the clip and the software: plain data for a key."""

    def __call__(self, samples: Waveform, sample_rate: int, clip: Clip, /) -> Waveform:
        """Return the changed waveform at the same rate."""


class Extracted(msgspec.Struct, frozen=True):
    """What is extracted of one clip: little-endian arrays as bytes, and the fingerprint of its sound.

    ``features`` is float32, (windows, features); ``starts`` float64, ``gains`` float32 and ``silent`` bool, (windows,).
    """

    features: bytes
    starts: bytes
    gains: bytes
    silent: bytes
    sound: str


class Extraction(NamedTuple):
    """The work of extracting a clip's features, after ``change`` if there is one."""

    spec: FeatureSpec
    change: Change | None = None

    @property
    def identity(self) -> Any:
        """The spec, and what the change hangs on."""
        return self.spec, None if self.change is None else self.change.identity

    def __call__(self, sound: Sound, clip: Clip) -> Extracted:
        """Return what is extracted of ``clip``."""
        spec, featurizer = self.spec, _featurizer(self.spec)
        samples = resample(sound.samples, sound.sample_rate, spec.sample_rate)
        if self.change is not None:
            samples = self.change(samples, spec.sample_rate, clip)
        windows = featurizer.windows(samples)
        last = max(samples.size - spec.window_samples, 0)
        starts = np.minimum(np.arange(len(windows)) * spec.window_hop_samples, last) / spec.sample_rate
        return Extracted(
            featurizer.transform(windows).astype("<f4").tobytes(),
            starts.astype("<f8").tobytes(),
            featurizer.gains(windows).astype("<f4").tobytes(),
            _silent(windows).tobytes(),
            fingerprint(sound),
        )


def featurize(
    dataset: Dataset,
    featurizer: Featurizer,
    *,
    jobs: int = -1,
    cache: Cache | None = None,
    on_progress: Progress = silent,
) -> Windows:
    """Decode all clips and compute the features of all their windows.

    Clips of equal sound are found here, whatever their bytes are: in the data set that comes back they
    are one group, and its warnings say so. Split that one.

    Args:
        dataset: the labelled clips.
        featurizer: what computes the features; its spec decides how clips are cut.
        jobs: processor cores to use; -1 is all of them. The result does not depend on it, nor on the cache.
        cache: where features may be kept.
        on_progress: told how many clips are done.

    Raises:
        Fatal: more clips are unreadable or empty than a data set may have.
    """
    work = Extraction(featurizer.spec)
    results = listen(
        [(clip, work) for clip in dataset.clips],
        Extracted,
        stage="listening to the clips",
        jobs=jobs,
        cache=cache,
        on_progress=on_progress,
    )
    skipped = [found for found in results if isinstance(found, Skipped)]
    too_many_skipped(skipped, len(dataset.clips))
    usable = [(clip, found) for clip, found in zip(dataset.clips, results, strict=True) if isinstance(found, Extracted)]
    kept = msgspec.structs.replace(dataset, clips=tuple(clip for clip, _ in usable))
    if cache is not None and cache.trouble is not None:
        kept = msgspec.structs.replace(kept, warnings=(*kept.warnings, cache.trouble))
    return windows_of(
        join_equal_sounds(kept, [found.sound for _, found in usable]),
        [(owner, 0, found) for owner, (_, found) in enumerate(usable)],
        skipped,
    )


def windows_of(dataset: Dataset, found: Iterable[tuple[int, int, Extracted]], skipped: list[Skipped]) -> Windows:
    """Join what was extracted; each comes with its clip's index in ``dataset``, and the number of its copy."""
    owners, copies, extracted = zip(*found, strict=True)
    starts = [np.frombuffer(each.starts, "<f8") for each in extracted]
    counts = [len(each) for each in starts]
    features = [np.frombuffer(each.features, "<f4").reshape(n, -1) for each, n in zip(extracted, counts, strict=True)]
    return Windows(
        dataset,
        np.concatenate(features),
        np.repeat(owners, counts),
        np.concatenate(starts),
        np.repeat(copies, counts),
        np.concatenate([np.frombuffer(each.gains, "<f4") for each in extracted]),
        np.concatenate([np.frombuffer(each.silent, "?") for each in extracted]),
        skipped,
    )


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


def _silent(windows: Waveform) -> NDArray[np.bool_]:
    """Return which windows of a clip are silent: none of a clip that is silent throughout."""
    powers = np.array([np.mean(np.square(window, dtype=np.float64)) for window in windows])
    silent: NDArray[np.bool_] = powers < powers.max() * 10 ** (SILENCE / 10)
    return silent


@lru_cache(maxsize=4)
def _featurizer(spec: FeatureSpec) -> Featurizer:
    """Return the featurizer of a spec; building its tables takes as long as listening to a clip."""
    return Featurizer(spec)
