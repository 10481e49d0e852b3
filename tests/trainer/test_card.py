"""The model card: the same findings in words, as Markdown that no name can break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.markdown import Markdown

from tests.trainer.findings import learned
from tests.trainer.test_report import HOSTILE, renamed
from trainer import card
from trainer.dataset import load
from trainer.report import Findings
from worker import bundle
from worker.bundle import model_hash

SECTIONS = [
    *("Intended use", "Data", "How it was tested", "Limits", "Calibration", "What it listens to"),
    *("How its settings were found", "Settings", "Versions", "How to run it"),
]


@pytest.fixture(scope="module")
def found(machines: Path, machine_bundle: Path) -> Findings:
    return learned(load(machines), bundle.load(machine_bundle).manifest)


def parsed(text: str) -> list[Any]:
    """The tokens of a CommonMark parser with tables."""
    return list(Markdown(text).parsed)


def headings(text: str, level: str) -> list[str]:
    tokens = parsed(text)
    return [
        tokens[n + 1].content for n, token in enumerate(tokens) if (token.type, token.tag) == ("heading_open", level)
    ]


def structure(text: str) -> list[str]:
    """Every element of a text in order, apart from the words."""
    return [each.type for token in parsed(text) for each in (token, *(token.children or ())) if each.type != "text"]


def cells(text: str) -> list[str]:
    """What stands in the cells of all tables, as it is read."""
    tokens = parsed(text)
    return [
        "".join(child.content for child in tokens[n + 1].children or ())
        for n, token in enumerate(tokens)
        if token.type in {"td_open", "th_open"}
    ]


class TestContent:
    def test_its_sections(self, found: Findings) -> None:
        """From what it is for to how it is run, each once and in this order."""
        text = card.markdown(found)
        assert [f"Model card: {found.manifest.name}"] == headings(text, "h1")
        assert SECTIONS == headings(text, "h2")

    def test_it_says_what_was_found(self, found: Findings) -> None:
        """Measures with intervals, each class, every setting and version, and which model this is."""
        text = card.markdown(found)
        accuracy = found.evaluation.clip["accuracy"]
        inside = cells(text)
        assert accuracy.low is not None
        assert accuracy.high is not None
        interval = f"{100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}"
        assert {f"{100 * accuracy.value:.1f} %", interval} <= set(inside)
        assert set(found.evaluation.classes) <= set(inside)
        assert {"spec.sample_rate", "seed", *found.manifest.versions, model_hash(found.manifest)} <= set(inside)
        assert found.evaluation.how in text
        assert "earshot-worker run --model" in text

    def test_whole_groups_come_before_the_leaky_split(self, found: Findings) -> None:
        """What a random split claims stands behind what is true, as a warning and in no table."""
        text = card.markdown(found)
        claimed = f"{100 * found.evaluation.leaky['accuracy']:.1f} %"
        assert text.index(f"{100 * found.evaluation.clip['accuracy'].value:.1f} %") < text.index("Not to be quoted")
        assert claimed in text[text.index("Not to be quoted") :]
        assert claimed not in cells(text)

    def test_silence_is_set_apart(self, found: Findings) -> None:
        """Windows with sound are measured beside all of them, and the rest is counted, if there is any."""
        text = card.markdown(found)
        assert "12.5 % of the windows are silent" in text
        inside = cells(text)
        assert "windows with sound" in inside
        assert f"{100 * found.evaluation.sounding['accuracy'].value:.1f} %" in inside
        everything = card.markdown(
            msgspec.structs.replace(
                found, evaluation=msgspec.structs.replace(found.evaluation, silent=0.0, sounding={})
            )
        )
        assert "silent" not in everything
        assert "with sound" not in everything
        assert len(inside) > len(cells(everything)), "both are tables"

    def test_the_weak_spots_are_limits(self, found: Findings) -> None:
        """The class with the lowest F1 is named where one looks for limits."""
        weakest = min(found.evaluation.per_class, key=lambda each: each.f1)
        limits = card.markdown(found).partition("## Limits")[2].partition("##")[0]
        assert f"Weakest classes: {weakest.name} (F1 {weakest.f1:.2f})" in limits

    def test_a_regression(self, machines: Path, rpm_bundle: Path) -> None:
        """It says the unit, how many truths were inside their intervals, and nothing of classes."""
        text = card.markdown(learned(load(machines, label="rpm"), bundle.load(rpm_bundle).manifest))
        assert "mean absolute error in rpm" in cells(text)
        assert "88.0 % of held-out truths were inside the interval" in text
        assert "Weakest" not in text

    def test_what_there_is_not_is_not_told(self, found: Findings) -> None:
        """Without a search, importances, calibration or a leaky split there is no empty section."""
        evaluation = msgspec.structs.replace(found.evaluation, reliability=None, leaky={})
        text = card.markdown(msgspec.structs.replace(found, search=None, importances=(), evaluation=evaluation))
        assert [each for each in SECTIONS if each[:4] not in {"What", "How "} or "run" in each or "tested" in each] == (
            headings(text, "h2")
        )
        assert "The probabilities were not calibrated" in text
        assert "Not to be quoted" not in text

    def test_the_same_findings_give_the_same_text(self, found: Findings) -> None:
        """There is no clock in it, and it ends with a line break."""
        assert card.markdown(found) == card.markdown(found)
        assert card.markdown(found).endswith(".\n")


class TestForeignText:
    @pytest.mark.parametrize(
        "name", [HOSTILE, "a|b", "*bold* `code` [x](http://x) ~~s~~", "# heading", "\\", "__init__", "&amp;", "![](x)"]
    )
    def test_no_name_is_markup(self, found: Findings, name: str) -> None:
        """A name is read as it is: no HTML, no emphasis or link, no cell more, and nothing is missing."""
        text = card.markdown(renamed(found, name))
        assert structure(card.markdown(renamed(found, "name"))) == structure(text)
        shown = " ".join(name.replace("\ud800", "\ufffd").replace("\u202e", "\ufffd").split())
        assert shown in cells(text)
        text.encode("utf-8")

    def test_plain_names_stay_plain(self, found: Findings) -> None:
        """Most cards are read as they are: a name with underscores has no backslashes."""
        assert "dog_bark" in card.markdown(renamed(found, "dog_bark"))
