"""`make skew`: what serving differently from training costs a notebook's loop, and what the worker makes of it.

Both are trained on the same clips of ESC-10 and hear the same seconds of the held-out ones, spoilt
in the ways that were found in published notebooks. The notebook is librosa and scikit-learn; the
worker is the whole pipeline, from the bytes of a record to its prediction or rejection.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import joblib
import librosa
import msgspec
import numpy as np
import soundfile
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier

from tests.conftest import SHARED_DATA
from trainer.dataset import Dataset, load
from trainer.training import fit
from worker import audio, bundle
from worker.bundle import FEATURIZER, MANIFEST
from worker.drift import DriftPolicy
from worker.errors import BadModel
from worker.features import Featurizer, feature_spec
from worker.messages import Classification, Prediction, Record, Topics
from worker.pipeline import Pipeline
from worker.states import Retention

RATE: Final = 16_000
TREES: Final = 100
LEVEL: Final = -23.0
TOPICS: Final = Topics()

Sound = NDArray[np.float32]


class Heard(NamedTuple):
    """A second of a held-out clip at the clip's own rate, and its class."""

    samples: Sound
    rate: int
    label: str


class Skew(NamedTuple):
    """A difference between training and serving: what the notebook computes, and what the worker is sent."""

    name: str
    notebook: Callable[[Heard], Sequence[Sound]]
    relative: bool
    record: Callable[[Heard], Sequence[tuple[str, bytes]]]


class Score(NamedTuple):
    """Of so many chunks, how many were named correctly, and how many the worker refused, by reason."""

    right: int
    chunks: int
    refused: Counter[str]

    def __str__(self) -> str:
        if self.refused.total() == self.chunks:
            return "refused: " + ", ".join(self.refused)
        return f"{100 * self.right / self.chunks:.1f} %"


def at_rate(heard: Heard, rate: int) -> Sound:
    """Resample a second properly."""
    return audio.resample(heard.samples, heard.rate, rate)


def wav(samples: Sound, rate: int) -> bytes:
    """Encode as a WAV file of 16 bits."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def pcm(samples: Sound) -> bytes:
    """Encode as raw 16-bit samples."""
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2").tobytes()


def quarters(samples: Sound) -> list[Sound]:
    """Cut a second into quarters."""
    return np.array_split(samples, 4)


WAV: Final = "audio/wav"
SKEWS: Final = (
    Skew(
        "none: served as trained",
        lambda heard: [at_rate(heard, RATE)],
        relative=False,
        record=lambda heard: [(WAV, wav(at_rate(heard, RATE), RATE))],
    ),
    Skew(
        "44.1 kHz taken for 16 kHz",
        lambda heard: [heard.samples],
        relative=False,
        record=lambda heard: [(WAV, wav(heard.samples, heard.rate))],
    ),
    Skew(
        "raw samples whose rate nobody states",
        lambda heard: [heard.samples],
        relative=False,
        record=lambda heard: [("audio/pcm;format=s16le", pcm(heard.samples))],
    ),
    Skew(
        "int16 not scaled",
        lambda heard: [at_rate(heard, RATE) * np.float32(32768)],
        relative=False,
        record=lambda heard: [(f"audio/pcm;rate={RATE};format=s16le", pcm(at_rate(heard, RATE)))],
    ),
    Skew(
        "48 kHz, every third sample, no filter",
        lambda heard: [at_rate(heard, 3 * RATE)[::3]],
        relative=False,
        record=lambda heard: [(WAV, wav(at_rate(heard, 3 * RATE), 3 * RATE))],
    ),
    Skew(
        "dB relative to the maximum",
        lambda heard: [at_rate(heard, RATE)],
        relative=True,
        record=lambda _heard: (),  # no record can do that; see `refused_bundle`
    ),
    Skew(
        "quarter-second chunks",
        lambda heard: quarters(at_rate(heard, RATE)),
        relative=False,
        record=lambda heard: [(WAV, wav(each, RATE)) for each in quarters(at_rate(heard, RATE))],
    ),
    Skew(
        "12 dB quieter",
        lambda heard: [at_rate(heard, RATE) * np.float32(0.25)],
        relative=False,
        record=lambda heard: [(WAV, wav(at_rate(heard, RATE) * np.float32(0.25), RATE))],
    ),
)


class Notebook:
    """What a notebook does: librosa for each second, a forest, and whatever it is given."""

    def __init__(self, training: Dataset) -> None:
        chunks = list(seconds(training))
        features = [self.features(at_rate(chunk, RATE), relative=False) for chunk in chunks]
        self._forest = RandomForestClassifier(TREES, random_state=0).fit(features, [chunk.label for chunk in chunks])

    @staticmethod
    def features(samples: Sound, *, relative: bool) -> NDArray[Any]:
        """Return mean and deviation of 20 MFCCs."""
        mel = librosa.feature.melspectrogram(y=samples, sr=RATE)
        decibels = librosa.power_to_db(mel, ref=np.max if relative else 1.0)
        mfcc = librosa.feature.mfcc(S=decibels, n_mfcc=20)
        return np.concatenate([mfcc.mean(axis=1), mfcc.std(axis=1)])

    def score(self, skew: Skew, heard: Sequence[Heard]) -> Score:
        """Return how many chunks it names correctly."""
        pieces = [(piece, each.label) for each in heard for piece in skew.notebook(each)]
        said = self._forest.predict([self.features(piece, relative=skew.relative) for piece, _ in pieces])
        return Score(sum(a == label for a, (_, label) in zip(said, pieces, strict=True)), len(pieces), Counter())


class Worker:
    """What Earshot does with the same clips."""

    def __init__(self, training: Dataset, folder: Path) -> None:
        self._folder = folder
        fit(training, folder, name="skew", spec=feature_spec("compact", level_dbfs=LEVEL), trees=TREES)
        self._bundle = bundle.load(folder)
        half = self._bundle.featurizer.spec.window_seconds / 2
        limits = audio.Limits(min_seconds=half)
        self._pipeline = Pipeline(self._bundle, TOPICS, limits, DriftPolicy(), Retention())

    def score(self, skew: Skew, heard: Sequence[Heard]) -> Score:
        """Return how many chunks it names correctly, and how many it refuses."""
        sent = [(*record, each.label) for each in heard for record in skew.record(each)]
        right, refused = 0, Counter[str]()
        for number, (content_type, value, label) in enumerate(sent):
            headers = (("content-type", content_type.encode()),)
            record = Record(TOPICS.audio_in, 0, number, 0, b"mic-1", value, headers)
            batch = self._pipeline.run({}, [record])
            refused.update(batch.rejections)
            for message in batch.outputs:
                if message.topic == TOPICS.predictions_out:
                    prediction = msgspec.json.decode(message.value or b"", type=Prediction)
                    assert isinstance(prediction, Classification)
                    right += prediction.label == label
        return Score(right, len(sent), refused)

    def refuses_another_featurizer(self) -> str:
        """Return what is said to a bundle whose featurizer has been replaced by one that clamps its dB elsewhere."""
        spec = self._bundle.featurizer.spec
        other = msgspec.structs.replace(spec, sets=(msgspec.structs.replace(spec.sets[0], top_db=20.0),))
        joblib.dump(Featurizer(other), self._folder / FEATURIZER)
        # Not damage, which its hash would show, but a bundle that agrees with itself and computes something else.
        forged = hashlib.sha256((self._folder / FEATURIZER).read_bytes()).hexdigest()
        manifest = self._bundle.manifest
        lying = msgspec.structs.replace(manifest, spec=other, files={**manifest.files, FEATURIZER: forged})
        (self._folder / MANIFEST).write_bytes(msgspec.json.encode(lying))
        try:
            bundle.load(self._folder)
        except BadModel as error:
            return f"the model is refused: {str(error).partition(': ')[2]}"
        raise AssertionError("a bundle with another featurizer was loaded")


def seconds(dataset: Dataset) -> Iterator[Heard]:
    """Yield the whole seconds of each clip."""
    for clip in dataset.clips:
        sound = audio.from_container(clip.path.read_bytes())
        for start in range(0, len(sound.samples) - sound.sample_rate + 1, sound.sample_rate):
            yield Heard(sound.samples[start : start + sound.sample_rate], sound.sample_rate, clip.label)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and return 0 if the worker refuses or keeps its accuracy within a point everywhere."""
    parser = argparse.ArgumentParser(prog="make skew", description=__doc__)
    parser.add_argument(
        "data", nargs="?", type=Path, default=SHARED_DATA / "esc10", help="ESC-10 or another data set with folds"
    )
    parser.add_argument("--folds", type=int, default=5, help="how many of its folds to hold out in turn (%(default)s)")
    arguments = parser.parse_args(argv)
    dataset = load(arguments.data)
    totals: dict[str, list[Score]] = {}
    for fold in sorted({str(clip.fold) for clip in dataset.clips})[: arguments.folds]:
        training = msgspec.structs.replace(dataset, clips=tuple(c for c in dataset.clips if c.fold != fold))
        held = list(seconds(msgspec.structs.replace(dataset, clips=tuple(c for c in dataset.clips if c.fold == fold))))
        with tempfile.TemporaryDirectory() as folder:
            notebook, worker = Notebook(training), Worker(training, Path(folder) / "bundle")
            for skew in SKEWS:
                totals.setdefault(f"{skew.name}/notebook", []).append(notebook.score(skew, held))
                totals.setdefault(f"{skew.name}/worker", []).append(worker.score(skew, held))
            refusal = worker.refuses_another_featurizer()
    scores = {
        name: Score(*(sum(x, start=type(x[0])()) for x in zip(*each, strict=True))) for name, each in totals.items()
    }
    print(f"{'difference':40}{'notebook':>10}   worker")
    for skew in SKEWS:
        ours = scores[f"{skew.name}/worker"]
        print(f"{skew.name:40}{scores[f'{skew.name}/notebook']!s:>10}   {ours if ours.chunks else refusal}")
    as_trained, *spoilt = (scores[f"{skew.name}/worker"] for skew in SKEWS)
    lost = [
        s
        for s in spoilt
        if s.chunks > s.refused.total() and s.right / s.chunks < as_trained.right / as_trained.chunks - 0.01
    ]
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
