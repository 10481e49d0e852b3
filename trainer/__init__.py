"""Earshot's trainer: labelled clips in, a model bundle for the worker out.

What the command line does, as functions::

    import trainer

    clips = trainer.load("clips")
    fitted = trainer.fit(clips, "bundle", trees=300)
    print(fitted.evaluation.clip["accuracy"])
    print(trainer.evaluate("bundle", "new-clips").evaluation.clip["accuracy"])

    model = trainer.load_bundle("bundle")
    print(model.predict([waveform]))

Each is imported when it is first asked for, so that ``--help`` need not wait for any of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

FOUND_IN: Final = {
    "AudioFeatures": "trainer.transformer",
    "Augmentation": "trainer.augmentation",
    "Cache": "trainer.cache",
    "FeatureSpec": "worker.features",
    "ForestSpec": "trainer.models",
    "evaluate": "trainer.verdict",
    "feature_spec": "worker.features",
    "fit": "trainer.training",
    "load": "trainer.dataset",
    "load_bundle": "worker.bundle",
    "tune": "trainer.tuning",
}


def __getattr__(name: str) -> Any:
    if name not in FOUND_IN:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}; it has {', '.join(FOUND_IN)}")
    return getattr(import_module(FOUND_IN[name]), "load" if name == "load_bundle" else name)


def __dir__() -> list[str]:
    return [*globals(), *FOUND_IN]
