"""The rules of the house that no type checker knows: who may import whom, and what lies where."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

ORDER = (
    *("errors", "messages", "wav", "audio"),
    *("compiled", "fourier", "windows", "filters", "frames", "statistics", "rhythm", "pitch", "features", "forest"),
    *("profile", "calibration", "golden", "drift", "states", "bundle"),
    *("hearing", "pipeline"),
    *("config", "security", "broker", "watchdog"),
    *("kafka_wire", "kafka_clients", "kafka_cluster", "kafka_transactions", "broker_kafka", "broker_sqlite"),
    *("telemetry", "health", "memory", "supervisor"),
    *("service", "play", "text", "dlq", "board", "watch"),
    *("arguments", "__main__"),
)
"""The modules of the worker: each may import those before it. A new one needs its place here."""

PURE = ORDER[: ORDER.index("pipeline") + 1]
"""Bytes in, bytes out: these know no client, clock, environment or file."""

IMPURE_PACKAGES = frozenset(
    {
        *("kafka", "sqlite3", "socket", "urllib", "subprocess"),  # clients
        *("os", "logging", "structlog"),  # the environment, and a voice of one's own
        *("time", "sched", "random", "secrets", "uuid"),  # what differs between two runs
        *("threading", "multiprocessing", "concurrent", "asyncio"),  # what has an order of its own
    }
)

FILE_PACKAGES = frozenset({"pathlib", "shutil", "tempfile", "glob"})
"""Files are for bundle.py alone, which is a model on disk."""

RECORDING_ENDINGS = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aif", ".aiff"})
RECORDING_SIGNATURES = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"FORM", b"\xff\xfb")


class Import(NamedTuple):
    """One imported name in full, and where: ``from worker import audio`` is ``worker.audio``."""

    path: PurePath
    line: int
    name: str

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @property
    def module(self) -> str:
        """The module of the worker or trainer that is meant; empty for the package itself."""
        return self.name.split(".")[1] if "." in self.name else ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.name}"


def imports(source: str, path: PurePath) -> list[Import]:
    """Find every import in a module, at its top or deep inside."""
    found = []
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            found += [Import(path, node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            found += [Import(path, node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def sources(folder: str) -> dict[PurePath, str]:
    """The modules below a folder of the repository, by their path in it."""
    return {path.relative_to(ROOT): path.read_text() for path in sorted((ROOT / folder).rglob("*.py"))}


def out_of_order(found: Iterable[Import]) -> Iterator[str]:
    """Say which imports of the worker by the worker go against the order."""
    for each in found:
        if each.package == "worker":
            allowed = ORDER[: ORDER.index(each.path.stem)] if each.path.stem in ORDER else ()
            if each.module not in allowed:
                yield f"{each}; {each.path.stem} may import only {', '.join(allowed) or 'nothing of the worker'}"


def impure(found: Iterable[Import]) -> Iterator[str]:
    """Say which imports have no place in a pure module."""
    for each in found:
        stem = each.path.stem
        forbidden = IMPURE_PACKAGES if stem == "bundle" else IMPURE_PACKAGES | FILE_PACKAGES
        if stem in PURE and each.package in forbidden:
            yield f"{each}; up to pipeline.py the worker is pure"


def impure_calls(source: str, path: PurePath) -> Iterator[str]:
    """Say where a module opens a file, asks for the time or rolls numpy's dice, which takes no import."""
    for node in ast.walk(ast.parse(source, str(path))):
        match node:
            case ast.Call(func=ast.Name(id="open")) if path.stem != "bundle":
                yield f"{path}:{node.lineno} opens a file; up to pipeline.py the worker is pure"
            case ast.Attribute(attr="now" | "utcnow" | "today"):
                yield f"{path}:{node.lineno} asks for the time; up to pipeline.py the worker is pure"
            case ast.Attribute(value=ast.Name(id="np"), attr="random"):
                yield f"{path}:{node.lineno} uses random numbers; up to pipeline.py the worker is pure"
            case _:
                pass


WORKER = [each for path, source in sources("worker").items() for each in imports(source, path)]


class TestImports:
    def test_every_module_has_its_place(self) -> None:
        """The order names exactly the modules that the worker has."""
        modules = {path.stem for path in sources("worker")} - {"__init__"}

        unplaced = [f"worker/{name}.py: give it a place in ORDER" for name in sorted(modules - {*ORDER})]
        assert [] == unplaced

    def test_go_one_way(self) -> None:
        """A module of the worker imports only modules before it."""
        assert [] == list(out_of_order(WORKER))

    def test_worker_does_not_know_the_trainer(self) -> None:
        """The trainer imports the worker, never the reverse."""
        assert [] == [str(each) for each in WORKER if each.package == "trainer"]

    def test_three_files_know_kafka(self) -> None:
        """The Kafka client is imported by kafka_wire, kafka_clients and kafka_cluster alone."""
        trainer = [each for path, source in sources("trainer").items() for each in imports(source, path)]
        kafka = [each for each in WORKER + trainer if each.package == "kafka"]

        assert kafka, "nobody imports kafka: has the client another name now?"
        assert [] == [
            str(each)
            for each in kafka
            if each.path not in {PurePath(f"worker/kafka_{part}.py") for part in ("wire", "clients", "cluster")}
        ]

    def test_the_core_is_pure(self) -> None:
        """Up to pipeline.py nothing imports a client, a clock, the environment or, but for bundle.py, a file."""
        assert [] == list(impure(WORKER))

    def test_the_core_does_nothing_impure(self) -> None:
        """Nor does it open a file, ask for the time or roll dice by way of what it may import."""
        pure = {path: source for path, source in sources("worker").items() if path.stem in PURE}

        assert [] == [found for path, source in pure.items() for found in impure_calls(source, path)]

    def test_none_is_hidden(self) -> None:
        """Nothing is imported for the type checker alone: that would hide a cycle."""
        everything = [*WORKER, *(each for path, source in sources("trainer").items() for each in imports(source, path))]

        assert [] == [str(each) for each in everything if each.name.endswith(".TYPE_CHECKING")]


class TestLayout:
    def test_no_module_is_called_kafka(self) -> None:
        """A module kafka.py would hide the client from whoever runs its folder."""
        folders = ("worker", "trainer", "tests")

        assert [] == [path for folder in folders for path in sources(folder) if "kafka" in {path.stem, *path.parts}]

    def test_tests_are_packages(self) -> None:
        """Each folder of tests has an __init__.py, so that two modules may have the same name."""
        folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}

        assert ROOT / "tests" / "worker" in folders
        assert [] == sorted(str(folder) for folder in folders if not (folder / "__init__.py").is_file())

    def test_no_recordings(self) -> None:
        """No sound that somebody recorded is under version control, by its name or by its first bytes."""
        if not (ROOT / ".git").exists():
            pytest.skip("this is no git checkout")
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        files = [ROOT / name for name in listed.split("\0") if name]

        assert ROOT / "pyproject.toml" in files
        assert [] == [str(file) for file in files if file.is_file() and is_recording(file)]


def is_recording(file: Path) -> bool:
    with file.open("rb") as opened:
        start = opened.read(4)
    return file.suffix.lower() in RECORDING_ENDINGS or start.startswith(RECORDING_SIGNATURES)


class TestTheseRules:
    """The rules above hold, so none of them has ever spoken: here each one is broken."""

    @pytest.mark.parametrize(
        ("statement", "expected"),
        [
            ("import worker.drift", "worker.drift"),
            ("import worker.drift as d", "worker.drift"),
            ("from worker import drift", "worker.drift"),
            ("from worker.drift import Shift", "worker.drift.Shift"),
            ("from . import drift", "worker.drift"),
            ("from .drift import Shift", "worker.drift.Shift"),
            ("def f():\n    if True:\n        import os.path", "os.path"),
        ],
    )
    def test_imports_are_found(self, statement: str, expected: str) -> None:
        """However it is written and wherever it stands, an import is found under its full name."""
        path = PurePath("worker/audio.py")

        assert [Import(path, statement.count("\n") + 1, expected)] == imports(statement, path)

    @pytest.mark.parametrize(
        ("module", "statement", "allowed"),
        [
            ("drift", "from worker.profile import Signal", True),
            ("profile", "from worker.drift import Shift", False),
            ("drift", "from worker import drift", False),
            ("pipeline", "import worker.service", False),
            ("watch", "from worker.broker import Broker", True),
            ("errors", "import worker", False),
            ("__init__", "from worker.errors import Fatal", False),
            ("unknown", "from worker.errors import Fatal", False),
        ],
    )
    def test_order(self, module: str, statement: str, allowed: bool) -> None:  # noqa: FBT001  # pytest passes by name
        """An import of a later module, of itself, or from a module without a place is named with file and line."""
        found = list(out_of_order(imports(f"\n{statement}", PurePath(f"worker/{module}.py"))))

        assert allowed == (found == [])
        assert all(each.startswith(f"worker/{module}.py:2 ") for each in found)

    @pytest.mark.parametrize(
        ("module", "statement", "allowed"),
        [
            ("features", "import os", False),
            ("features", "from time import monotonic", False),
            ("features", "import pathlib", False),
            ("bundle", "import pathlib", True),
            ("bundle", "import random", False),
            ("messages", "from datetime import datetime", True),
            ("service", "import threading", True),
        ],
    )
    def test_purity(self, module: str, statement: str, allowed: bool) -> None:  # noqa: FBT001  # pytest passes by name
        """An impure import is found in the core, and let be outside of it."""
        found = list(impure(imports(statement, PurePath(f"worker/{module}.py"))))

        assert allowed == (found == [])
        assert all(each.startswith(f"worker/{module}.py:1 ") for each in found)

    @pytest.mark.parametrize("code", ["open('x')", "datetime.now(UTC)", "np.random.default_rng()"])
    def test_calls(self, code: str) -> None:
        """An impure call is found, with its line."""
        (found,) = impure_calls(f"x = 1\n{code}", PurePath("worker/features.py"))

        assert found.startswith("worker/features.py:2 ")

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [("dog.WAV", b"", True), ("dog.bin", b"fLaC\0", True), ("dog.py", b"RIFF = 1", True), ("dog.txt", b"", False)],
    )
    def test_recordings(self, tmp_path: Path, name: str, content: bytes, expected: bool) -> None:  # noqa: FBT001  # see above
        """A recording is known by its name in any case, and under another name by its content."""
        file = tmp_path / name
        file.write_bytes(content)

        assert expected == is_recording(file)


def test_a_worker_does_not_import_librosa() -> None:
    """It compiles when it is imported, and cannot be where no folder may be written to keep that in."""
    found = [each for path, source in sources("worker").items() for each in imports(source, path)]
    assert "numba" in {each.package for each in found}
    assert [] == [each for each in found if each.package == "librosa"]
