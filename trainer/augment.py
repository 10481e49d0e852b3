"""More sounds to train on: copies of clips as they might have been heard elsewhere.

This module owns how a copy is made, and which copies there are. The transforms themselves are
audiomentations'; codecs are libsndfile's. It must not know about folds or models: `Windows.copies`
says which rows are of copies, and whoever splits trains on those of the clips that are trained on,
and tests on none.

A copy hangs on the seed, the content of its clip and its own number, and on nothing else: not on the
number of processes, nor on which clips there are beside it.
"""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, cast

import audiomentations  # type: ignore[import-untyped]  # it ships no types
import msgspec
import numpy as np
import soundfile

from trainer.augmentation import CODECS, RANGES, Augmentation
from trainer.cache import Cache
from trainer.dataset import Clip
from trainer.extract import Extracted, Extraction, Waveform, Windows, windows_of
from trainer.listening import Progress, listen, silent
from worker.errors import Fatal
from worker.features import Featurizer

COMPRESSIBLE: Final = {"vorbis": 1.0, "opus": 1.0, "mp3": 0.999}
"""Codecs whose quality can be chosen, with the worst that there is; it is drawn at random between the best and that.
libsndfile refuses to compress an MP3 as far as it goes."""

PITCHED: Final = ("stretch", "pitch")
"""These change the speed or the pitch, and with it many a quantity that could be a label."""

_GLOBAL_RANDOM: Final = threading.Lock()
"""audiomentations draws from the random numbers of the whole process; two threads would share them."""


def check(augmentation: Augmentation, task: str, sample_rate: int) -> None:
    """Check that this can be done to sound at ``sample_rate`` in Hz, and leaves the labels true.

    Raises:
        Fatal: it cannot, or does not.
    """
    pitched = [name for name in PITCHED if getattr(augmentation, name) is not None]
    if task == "regression" and pitched:
        raise Fatal(
            f"--augment {pitched[0]} changes the pitch or the speed of a sound, so its label would no longer be "
            "true of it; leave it out where the label is a quantity"
        )
    for name in ("highpass", "lowpass"):
        cutoff = getattr(augmentation, name)
        if cutoff is not None and cutoff[1] >= sample_rate / 2:
            raise Fatal(
                f"--augment {name} is up to {cutoff[1]:g} Hz; expected less than {sample_rate / 2:g} Hz, half of "
                "the sample rate"
            )
    for codec in augmentation.codec:
        try:
            _through(np.zeros(sample_rate, np.float32), sample_rate, codec)
        except soundfile.LibsndfileError as error:
            raise Fatal(f"--augment codec={codec} at {sample_rate} Hz: {error.error_string}") from error


def augmented(
    windows: Windows,
    featurizer: Featurizer,
    augmentation: Augmentation,
    *,
    seed: int = 0,
    jobs: int = -1,
    cache: Cache | None = None,
    on_progress: Progress = silent,
) -> Windows:
    """Return the same windows, followed by those of the augmented copies of all clips.

    A copy belongs to its clip: train on the rows that the training clips own, and test on those rows of
    the held-out clips whose ``copies`` is 0. Whatever describes the data itself is of those rows, too.

    Args:
        windows: what has been extracted of the clips as they were recorded.
        featurizer: what it was extracted with.
        augmentation: what is done to the copies.
        seed: another one, other copies.
        jobs: processor cores to use; -1 is all of them. The result does not depend on it.
        cache: where features may be kept.
        on_progress: told how many copies are done.

    Raises:
        Fatal: this augmentation cannot be used for these labels, or at this sample rate.
    """
    check(augmentation, windows.dataset.task, featurizer.spec.sample_rate)
    places = [
        (owner, copy) for copy in range(1, augmentation.copies + 1) for owner in range(len(windows.dataset.clips))
    ]
    found = listen(
        [
            (windows.dataset.clips[owner], Extraction(featurizer.spec, Altered(augmentation, seed, copy)))
            for owner, copy in places
        ],
        Extracted,
        stage="augmenting the clips",
        jobs=jobs,
        cache=cache,
        on_progress=on_progress,
    )
    copies = windows_of(
        windows.dataset,
        [(*place, each) for place, each in zip(places, found, strict=True) if isinstance(each, Extracted)],
        windows.skipped,
    )
    return Windows(
        windows.dataset,
        np.concatenate([windows.features, copies.features]),
        np.concatenate([windows.owner, copies.owner]),
        np.concatenate([windows.starts, copies.starts]),
        np.concatenate([windows.copies, copies.copies]),
        np.concatenate([windows.gains, copies.gains]),
        np.concatenate([windows.silent, copies.silent]),
        windows.skipped,
    )


class Altered(NamedTuple):
    """What makes the copy of this number of a clip."""

    augmentation: Augmentation
    seed: int
    copy: int

    @property
    def identity(self) -> Any:
        """All of it: other settings, seeds and numbers make other copies."""
        return tuple(self)

    def __call__(self, samples: Waveform, sample_rate: int, clip: Clip) -> Waveform:
        """Return the copy, at the same rate; it may be shorter or longer."""
        with _seeded(self.seed, clip.sha256, clip.start, clip.end, self.copy):
            for transform in _transforms(self.augmentation):
                samples = transform(samples, sample_rate)
            if self.augmentation.codec:
                codec = random.choice(self.augmentation.codec)  # noqa: S311  # nothing is secret about it
                samples = _through(samples, sample_rate, codec, random.random())  # noqa: S311  # nor about this
        return samples


def _transforms(augmentation: Augmentation) -> Iterator[Any]:
    """Yield what is done, in the order from a sound's source over the room to its recorder."""
    ranges = {name: getattr(augmentation, name) for name in RANGES}
    if ranges["stretch"]:
        yield audiomentations.TimeStretch(*ranges["stretch"], leave_length_unchanged=False, p=1.0)
    if ranges["pitch"]:
        yield audiomentations.PitchShift(*ranges["pitch"], p=1.0)
    if augmentation.shift is not None:
        yield audiomentations.Shift(-augmentation.shift, augmentation.shift, p=1.0)
    for name, kind in (
        ("noise", audiomentations.AddGaussianSNR),
        ("highpass", audiomentations.HighPassFilter),
        ("lowpass", audiomentations.LowPassFilter),
        ("gain", audiomentations.Gain),
    ):
        if ranges[name]:
            yield kind(*ranges[name], p=1.0)


def _through(samples: Waveform, sample_rate: int, codec: str, compression: float = 0.0) -> Waveform:
    """Encode and decode; of what is encoded, samples beyond full scale are clipped, and so is the length."""
    container, encoding = CODECS[codec]
    chosen = {"compression_level": min(compression, COMPRESSIBLE[codec])} if codec in COMPRESSIBLE else {}
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(samples, -1.0, 1.0), sample_rate, format=container, subtype=encoding, **chosen)
    buffer.seek(0)
    decoded, _ = soundfile.read(buffer, dtype="float32")
    return cast("Waveform", decoded[: samples.size])


@contextmanager
def _seeded(*parts: Any) -> Iterator[None]:
    """Let the random numbers of the process hang on ``parts`` alone, and go on afterwards as if nothing had been."""
    digest = hashlib.sha256(msgspec.json.encode(parts)).digest()
    with _GLOBAL_RANDOM:
        before, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002  # what audiomentations draws from
        try:
            random.seed(digest)
            np.random.seed(int.from_bytes(digest[:4], "little"))  # noqa: NPY002  # as above
            yield
        finally:
            random.setstate(before)
            np.random.set_state(legacy)  # noqa: NPY002  # as above
