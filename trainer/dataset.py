"""Labelled clips: where they are, what they are called, and how they are held out.

This module owns the layouts that a data set may have on disk, and the rule that clips of one
recording never stand on both sides of a split. It must not know about features or models.

Two layouts are read:

- a folder for each class, whose name is the label of every sound in it;
- a CSV manifest, given by its path or found in a folder under one of `MANIFESTS`. It has a column
  of files (one of `FILE_COLUMNS`) and a column of labels, and may have ``fold`` and ``group``. Files
  are looked for beside the manifest, then in ``audio/`` beside it, then in ``../audio``. ESC-50's own
  table (Piczak 2015) is read as it is: ``category`` is the label and ``src_file`` the group.

Clips are one group if the manifest says so, and also if their files are equal byte for byte.
"""

from __future__ import annotations

import csv
import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from worker.errors import Fatal

MANIFESTS: Final = ("manifest.csv", "meta.csv", "metadata.csv", "meta/esc50.csv")
FILE_COLUMNS: Final = ("filename", "file", "path")
SUFFIXES: Final = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".rf64"}
)
"""What counts as a sound in a folder per class; a manifest may name anything that libsndfile reads."""

MOST_CLASSES: Final = 20
"""Whole numbers with more distinct values than this are a quantity, with fewer they are codes of classes."""

Task = Literal["classification", "regression"]
Index = NDArray[np.intp]


class Clip(msgspec.Struct, frozen=True):
    """One labelled sound.

    ``name`` is its place within the data set, the same wherever that lies; ``label`` is a class,
    or a number as it was written; clips with the same ``group`` belong together; ``fold`` is the
    official split it is tested in, if there are any; ``sha256`` is that of the file.
    """

    path: Path
    name: str
    label: str
    group: str
    fold: str | None
    sha256: str


class Dataset(msgspec.Struct, frozen=True):
    """Labelled clips, the name of what they are labelled with, and what is to be learnt from it."""

    clips: tuple[Clip, ...]
    label: str
    task: Task
    warnings: tuple[str, ...] = ()


class _Listed(NamedTuple):
    """A clip, and where a person finds what was said of it."""

    clip: Clip
    where: str


def load(data: Path, label: str = "label", task: Task | None = None) -> Dataset:
    """Find the clips of a folder per class or of a CSV manifest; nothing is decoded yet.

    Args:
        data: a folder, or a manifest.
        label: the column to learn.
        task: what to learn. If it is not given, a column of a manifest is a quantity (regression) if all
            its values are numbers, and not all whole or more than `MOST_CLASSES` distinct ones;
            anything else, and every folder per class, is classification.

    Raises:
        Fatal: the layout is another, a column or a file is missing, or a label cannot be used.
    """
    manifest = _manifest(data)
    if manifest is None:
        listed, column, quantity = list(_from_folders(data, label)), label, False
    else:
        column, listed = _from_csv(manifest, label)
        quantity = _is_quantity({entry.clip.label for entry in listed})
    if task is None:
        task = "regression" if quantity else "classification"
    if task == "regression":
        for clip, where in listed:
            if _number(clip.label) is None:
                raise Fatal(f"{where}: {column} is {clip.label!r}; regression expects a finite number")
    clips, found = _group_identical([entry.clip for entry in listed])
    if task == "classification":
        found += _never_held_out(clips)
    return Dataset(clips, column, task, found)


def splits(dataset: Dataset, n_splits: int = 5, seed: int = 0) -> list[tuple[Index, Index]]:
    """Return pairs of clip indices (train, test); every clip is tested once, and no group is on both sides.

    The folds of the data set are used if it has any. Otherwise whole groups are held out, with
    the classes spread evenly as far as groups allow; there are fewer splits if groups are few.

    Raises:
        Fatal: a group stands in two folds, or nothing can be held out.
    """
    groups = np.array([clip.group for clip in dataset.clips])
    if dataset.clips[0].fold is not None:
        return _official_splits(dataset.clips)
    labels = np.array([clip.label for clip in dataset.clips])
    most = min(n_splits, len(set(groups)))
    if dataset.task == "classification":
        most = min(most, max(Counter(labels).values()))
    if most < 2:
        raise Fatal(
            f"nothing can be held out of {len(groups)} clips: they need two groups at least, and a class two clips; "
            "the column 'group' says which clips are from one recording or machine"
        )
    folds = StratifiedGroupKFold if dataset.task == "classification" else GroupKFold
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # it cannot be in every test, and need not
        pairs = list(folds(most, shuffle=True, random_state=seed).split(groups, labels, groups))
    return [(train, test) for train, test in pairs if train.size and test.size]


def data_hash(dataset: Dataset) -> str:
    """Return a SHA-256 of what was learnt from: names, labels, groups, folds and bytes, wherever they lie."""
    rows = sorted((clip.name, clip.label, clip.group, clip.fold or "", clip.sha256) for clip in dataset.clips)
    return hashlib.sha256(msgspec.json.encode(rows)).hexdigest()


def _manifest(data: Path) -> Path | None:
    """Return the manifest that ``data`` is or has, or None for a folder per class."""
    if data.is_file():
        return data
    if not data.is_dir():
        raise Fatal(f"{data} does not exist; expected a folder of clips or a CSV manifest")
    return next((data / name for name in MANIFESTS if (data / name).is_file()), None)


def _from_folders(data: Path, label: str) -> Iterator[_Listed]:
    if label != "label":
        raise Fatal(f"{data} has no manifest ({', '.join(MANIFESTS)}), so there is no column {label!r} in it")
    paths = sorted(path for path in data.glob("*/**/*") if _is_sound(path))
    if not paths:
        raise Fatal(
            f"{data} holds no clips; expected a folder for each class with sounds in it "
            f"({', '.join(sorted(SUFFIXES))}), or a manifest ({', '.join(MANIFESTS)})"
        )
    for path in paths:
        name = path.relative_to(data)
        yield _Listed(Clip(path, name.as_posix(), name.parts[0], name.as_posix(), None, _sha256(path)), str(path))


def _is_sound(path: Path) -> bool:
    hidden = path.name.startswith(".")  # macOS leaves a "._a.wav" beside an a.wav on foreign disks
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def _from_csv(manifest: Path, label: str) -> tuple[str, list[_Listed]]:
    """Return the column of the labels, and the clips."""
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            reader.fieldnames = columns = [column.strip() for column in reader.fieldnames or ()]
            rows = [(f"{manifest}, row {reader.line_num}", row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Fatal(f"{manifest} cannot be read as CSV in UTF-8: {error}") from error
    file_column = next((column for column in FILE_COLUMNS if column in columns), None)
    if file_column is None:
        raise Fatal(
            f"{manifest} has none of the columns {', '.join(FILE_COLUMNS)}; it has {', '.join(columns) or 'no header'}"
        )
    esc50 = {"category", "src_file"} <= set(columns)
    if label == "label" and label not in columns and esc50:
        label = "category"
    if label not in columns:
        raise Fatal(f"{manifest} has no column {label!r} to learn; it has {', '.join(columns)}")
    if not rows:
        raise Fatal(f"{manifest} lists no clips: it has a header and nothing else")
    group_column = "group" if "group" in columns else "src_file" if esc50 else None

    def clip(where: str, row: dict[str, str]) -> Clip:
        def cell(column: str) -> str:
            text = row[column].strip()
            if not text:
                raise Fatal(f"{where}: the column {column!r} is empty; fill it in, or remove the row")
            return text

        name = cell(file_column)
        path = _find(manifest.parent, name, where)
        group = cell(group_column) if group_column else name
        return Clip(path, name, cell(label), group, cell("fold") if "fold" in columns else None, _sha256(path))

    return label, [_Listed(clip(where, row), where) for where, row in rows]


def _find(folder: Path, name: str, where: str) -> Path:
    places = (folder / name, folder / "audio" / name, folder.parent / "audio" / name)
    for path in places:
        if path.is_file():
            return path
    raise Fatal(f"{where}: there is no file {name!r}; looked for {', '.join(map(str, places))}")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Fatal(f"{path} cannot be read: {error.strerror}") from error


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_quantity(labels: Iterable[str]) -> bool:
    numbers = {_number(label) for label in labels}
    return None not in numbers and (len(numbers) > MOST_CLASSES or any(n is not None and n % 1 for n in numbers))


def _group_identical(clips: Sequence[Clip]) -> tuple[tuple[Clip, ...], tuple[str, ...]]:
    """Join the groups of clips with equal bytes, for one of them would tell what the other is; say which."""
    joined: dict[str, str] = {}
    first: dict[str, Clip] = {}
    found = []

    def root(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    for clip in clips:
        twin = first.setdefault(clip.sha256, clip)
        if root(clip.group) != root(twin.group):
            joined[root(clip.group)] = root(twin.group)
            found.append(f"{clip.name} has the same bytes as {twin.name}; they are held out together")
        if clip.label != twin.label:
            found.append(f"{clip.name} ({clip.label}) has the same bytes as {twin.name} ({twin.label})")
    return tuple(msgspec.structs.replace(clip, group=root(clip.group)) for clip in clips), tuple(found)


def _never_held_out(clips: Sequence[Clip]) -> tuple[str, ...]:
    """Say which classes stand in one fold or group only: held out, nobody has ever heard them, and all are wrong."""
    places: dict[str, set[str]] = {}
    for clip in clips:
        places.setdefault(clip.label, set()).add(clip.group if clip.fold is None else clip.fold)
    return tuple(
        f"all clips of {label!r} are of one group or fold ({', '.join(place)}): held out, it is never recognised"
        for label, place in sorted(places.items())
        if len(place) == 1
    )


def _official_splits(clips: Sequence[Clip]) -> list[tuple[Index, Index]]:
    fold_of: dict[str, Clip] = {}
    for clip in clips:
        other = fold_of.setdefault(clip.group, clip)
        if other.fold != clip.fold:
            raise Fatal(
                f"{other.name} is in fold {other.fold} and {clip.name} in fold {clip.fold}, but both are of group "
                f"{clip.group!r}; clips of one group, or with the same bytes, must be in one fold"
            )
    folds = np.array([clip.fold for clip in clips])
    values = np.unique(folds)
    if len(values) < 2:
        raise Fatal(f"all clips are in fold {values[0]}: nothing can be held out; number the folds, or drop the column")
    return [(np.flatnonzero(folds != value), np.flatnonzero(folds == value)) for value in values]
