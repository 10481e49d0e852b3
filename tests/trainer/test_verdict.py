"""A bundle on other clips: what it has heard is known again and left out, and what it cannot know is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import soundfile

from tests.trainer.test_training import SPEC, Sound, two_classes, written
from trainer.dataset import load
from trainer.models import ForestSpec
from trainer.results import Evaluation
from trainer.simulate import simulate
from trainer.training import fit
from trainer.verdict import evaluate
from worker import bundle
from worker.errors import Fatal

FOREST = ForestSpec(kind="extra-trees", n_estimators=7, max_depth=4)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("training") / "clips", two_classes())


@pytest.fixture(scope="module")
def model(training: Path) -> Path:
    fit(load(training), training.parent / "model", spec=SPEC, forest=FOREST, seed=3, folds=4)
    return training.parent / "model"


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Twenty clips of the same two classes, and other tones."""
    return written(tmp_path / "others", [sound._replace(frequency=sound.frequency * 1.1) for sound in two_classes()])


def test_clips_that_are_new(model: Path, others: Path) -> None:
    """The model itself is measured, with its own calibration; there is nothing to warn of."""
    found, warnings = evaluate(model, others)
    assert () == warnings
    assert "20 clips that the model was not trained on." == found.how
    assert (20, 1.0, {}) == (len(found.answers), found.clip["accuracy"].value, found.leaky)
    loaded = bundle.load(model)
    clip = load(others).clips[0]
    answers = loaded.predict_proba([soundfile.read(clip.path, dtype="float32")[0]])
    assert answers.max() == found.answers[0].confidence


def test_clips_that_it_was_trained_on_are_left_out(model: Path, training: Path, others: Path) -> None:
    """They are known by their content, under whatever name they come."""
    for number in range(3):
        shutil.copy(training / f"00{number}.wav", others / f"00{number}.wav")
    found, warnings = evaluate(model, others)
    (warning,) = warnings
    assert warning.startswith("3 of 20 clips are those that the model was trained on")
    assert [f"{number:03}.wav" for number in range(3, 20)] == [each.name for each in found.answers]


def test_nothing_but_its_training(model: Path, training: Path) -> None:
    """Its kind is measured instead, by all recorded settings: the very figures of the training."""
    found, warnings = evaluate(model, training)
    (warning,) = warnings
    assert "trained on all of these clips" in warning
    kept = bundle.load(model).manifest.metrics
    assert kept["accuracy"] == found.clip["accuracy"].value
    assert kept["calibration_error"] == found.clip["calibration_error"].value
    assert kept["window_auroc"] == found.window["auroc"].value
    assert "accuracy" in found.leaky
    assert isinstance(found, Evaluation)


def test_a_class_that_it_does_not_know(model: Path, tmp_path: Path) -> None:
    """The clip, its label and what may stand there are named."""
    data = written(tmp_path / "data", [Sound("middle", "x", 1000.0), Sound("low", "y", 400.0)])
    with pytest.raises(Fatal, match=r"000\.wav is labelled 'middle', and the model knows high, low; label it"):
        evaluate(model, data)


def test_some_of_its_classes(model: Path, tmp_path: Path) -> None:
    """Clips of one class are enough; classes without a clip are told as such."""
    data = written(tmp_path / "data", [Sound("low", str(n), 410.0 + n) for n in range(4)])
    found, _ = evaluate(model, data)
    assert ("high", "low") == found.classes
    assert [("high", 0), ("low", 4)] == [(each.name, each.clips) for each in found.per_class]
    assert "auroc" not in found.clip


def test_a_bundle_that_does_not_know_its_training(model: Path, others: Path, tmp_path: Path) -> None:
    """Without the record nobody can say what is new, and it does not pretend to."""
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / bundle.EVALUATION).unlink()
    with pytest.raises(Fatal, match=r"evaluation\.json cannot be read .* nobody knows which clips"):
        evaluate(copy, others)


def test_a_quantity(rpm_bundle: Path, tmp_path: Path) -> None:
    """The column of the training is read, and clips have values with intervals."""
    simulate(tmp_path / "clips", seed=9, clips=36, seconds=1.0)
    found, _ = evaluate(rpm_bundle, tmp_path / "clips")
    assert ("regression", "rpm", 36) == (found.task, found.label, len(found.answers))
    assert 0.5 < found.clip["coverage"].value <= 1.0
    first = found.answers[0]
    assert first.low is not None
    assert first.high is not None
    assert first.low < float(first.said) < first.high


def test_folders_are_read_whatever_the_column_was_called(machine_bundle: Path, tmp_path: Path) -> None:
    """A manifest's column and a folder's name are both the label."""
    (tmp_path / "x").mkdir()
    (written(tmp_path / "x" / "dog", [Sound("", "", 500.0)]) / "manifest.csv").unlink()
    with pytest.raises(Fatal, match="is labelled 'dog'"):
        evaluate(machine_bundle, tmp_path / "x")
