"""What was computed from sound before, kept in files, so that it is not computed again.

This module owns the folder and what an entry is known by: a key that changes with everything that
may change the numbers, Earshot's own source among it. So nothing has to be emptied for the sake of
correctness; to get the space back, delete the folder. It must not know what entries mean.

An entry that is damaged is no entry. A folder that cannot be written costs time and no result: that
is said once, in `Cache.trouble`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from contextlib import suppress
from functools import cache as once
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec

import worker

LIBRARIES: Final = ("earshot", "numpy", "scipy", "librosa", "numba", "soundfile", "soxr", "audiomentations")
"""Whatever computes a number between a file and a feature."""

TAG: Final = "CACHEDIR.TAG"
TAG_TEXT: Final = "Signature: 8a477f597d28d172789f06886806bc55\n# This folder may be deleted.\n"
"""What tells backup programs to leave a folder alone (bford.info/cachedir)."""


class Cache:
    """Entries of bytes in a folder, which is created when it is first written to.

    Args:
        folder: where entries are; by default ``earshot`` in ``XDG_CACHE_HOME``, or in ``~/.cache``.

    Attributes:
        trouble: why entries could not be written, or None.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = default_folder() if folder is None else folder
        self.trouble: str | None = None

    def get(self, key: str) -> bytes | None:
        """Return what was put there, or None if there is nothing, or it is damaged."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        digest, value = content[:32], content[32:]
        return value if hashlib.sha256(value).digest() == digest else None

    def put(self, key: str, value: bytes) -> None:
        """Keep ``value``; whoever reads meanwhile sees what was there before, or all of it."""
        if self.trouble is not None:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (self.folder / TAG).exists():
                (self.folder / TAG).write_text(TAG_TEXT)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
                try:
                    file.write(hashlib.sha256(value).digest() + value)
                    file.close()
                    Path(file.name).replace(path)
                except BaseException:
                    with suppress(OSError):
                        Path(file.name).unlink()
                    raise
        except OSError as error:
            self.trouble = (
                f"nothing can be kept in {self.folder} ({error.strerror}), so the next run computes it again; "
                "XDG_CACHE_HOME names another place, --no-cache none"
            )

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:]


def key_of(*parts: Any) -> str:
    """Return the key of what is computed from ``parts``, anything that msgspec can write, by this software."""
    return hashlib.sha256(msgspec.json.encode([_software(), *parts], order="deterministic")).hexdigest()


def default_folder() -> Path:
    """Return the user's folder for Earshot's cache (the XDG base directory specification)."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (folder if folder.is_absolute() else Path.home() / ".cache") / "earshot"


@once
def _software() -> list[str]:
    """Return the versions of all that computes, and a hash of this project's own source, which changes in between."""
    folders = (Path(worker.__file__).parent, Path(__file__).parent)
    source = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        source.update(path.read_bytes())
    return [platform.machine(), source.hexdigest(), *(version(name) for name in LIBRARIES)]
