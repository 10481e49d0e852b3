"""Evaluation: clips are judged as the worker judges a record, and every figure is what it says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score

from trainer.calibration import fitted
from trainer.dataset import Clip, Dataset, Index
from trainer.evaluation import by_clip, cross_fitted, of_scores
from trainer.extract import Windows
from trainer.holdout import HeldOut, Truth
from trainer.results import Evaluation
from worker import bundle
from worker.audio import UNLIMITED, waveform
from worker.calibration import Calibration, ConformalInterval, TemperatureScaling
from worker.drift import DriftPolicy
from worker.messages import Classification, Record, Topics
from worker.pipeline import Pipeline
from worker.profile import Vector
from worker.states import Retention

UNCHANGED = TemperatureScaling(16, 1e-12)


def windows_of(owner: Index, labels: list[str], groups: list[str] | None = None, *, quantity: bool = False) -> Windows:
    """Return windows of clips that lie nowhere, without features."""
    clips = tuple(
        Clip(Path(), f"{n}.wav", label, groups[n] if groups else str(n), None, str(n)) for n, label in enumerate(labels)
    )
    dataset = Dataset(clips, "label", "regression" if quantity else "classification", background=("noise",))
    zeros = np.zeros(len(owner))
    features, silent = np.zeros((len(owner), 0), np.float32), zeros.astype(np.bool_)
    return Windows(dataset, features, owner, zeros, owner * 0, zeros.astype(np.float32), silent, [])


def evaluated(
    scores: Vector,
    owner: Index,
    truth: Truth,
    calibration: Calibration,
    fold: Index | None = None,
    silent: Index | None = None,
) -> Evaluation:
    first = np.unique(owner, return_index=True)[1]
    labels = [truth.classes[code] if truth.classes else str(code) for code in truth.targets[first].tolist()]
    windows = windows_of(owner, labels, quantity=not truth.classes)
    if silent is not None:
        windows = windows._replace(silent=np.isin(np.arange(len(owner)), silent))
    held = HeldOut(scores, owner * 0 if fold is None else fold)
    return of_scores(windows, truth, held, [calibration], how="by hand")


class TestByClip:
    def test_windows_are_averaged(self) -> None:
        """A clip's scores are the mean over its windows, in the order that is asked for."""
        values = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8]])
        owner = np.array([7, 7, 7, 3])
        np.testing.assert_allclose([[0.2, 0.8], [0.5, 0.5]], by_clip(values, owner, np.array([3, 7])))

    def test_it_is_what_the_worker_says_of_a_record(self, machine_bundle: Path, machines: Path) -> None:
        """The same bytes as one record give the same probabilities, to the last bit."""
        clips = sorted((machines / "audio").glob("*.wav"))[:3]
        model = bundle.load(machine_bundle)
        records = [Record("audio.in", 0, offset, 0, b"mic", clip.read_bytes()) for offset, clip in enumerate(clips)]
        outputs = Pipeline(model, Topics(), UNLIMITED, DriftPolicy(), Retention()).run({}, records).outputs
        said = [
            msgspec.json.decode(each.value or b"", type=Classification)
            for each in outputs
            if each.topic == "predictions.out"
        ]
        cut = [
            model.featurizer.windows(
                waveform(clip.read_bytes(), None, model.featurizer.spec.sample_rate, UNLIMITED).samples
            )
            for clip in clips
        ]
        owner = np.repeat(np.arange(len(cut)), [len(windows) for windows in cut])
        scores = model.scores(model.featurizer.transform(np.concatenate(cut)))
        expected = model.manifest.calibration.apply(by_clip(scores, owner, np.arange(len(cut))))
        assert [len(windows) for windows in cut] == [each.windows for each in said]
        assert min(each.windows for each in said) > 1, "one window is its own mean, and shows nothing"
        assert expected.tolist() == [list(each.probabilities.values()) for each in said]


class TestClassification:
    def test_by_hand(self) -> None:
        """Two of three clips are right although two of six windows are: windows vote with their probabilities."""
        owner = np.array([0, 0, 1, 1, 2, 2])
        truth = Truth(np.array([0, 0, 1, 1, 1, 1]), ("a", "noise"))
        first = np.array([0.9, 0.4, 0.6, 0.1, 0.7, 0.8])  # the probability of class 0
        found = evaluated(np.column_stack([first, 1 - first]), owner, truth, UNCHANGED)
        # Clips: 0.65 -> 0 (right), 0.35 -> 1 (right), 0.75 -> 0 (wrong): both F1 are 2/3.
        assert (2 / 3, 2 / 3) == pytest.approx((found.clip["accuracy"].value, found.clip["macro_f1"].value))
        assert 2 / 6 == pytest.approx(found.window["accuracy"].value)
        assert ((1, 0), (1, 1)) == found.confusion
        assert [("a", 1, False), ("noise", 2, True)] == [(c.name, c.clips, c.background) for c in found.per_class]
        last = found.answers[-1]
        assert ("2.wav", "noise", "a") == (last.name, last.truth, last.said)
        assert 0.75 == pytest.approx(last.confidence)

    def test_figures_are_scikit_learns(self) -> None:
        """On random scores of clips of unequal length, in no order."""
        random = np.random.default_rng(1)
        owner = random.permutation(np.repeat(np.arange(30), random.integers(1, 6, 30)))
        codes, scores = random.integers(0, 4, 30), random.dirichlet(np.ones(4), len(owner))
        clips = np.array([scores[owner == clip].mean(axis=0) for clip in range(30)]).argmax(axis=1)
        found = evaluated(scores, owner, Truth(codes[owner], tuple("abcd")), UNCHANGED)
        assert accuracy_score(codes, clips) == pytest.approx(found.clip["accuracy"].value)
        assert f1_score(codes, clips, average="macro") == pytest.approx(found.clip["macro_f1"].value)
        assert accuracy_score(codes[owner], scores.argmax(axis=1)) == pytest.approx(found.window["accuracy"].value)

    def test_calibration_changes_the_odds_and_no_answer(self) -> None:
        """Answers, confusion and accuracy stay, confidence and reliability do not."""
        random = np.random.default_rng(0)
        owner, codes = np.repeat(np.arange(20), 2), random.integers(0, 3, 20)
        scores = random.dirichlet(np.ones(3), 40)
        truth = Truth(codes[owner], tuple("abc"))
        before, after = (evaluated(scores, owner, truth, TemperatureScaling(n, 0.005)) for n in (16, 40))
        assert before.confusion == after.confusion
        assert [each.said for each in before.answers] == [each.said for each in after.answers]
        assert before.clip["calibration_error"] != after.clip["calibration_error"]
        assert before.reliability is not None
        assert after.reliability is not None
        assert before.reliability.before == after.reliability.before != after.reliability.after

    def test_clips_that_no_fold_tested_are_left_out(self) -> None:
        """They count for nothing, and their NaN is in no figure."""
        owner = np.array([0, 1, 2])
        scores = np.array([[0.9, 0.1], [np.nan, np.nan], [0.2, 0.8]])
        truth = Truth(np.array([0, 0, 1]), ("a", "b"))
        found = evaluated(scores, owner, truth, UNCHANGED, fold=np.array([0, -1, 0]))
        assert ["0.wav", "2.wav"] == [each.name for each in found.answers]
        assert 1.0 == found.clip["accuracy"].value


class TestSilence:
    """Windows without sound count in every figure but those of windows with sound."""

    OWNER = np.array([0, 0, 1, 1, 2])

    def test_classes(self) -> None:
        """Three of five windows are right, and two of three with sound; clips are means over all of their windows."""
        truth = Truth(np.array([0, 0, 1, 1, 1]), ("a", "b"))
        first = np.array([0.9, 0.1, 0.3, 0.2, 0.8])
        scores = np.column_stack([first, 1 - first])
        found, all_sound = (
            evaluated(scores, self.OWNER, truth, UNCHANGED, silent=which) for which in (np.array([1, 3]), None)
        )
        assert (0.4, 0.0) == (found.silent, all_sound.silent)
        assert 2 / 3 == pytest.approx(found.sounding["accuracy"].value)
        assert {} == all_sound.sounding
        assert (found.window, found.clip, found.answers) == (all_sound.window, all_sound.clip, all_sound.answers)
        assert 3 / 5 == pytest.approx(found.window["accuracy"].value)

    def test_values(self) -> None:
        """The same for errors."""
        truth = Truth(np.array([1.0, 1.0, 2.0, 2.0, 6.0]), ())
        scores = np.column_stack([[1.0, 4.0, 2.5, 0.0, 5.0], np.full(5, 0.1)])
        found = evaluated(scores, self.OWNER, truth, ConformalInterval(0.9, 1.0, 0.1), silent=np.array([1, 3]))
        assert 0.5 == pytest.approx(found.sounding["mae"].value)
        assert 6.5 / 5 == pytest.approx(found.window["mae"].value)

    def test_windows_that_were_not_tested_are_not_counted(self) -> None:
        """Neither as silent nor as sound."""
        truth = Truth(np.array([0, 0, 1, 1, 1]), ("a", "b"))
        scores = np.full((5, 2), 0.5)
        scores[4] = np.nan
        fold = np.array([0, 0, 0, 0, -1])
        found = evaluated(scores, self.OWNER, truth, UNCHANGED, fold, silent=np.array([1, 4]))
        assert 0.25 == found.silent


class TestRegression:
    def test_by_hand(self) -> None:
        """A clip's value is the mean of its windows' values, and so are its interval's ends."""
        owner = np.array([0, 0, 1, 2])
        truth = Truth(np.array([1.0, 1.0, 2.0, 6.0]), ())
        scores = np.column_stack([[0.0, 3.0, 2.0, 5.0], [0.5, 0.1, 0.1, 0.1]])
        found = evaluated(scores, owner, truth, ConformalInterval(0.9, 2.0, 0.2))
        # Clips: 1.5, 2, 5 against 1, 2, 6; the mean of the truth is 3.
        values = {name: measure.value for name, measure in found.clip.items()}
        expected = {"mae": 0.5, "rmse": np.sqrt(1.25 / 3), "r2": 1 - 1.25 / (4 + 1 + 9), "coverage": 2 / 3}
        assert expected == pytest.approx(values)
        assert 1.0 == pytest.approx(found.window["mae"].value)
        first = found.answers[0]
        assert ("1.0", "1.5") == (first.truth, first.said)
        assert (0.5, 2.5) == pytest.approx((first.low, first.high))
        assert ((), None) == (found.confusion, found.reliability)

    def test_figures_are_scikit_learns(self) -> None:
        """On random scores of clips of unequal length, in no order."""
        random = np.random.default_rng(1)
        owner = random.permutation(np.repeat(np.arange(30), random.integers(1, 6, 30)))
        targets, scores = random.normal(size=30), random.gamma(1.0, size=(len(owner), 2))
        clips = np.array([scores[owner == clip, 0].mean() for clip in range(30)])
        found = evaluated(scores, owner, Truth(targets[owner], ()), ConformalInterval(0.9, 1.0, 0.1))
        assert mean_absolute_error(targets, clips) == pytest.approx(found.clip["mae"].value)
        assert r2_score(targets, clips) == pytest.approx(found.clip["r2"].value)
        assert mean_absolute_error(targets[owner], scores[:, 0]) == pytest.approx(found.window["mae"].value)


class TestCrossFitting:
    def test_a_fold_is_calibrated_by_the_others(self) -> None:
        """Each calibration is that of the scores of all other folds, so a fold's own scores change it not."""
        random = np.random.default_rng(0)
        scores, targets = random.dirichlet(np.ones(3), 60), random.integers(0, 3, 60)
        fold = np.repeat([0, 1, -1], 20)
        found = cross_fitted(HeldOut(scores, fold), Truth(targets, tuple("abc")), trees=10)
        expected = [fitted(scores[fold == n], targets[fold == n], trees=10, classifier=True) for n in (1, 0)]
        assert expected == found

    def test_a_single_fold_has_no_other(self) -> None:
        """There is nothing better than its own."""
        scores, targets = np.array([[1.0, 0.5], [2.0, 0.5]]), np.array([1.5, 2.0])
        held = HeldOut(scores, np.zeros(2, np.intp))
        (found,) = cross_fitted(held, Truth(targets, ()), trees=10)
        assert fitted(scores, targets, trees=10, classifier=False) == found
