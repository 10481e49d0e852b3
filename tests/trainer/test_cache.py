"""The cache: what was put there comes back, what was damaged does not, and no key outlives what it stands for."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import cache as module
from trainer.cache import TAG, Cache, default_folder, key_of
from worker.features import FeatureSpec, feature_spec

KEY = key_of("anything")


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != TAG]


class TestEntries:
    def test_what_was_put_there_comes_back(self, tmp_path: Path) -> None:
        """Also to another process's cache of the same folder; a new value takes the place of the old one."""
        cache = Cache(tmp_path / "new" / "cache")
        assert cache.get(KEY) is None
        for value in (b"", b"some bytes", b"\0" * 100_000):
            cache.put(KEY, value)
            assert value == Cache(tmp_path / "new" / "cache").get(KEY)
        assert 1 == len(entries(tmp_path))
        assert cache.trouble is None

    @settings(deadline=None, max_examples=40)  # it waits for a disk, and there are 40 bytes
    @given(cut=st.integers(0, 39), flip=st.integers(0, 39))
    def test_a_damaged_entry_is_none(self, tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int) -> None:
        """Cut off anywhere, or with any byte changed; it is replaced by the next one."""
        cache = Cache(tmp_path_factory.mktemp("cache"))
        cache.put(KEY, b"8 bytes.")
        (path,) = entries(cache.folder)
        content = path.read_bytes()
        assert 40 == len(content)
        for damaged in (content[:cut], content[:flip] + bytes([content[flip] ^ 1]) + content[flip + 1 :]):
            path.write_bytes(damaged)
            assert cache.get(KEY) is None
        cache.put(KEY, b"again")
        assert b"again" == cache.get(KEY)

    def test_the_folder_may_be_deleted(self, tmp_path: Path) -> None:
        """It says so to backup programs, in the way they understand."""
        Cache(tmp_path).put(KEY, b"value")
        assert (tmp_path / TAG).read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        """It costs nothing but time; why is said, with what to do."""
        (tmp_path / "file").write_text("in the way")
        cache = Cache(tmp_path / "file" / "cache")
        cache.put(KEY, b"value")
        assert cache.get(KEY) is None
        assert cache.trouble is not None
        assert f"nothing can be kept in {tmp_path}/file/cache" in cache.trouble
        assert "XDG_CACHE_HOME names another place" in cache.trouble

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What could not take its place is removed again."""

        def full(_self: Path, _target: Path) -> None:
            raise OSError(28, "No space left on device")

        cache = Cache(tmp_path)
        monkeypatch.setattr(Path, "replace", full)
        cache.put(KEY, b"value")
        assert [] == entries(tmp_path)
        assert "No space left on device" in (cache.trouble or "")


class TestKeys:
    @pytest.mark.parametrize(
        "changes",
        [
            {"sample_rate": 22_050},
            {"window_seconds": 0.5, "window_hop_seconds": 0.25},
            {"window_hop_seconds": 0.25},
            {"level_dbfs": -23.0},
            {"sets": feature_spec("article").sets},
            {"sets": feature_spec("article").sets, "precision": "float32"},
            {"sets": (msgspec.structs.replace(FeatureSpec().sets[0], fmin=20.0),)},
        ],
    )
    def test_another_setting_is_another_key(self, changes: dict[str, object]) -> None:
        """Whatever may alter a number alters the key."""
        assert key_of(FeatureSpec()) == key_of(FeatureSpec())
        assert key_of(FeatureSpec()) != key_of(msgspec.structs.replace(FeatureSpec(), **changes))

    def test_other_software_is_another_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A new version of a library, or of this project's own source, computes everything again."""
        before = key_of("anything")
        for change in (["x86_64", "other source", "1.0"], ["x86_64", "source", "1.1"], ["arm64", "source", "1.0"]):
            monkeypatch.setattr(module, "_software", lambda change=change: change)
            assert before != key_of("anything")
            before = key_of("anything")


class TestDefaultFolder:
    def test_it_is_where_caches_belong(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """As the XDG base directories say: in XDG_CACHE_HOME if that is an absolute path, else in ~/.cache."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        assert tmp_path / "elsewhere" / "earshot" == default_folder() == Cache().folder
        for unusable in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", unusable)
            assert tmp_path / ".cache" / "earshot" == default_folder()
