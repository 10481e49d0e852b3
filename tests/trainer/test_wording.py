"""Wording: figures are rounded and named in one way, and no text from outside can break a line."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import wording
from trainer.results import Evaluation, Measure, Search

EVALUATION = Evaluation(
    task="classification",
    label="label",
    classes=("a", "b"),
    how="",
    clip={"accuracy": Measure(0.8971, 0.86, 0.93), "macro_f1": Measure(0.8912, 0.85, 0.92)},
    window={"accuracy": Measure(0.81, 0.79, 0.83)},
    leaky={"accuracy": 0.99},
)


class TestMeasures:
    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("accuracy", 0.8971, "89.7 %"),
            ("calibration_error", 0.031, "3.1 %"),
            ("macro_f1", 0.8912, "0.891"),
            ("mae", 1.0449, "1.04"),
            ("mae", 1234.5, "1,234"),
            ("mae", 999.7, "1,000"),
            ("r2", -0.5, "-0.500"),
        ],
    )
    def test_figures(self, name: str, value: float, expected: str) -> None:
        """Shares are percentages, errors have three digits, the rest three decimals."""
        assert expected == wording.figure(name, value)

    def test_intervals(self) -> None:
        """The sign of a percentage is not said three times."""
        assert "86.0 to 93.0" == wording.interval("accuracy", Measure(0.9, 0.86, 0.93))
        assert "0.9 to 1.1" == wording.interval("rmse", Measure(1.0, 0.9, 1.1))

    def test_one_group_has_no_interval(self) -> None:
        """It is said why, and not from where to where nothing is known."""
        alone = Measure(0.857, None, None)
        assert "one group: no interval" == wording.interval("accuracy", alone)
        expected = "Of clips that it had never heard, it named 85.7 % right (one group: no interval)."
        evaluation = msgspec.structs.replace(EVALUATION, clip={"accuracy": alone}, window={})
        assert expected == wording.headline(evaluation)
        assert ("85.7 %", "one group: no interval") == wording.rows(evaluation)[0][1:3]

    def test_titles(self) -> None:
        """An error says what it is measured in; a measure that is new keeps its name."""
        assert "mean absolute error in rpm" == wording.title("mae", "rpm")
        assert "accuracy" == wording.title("accuracy", "rpm")
        assert "log loss" == wording.title("log_loss", "rpm")

    def test_the_headline_is_the_first_measure_of_clips(self) -> None:
        """In one sentence, with its interval."""
        expected = "Of clips that it had never heard, it named 89.7 % right (95 % interval 86.0 to 93.0)."
        assert expected == wording.headline(EVALUATION)
        regression = msgspec.structs.replace(EVALUATION, label="rpm", clip={"mae": Measure(12.3, 10, 15)})
        expected = "On clips that it had never heard, its mean absolute error in rpm is 12.3 (95 % interval 10 to 15)."
        assert expected == wording.headline(regression)

    def test_after_a_search_the_headline_is_of_what_it_never_heard(self) -> None:
        """The folds have chosen the settings, and flatter them."""
        held_out = {"accuracy": Measure(0.8, 0.7, 0.9)}
        search = Search(strategy="grid", scoring="accuracy", candidates=(), best={}, held_out=held_out)
        expected = "Of clips that the search had never heard, it named 80.0 % right (95 % interval 70.0 to 90.0)."
        assert expected == wording.headline(EVALUATION, search)

    def test_rows_leave_empty_what_was_not_measured(self) -> None:
        """Each measure once, clips, windows and what a leaky split claims side by side."""
        accuracy, f1 = wording.rows(EVALUATION)
        assert ("accuracy", "89.7 %", "86.0 to 93.0", "81.0 %", "79.0 to 83.0", "", "", "99.0 %") == accuracy
        assert ("macro-F1", "0.891", "0.850 to 0.920", "", "", "", "", "") == f1

    def test_silence_is_told_where_there_is_some(self) -> None:
        """With how much of it, what it is, and a measure of the rest."""
        assert "" == wording.silence(EVALUATION)
        found = msgspec.structs.replace(EVALUATION, silent=0.102, sounding={"accuracy": Measure(0.85, 0.83, 0.87)})
        expected = "10.2 % of the windows are silent: more than 60 dB under the loudest of their clip. "
        assert wording.silence(found).startswith(expected)
        assert ("85.0 %", "83.0 to 87.0") == (wording.rows(found)[0].sounding, wording.rows(found)[0].sounding_interval)


class TestText:
    @given(st.text())
    def test_any_text_is_one_line_that_can_be_written(self, text: str) -> None:
        """Whatever a label or a file name holds: line breaks, controls, lone halves of characters."""
        shown = wording.printable(text)
        assert shown.isprintable()
        shown.encode("utf-8")

    def test_what_can_be_read_is_kept(self) -> None:
        """Letters of any script stay as they are."""
        assert "Größe 音 <b>" == wording.printable("Größe\n 音 <b>")

    @pytest.mark.parametrize(
        ("seconds", "expected"),
        [
            (0.394, "0.394 s"),
            (5, "5 s"),
            (65, "1 min 5 s"),
            (2003, "33 min"),
            (3600, "1 h 0 min"),
            (9000, "2 h 30 min"),
        ],
    )
    def test_durations(self, seconds: float, expected: str) -> None:
        """Three digits or so, in units that fit."""
        assert expected == wording.duration(seconds)

    def test_counts(self) -> None:
        """One is no plural."""
        assert ["1 clip", "2 clips", "1,000 classes"] == [
            wording.count(1, "clip"),
            wording.count(2, "clip"),
            wording.count(1000, "class", "classes"),
        ]
