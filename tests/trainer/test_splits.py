"""Splits: no group is on both sides, official folds are kept, and the leaky one leaks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.test_dataset import dataset_of
from trainer.dataset import load
from trainer.splits import random_splits, splits
from worker.errors import Fatal


class TestSplits:
    @settings(deadline=None)  # scikit-learn's first call takes its time
    @given(
        clips=st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("abcdefg")), min_size=2, max_size=40),
        n_splits=st.integers(2, 6),
        seed=st.integers(0, 9),
        task=st.sampled_from(["classification", "regression"]),
    )
    def test_no_group_is_on_both_sides(self, clips: list[tuple[str, str]], n_splits: int, seed: int, task: str) -> None:
        """Whatever the groups: they are held out whole, every clip once, and the same way for a seed."""
        dataset = msgspec.structs.replace(dataset_of(clips), task=task)
        groups = np.array([group for _, group in clips])
        most_common = max(Counter(label for label, _ in clips).values())
        if len(set(groups)) < 2 or (task == "classification" and most_common < 2):
            with pytest.raises(Fatal, match="nothing can be held out"):
                splits(dataset, n_splits, seed)
            return
        pairs = splits(dataset, n_splits, seed)
        assert 2 <= len(pairs) <= n_splits
        assert list(range(len(clips))) == sorted(int(index) for _, test in pairs for index in test)
        for train, test in pairs:
            assert len(clips) == len(np.union1d(train, test))
            assert set() == set(groups[train]) & set(groups[test])
        again = splits(dataset, n_splits, seed)
        assert [test.tolist() for _, test in pairs] == [test.tolist() for _, test in again]

    def test_classes_are_spread_evenly(self) -> None:
        """With enough groups each fold has its share of each class."""
        dataset = dataset_of([(label, f"{label}{number}") for label in "xy" for number in range(10)])
        for _, test in splits(dataset):
            assert {"x": 2, "y": 2} == Counter(dataset.clips[index].label for index in test)

    def test_official_folds_are_kept(self) -> None:
        """One split for each fold, in their order; the seed has no say."""
        clips = [("x", "a"), ("y", "b"), ("x", "c"), ("y", "d"), ("x", "a")]
        pairs = splits(dataset_of(clips, folds=["2", "1", "3", "1", "2"]), n_splits=5, seed=7)
        assert [[1, 3], [0, 4], [2]] == [test.tolist() for _, test in pairs]
        assert [[0, 2, 4], [1, 2, 3], [0, 1, 3, 4]] == [train.tolist() for train, _ in pairs]

    def test_what_is_the_same_sound_in_two_folds_is_not_trained_on(self) -> None:
        """The test stays as published; the twin is left out of the training, and every other clip is in it."""
        clips = [("x", "a"), ("y", "b"), ("x", "a"), ("y", "c")]
        pairs = splits(dataset_of(clips, folds=["1", "1", "2", "3"]))
        assert [([3], [0, 1]), ([1, 3], [2]), ([0, 1, 2], [3])] == [(a.tolist(), b.tolist()) for a, b in pairs]

    def test_nothing_left_to_train_is_said(self) -> None:
        """Folds that hold the same sounds are none."""
        with pytest.raises(Fatal, match="every clip is in fold 1 or has the same sound"):
            splits(dataset_of([("x", "a"), ("x", "a")], folds=["1", "2"]))

    def test_one_fold_holds_nothing_out(self) -> None:
        """There is nothing to train on."""
        with pytest.raises(Fatal, match="all clips are in fold 1"):
            splits(dataset_of([("x", "a"), ("y", "b")], folds=["1", "1"]))


class TestRandomSplits:
    @settings(deadline=None)  # as above
    @given(count=st.integers(2, 60), n_splits=st.integers(2, 6), seed=st.integers(0, 9))
    def test_each_window_is_tested_once(self, count: int, n_splits: int, seed: int) -> None:
        """And trained on in every other fold, the same way for a seed."""
        pairs = random_splits(count, n_splits, seed)
        assert list(range(count)) == sorted(int(index) for _, test in pairs for index in test)
        assert all(count == len(train) + len(test) == len(np.union1d(train, test)) for train, test in pairs)
        again = random_splits(count, n_splits, seed)
        assert [test.tolist() for _, test in pairs] == [test.tolist() for _, test in again]

    def test_windows_of_a_clip_are_on_both_sides(self) -> None:
        """That is what it is there to show."""
        owner = np.repeat(np.arange(10), 9)
        assert all(set(owner[train]) & set(owner[test]) for train, test in random_splits(len(owner)))

    def test_one_window_is_too_few(self) -> None:
        """There is nothing to train on."""
        with pytest.raises(Fatal, match="nothing can be held out of 1 window"):
            random_splits(1)


class TestRealRecordings:
    def test_esc10(self, esc10: Path) -> None:
        """The official folds split it without a leak."""
        dataset = load(esc10)
        groups = np.array([clip.group for clip in dataset.clips])
        pairs = splits(dataset)
        assert [80] * 5 == [len(test) for _, test in pairs]
        for train, test in pairs:
            assert 320 == len(train)
            assert set() == set(groups[train]) & set(groups[test])

    def test_notes(self, notes: Path) -> None:
        """Whole instrument libraries are held out."""
        dataset = load(notes, label="midi_pitch")
        groups = np.array([clip.group for clip in dataset.clips])
        pairs = splits(dataset)
        assert 5 == len(pairs)
        for train, test in pairs:
            assert set() == set(groups[train]) & set(groups[test])
