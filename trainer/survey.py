"""A data set at a glance, before anything is learnt from it.

This module owns what is measured in a clip without a model, what in that is worth a warning, and how
it is told in plain text. It must not know about features, folds or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import soundfile
from numpy.typing import NDArray

from trainer.cache import Cache
from trainer.dataset import Clip, Dataset, join_equal_sounds
from trainer.listening import Progress, Skipped, fingerprint, listen, silent
from trainer.results import ClipFacts, Survey
from worker.audio import Sound

FLOOR: Final = -120.0
"""What stands for no sound at all, in dB relative to full scale."""

FULL_SCALE: Final = 0.999
"""Magnitudes from here on are taken for full scale: the highest code of 8 bits is at 0.992, of 16 bits at 0.99997."""

RUN: Final = 3
"""So many samples at full scale in a row are clipped; a single one may just be the loudest."""

SILENCE: Final = -60.0
"""Blocks of `BLOCK` seconds under this RMS level, in dBFS, are silent."""

BLOCK: Final = 0.02

MUCH_CLIPPED: Final = 0.001
"""The share of clipped samples from which on a clip is warned of."""

MUCH_SILENT: Final = 0.5
"""The share of silence from which on a clip is warned of."""

FEW_CLIPS: Final = 10
"""A class of fewer has two clips in each of five tests, or less."""

UNBALANCED: Final = 10
"""So many times the clips of the smallest class, and the largest one is what a forest says when in doubt."""

NAMED: Final = 3
"""How many clips a warning names."""


class Heard(msgspec.Struct, frozen=True):
    """The facts of a clip, and the fingerprint of its sound."""

    facts: ClipFacts
    sound: str


class Looking(NamedTuple):
    """The work of finding the facts of a clip."""

    identity: Any = None

    def __call__(self, sound: Sound, clip: Clip) -> Heard:
        """Return what there is to be said of ``clip``, all channels mixed as the model hears them."""
        samples = sound.samples
        with clip.path.open("rb") as file:  # soundfile opens no path that is not UTF-8
            channels = soundfile.info(file).channels
        block = max(1, round(BLOCK * sound.sample_rate))
        edges = np.arange(0, samples.size, block)
        power = np.square(samples, dtype=np.float64)
        levels = np.add.reduceat(power, edges) / np.diff(edges, append=samples.size)
        facts = ClipFacts(
            name=clip.name,
            seconds=sound.duration,
            sample_rate=sound.sample_rate,
            channels=channels,
            peak=_decibels(float(np.abs(samples).max()) ** 2),
            rms=_decibels(float(power.mean())),
            clipped=_clipped(np.abs(samples) >= FULL_SCALE),
            silent=float(np.mean(levels < 10 ** (SILENCE / 10))),
        )
        return Heard(facts, fingerprint(sound))


def survey(
    dataset: Dataset,
    *,
    shortest_seconds: float = 0.0,
    jobs: int = -1,
    cache: Cache | None = None,
    on_progress: Progress = silent,
) -> Survey:
    """Listen to all clips and return what can be said of them, with warnings of what would mislead a model.

    Args:
        dataset: the labelled clips.
        shortest_seconds: what a worker will reject if it is shorter, if that is known.
        jobs: processor cores to use; -1 is all of them.
        cache: where facts may be kept.
        on_progress: told how many clips are done.
    """
    work = Looking()
    found = listen(
        [(clip, work) for clip in dataset.clips],
        Heard,
        stage="surveying the clips",
        jobs=jobs,
        cache=cache,
        on_progress=on_progress,
    )
    heard = [(clip, each) for clip, each in zip(dataset.clips, found, strict=True) if isinstance(each, Heard)]
    skipped = [each for each in found if isinstance(each, Skipped)]
    kept = msgspec.structs.replace(dataset, clips=tuple(clip for clip, _ in heard))
    joined = join_equal_sounds(kept, [each.sound for _, each in heard])
    facts = tuple(msgspec.structs.replace(each.facts, name=clip.name) for clip, each in heard)
    labels = [clip.label for clip in joined.clips] if dataset.task == "classification" else []
    counts = dict(sorted(Counter(labels).items()))
    return Survey(
        clips=len(facts),
        groups=len({clip.group for clip in joined.clips}),
        seconds=sum(each.seconds for each in facts),
        counts=counts,
        background=dataset.background,
        facts=facts,
        warnings=(
            *joined.warnings,
            *(f"{each.path} cannot be used: {each.reason}" for each in skipped),
            *_about_classes(counts),
            *_about_formats(labels, facts),
            *_about_levels(facts),
            *_about_lengths(facts, shortest_seconds),
        ),
    )


def describe(survey: Survey) -> str:
    """Return a survey as lines of plain text, its warnings last."""
    facts = survey.facts
    lines = [f"{survey.clips} clips of {survey.groups} groups, {_duration(survey.seconds)}"]
    if facts:
        rates, channels = Counter(each.sample_rate for each in facts), Counter(each.channels for each in facts)
        for name, text in (
            ("sample rate", _formats(rates, "Hz")),
            ("channels", _formats(channels, "")),
            ("duration", _range([each.seconds for each in facts], "s", 2)),
            ("peak", _range([each.peak for each in facts], "dBFS", 1)),
            ("RMS level", _range([each.rms for each in facts], "dBFS", 1)),
        ):
            lines.append(f"  {name:12} {text}")
    if survey.counts:
        width = max(map(len, survey.counts)) + 2
        lines += [
            f"  {name:{width}} {count:6}{'  background' if name in survey.background else ''}"
            for name, count in survey.counts.items()
        ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in survey.warnings)])


def _decibels(power: float) -> float:
    return max(FLOOR, 10 * float(np.log10(power))) if power > 0 else FLOOR


def _clipped(full: NDArray[np.bool_]) -> float:
    """Return the share of samples that are in runs at full scale, of `RUN` or more."""
    changes = np.flatnonzero(np.diff(full, prepend=False, append=False))
    lengths = changes[1::2] - changes[::2]
    return float(lengths[lengths >= RUN].sum() / full.size)


def _about_classes(counts: dict[str, int]) -> Iterator[str]:
    for name, count in counts.items():
        if count < FEW_CLIPS:
            clips = "1 clip" if count == 1 else f"{count} clips"
            yield f"class {name!r} has {clips}: too few to learn it, or to know how well it is learnt"
    if counts and max(counts.values()) > UNBALANCED * min(counts.values()):
        most, fewest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        yield (
            f"class {most!r} has {counts[most]} clips and {fewest!r} {counts[fewest]}: "
            "weigh the classes, or the larger one is said in doubt"
        )


def _about_formats(labels: Sequence[str], facts: Sequence[ClipFacts]) -> Iterator[str]:
    """Warn of formats that differ, and all the more if they tell the classes apart."""
    aspects: tuple[tuple[str, str, Callable[[ClipFacts], int]], ...] = (
        ("sample rates", "Hz", lambda each: each.sample_rate),
        ("numbers of channels", "", lambda each: each.channels),
    )
    for what, unit, of in aspects:
        everywhere = Counter(map(of, facts))
        if len(everywhere) < 2:
            continue
        yield f"clips are of different {what}: {_formats(everywhere, unit)}; a model can hear that, record all alike"
        for name in sorted(set(labels)):
            own = Counter(of(each) for label, each in zip(labels, facts, strict=True) if label == name)
            usual = (everywhere - own).most_common(1)
            if usual and own.most_common(1)[0][0] != usual[0][0]:
                yield (
                    f"class {name!r} has other {what} ({_formats(own, unit)}) than most others: "
                    "a model may learn the recorder and not the sound"
                )


def _about_levels(facts: Sequence[ClipFacts]) -> Iterator[str]:
    clipped = sorted((each for each in facts if each.clipped >= MUCH_CLIPPED), key=lambda each: -each.clipped)
    mute = [each for each in facts if each.rms <= SILENCE]
    still = sorted((each for each in facts if each.silent >= MUCH_SILENT and each not in mute), key=lambda e: -e.silent)
    if clipped:
        yield f"{_clips(clipped)} clipped: {_named(clipped, lambda each: each.clipped, 1)} of the samples"
    if mute:
        yield f"{_clips(mute)} silent throughout: {_named(mute, None, 0)}"
    if still:
        yield (
            f"{_clips(still)} silent for half of the time or more, and silence is learnt as their label: "
            f"{_named(still, lambda each: each.silent, 0)}"
        )


def _about_lengths(facts: Sequence[ClipFacts], shortest: float) -> Iterator[str]:
    short = sorted((each for each in facts if each.seconds < shortest), key=lambda each: each.seconds)
    if short:
        yield (
            f"{_clips(short)} shorter than half a window, {shortest:g} s, and silence fills it up: "
            f"{_named(short, None, 0)}. A worker rejects such sound: train with a shorter --window-seconds, or serve "
            "with --min-record-seconds"
        )


def _clips(several: Sequence[ClipFacts]) -> str:
    return "1 clip is" if len(several) == 1 else f"{len(several)} clips are"


def _named(several: Sequence[ClipFacts], share: Callable[[ClipFacts], float] | None, digits: int) -> str:
    names = [
        each.name if share is None else f"{each.name} ({100 * share(each):.{digits}f} %)" for each in several[:NAMED]
    ]
    return ", ".join([*names, "…"] if len(several) > NAMED else names)


def _formats(counts: Counter[int], unit: str) -> str:
    if len(counts) == 1:
        return f"{next(iter(counts))} {unit}".rstrip()
    return ", ".join(
        f"{value} {unit}".rstrip() + f" ({count} clip{'s' if count > 1 else ''})"
        for value, count in counts.most_common()
    )


def _range(values: Iterable[float], unit: str, digits: int) -> str:
    low, middle, high = np.quantile(list(values), [0.0, 0.5, 1.0])
    if round(high - low, digits) == 0:
        return f"{middle:.{digits}f} {unit}"
    return f"{low:.{digits}f} to {high:.{digits}f} {unit}, median {middle:.{digits}f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
