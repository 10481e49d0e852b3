"""A bundle is believed only after it has been verified, and nothing is unpickled before that."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import stat
from pathlib import Path
from typing import Any

import joblib
import msgspec
import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

from worker import bundle
from worker.errors import BadModel, Fatal
from worker.golden import pack, unpack
from worker.profile import signal_names


@pytest.fixture
def copy(machine_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(machine_bundle, tmp_path / "machines"))


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Change fields of the manifest, as somebody would who also knows how to hash."""
    manifest = msgspec.json.decode((path / bundle.MANIFEST).read_bytes())
    (path / bundle.MANIFEST).write_bytes(msgspec.json.encode(manifest | changes))


def replace_file(path: Path, name: str, content: bytes) -> None:
    """Replace a file and state its new hash."""
    (path / name).write_bytes(content)
    files = msgspec.json.decode((path / bundle.MANIFEST).read_bytes())["files"]
    rewrite_manifest(path, files=files | {name: hashlib.sha256(content).hexdigest()})


class Bomb:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_bundle_loads_and_says_what_it_is(machine_bundle: Path) -> None:
    """Its id is its name, its time and a hash of its manifest; its parts belong together."""
    loaded = bundle.load(machine_bundle)
    assert "machines" == loaded.id.name
    assert loaded.manifest.created.strftime("%Y%m%dT%H%M%SZ") == loaded.id.version
    assert bundle.model_hash(loaded.manifest) == loaded.id.hash
    assert signal_names(loaded.manifest.classes, loaded.manifest.watched) == loaded.profile.names
    assert [loaded.featurizer.feature_names[i] for i in loaded.watched] == list(loaded.manifest.watched)
    assert set(bundle.FILES) == set(loaded.manifest.files)


@pytest.mark.parametrize("name", bundle.FILES)
def test_a_damaged_file_is_refused(copy: Path, name: str) -> None:
    """One flipped bit anywhere is seen, and the file is named."""
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BadModel, match=f"{name} has SHA-256 .* it is damaged or replaced"):
        bundle.load(copy)


@pytest.mark.parametrize("name", [bundle.FEATURIZER, bundle.FOREST])
def test_nothing_is_unpickled_before_its_hash_is_checked(copy: Path, name: str, tmp_path: Path) -> None:
    """A replaced pickle does not run."""
    trace = tmp_path / "trace"
    (copy / name).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(BadModel):
        bundle.load(copy)
    assert not trace.exists()
    pickle.loads((copy / name).read_bytes())
    assert trace.exists(), "the bomb is a dud, and the test proves nothing"


@pytest.mark.parametrize("name", [*bundle.FILES, bundle.MANIFEST])
def test_an_incomplete_bundle_is_refused(copy: Path, name: str) -> None:
    """A missing file is named."""
    (copy / name).unlink()
    with pytest.raises(BadModel, match=name):
        bundle.load(copy)


def test_a_forest_of_another_scikit_learn_is_refused_before_it_is_unpickled(copy: Path, tmp_path: Path) -> None:
    """The text says which version made it and how to get on."""
    trace = tmp_path / "trace"
    replace_file(copy, bundle.FOREST, pickle.dumps(Bomb(trace)))
    versions = msgspec.json.decode((copy / bundle.MANIFEST).read_bytes())["versions"]
    rewrite_manifest(copy, versions=versions | {"scikit-learn": "0.24.2"})
    with pytest.raises(BadModel, match=r"made by scikit-learn 0\.24\.2 .* train again, or install"):
        bundle.load(copy)
    assert not trace.exists()


def test_a_bundle_of_a_later_format_is_refused(copy: Path) -> None:
    """The format is looked at before anything else of the manifest."""
    rewrite_manifest(copy, format=99, unheard_of=True)
    with pytest.raises(BadModel, match="has bundle format 99; this Earshot reads format 2"):
        bundle.load(copy)


@pytest.mark.parametrize("garbage", [b"", b"[]", b"{", b"\xff", b'{"format": 2}'])
def test_a_manifest_that_is_none_is_refused(copy: Path, garbage: bytes) -> None:
    """Whatever stands there, it is a BadModel that names the bundle."""
    (copy / bundle.MANIFEST).write_bytes(garbage)
    with pytest.raises(BadModel, match=str(copy)):
        bundle.load(copy)


@pytest.mark.parametrize("number", [0, 5], ids=["the first", "the last"])
@pytest.mark.parametrize("wrong", [10.0, np.nan])
def test_features_that_differ_from_the_trainers_are_refused(copy: Path, number: int, wrong: float) -> None:
    """Whichever golden clip differs, it names the feature, what came out and what should have."""
    goldens = unpack((copy / bundle.GOLDEN).read_bytes())
    names = bundle.load(copy).featurizer.feature_names
    assert 6 == len(goldens)
    goldens[number].features[1, 7] = wrong
    replace_file(copy, bundle.GOLDEN, pack(goldens))
    with pytest.raises(BadModel, match=rf"golden clip {number} .* features: {names[7]} is .*, expected {wrong:.6g}"):
        bundle.load(copy)


def test_scores_that_differ_by_one_bit_are_refused(copy: Path) -> None:
    """From the same features a forest gives the same scores, to the last bit."""
    goldens = unpack((copy / bundle.GOLDEN).read_bytes())
    goldens[0].scores[0, 0] = np.nextafter(goldens[0].scores[0, 0], 2.0)
    replace_file(copy, bundle.GOLDEN, pack(goldens))
    with pytest.raises(BadModel, match=r"golden clip 0 .* scores: output 0 of window 0"):
        bundle.load(copy)


def test_a_bundle_without_golden_clips_is_refused(copy: Path) -> None:
    """Nothing would show that the model still does what it did."""
    replace_file(copy, bundle.GOLDEN, pack([]))
    with pytest.raises(BadModel, match="there is no golden clip"):
        bundle.load(copy)


def test_parts_of_different_models_are_refused(copy: Path, rpm_bundle: Path) -> None:
    """A profile, forest or featurizer of another model does not fit, whatever the hashes say."""
    for name in (bundle.PROFILE, bundle.FOREST):
        before = (copy / name).read_bytes()
        replace_file(copy, name, (rpm_bundle / name).read_bytes())
        with pytest.raises(BadModel):
            bundle.load(copy)
        replace_file(copy, name, before)
    buffer = io.BytesIO()
    pickle.dump("no featurizer", buffer)
    replace_file(copy, bundle.FEATURIZER, buffer.getvalue())
    with pytest.raises(BadModel, match="is not the featurizer"):
        bundle.load(copy)


def test_a_featurizer_with_other_settings_is_refused(copy: Path) -> None:
    """What the manifest says of the features is true, also of a setting that the golden clips do not show."""
    spec = msgspec.json.decode((copy / bundle.MANIFEST).read_bytes())["spec"]
    spec["sets"][0]["top_db"] += 1
    rewrite_manifest(copy, spec=spec)
    with pytest.raises(BadModel, match=r"is not the featurizer that manifest\.json describes"):
        bundle.load(copy)


def test_a_forest_of_other_features_is_refused(copy: Path) -> None:
    """It is said how many features the forest takes, and how many there are."""
    loaded = bundle.load(copy)
    names, classes = loaded.featurizer.feature_names, loaded.manifest.classes
    forest = RandomForestClassifier(2, random_state=0).fit(np.eye(len(classes), len(names) - 1), classes)
    buffer = io.BytesIO()
    joblib.dump(forest, buffer)
    replace_file(copy, bundle.FOREST, buffer.getvalue())
    with pytest.raises(BadModel, match=rf"the features of .* are {len(names) - 1}, expected {len(names)}"):
        bundle.load(copy)


def write_again(path: Path) -> None:
    """Write the bundle at ``path`` once more in its own place."""
    loaded = bundle.load(path)
    manifest = msgspec.structs.asdict(loaded.manifest)
    for field in ("format", "spec", "versions", "files"):
        del manifest[field]
    forest = joblib.load(path / bundle.FOREST)
    goldens = unpack((path / bundle.GOLDEN).read_bytes())
    bundle.write(path, manifest, featurizer=loaded.featurizer, forest=forest, profile=loaded.profile, goldens=goldens)


def test_a_bundle_is_written_for_others_to_read(copy: Path) -> None:
    """The worker may run as somebody else than the trainer."""
    copy.chmod(0o700)
    write_again(copy)
    assert 0o755 == stat.S_IMODE(copy.stat().st_mode)
    assert [copy] == list(copy.parent.iterdir())


def test_a_write_that_fails_leaves_what_was_there(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the old bundle stays as it is, and nothing lies beside it."""
    before = bundle.load(copy).id
    write_bytes = Path.write_bytes

    def until_full(path: Path, content: bytes) -> int:
        if path.name == bundle.GOLDEN:
            raise OSError("no space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", until_full)
    with pytest.raises(OSError, match="no space left"):
        write_again(copy)
    assert [copy] == list(copy.parent.iterdir())
    assert before == bundle.load(copy).id


def test_a_folder_that_is_no_bundle_is_neither_loaded_nor_overwritten(tmp_path: Path, machine_bundle: Path) -> None:
    """Somebody's other work is safe from a mistyped --out."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadModel, match=r"has no manifest\.json"):
        bundle.load(tmp_path)
    loaded = bundle.load(machine_bundle)
    with pytest.raises(Fatal, match="exists and is no model bundle"):
        bundle.write(tmp_path, {}, featurizer=loaded.featurizer, forest=None, profile=loaded.profile, goldens=[])
    assert ["thesis.tex"] == [path.name for path in tmp_path.iterdir()]


def test_the_hash_of_a_model_is_what_it_is_and_not_when_it_was_made(copy: Path) -> None:
    """The same training at another hour is the same model; any other change of the manifest is another model."""
    before = bundle.load(copy).id
    rewrite_manifest(copy, created="2031-01-01T00:00:00Z")
    later = bundle.load(copy).id
    assert (before.hash, "20310101T000000Z") == (later.hash, later.version)
    rewrite_manifest(copy, seed=7)
    assert before.hash != bundle.load(copy).id.hash


@pytest.mark.parametrize(
    "garbage", [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)], ids=["empty", "cut off", "no files"]
)
def test_golden_clips_that_are_none_are_refused(copy: Path, garbage: bytes) -> None:
    """Whatever stands there, with its right hash, is a BadModel and no traceback."""
    replace_file(copy, bundle.GOLDEN, garbage)
    with pytest.raises(BadModel):
        bundle.load(copy)


def test_only_a_bundle_and_nothing_else_is_replaced(machine_bundle: Path, copy: Path, tmp_path: Path) -> None:
    """Many a project has a manifest.json: it is not taken for a bundle, nor is a bundle with somebody's notes in it."""
    web = tmp_path / "web"
    (web / "src").mkdir(parents=True)
    (web / "manifest.json").write_text("{}")
    (copy / "notes.txt").write_text("what I have found")
    for path in (web, copy):
        with pytest.raises(Fatal, match="exists and is no model bundle"):
            bundle.check_replaceable(path)
    bundle.check_replaceable(machine_bundle)
    bundle.check_replaceable(tmp_path / "new" / "bundle")
    (tmp_path / "empty").mkdir()
    bundle.check_replaceable(tmp_path / "empty")


def test_a_bundle_holds_no_class_of_the_trainer(machine_bundle: Path) -> None:
    """A worker without the trainer installed can unpickle it."""
    for name in (bundle.FEATURIZER, bundle.FOREST):
        assert b"trainer" not in (machine_bundle / name).read_bytes()


class TestPredict:
    def test_classes_are_what_the_worker_says(self, machine_bundle: Path) -> None:
        """Waveforms of any length, float32 or int16, get the most probable class."""
        model = bundle.load(machine_bundle)
        random = np.random.default_rng(0)
        waveforms = [random.normal(0, 0.1, size).astype(np.float32) for size in (4_000, 16_000, 40_000)]
        probabilities = model.predict_proba(waveforms)
        assert (3, 6) == probabilities.shape
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)
        best = [model.manifest.classes[index] for index in probabilities.argmax(axis=1)]
        assert best == model.predict(waveforms)
        features = [model.featurizer.transform(model.featurizer.windows(each)) for each in waveforms]
        np.testing.assert_array_equal(model.answers(features), probabilities)
        integers = [np.round(each * 2**15).astype(np.int16) for each in waveforms]
        floats = [(each / 2**15).astype(np.float32) for each in integers]
        np.testing.assert_array_equal(model.predict_proba(floats), model.predict_proba(integers))

    def test_values(self, rpm_bundle: Path) -> None:
        """A regressor's are numbers; probabilities it has none."""
        model = bundle.load(rpm_bundle)
        (value,) = model.predict([np.zeros(16_000, np.float32)])
        assert 1200 <= float(value) <= 3600
        with pytest.raises(TypeError, match="is a regressor"):
            model.predict_proba([np.zeros(16_000, np.float32)])

    def test_nothing(self, machine_bundle: Path) -> None:
        """No waveform has no class, and that is no error; a waveform without a sample is one."""
        model = bundle.load(machine_bundle)
        assert [] == list(model.predict([]))
        assert (0, 6) == model.predict_proba([]).shape
        with pytest.raises(ValueError, match="sample"):
            model.predict([np.zeros(0, np.float32)])


def test_a_calibration_of_another_task_is_refused(copy: Path) -> None:
    """An interval says nothing about classes."""
    rewrite_manifest(copy, calibration={"type": "conformal-interval", "coverage": 0.9, "factor": 1.0, "floor": 1.0})
    with pytest.raises(BadModel, match="the calibration are ConformalInterval, expected TemperatureScaling"):
        bundle.load(copy)


def test_documents_are_for_people(copy: Path) -> None:
    """A model is served without them, or with others; and a bundle that has lost them is still one to replace."""
    before = bundle.load(copy).id
    assert (copy / bundle.EVALUATION).is_file()
    (copy / bundle.CARD).write_text("# What we think of it")
    assert before == bundle.load(copy).id
    for name in bundle.DOCUMENTS:
        (copy / name).unlink(missing_ok=True)
    assert before == bundle.load(copy).id
    bundle.check_replaceable(copy)
