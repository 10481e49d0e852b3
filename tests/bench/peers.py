"""What others would run: the article's loop, and the same work by faster libraries.

Each takes WAV bytes of one-second chunks and gives the probabilities of a forest. They are written
as their users write them, not as slowly as possible.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

import librosa
import numpy as np
import scipy.stats
import soundfile
from numpy.typing import NDArray

RATE: Final = 16_000
N_MFCC: Final = 20

Matrix = NDArray[Any]


def load(wav: bytes) -> Matrix:
    """Decode a chunk as notebooks do."""
    samples, _ = soundfile.read(io.BytesIO(wav), dtype="float32")
    return np.asarray(samples)


def load_any(data: bytes) -> Matrix:
    """Decode a chunk of any container and rate, and resample it to `RATE`."""
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    return np.asarray(samples if rate == RATE else librosa.resample(samples, orig_sr=rate, target_sr=RATE))


def article_features(samples: Matrix) -> Matrix:
    """Featurize one chunk with librosa: mel, dB, MFCC, means over the frames."""
    decibels = librosa.power_to_db(librosa.feature.melspectrogram(y=samples, sr=RATE))
    mfcc = librosa.feature.mfcc(S=decibels, n_mfcc=N_MFCC)
    return np.concatenate([decibels.mean(axis=1), mfcc.mean(axis=1)])


def rich_features(samples: Matrix) -> Matrix:
    """Compute the frame statistics of the feature set "rich" with librosa, numpy and scipy, from one transform."""
    frames: dict[str, Any] = {"n_fft": 1024, "hop_length": 256}
    feature = librosa.feature
    magnitude = np.abs(librosa.stft(samples, **frames))
    decibels = librosa.power_to_db(feature.melspectrogram(S=magnitude**2, sr=RATE, n_fft=1024, n_mels=64))
    rms = feature.rms(y=samples, frame_length=1024, hop_length=256)
    rows = np.concatenate(
        [
            decibels,
            feature.mfcc(S=decibels, n_mfcc=N_MFCC),
            feature.spectral_centroid(S=magnitude, sr=RATE, **frames),
            feature.spectral_bandwidth(S=magnitude, sr=RATE, **frames),
            feature.spectral_rolloff(S=magnitude, sr=RATE, **frames),
            feature.spectral_flatness(S=magnitude, **frames),
            feature.spectral_contrast(S=magnitude, sr=RATE, **frames),
            feature.zero_crossing_rate(samples, frame_length=1024, hop_length=256),
            rms,
        ]
    )[:, rms[0] >= rms.max() / 1000]
    steps = np.diff(rows)
    moments = [rows.mean(axis=1), rows.std(axis=1), scipy.stats.skew(rows, axis=1)]
    changes = [np.abs(steps).mean(axis=1), steps.std(axis=1), np.abs(steps).max(axis=1)]
    return np.stack([*moments, *changes, *np.quantile(rows, [0, 0.1, 0.5, 0.9, 1], axis=1)], axis=1).ravel()


def article_loop(wavs: Sequence[bytes], forest: Any) -> Matrix:
    """Predict chunk by chunk, as in the article."""
    return np.concatenate([forest.predict_proba([article_features(load(wav))]) for wav in wavs])


def batched_loop(wavs: Sequence[bytes], forest: Any) -> Matrix:
    """Featurize chunk by chunk and predict once for each poll."""
    return np.asarray(forest.predict_proba(np.array([article_features(load(wav)) for wav in wavs])))


def librosa_batched(wavs: Sequence[bytes], forest: Any) -> Matrix:
    """Give librosa all chunks of a poll at once; its dB are then relative to the loudest of them, which is wrong."""
    decibels = librosa.power_to_db(librosa.feature.melspectrogram(y=np.array([load(wav) for wav in wavs]), sr=RATE))
    mfcc = librosa.feature.mfcc(S=decibels, n_mfcc=N_MFCC)
    return np.asarray(forest.predict_proba(np.concatenate([decibels.mean(axis=-1), mfcc.mean(axis=-1)], axis=-1)))
