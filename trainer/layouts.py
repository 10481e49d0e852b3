"""The layouts that a data set may have on disk, read as one list.

This module owns where files are looked for and what columns mean. It must not know what is done
with the clips, nor read a sound.

- A folder for each class, whose name is the label of every sound in it.
- A CSV manifest, given by its path or found in a folder under one of `MANIFESTS`. It has a column of
  files (one of `FILE_COLUMNS`) and columns of labels, of which one is learnt. It may have ``fold``,
  ``group``, and ``start`` and ``end`` in seconds: then a row is a segment of its file, and an empty cell
  is the file's own start or end. Files are looked for beside the manifest, then in ``audio/`` beside it,
  then in ``../audio``. ESC-50's own table (Piczak 2015) is read as it is: ``category`` is the label and
  ``src_file`` the group.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from worker.errors import Fatal

MANIFESTS: Final = ("manifest.csv", "meta.csv", "metadata.csv", "meta/esc50.csv")
FILE_COLUMNS: Final = ("filename", "file", "path")
SUFFIXES: Final = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".rf64"}
)
"""What counts as a sound in a folder per class; a manifest may name anything that libsndfile reads."""


class Listed(NamedTuple):
    """A clip as it is listed, and ``where`` a person finds it so; ``end`` None is that of the file."""

    path: Path
    name: str
    label: str
    group: str
    fold: str | None
    start: float
    end: float | None
    where: str


def find_manifest(data: Path) -> Path | None:
    """Return the manifest that ``data`` is or has, or None for a folder per class.

    Raises:
        Fatal: there is no such file or folder.
    """
    if data.is_file():
        return data
    if not data.is_dir():
        raise Fatal(f"{data} does not exist; expected a folder of clips or a CSV manifest")
    return next((data / name for name in MANIFESTS if (data / name).is_file()), None)


def from_folders(data: Path, label: str, group: str | None = None) -> list[Listed]:
    """List the sounds below each folder in ``data``; each is a group of its own.

    Raises:
        Fatal: there are none, or a column other than "label" is asked for.
    """
    if label != "label" or group:
        asked = group or label
        raise Fatal(f"{data} has no manifest ({', '.join(MANIFESTS)}), so there is no column {asked!r} in it")
    paths = sorted(path for path in data.glob("*/**/*") if _is_sound(path))
    if not paths:
        raise Fatal(f"{data} holds no clips{_instead(data)}")
    listed = []
    for path in paths:
        # A name on a disk need not be UTF-8; a name in a manifest, a report or a prediction must be.
        name = path.relative_to(data).as_posix().encode(errors="backslashreplace").decode()
        listed.append(Listed(path, name, name.partition("/")[0], name, None, 0.0, None, str(path)))
    return listed


def _instead(data: Path) -> str:
    """Say what lies in a folder without clips, and what is to be done about it."""
    direct = sum(map(_is_sound, data.iterdir()))
    table = min(data.glob("*.csv"), default=None)
    if not direct and table is None:
        return (
            f"; expected a folder for each class with sounds in it ({', '.join(sorted(SUFFIXES))}), "
            f"or a manifest ({', '.join(MANIFESTS)})"
        )
    lie = f" in folders: {direct} sound{' lies' if direct == 1 else 's lie'} directly in it" if direct else ""
    if table is not None:
        return f"{lie}; if {table.name} lists them, pass {table}"
    return f"{lie}; put each class into a folder of its own, or name a CSV"


def from_csv(manifest: Path, label: str, group: str | None = None) -> tuple[str, list[Listed]]:
    """Return the column of the labels, and what is listed; without a group column each file is its own group.

    ``group`` names another column, or several joined by "+": clips that agree in all of them belong together.

    Raises:
        Fatal: a column or a file is missing, or a cell cannot be used.
    """
    columns, rows = _table(manifest)
    file_column = next((column for column in FILE_COLUMNS if column in columns), None)
    if file_column is None and ";" in "".join(columns):
        raise Fatal(f"{manifest} seems to be separated by ';'; expected commas: save it as comma-separated values")
    if file_column is None:
        raise Fatal(
            f"{manifest} has none of the columns {', '.join(FILE_COLUMNS)}; it has {', '.join(columns) or 'no header'}"
        )
    esc50 = {"category", "src_file"} <= set(columns)
    if label == "label" and label not in columns and esc50:
        label = "category"
    if label not in columns:
        others = [column for column in columns if column not in {file_column, "fold", "group", "start", "end"}]
        raise Fatal(f"{manifest} has no column {label!r} to learn; --label may be {' or '.join(others) or 'none'}")
    if not rows:
        raise Fatal(f"{manifest} lists no clips: it has a header and nothing else")
    group = group or ("group" if "group" in columns else "src_file" if esc50 else file_column)
    missing = [column for column in group.split("+") if column not in columns]
    if missing:
        raise Fatal(f"{manifest} has no column {missing[0]!r} to group by; it has {', '.join(columns)}")
    fold = "fold" if "fold" in columns else None
    paths = _paths(manifest.parent, ((where, row[file_column]) for where, row in rows))
    return label, [
        _listed(paths, row, where, file=file_column, label=label, group=group, fold=fold) for where, row in rows
    ]


def _table(manifest: Path) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """Return the columns, and each row with the place where it stands; blanks around a cell are no part of it."""
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            reader.fieldnames = columns = [column.strip() for column in reader.fieldnames or ()]
            rows = [
                (f"{manifest}, row {reader.line_num}", {column: row[column].strip() for column in columns})
                for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Fatal(f"{manifest} cannot be read as CSV in UTF-8: {error}") from error
    return columns, rows


def _listed(
    paths: Mapping[str, Path], row: dict[str, str], where: str, *, file: str, label: str, group: str, fold: str | None
) -> Listed:
    groups = group.split("+")
    for column in (file, label, *groups, fold):
        if column and not row[column]:
            raise Fatal(f"{where}: the column {column!r} is empty; fill it in, or remove the row")
    start = _seconds(row, "start", where) or 0.0
    end = _seconds(row, "end", where)
    if end is not None and end <= start:
        raise Fatal(f"{where}: the segment ends at {end:g} s and starts at {start:g} s; expected it to end later")
    name = row[file]
    if start or end is not None:
        name = f"{name}@{row.get('start') or '0'}-{row.get('end', '')}"
    together = "+".join(row[column] for column in groups)
    return Listed(paths[row[file]], name, row[label], together, row[fold] if fold else None, start, end, where)


def _seconds(row: dict[str, str], column: str, where: str) -> float | None:
    text = row.get(column, "")
    if not text:
        return None
    seconds = finite_number(text)
    if seconds is None or seconds < 0:
        raise Fatal(f"{where}: {column} is {text!r}; expected seconds from the beginning of the file, such as 12.5")
    return seconds


def finite_number(text: str) -> float | None:
    """Return the number that is written there, or None if it is none or not finite."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _paths(folder: Path, listed: Iterable[tuple[str, str]]) -> dict[str, Path]:
    """Return where each file lies, of places in the manifest and the names that stand there."""
    found: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for where, name in listed:
        if not name or name in found or name in missing:
            continue
        places = dict.fromkeys((folder / name, folder / "audio" / name, folder.parent / "audio" / name))
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            missing[name] = f"{where}: there is no file {name!r}; looked for {', '.join(map(str, places))}"
        else:
            found[name] = path
    if missing:
        first = next(iter(missing.values()))
        raise Fatal(f"{first} (missing: {len(missing)} of {len(missing) + len(found)} files)")
    return found


def _is_sound(path: Path) -> bool:
    hidden = path.name.startswith(".")  # macOS leaves a "._a.wav" beside an a.wav on foreign disks
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()
