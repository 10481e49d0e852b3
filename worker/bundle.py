"""The model bundle on disk: a folder that is verified before anything in it is believed.

    manifest.json       what this is: names, versions, settings, metrics, and the hash of each file
    featurizer.joblib   the one featurizer
    forest.joblib       the fitted scikit-learn forest
    profile.json        what normal looked like (`worker.profile`)
    golden.npz          clips, and the features and scores that the trainer got from them
    evaluation.json, README.md, report.html   for people: what was found out in training

Loading goes in steps, each of which may refuse: the manifest reads, every file has its hash (only
now is anything unpickled: a hash shows damage, not a forger, who could write a manifest as well),
the versions fit, the parts fit each other, and the golden clips give what they gave the trainer.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import joblib
import msgspec
import numpy as np
from numpy.typing import NDArray

from worker.calibration import Calibration, ConformalInterval, TemperatureScaling
from worker.errors import BadModel, Fatal
from worker.features import FeatureSpec, Featurizer
from worker.forest import Forest
from worker.golden import Golden, pack, replay, scores, unpack, window_mean
from worker.messages import ModelId
from worker.profile import ReferenceProfile, Vector, signal_names
from worker.windows import Waveform

FORMAT: Final = 2
MANIFEST: Final = "manifest.json"
FEATURIZER: Final = "featurizer.joblib"
FOREST: Final = "forest.joblib"
PROFILE: Final = "profile.json"
GOLDEN: Final = "golden.npz"
FILES: Final = (FEATURIZER, FOREST, PROFILE, GOLDEN)

EVALUATION: Final = "evaluation.json"
CARD: Final = "README.md"
REPORT: Final = "report.html"
DOCUMENTS: Final = (EVALUATION, CARD, REPORT)
"""What people read. A model is served without them, so they are not verified, and may be taken away."""

VERSIONED: Final = ("earshot", "scikit-learn", "numpy", "scipy", "librosa", "joblib")


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle says about itself.

    ``label`` is the trained column, ``classes`` the classes in the order of the scores (none for
    a regressor), ``watched`` the features among the signals of the profile, ``metrics`` what was
    measured on clips that the forest had not seen. ``forest`` has scikit-learn's settings,
    ``augmentation`` those of the copies that were trained on beside the clips, ``validation`` how clips were
    held out, and ``search`` what the settings of the forest were chosen from, and how.
    """

    format: int
    name: str
    created: datetime
    task: Literal["classification", "regression"]
    label: str
    classes: tuple[str, ...]
    spec: FeatureSpec
    watched: tuple[str, ...]
    metrics: dict[str, float]
    calibration: Calibration
    forest: dict[str, Any]
    augmentation: dict[str, Any] | None
    validation: dict[str, Any]
    search: dict[str, Any] | None
    seed: int
    clips: int
    windows: int
    data_hash: str
    versions: dict[str, str]
    files: dict[str, str]


class Bundle:
    """A verified model: the featurizer, the forest and the profile that belong together."""

    def __init__(
        self,
        manifest: Manifest,
        id: ModelId,
        featurizer: Featurizer,
        forest: Forest,
        profile: ReferenceProfile,
        goldens: Sequence[Golden],
    ) -> None:
        self.manifest = manifest
        self.id = id
        self.featurizer = featurizer
        self.profile = profile
        self.watched = np.array([featurizer.feature_names.index(name) for name in manifest.watched], np.intp)
        self._forest = forest
        self._goldens = goldens

    def scores(self, features: NDArray[np.float32]) -> Vector:
        """Return what the forest itself says of each row of ``features``, shape (n, features).

        Returns:
            The probability of each class, shape (n, classes); for a regressor the value and the
            standard deviation over the trees, shape (n, 2).
        """
        return scores(self._forest, features)

    def answers(self, records: Sequence[NDArray[np.float32]]) -> Vector:
        """Return what is said of records, each of them the features of its windows, shape (windows, features).

        Returns:
            The calibrated mean over the windows: the probability of each class, shape (n, classes); for a
            regressor the value, the spread of the trees and the ends of the interval, shape (n, 4).
        """
        every = self.scores(np.concatenate(records))
        if any(len(record) != 1 for record in records):
            ends = np.cumsum([len(record) for record in records])
            every = np.array(
                [window_mean(every[end - len(record) : end]) for end, record in zip(ends, records, strict=True)]
            )
        return self.manifest.calibration.apply(every)

    def predict(self, waveforms: Sequence[Waveform]) -> list[str] | Vector:
        """Return the class, or the value, of each waveform.

        Args:
            waveforms: each of shape (samples,), float32 with full scale at 1 or int16, at the sample rate of
                ``manifest.spec``, of any length.

        Raises:
            ValueError: a waveform has another shape, or no sample.
            TypeError: they are no list of waveforms, or a waveform is neither float32 nor int16.
        """
        _expect_waveforms(waveforms)
        if not len(waveforms):
            return []
        answers = self._heard(waveforms)
        if self.manifest.task == "regression":
            return answers[:, 0]
        return [self.manifest.classes[best] for best in answers.argmax(axis=1)]

    def predict_proba(self, waveforms: Sequence[Waveform]) -> Vector:
        """Return the probability of each of ``manifest.classes`` for each waveform, shape (n, classes).

        Raises:
            TypeError: the model is a regressor. For waveforms see `predict`.
        """
        if self.manifest.task == "regression":
            raise TypeError("this model is a regressor and has no probabilities; call predict")
        _expect_waveforms(waveforms)
        return self._heard(waveforms) if len(waveforms) else np.empty((0, len(self.manifest.classes)))

    def _heard(self, waveforms: Sequence[Waveform]) -> Vector:
        return self.answers([self.featurizer.transform(self.featurizer.windows(each)) for each in waveforms])

    def replay(self) -> None:
        """Hold the golden clips against what the trainer saw.

        Raises:
            BadModel: one of them gives something else; the text says what differs.
        """
        replay(self._goldens, self.featurizer, self._forest)


def write(
    path: Path,
    manifest: dict[str, Any],
    *,
    featurizer: Featurizer,
    forest: Any,
    profile: ReferenceProfile,
    goldens: Sequence[Golden],
    documents: Callable[[Manifest], Mapping[str, str]] = lambda _manifest: {},
) -> Manifest:
    """Write a bundle to ``path``, whole or not at all, in place of a bundle that stands there.

    Args:
        path: the folder to be.
        manifest: the fields of `Manifest` apart from format, spec, versions and files.
        featurizer: what the features came from.
        forest: the fitted scikit-learn forest.
        profile: the reference profile.
        goldens: clips to be replayed whenever the bundle is loaded.
        documents: makes `DOCUMENTS`, by name, for the complete manifest.

    Raises:
        Fatal: ``path`` exists and is no bundle.
    """
    check_replaceable(path)
    contents = {
        FEATURIZER: _dump(featurizer),
        FOREST: _dump(forest),
        PROFILE: msgspec.json.format(msgspec.json.encode(profile)),
        GOLDEN: pack(goldens),
    }
    complete = Manifest(
        format=FORMAT,
        spec=featurizer.spec,
        versions={name: version(name) for name in VERSIONED},
        files={name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        **manifest,
    )
    contents[MANIFEST] = msgspec.json.format(msgspec.json.encode(complete)) + b"\n"
    complete = msgspec.json.decode(contents[MANIFEST], type=Manifest)  # as whoever loads it will see it
    contents |= {name: text.encode() for name, text in documents(complete).items()}
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        temporary.chmod(0o755)
        # The old bundle is out of the way for a moment only: gone when the new one is there, back if that fails.
        replaced = temporary.with_name(f"{temporary.name}-old")
        if path.exists():
            path.rename(replaced)
        try:
            temporary.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return complete


def check_replaceable(path: Path) -> None:
    """Make the folder above ``path`` if a bundle may be written there: nothing is there, or a bundle and nothing else.

    Raises:
        Fatal: something else is there (much that is not ours has a ``manifest.json``), or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    except OSError as error:
        raise Fatal(f"cannot write to {path}: {error}; name another folder") from error
    if names and names - set(DOCUMENTS) != {MANIFEST, *FILES}:
        raise Fatal(f"{path} exists and is no model bundle: name another folder, or remove it")


def load(path: Path | str) -> Bundle:
    """Read and verify a bundle.

    Raises:
        BadModel: it is incomplete, damaged, made by another scikit-learn, or does not reproduce
            its golden clips; the text says what differs.
    """
    path = Path(path)
    if not path.exists():
        raise BadModel(f"there is no model bundle at {path}; `earshot-trainer fit` writes one")
    if not (path / MANIFEST).is_file():
        raise BadModel(f"{path} is no model bundle: it has no {MANIFEST}; `earshot-trainer fit` writes one")
    manifest = _manifest(path)
    contents = _verified(path, manifest)
    made_by, running = manifest.versions.get("scikit-learn"), version("scikit-learn")
    if made_by != running:
        raise BadModel(
            f"{path} was made by scikit-learn {made_by} and this is {running}: a forest must not be unpickled by"
            f" another version; train again, or install scikit-learn=={made_by}"
        )
    featurizer, forest = _unpickle(path, FEATURIZER, contents), _unpickle(path, FOREST, contents)
    if not isinstance(featurizer, Featurizer) or featurizer.spec != manifest.spec:
        raise BadModel(f"{path / FEATURIZER} is not the featurizer that {MANIFEST} describes")
    try:
        profile = msgspec.json.decode(contents[PROFILE], type=ReferenceProfile)
        identity = ModelId(manifest.name, manifest.created.strftime("%Y%m%dT%H%M%SZ"), model_hash(manifest))
        flat = Forest.from_sklearn(forest)
        _expect(f"the classes of {FOREST}", flat.classes or (), manifest.classes)
        _expect(f"the features of {FOREST}", flat.n_features, len(featurizer.feature_names))
        levelled = manifest.spec.level_dbfs is not None
        expected = TemperatureScaling if manifest.classes else ConformalInterval
        _expect("the calibration", type(manifest.calibration).__name__, expected.__name__)
        signals = signal_names(manifest.classes, manifest.watched, levelled=levelled)
        _expect(f"the signals of {PROFILE}", profile.names, signals)
        bundle = Bundle(manifest, identity, featurizer, flat, profile, unpack(contents[GOLDEN]))
    except (ValueError, msgspec.MsgspecError) as error:
        raise BadModel(f"the parts of {path} do not fit each other: {error}") from error
    try:
        bundle.replay()
    except BadModel as error:
        raise BadModel(f"{path}: {error}") from error
    return bundle


def model_hash(manifest: Manifest) -> str:
    """Return the SHA-256 that identifies a model: of its manifest, and so of its files, but not of its hour.

    The same clips, settings and versions give the same model whenever it is trained, and then its
    predictions keep their ``ce_id``.
    """
    timeless = msgspec.structs.replace(manifest, created=datetime.fromtimestamp(0, UTC))
    return hashlib.sha256(msgspec.json.encode(timeless)).hexdigest()


def _manifest(path: Path) -> Manifest:
    try:
        raw = (path / MANIFEST).read_bytes()
        stated = msgspec.json.decode(raw).get("format")
        if stated != FORMAT:
            raise BadModel(f"{path} has bundle format {stated}; this Earshot reads format {FORMAT}")
        return msgspec.json.decode(raw, type=Manifest)
    except (OSError, msgspec.DecodeError, AttributeError) as error:
        raise BadModel(f"{path / MANIFEST} is not readable: {error}") from error


def _verified(path: Path, manifest: Manifest) -> dict[str, bytes]:
    """Return the contents of the files, read once: what was hashed is what is unpickled."""
    contents = {}
    for name in FILES:
        try:
            contents[name] = (path / name).read_bytes()
        except OSError as error:
            raise BadModel(f"{path / name} is not readable: {error.strerror}") from error
        found, stated = hashlib.sha256(contents[name]).hexdigest(), manifest.files.get(name)
        if found != stated:
            raise BadModel(
                f"{path / name} has SHA-256 {found}, and {MANIFEST} says {stated}: it is damaged or replaced"
            )
    return contents


def _unpickle(path: Path, name: str, contents: dict[str, bytes]) -> Any:
    try:
        return joblib.load(io.BytesIO(contents[name]))
    except Exception as error:
        raise BadModel(f"{path / name} cannot be unpickled: {type(error).__name__}: {error}") from error


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(f"{what} are {found}, expected {expected}")


def _expect_waveforms(waveforms: Any) -> None:
    """Do nothing if these may be waveforms; a path, a list of paths and a bare waveform are what else is given.

    Raises:
        TypeError: they are one of those.
    """
    if isinstance(waveforms, str | Path) or any(np.ndim(each) == 0 for each in waveforms):
        given = "a single waveform" if isinstance(waveforms, np.ndarray) else "no list of waveforms"
        raise TypeError(
            f"this is {given}; pass a list of waveforms, as in [samples], each an array of float32 or int16 "
            "that was read from its file before"
        )


def _dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    joblib.dump(value, buffer)
    return buffer.getvalue()
