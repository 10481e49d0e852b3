"""Golden clips: sounds that a model carries with it, and what the trainer made of them.

Replaying them shows that this machine and these libraries still hear what the trainer heard. This
module owns the replay and how clips are packed; it must not know where a model is kept.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worker import audio
from worker.errors import BadModel, BadRecord
from worker.features import Featurizer
from worker.forest import Forest
from worker.profile import Vector

FEATURE_TOLERANCE: Final = 1e-3
"""How far a golden feature may be off, relative to its size or one: the last bits of an FFT or a
BLAS product differ between processors; a wrong rate, scale or filter shows in the first digits."""


class Golden(NamedTuple):
    """A clip, as the bytes of a WAV file, and what the trainer's featurizer and forest made of its windows."""

    wav: bytes
    features: NDArray[np.float32]
    scores: Vector


def scores(forest: Forest, features: NDArray[np.float32]) -> Vector:
    """Return what a forest says of each row of ``features``, shape (n, features).

    Returns:
        The probability of each class, shape (n, classes); for a regressor the value and the
        standard deviation over the trees, shape (n, 2).
    """
    if forest.classes is not None:
        return forest.predict_proba(features)
    return np.column_stack(forest.predict(features))


def window_mean(windows: NDArray[Any]) -> NDArray[Any]:
    """Return the mean over the windows of a record, shape (windows, numbers); most records have one."""
    mean: NDArray[Any] = windows[0] if len(windows) == 1 else windows.mean(axis=0, dtype=np.float64)
    return mean


def golden(featurizer: Featurizer, forest: Forest, wav: bytes) -> Golden:
    """Run a clip through the whole of serving and keep what came out."""
    features = featurizer.transform(_windows(featurizer, wav))
    return Golden(wav, features, scores(forest, features))


def replay(goldens: Sequence[Golden], featurizer: Featurizer, forest: Forest) -> None:
    """Hold what the clips give now against what they gave the trainer.

    Raises:
        BadModel: one of them gives something else, or there is none; the text says what differs.
    """
    if not goldens:
        raise BadModel("there is no golden clip: nothing shows that this model still does what it did")
    for number, each in enumerate(goldens):
        _replay(number, each, featurizer, forest)


def pack(goldens: Sequence[Golden]) -> bytes:
    """Return the clips as the bytes of an NPZ file."""
    buffer = io.BytesIO()
    arrays: dict[str, NDArray[Any]] = {}
    for number, clip in enumerate(goldens):
        arrays[f"wav-{number}"] = np.frombuffer(clip.wav, np.uint8)
        arrays[f"features-{number}"] = clip.features
        arrays[f"scores-{number}"] = clip.scores
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(packed: bytes) -> list[Golden]:
    """Return the clips that were packed.

    Raises:
        BadModel: these are other bytes.
    """
    try:
        with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
            count = len(arrays.files) // 3
            return [
                Golden(arrays[f"wav-{n}"].tobytes(), arrays[f"features-{n}"], arrays[f"scores-{n}"])
                for n in range(count)
            ]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise BadModel(f"the golden clips are not readable: {error}") from error


def _replay(number: int, expected: Golden, featurizer: Featurizer, forest: Forest) -> None:
    features = featurizer.transform(_windows(featurizer, expected.wav))
    if features.shape != expected.features.shape:
        raise BadModel(f"golden clip {number} gives {features.shape}, expected {expected.features.shape}")
    off = np.abs(features - expected.features) / np.maximum(np.abs(expected.features), 1.0)
    window, column = np.unravel_index(int(np.argmax(off)), off.shape)
    if not off[window, column] <= FEATURE_TOLERANCE:
        raise BadModel(
            f"golden clip {number} does not give the trainer's features: {featurizer.feature_names[column]} is"
            f" {features[window, column]:.6g}, expected {expected.features[window, column]:.6g}"
        )
    # From the same features the forest must give the same scores to the last bit: it only compares and adds.
    got = scores(forest, expected.features)
    if got.shape != expected.scores.shape:
        raise BadModel(f"golden clip {number} gives scores of {got.shape}, expected {expected.scores.shape}")
    if not np.array_equal(got, expected.scores):
        window, column = np.argwhere(got != expected.scores)[0]
        raise BadModel(
            f"golden clip {number} does not give the trainer's scores: output {column} of window"
            f" {window} is {got[window, column]:.6g}, expected {expected.scores[window, column]:.6g}"
        )


def _windows(featurizer: Featurizer, wav: bytes) -> NDArray[np.float32]:
    try:
        sound = audio.waveform(wav, "audio/wav", featurizer.spec.sample_rate, audio.UNLIMITED)
    except BadRecord as error:
        raise BadModel(f"a golden clip cannot be decoded: {error}") from error
    return featurizer.windows(sound.samples)
