"""What a model's world looks like when all is well: which numbers are watched, and what they are on held-out clips.

This module owns the choice of watched features and the reference profile. It must not know how the
scores were made (`trainer.holdout`), or what is done with the profile (`worker.drift`).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from worker.profile import ReferenceProfile, Signal, Vector, raw_signals, signal_names

WATCHED_FEATURES: Final = 8
"""How many of the most important features are watched: enough to say what changed, few enough that
a state stays at a few kilobytes."""

ALWAYS_WATCHED: Final = ("rms.mean", "centroid.mean", "bandwidth.mean", "flatness.mean")
"""Watched whatever their importance: level, colour and noise are what a microphone changes when it goes bad."""

FINEST_CONFIDENCE: Final = 0.01
"""The least spread of the confidence: what a hundred trees can tell apart. Of a few clips that are all easy, all
confidences are 1 within a millionth, and an ordinary one would be a hundred thousand spreads away."""


def watched_features(importances: Vector, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the most important features, and of `ALWAYS_WATCHED` those that there are."""
    ranked = [names[index] for index in np.argsort(-importances, kind="stable")[:WATCHED_FEATURES]]
    return (*ranked, *(name for name in ALWAYS_WATCHED if name in names and name not in ranked))


def reference_profile(
    held_out: Vector,
    features: NDArray[np.float32],
    gains: NDArray[np.float32] | None = None,
    *,
    classes: tuple[str, ...],
    watched: tuple[str, ...],
    names: tuple[str, ...],
) -> ReferenceProfile:
    """Return mean and spread of every watched signal over the held-out windows.

    ``held_out`` are calibrated scores, as a record's are, and ``gains`` those of a model that levels.
    A signal that never varies (a class that is never predicted) gets a spread of one in its own
    unit: there is nothing to measure a change by, and any other number would be made up.
    """
    columns = [names.index(name) for name in watched]
    raw = raw_signals(held_out, features, columns, gains, classifier=bool(classes))
    spread = raw.std(axis=0)
    spread[spread < 1e-12] = 1.0
    if classes:
        spread[0] = max(spread[0], FINEST_CONFIDENCE)
    return ReferenceProfile(
        tuple(
            Signal(name, mean, deviation)
            for name, mean, deviation in zip(
                signal_names(classes, watched, levelled=gains is not None),
                raw.mean(axis=0).tolist(),
                spread.tolist(),
                strict=True,
            )
        )
    )
