"""Labelled clips: what they are called, what is to be learnt from them, and which of them belong together.

This module owns the data set as everything after it sees it, wherever it lay. Clips are one group if
the manifest says so, if they are segments of one file and it says nothing, and always if they share a
sound: the same bytes, segments that overlap, or equal samples in other bytes. It must not know about
features or models.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from trainer.layouts import Listed, find_manifest, finite_number, from_csv, from_folders
from worker.errors import Fatal

MOST_CLASSES: Final = 20
"""Whole numbers with more distinct values than this are a quantity, with fewer they are codes of classes."""

BACKGROUND: Final = frozenset({"background", "noise", "silence", "other"})
"""Classes of these names, in any case, are learnt so that they can be told from what matters."""

Task = Literal["classification", "regression"]
Index = NDArray[np.intp]


class Clip(msgspec.Struct, frozen=True):
    """One labelled sound: a file, or the segment of it from ``start`` to ``end`` (None: its end) in seconds.

    ``name`` is its place within the data set, the same wherever that lies, "file@start-end" for a segment;
    ``label`` is a class, or a number as it was written; clips with the same ``group`` belong together;
    ``fold`` is the official split it is tested in, if there are any; ``sha256`` is that of the file.
    """

    path: Path
    name: str
    label: str
    group: str
    fold: str | None
    sha256: str
    start: float = 0.0
    end: float | None = None


class Dataset(msgspec.Struct, frozen=True):
    """Labelled clips, the name of what they are labelled with, and what is to be learnt from it.

    ``background`` are the classes that are learnt only to be told from the others, see `BACKGROUND`;
    ``group`` are the columns that were asked to say what belongs together, if any.
    """

    clips: tuple[Clip, ...]
    label: str
    task: Task
    warnings: tuple[str, ...] = ()
    background: tuple[str, ...] = ()
    group: str | None = None


def load(data: Path | str, label: str = "label", task: Task | None = None, group: str | None = None) -> Dataset:
    """Find the clips of a folder per class or of a CSV manifest (see `trainer.layouts`); nothing is decoded yet.

    Args:
        data: a folder, or a manifest.
        label: the column to learn.
        task: what to learn. If it is not given, a column of a manifest is a quantity (regression) if all
            its values are numbers, and not all whole or more than `MOST_CLASSES` distinct ones;
            anything else, and every folder per class, is classification.
        group: the columns that say what belongs together, joined by "+", instead of ``group``.

    Raises:
        Fatal: the layout is another, a column or a file is missing, a label cannot be used, or a
            group stands in two folds.
    """
    data = Path(data)
    manifest = find_manifest(data)
    if manifest is None:
        listed, quantity = from_folders(data, label, group), False
    else:
        label, listed = from_csv(manifest, label, group)
        quantity = _is_quantity({each.label for each in listed})
    if task is None:
        task = "regression" if quantity else "classification"
    if task == "regression":
        for each in listed:
            if finite_number(each.label) is None:
                raise Fatal(f"{each.where}: {label} is {each.label!r}; regression expects a finite number")
    clips = _clips(listed)
    _check_folds(clips)
    clips, found = _joined(clips, _same_bytes(clips))
    if task == "regression":
        return Dataset(clips, label, task, found, group=group)
    background = sorted({clip.label for clip in clips if clip.label.casefold() in BACKGROUND})
    return Dataset(clips, label, task, found + _never_held_out(clips), tuple(background), group)


def join_equal_sounds(dataset: Dataset, sounds: Sequence[str]) -> Dataset:
    """Return ``dataset`` with clips of equal sound in one group, and a warning for each that was not.

    Args:
        dataset: labelled clips.
        sounds: a hash of the decoded samples of each clip.
    """
    clips, found = _joined(dataset.clips, _same_sound(dataset.clips, sounds))
    return msgspec.structs.replace(dataset, clips=clips, warnings=dataset.warnings + found)


def data_hash(dataset: Dataset) -> str:
    """Return a SHA-256 of what was learnt from: names, labels, groups, folds and bytes, wherever they lie."""
    rows = sorted((clip.name, clip.label, clip.group, clip.fold or "", clip.sha256) for clip in dataset.clips)
    return hashlib.sha256(msgspec.json.encode(rows)).hexdigest()


def _clips(listed: Iterable[Listed]) -> tuple[Clip, ...]:
    hashes: dict[Path, str] = {}  # a long file is listed with each of its segments
    clips = []
    for each in listed:
        if each.path not in hashes:
            hashes[each.path] = _sha256(each.path)
        clips.append(
            Clip(each.path, each.name, each.label, each.group, each.fold, hashes[each.path], each.start, each.end)
        )
    return tuple(clips)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Fatal(f"{path} cannot be read: {error.strerror}") from error


def _is_quantity(labels: Iterable[str]) -> bool:
    numbers = {finite_number(label) for label in labels}
    return None not in numbers and (len(numbers) > MOST_CLASSES or any(n is not None and n % 1 for n in numbers))


def _check_folds(clips: Iterable[Clip]) -> None:
    first: dict[str, Clip] = {}
    for clip in clips:
        other = first.setdefault(clip.group, clip)
        if other.fold != clip.fold:
            raise Fatal(
                f"{other.name} is in fold {other.fold} and {clip.name} in fold {clip.fold}, but both are of group "
                f"{clip.group!r}; clips of one group must be in one fold"
            )


Twins = tuple[int, int, str]
"""A clip, an earlier one that it must not be held out from, and why: words that stand between their names."""


def _same_bytes(clips: Sequence[Clip]) -> Iterator[Twins]:
    """Find clips of equal bytes, unless they are segments that do not overlap."""
    by_content: dict[str, list[int]] = {}
    for index, clip in enumerate(clips):
        by_content.setdefault(clip.sha256, []).append(index)
    for indices in by_content.values():
        longest, *rest = sorted(indices, key=lambda index: clips[index].start)
        for index in rest:
            clip, before = clips[index], clips[longest]
            if clip.start < _end(before):
                yield index, longest, "has the same bytes as" if _bytes(clip) == _bytes(before) else "overlaps with"
            if _end(clip) > _end(before):
                longest = index


def _same_sound(clips: Sequence[Clip], sounds: Sequence[str]) -> Iterator[Twins]:
    first: dict[str, int] = {}
    for index, sound in enumerate(sounds):
        earlier = first.setdefault(sound, index)
        if _bytes(clips[index]) != _bytes(clips[earlier]):  # of those that are equal it is known already
            yield index, earlier, "has the same sound as"


def _bytes(clip: Clip) -> tuple[str, float, float]:
    return clip.sha256, clip.start, _end(clip)


def _end(clip: Clip) -> float:
    return math.inf if clip.end is None else clip.end


def _joined(clips: Sequence[Clip], pairs: Iterable[Twins]) -> tuple[tuple[Clip, ...], tuple[str, ...]]:
    """Join the groups of twins, for one of them would tell what the other is; say which were not yet one."""
    joined: dict[str, str] = {}
    found = []

    def root(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    for index, earlier, how in pairs:
        clip, twin = clips[index], clips[earlier]
        group, other = root(clip.group), root(twin.group)
        if group != other:
            joined[group] = other
            told = "they are held out together"
            if clip.fold != twin.fold:
                told = f"each is left out of the training that is tested on the other (folds {clip.fold}, {twin.fold})"
            found.append(f"{clip.name} {how} {twin.name}; {told}")
        if clip.label != twin.label and how != "overlaps with":  # two things may be heard one after the other
            found.append(f"{clip.name} ({clip.label}) {how} {twin.name} ({twin.label})")
    return tuple(msgspec.structs.replace(clip, group=root(clip.group)) for clip in clips), tuple(found)


def _never_held_out(clips: Iterable[Clip]) -> tuple[str, ...]:
    """Say which classes stand in one fold or group only: held out, nobody has ever heard them, and all are wrong."""
    places: dict[str, set[str]] = {}
    for clip in clips:
        places.setdefault(clip.label, set()).add(clip.group if clip.fold is None else clip.fold)
    return tuple(
        f"all clips of {label!r} are of one group or fold ({', '.join(place)}): held out, it is never recognised"
        for label, place in sorted(places.items())
        if len(place) == 1
    )
