"""Listening to clips: each is read once, on all cores, and what was found out is kept for the next time.

This module owns how a clip becomes a waveform, how the work on many is spread, and when it need not
be done again. Decoding, mixing and resampling are the worker's: train as you serve. It must not know
what is found out.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import joblib
import msgspec
import numpy as np
import soundfile
from numpy.typing import NDArray

from trainer.backend import on_cluster
from trainer.cache import Cache, key_of
from trainer.dataset import Clip
from worker.audio import Sound, from_container, resample
from worker.errors import BadRecord, Fatal

FEWEST: Final = 128
"""For fewer tasks, processes are not worth starting: that takes two seconds, and two cores save about 12 ms a clip of
5 s. Threads save nothing: features are many small steps of Python, of which only one runs at a time."""

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""


def silent(_stage: str, _done: int, _total: int) -> None:
    """Tell nobody how far the work is."""


class Skipped(NamedTuple):
    """The file of a clip that cannot be used, by a name that can be written anywhere, and why."""

    path: Path
    reason: str


Found_co = TypeVar("Found_co", bound=msgspec.Struct, covariant=True)
Found = TypeVar("Found", bound=msgspec.Struct)


class Work(Protocol[Found_co]):
    """What is done with a clip. It is sent to other processes, and what it returns comes back from there."""

    @property
    def identity(self) -> Any:
        """All that decides what is found, apart from the clip and the software: plain data for a key."""

    def __call__(self, sound: Sound, clip: Clip, /) -> Found_co:
        """Return what there is to be found."""


def listen(
    tasks: Sequence[tuple[Clip, Work[Found]]],
    found: type[Found],
    *,
    stage: str,
    jobs: int = -1,
    cache: Cache | None = None,
    on_progress: Progress = silent,
) -> list[Found | Skipped]:
    """Return what each task finds out, in their order, from the cache where it is known.

    The rest is done wherever `joblib.parallel_config` says, in processes on this machine if nothing is
    said. A Dask cluster's workers must see the files under the same paths.

    Args:
        tasks: clips, and what is to be done with each.
        found: what all of this work returns.
        stage: what progress is told under.
        jobs: processor cores to use; -1 is all of them. The result does not depend on it.
        cache: where results may be kept.
        on_progress: told how many tasks are done.

    Raises:
        Fatal: a process was killed, other than this one.
    """
    keys = [_key(clip, work) for clip, work in tasks] if cache is not None else []
    results: list[Any] = [_kept(cache, key, found) for key in keys] if cache is not None else [None] * len(tasks)
    missing: dict[Clip, list[int]] = {}
    for index, (clip, _) in enumerate(tasks):
        if results[index] is None:
            missing.setdefault(clip, []).append(index)
    done = len(tasks) - sum(map(len, missing.values()))
    on_progress(stage, done, len(tasks))
    calls = [(clip, [tasks[index][1] for index in indices]) for clip, indices in missing.items()]
    jobs = jobs if len(tasks) - done >= FEWEST else 1
    try:
        for indices, several in zip(missing.values(), _spread(calls, jobs), strict=True):
            for index, one in zip(indices, several, strict=True):
                results[index] = one
                if cache is not None and not isinstance(one, Skipped):
                    cache.put(keys[index], msgspec.msgpack.encode(one))
            done += len(indices)
            on_progress(stage, done, len(tasks))
    except BrokenProcessPool as error:
        raise Fatal(
            f"{stage}: a process was killed on the way, as happens where memory runs out; try fewer --jobs"
        ) from error
    return results


def sound_of(clip: Clip) -> Sound:
    """Read a clip as a mono waveform at its own rate, as the worker would if it were sent.

    Raises:
        BadRecord: the file cannot be read, or there is no usable sound where the clip should be.
    """
    whole = clip.start == 0 and clip.end is None
    try:
        return from_container(clip.path.read_bytes() if whole else _segment(clip))
    except OSError as error:
        raise BadRecord("undecodable", f"the file cannot be read: {error.strerror}") from error


def read_clip(clip: Clip, sample_rate: int) -> NDArray[np.float32]:
    """Read a clip as a mono waveform, shape (samples,), at ``sample_rate`` in Hz.

    Raises:
        BadRecord: as `sound_of` does.
    """
    sound = sound_of(clip)
    return resample(sound.samples, sound.sample_rate, sample_rate)


def fingerprint(sound: Sound) -> str:
    """Return a hash of a sound's samples and rate: equal for equal sound, in whatever container it was."""
    return hashlib.sha256(sound.sample_rate.to_bytes(4, "little") + sound.samples.tobytes()).hexdigest()


def _spread(calls: Sequence[tuple[Clip, list[Work[Found]]]], jobs: int) -> Iterator[list[Found | Skipped]]:
    """Do the work on the first clip that can be used here, and on all behind it wherever joblib is to work.

    What Numba compiles for the first is kept on this machine's disk: there, each process would compile all of it
    otherwise, and grow by so much that joblib takes it for a leak, ends the process and warns of it.
    """
    rest = iter(calls)
    for call in () if on_cluster() else rest:
        found = _listen(*call)
        yield found
        if not all(isinstance(each, Skipped) for each in found):
            break
    yield from joblib.Parallel(n_jobs=jobs, return_as="generator")(joblib.delayed(_listen)(*call) for call in rest)


def _listen(clip: Clip, works: Sequence[Work[Found]]) -> list[Found | Skipped]:
    """Do all of the work on a clip."""
    try:
        sound = sound_of(clip)
    except BadRecord as error:
        path = Path(str(clip.path).encode(errors="backslashreplace").decode())
        return [Skipped(path, error.detail) for _ in works]
    return [work(sound, clip) for work in works]


def _segment(clip: Clip) -> bytes:
    """Return a segment of a file as a file of its own, bit for bit; what would end after the file ends with it.

    Only the segment is decoded: recordings of a day would not fit into memory.
    """
    try:
        # An opened file, for soundfile opens no path that is not UTF-8.
        with clip.path.open("rb") as opened, soundfile.SoundFile(opened) as file:
            rate: int = file.samplerate
            first = round(clip.start * rate)
            if first >= file.frames:
                raise BadRecord("empty", f"{clip.name} has no samples: the file is {file.frames / rate:g} s long")
            file.seek(first)
            frames = -1 if clip.end is None else round(clip.end * rate) - first
            samples = file.read(frames, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise BadRecord("undecodable", f"libsndfile: {error.error_string}") from None
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _key(clip: Clip, work: Work[Any]) -> str:
    return key_of(type(work).__name__, work.identity, clip.sha256, clip.start, clip.end)


def _kept(cache: Cache, key: str, found: type[Found]) -> Found | None:
    content = cache.get(key)
    return None if content is None else msgspec.msgpack.decode(content, type=found)
