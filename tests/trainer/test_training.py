"""Training: the windows of the worker, honest scores, the same bytes every time, and a bundle that loads."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import msgspec
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier

from tests.system.processes import run
from trainer import calibration
from trainer.augmentation import read_augmentation
from trainer.dataset import Dataset, data_hash, load
from trainer.documents import kept
from trainer.evaluation import cross_fitted, of_scores
from trainer.extract import featurize
from trainer.holdout import folds, held_out, truth_of
from trainer.reference import reference_profile
from trainer.results import Candidate, Search
from trainer.splits import splits
from trainer.training import GOLDEN_CLIPS, Fitted, fit
from worker import bundle
from worker.audio import UNLIMITED, from_container, waveform
from worker.errors import Fatal
from worker.features import FeatureSpec, Featurizer
from worker.golden import Golden, unpack
from worker.statistics import FrameStatistics

RATE = 16_000
SPEC = FeatureSpec(
    window_seconds=0.25, window_hop_seconds=0.25, sets=(FrameStatistics(name="few", families=("mfcc", "rms")),)
)
"""Few features of short windows: these tests are about what is done with them."""


class Sound(NamedTuple):
    """A clip to be: a tone in noise, what it is labelled with, and what it belongs to."""

    label: str
    group: str
    frequency: float
    fold: str = ""


def tone(frequency: float, seed: int, *, seconds: float = 0.25, rate: int = RATE) -> NDArray[np.float32]:
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(scale=0.02, size=time.size)
    return (0.3 * np.sin(2 * np.pi * frequency * time) + noise).astype(np.float32)


def written(folder: Path, sounds: Sequence[Sound]) -> Path:
    """Write the sounds and their manifest; a fold is given if the first one has one."""
    folder.mkdir(exist_ok=True)
    columns = ["filename", "label", "group", *(["fold"] if sounds[0].fold else [])]
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for number, sound in enumerate(sounds):
            name = f"{number:03}.wav"
            soundfile.write(folder / name, tone(sound.frequency, number), RATE)
            writer.writerow({"filename": name} | sound._asdict())
    return folder


def two_classes(count: int = 20) -> list[Sound]:
    """Low and high tones in turn, each from a recording of its own."""
    return [Sound("low" if n % 2 else "high", str(n), 400.0 if n % 2 else 3000.0) for n in range(count)]


def trained(data: Path, out: Path, **settings: Any) -> Fitted:
    defaults: dict[str, Any] = {"name": "test", "spec": SPEC, "trees": 5}
    return fit(load(data), out, **(defaults | settings))


def manifest_of(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = msgspec.json.decode((path / bundle.MANIFEST).read_bytes())
    return manifest


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    return written(tmp_path / "tones", two_classes())


class TestEndToEnd:
    def test_a_classifier_of_machines(self, machine_bundle: Path, machines: Path) -> None:
        """The bundle loads, knows its training clips by heart, and says what it is worth on others."""
        model = bundle.load(machine_bundle)
        windows = featurize(load(machines), model.featurizer)
        best = model.scores(windows.features).argmax(axis=1)
        truth = [windows.dataset.clips[clip].label for clip in windows.owner]
        assert truth == [model.manifest.classes[index] for index in best]
        measures = {"accuracy", "macro_f1", "auroc", "auprc", "top3", "calibration_error"}
        assert measures | {f"window_{name}" for name in measures} == set(model.manifest.metrics)
        print(f"machines held out: {model.manifest.metrics}")
        assert 2 / 6 < model.manifest.metrics["accuracy"] < 1.0, "chance is 1/6, and some faults are hardly audible"

    def test_a_regressor_of_speed(self, rpm_bundle: Path, machines: Path) -> None:
        """The bundle loads, comes close to the speeds it was trained on, and is measured on others."""
        model = bundle.load(rpm_bundle)
        windows = featurize(load(machines, label="rpm"), model.featurizer)
        truth = np.array([float(windows.dataset.clips[clip].label) for clip in windows.owner])
        off = np.abs(model.scores(windows.features)[:, 0] - truth)
        assert off.mean() < 150, "the speeds lie between 1,200 and 3,600 rpm"
        assert ("regression", "rpm", ()) == (model.manifest.task, model.manifest.label, model.manifest.classes)
        measures = {"mae", "rmse", "r2", "coverage"}
        assert measures | {f"window_{name}" for name in measures} == set(model.manifest.metrics)
        assert 0.8 <= model.manifest.metrics["window_coverage"] <= 1.0
        print(f"rpm held out: {model.manifest.metrics}")
        assert model.manifest.metrics["mae"] > off.mean()

    def test_esc10_with_the_official_folds(self, esc10: Path, tmp_path: Path) -> None:
        """The default features and forest name at least 80 % of the clips of real recordings they have not heard."""
        metrics = fit(load(esc10), tmp_path / "esc10", name="esc10", spec=FeatureSpec()).manifest.metrics
        print(f"ESC-10, five official folds: {metrics}")
        assert metrics["accuracy"] >= 0.80
        assert metrics["window_accuracy"] < metrics["accuracy"]
        assert 10 == len(bundle.load(tmp_path / "esc10").manifest.classes)

    def test_notes_of_instruments_it_has_not_heard(self, notes: Path, tmp_path: Path) -> None:
        """The pitch of real notes is learnt across instruments, in semitones."""
        dataset = load(notes, label="midi_pitch")
        manifest = fit(dataset, tmp_path / "notes", name="notes", spec=FeatureSpec()).manifest
        print(f"notes, instruments held out: {manifest.metrics}")
        assert "regression" == manifest.task
        assert 0.5 < manifest.metrics["r2"] < 1.0
        assert 0.0 < manifest.metrics["mae"] < 12.0
        bundle.load(tmp_path / "notes")


class TestReproducibility:
    def test_the_same_bytes_from_another_process(
        self, machine_bundle: Path, machines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Later, elsewhere, with another hash seed and number of cores: every file but the date is the same."""
        monkeypatch.setenv("PYTHONHASHSEED", "1")
        other = tmp_path / "elsewhere"
        run("earshot-trainer", "fit", machines, "--out", other, "--name", "machines", "--trees", "20", "--jobs", "1")
        for name in (*bundle.FILES, bundle.EVALUATION):
            assert (machine_bundle / name).read_bytes() == (other / name).read_bytes(), name
        first, second = manifest_of(machine_bundle), manifest_of(other)
        assert first.pop("created") != second.pop("created")
        assert first == second

    def test_another_seed_gives_another_forest(self, tones: Path, tmp_path: Path) -> None:
        """The seed is what the forest hangs on, and the manifest states it."""
        for seed in (0, 1):
            assert seed == trained(tones, tmp_path / str(seed), seed=seed).manifest.seed
        forests = [(tmp_path / seed / bundle.FOREST).read_bytes() for seed in ("0", "1")]
        assert forests[0] != forests[1]


class TestHonesty:
    def test_a_recording_is_never_on_both_sides(self, tmp_path: Path) -> None:
        """Tones that give away the recording and nothing else: chance if it is held out, nearly 100 % if it leaks."""
        random = np.random.default_rng(3)
        labels = random.permutation(np.repeat(["a", "b"], 12)).tolist()
        frequencies = np.geomspace(200.0, 6000.0, len(labels)).tolist()
        sounds = [
            Sound(label, str(group), frequency)
            for group, (label, frequency) in enumerate(zip(labels, frequencies, strict=True))
            for _ in range(4)
        ]
        leaking = [sound._replace(group=str(number)) for number, sound in enumerate(sounds)]
        scores = {
            name: trained(written(tmp_path / name, listed), tmp_path / f"{name}-bundle", trees=30).manifest.metrics
            for name, listed in (("honest", sounds), ("leaking", leaking))
        }
        print(f"recordings held out {scores['honest']}, leaking {scores['leaking']}")
        assert scores["leaking"]["accuracy"] > 0.95
        assert scores["honest"]["accuracy"] < 0.70

    def test_figures_and_profile_are_of_clips_that_were_not_heard(self, tmp_path: Path) -> None:
        """Both come from held-out scores, of the folds and the forests that hang on the seed; so no clip is known."""
        labels = np.random.default_rng(3).permutation(np.repeat(["a", "b"], 12)).tolist()
        frequencies = np.geomspace(200.0, 6000.0, len(labels)).tolist()
        sounds = [Sound(label, str(n), f) for n, (label, f) in enumerate(zip(labels, frequencies, strict=True))]
        fitted = trained(written(tmp_path / "data", sounds), tmp_path / "out", seed=1)
        manifest = fitted.manifest
        featurizer = Featurizer(SPEC)
        windows = featurize(load(tmp_path / "data"), featurizer)
        truth = truth_of(windows)
        pairs = splits(windows.dataset, seed=1)
        held = held_out(folds(lambda: RandomForestClassifier(5, random_state=1), windows, truth, pairs), windows, truth)
        calibrations = cross_fitted(held, truth, trees=5)
        told = of_scores(windows, truth, held, calibrations, how="", seed=1)
        profile = reference_profile(
            manifest.calibration.apply(held.scores),
            windows.features,
            classes=("a", "b"),
            watched=manifest.watched,
            names=featurizer.feature_names,
        )
        assert (told.clip, told.window) == (fitted.evaluation.clip, fitted.evaluation.window)
        assert told.clip["accuracy"].value == manifest.metrics["accuracy"]
        assert told.window["macro_f1"].value == manifest.metrics["window_macro_f1"]
        assert calibration.fitted(held.scores, truth.targets, trees=5, classifier=True) == manifest.calibration
        assert profile == bundle.load(tmp_path / "out").profile

    def test_the_leak_is_named(self, tmp_path: Path) -> None:
        """Tones of 2 s that give away the recording: a random split of windows claims what nobody will see."""
        random = np.random.default_rng(3)
        labels = random.permutation(np.repeat(["a", "b"], 12)).tolist()
        for number, (label, frequency) in enumerate(zip(labels, np.geomspace(200.0, 6000.0, 24), strict=True)):
            folder = tmp_path / "data" / label
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / f"{number}.wav", tone(frequency, number, seconds=2.0), RATE)
        told = trained(tmp_path / "data", tmp_path / "out", trees=20).evaluation
        assert told.leaky["accuracy"] > 0.95
        assert told.window["accuracy"].value < 0.7
        assert "5 folds of clips" in told.how

    def test_windows_are_those_of_the_worker(self, tmp_path: Path) -> None:
        """The rows of a stereo FLAC of 2.3 s at another rate are what the worker makes of the same bytes."""
        folder = tmp_path / "class"
        folder.mkdir()
        stereo = np.column_stack([tone(f, 1, seconds=2.3, rate=44_100) for f in (500.0, 900.0)])
        soundfile.write(folder / "clip.flac", stereo, 44_100)
        featurizer = Featurizer(FeatureSpec())
        heard = waveform((folder / "clip.flac").read_bytes(), "audio/flac", RATE, UNLIMITED).samples
        windows = featurize(load(tmp_path), featurizer)
        assert (4, len(featurizer.feature_names)) == windows.features.shape  # from 0, 0.5 and 1 s, and the last second
        np.testing.assert_array_equal(featurizer.transform(featurizer.windows(heard)), windows.features)
        assert [0, 0, 0, 0] == windows.owner.tolist()


class TestUnusableClips:
    def test_a_few_are_skipped_and_listed(self, tones: Path, tmp_path: Path) -> None:
        """Up to a tenth may be unreadable or empty: each is named with its reason, and none is counted as learnt."""
        (tones / "004.wav").write_bytes(b"not a sound")
        soundfile.write(tones / "007.wav", np.zeros(0, np.float32), RATE)
        manifest, _, _, skipped = trained(tones, tmp_path / "out")
        assert [tones / "004.wav", tones / "007.wav"] == [each.path for each in skipped]
        assert all(each.reason for each in skipped)
        assert skipped[0].reason != skipped[1].reason
        assert (18, 18) == (manifest.clips, manifest.windows)
        bundle.load(tmp_path / "out")

    def test_more_than_a_tenth_is_a_mistake(self, tones: Path, tmp_path: Path) -> None:
        """The text counts them and names the first; no bundle is written."""
        for name in ("004.wav", "007.wav", "011.wav"):
            (tones / name).write_bytes(b"not a sound")
        with pytest.raises(Fatal, match=r"3 of 20 clips are unusable.*004\.wav"):
            trained(tones, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_what_is_skipped_is_in_no_fold(self, tmp_path: Path) -> None:
        """A fold of which nothing is left is none; if only one fold is left, that is said."""
        for name, numbers in (("three", ("1", "2", "3")), ("two", ("1", "1", "3"))):
            sounds = [
                sound._replace(fold="3" if number == 19 else numbers[number // 2 % 2])
                for number, sound in enumerate(two_classes())
            ]
            (written(tmp_path / name, sounds) / "019.wav").write_bytes(b"not a sound")
        assert 19 == trained(tmp_path / "three", tmp_path / "out").manifest.clips
        with pytest.raises(Fatal, match="all clips are in fold 1"):
            trained(tmp_path / "two", tmp_path / "out")

    def test_the_data_hash_is_of_what_was_learnt(self, tones: Path, tmp_path: Path) -> None:
        """A clip that cannot be read leaves the hash of the others."""
        everything = load(tones)
        (tones / "004.wav").write_bytes(b"not a sound")
        rest = msgspec.structs.replace(everything, clips=everything.clips[:4] + everything.clips[5:])
        assert data_hash(rest) == trained(tones, tmp_path / "out").manifest.data_hash


class TestRefusals:
    def test_one_class_only(self, tmp_path: Path) -> None:
        """There is nothing to tell apart, and the class is named."""
        data = written(tmp_path / "data", [sound._replace(label="low") for sound in two_classes()])
        with pytest.raises(Fatal, match="have the label 'low': a classifier needs at least two classes"):
            trained(data, tmp_path / "out")

    def test_something_else_is_not_replaced(self, tones: Path, tmp_path: Path) -> None:
        """A folder that is no bundle is refused before any work, and stays as it is."""
        out = tmp_path / "thesis"
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
        stages: list[str] = []
        with pytest.raises(Fatal, match="thesis exists and is no model bundle"):
            trained(tones, out, on_progress=lambda stage, _done, _total: stages.append(stage))
        assert [] == stages
        assert ["thesis.tex"] == [path.name for path in out.iterdir()]

    def test_a_place_that_cannot_be_written(self, tones: Path, tmp_path: Path) -> None:
        """A file where a folder has to be is named."""
        (tmp_path / "file").write_text("")
        with pytest.raises(Fatal, match=r"cannot write to .*file/out: .*; name another folder"):
            trained(tones, tmp_path / "file" / "out")

    def test_a_rate_without_these_features(self, tones: Path, tmp_path: Path) -> None:
        """A rate whose mel filters are finer than the spectrum is a setting to change, and no traceback."""
        with pytest.raises(Fatal, match=r"n_mels is 40.*expected fewer, or a larger n_fft"):
            trained(tones, tmp_path / "out", spec=FeatureSpec(sample_rate=1_000_000))


class TestBundle:
    def test_a_bundle_is_replaced(self, tones: Path, tmp_path: Path) -> None:
        """The new one stands in its place, whole, and nothing is left beside it."""
        out = tmp_path / "out" / "bundle"
        trained(tones, out, trees=3)
        trained(tones, out, trees=4)
        assert 4 == bundle.load(out).manifest.forest["n_estimators"]
        assert [out] == list(out.parent.iterdir())

    def test_the_manifest_says_what_this_is(self, tones: Path, tmp_path: Path) -> None:
        """Names, task, classes, settings, what was learnt from, how much it is worth, and what made it."""
        dataset = load(tones)
        manifest = fit(dataset, tmp_path / "out", name="tones", spec=SPEC, trees=7, seed=5).manifest
        assert ("tones", "classification", "label") == (manifest.name, manifest.task, manifest.label)
        assert ("high", "low") == manifest.classes
        assert (SPEC, 7, 5) == (manifest.spec, manifest.forest["n_estimators"], manifest.seed)
        assert (20, 20, data_hash(dataset)) == (manifest.clips, manifest.windows, manifest.data_hash)
        assert (1.0, 1.0) == (manifest.metrics["accuracy"], manifest.metrics["window_macro_f1"])
        assert set(bundle.VERSIONED) == set(manifest.versions)
        assert manifest == bundle.load(tmp_path / "out").manifest

    def test_documents_lie_beside_the_model(self, tones: Path, tmp_path: Path) -> None:
        """The card in words, everything as data, and the report if it is asked for; clips are known again by them."""
        told = trained(tones, tmp_path / "out", report=True).evaluation
        assert {bundle.MANIFEST, *bundle.FILES, *bundle.DOCUMENTS} == {
            each.name for each in (tmp_path / "out").iterdir()
        }
        remembered = kept(tmp_path / "out")
        assert told == remembered.evaluation
        assert {clip.name: clip.sha256 for clip in load(tones).clips} == remembered.clips
        assert (tmp_path / "out" / bundle.CARD).read_text().startswith("# ")
        assert "<html" in (tmp_path / "out" / bundle.REPORT).read_text()
        trained(tones, tmp_path / "out")
        assert not (tmp_path / "out" / bundle.REPORT).exists(), "a report of another training would lie"

    def test_the_search_is_told_without_its_seconds(self, tones: Path, tmp_path: Path) -> None:
        """What a search took differs from run to run, and must make no other model."""
        hashes = set()
        for seconds in (1.0, 2.0):
            best = {"n_estimators": 5}
            search = Search(
                strategy="grid",
                scoring="accuracy",
                candidates=(Candidate(best, 1.0, 0.0, seconds),),
                best=best,
                held_out={},
            )
            manifest = trained(tones, tmp_path / "out", search=search).manifest
            hashes.add(bundle.model_hash(manifest))
            assert {"strategy": "grid", "scoring": "accuracy", "candidates": 1, "best": best} == manifest.search
        assert 1 == len(hashes)

    def test_copies_are_trained_on_and_do_not_count(self, tones: Path, tmp_path: Path) -> None:
        """Held-out figures, the profile and the count of windows are of clips as they were recorded."""
        augmentation = read_augmentation("gain=-6:6,copies=3")
        fitted = trained(tones, tmp_path / "out", augmentation=augmentation)
        assert (20, 20) == (fitted.manifest.windows, len(fitted.evaluation.answers))
        assert {"gain": [-6.0, 6.0], "copies": 3} == fitted.manifest.augmentation
        forest = joblib.load(tmp_path / "out" / bundle.FOREST)
        assert 80 == forest.estimators_[0].tree_.weighted_n_node_samples[0]

    def test_golden_clips_cover_the_classes(self, machine_bundle: Path, machines: Path) -> None:
        """Each class has the beginning of its first clip, to the bit, and more than one window of it."""
        goldens = goldens_of(machine_bundle)
        dataset = load(machines)
        first = {clip.label: clip for clip in reversed(dataset.clips)}
        assert 6 == len(first) == len(goldens)
        for label, golden in zip(sorted(first), goldens, strict=True):
            clip, kept = from_container(first[label].path.read_bytes()), from_container(golden.wav)
            assert clip.sample_rate == kept.sample_rate
            np.testing.assert_array_equal(clip.samples[: kept.samples.size], kept.samples)
            assert len(golden.features) > 1

    def test_golden_clips_of_a_quantity_span_it(self, rpm_bundle: Path, machines: Path) -> None:
        """The smallest and the largest value are among them."""
        goldens = goldens_of(rpm_bundle)
        assert GOLDEN_CLIPS == len(goldens)
        speeds = speeds_of(load(machines, label="rpm"), goldens)
        assert sorted(speeds) == speeds
        everything = [float(clip.label) for clip in load(machines, label="rpm").clips]
        assert (min(everything), max(everything)) == (speeds[0], speeds[-1])

    def test_progress_is_told(self, tones: Path, tmp_path: Path) -> None:
        """Each stage counts up to its end, one after the other."""
        told: dict[str, list[tuple[int, int]]] = {}
        trained(tones, tmp_path / "out", on_progress=lambda stage, *counts: told.setdefault(stage, []).append(counts))
        stages = ["surveying the clips", "listening to the clips", "testing on held-out clips", "fitting the forest"]
        assert [*stages, "writing what was found"] == list(told)
        for counts in told.values():
            assert sorted(counts) == counts
            assert counts[-1][0] == counts[-1][1]


def goldens_of(path: Path) -> list[Golden]:
    return unpack((path / bundle.GOLDEN).read_bytes())


def speeds_of(dataset: Dataset, goldens: Sequence[Golden]) -> list[float]:
    """Return the label of the clip that each golden clip is the beginning of."""
    labels = {from_container(clip.path.read_bytes()).samples[:1000].tobytes(): clip.label for clip in dataset.clips}
    return [float(labels[from_container(golden.wav).samples[:1000].tobytes()]) for golden in goldens]
