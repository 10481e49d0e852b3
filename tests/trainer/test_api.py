"""The Python API: what the command line does, as functions that a notebook can call."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainer
from tests.trainer.test_training import two_classes, written


def test_a_notebook(tmp_path: Path) -> None:
    """From clips to an answer, with text for paths and no other import."""
    data = str(written(tmp_path / "tones", two_classes()))
    clips = trainer.load(data)
    spec = trainer.feature_spec("article", window_seconds=0.25, window_hop_seconds=0.25)
    fitted = trainer.fit(clips, str(tmp_path / "bundle"), spec=spec, forest=trainer.ForestSpec(n_estimators=5))
    assert 1.0 == fitted.evaluation.clip["accuracy"].value
    assert "bundle" == fitted.manifest.name
    assert 1.0 == trainer.evaluate(str(tmp_path / "bundle"), data).evaluation.clip["accuracy"].value
    model = trainer.load_bundle(str(tmp_path / "bundle"))
    assert {clips.clips[n].label for n in (0, 1)} == set(model.manifest.classes)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (np.zeros(16_000, np.float32), "this is a single waveform; pass a list of waveforms"),
        ("clip.wav", "this is no list of waveforms; pass a list"),
        (Path("clip.wav"), "this is no list of waveforms; pass a list"),
        (["clip.wav"], "this is no list of waveforms; pass a list"),
        ((np.zeros(16_000, np.float32), 16_000), "this is no list of waveforms; pass a list"),
    ],
    ids=["waveform", "text", "path", "paths", "with its rate"],
)
def test_what_is_no_list_of_waveforms(machine_bundle: Path, given: Any, complaint: str) -> None:
    """It is said what to pass instead, whatever is asked."""
    model = trainer.load_bundle(machine_bundle)
    for ask in (model.predict, model.predict_proba):
        with pytest.raises(TypeError, match=complaint):
            ask(given)


@pytest.mark.parametrize("name", trainer.FOUND_IN)
def test_every_name_is_found(name: str) -> None:
    """Each is a class or function, also where the modules of the package were imported before."""
    import_module(trainer.FOUND_IN[name])
    assert callable(getattr(trainer, name))
    assert name in dir(trainer)


def test_a_name_that_there_is_not() -> None:
    """Those that there are stand beside it."""
    with pytest.raises(AttributeError, match=r"no attribute 'train'; it has .*fit"):
        _ = trainer.train


def test_importing_it_is_fast() -> None:
    """Nothing that takes its time is imported before it is asked for."""
    code = "import sys, trainer; print({'sklearn', 'numba', 'numpy', 'librosa'} & {*sys.modules})"
    assert "set()\n" == subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
