"""What a stream framework is given to call for each chunk: the article's code, or Earshot's functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import joblib

from tests.bench import peers
from worker import audio
from worker.bundle import FOREST, load

Function = Callable[[bytes], dict[str, float]]


def function(which: str, model: str) -> Function:
    """Return "article" (librosa and scikit-learn, chunk by chunk) or "fast" (the same by Earshot)."""
    if which == "article":
        forest = joblib.load(Path(model) / FOREST)
        classes = [str(name) for name in forest.classes_]

        def article(wav: bytes) -> dict[str, float]:
            return dict(zip(classes, peers.article_loop([wav], forest)[0].tolist(), strict=True))

        return article
    bundle = load(Path(model))
    rate = bundle.featurizer.spec.sample_rate

    def fast(wav: bytes) -> dict[str, float]:
        sound = audio.waveform(wav, "audio/wav", rate, audio.UNLIMITED)
        scores = bundle.scores(bundle.featurizer.transform(bundle.featurizer.windows(sound.samples)))
        return dict(zip(bundle.manifest.classes, scores.mean(axis=0).tolist(), strict=True))

    return fast
