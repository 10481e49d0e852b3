"""The report: it says what was found, lets nothing of a name through as markup, and needs nothing but itself."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from tests.trainer.findings import learned
from trainer import report
from trainer.dataset import load
from trainer.listening import Skipped
from trainer.report import TEMPLATES, Findings
from trainer.results import Answer, ClassResult
from worker import bundle
from worker.bundle import model_hash
from worker.profile import ReferenceProfile, Signal

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(1)>\'"&\ud800\u202e\n{{ 7 * 7 }}'
STYLE = (TEMPLATES / "report.css").read_text()
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.pop(), "an element is closed that is not open"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def found(machines: Path, machine_bundle: Path) -> Findings:
    """Findings of a classifier; only a few of its clips are still there, since drawing takes most of the time."""
    found = learned(load(machines), bundle.load(machine_bundle).manifest)
    few = msgspec.structs.replace(found.dataset, clips=found.dataset.clips[::4])
    return msgspec.structs.replace(found, dataset=few)


@pytest.fixture(scope="module")
def measured(machines: Path, rpm_bundle: Path) -> Findings:
    """Findings of a regressor, as above."""
    found = learned(load(machines, label="rpm"), bundle.load(rpm_bundle).manifest)
    few = msgspec.structs.replace(found.dataset, clips=found.dataset.clips[::4])
    return msgspec.structs.replace(found, dataset=few)


@pytest.fixture(scope="module")
def page(found: Findings) -> str:
    return report.html(found)


def renamed(found: Findings, name: str) -> Findings:
    """The same findings, of a data set whose every name is foreign text."""
    evaluation, survey, search = found.evaluation, found.survey, found.search
    assert search is not None
    known = name.replace("\ud800", "")  # what a manifest holds could be written
    classes = (name, *evaluation.classes[1:])
    old = evaluation.classes[0]
    return msgspec.structs.replace(
        found,
        manifest=msgspec.structs.replace(found.manifest, name=known, label=known, versions={known: known}),
        evaluation=msgspec.structs.replace(
            evaluation,
            label=name,
            how=name,
            classes=classes,
            per_class=(msgspec.structs.replace(evaluation.per_class[0], name=name), *evaluation.per_class[1:]),
            answers=(Answer(name, name, name, 0.9), Answer(name, old, name, 1.0), *evaluation.answers),
        ),
        survey=msgspec.structs.replace(
            survey,
            counts={name: 1, **survey.counts},
            background=(name,),
            warnings=(name,),
            facts=(msgspec.structs.replace(survey.facts[0], name=name, clipped=1.0, silent=1.0), *survey.facts),
        ),
        importances=(msgspec.structs.replace(found.importances[0], family=name),),
        profile=ReferenceProfile((Signal(f"share.{name}", 0.1, 0.1),)),
        search=msgspec.structs.replace(search, best={name: name}, scoring=name),
        dataset=msgspec.structs.replace(
            found.dataset,
            clips=(msgspec.structs.replace(found.dataset.clips[0], name=name), *found.dataset.clips),
        ),
        skipped=(Skipped(Path("a") / name.replace("/", ""), name),),
    )


class TestContent:
    def test_it_says_what_was_found(self, page: str, found: Findings) -> None:
        """The measures with their intervals, every class, setting, signal and version, and whose report it is."""
        text = re.sub(r"\s+", " ", Page(page).text)
        accuracy = found.evaluation.clip["accuracy"]
        assert f"it named {100 * accuracy.value:.1f} % right" in text
        assert accuracy.low is not None
        assert accuracy.high is not None
        assert f"{100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}" in text
        assert "Do not quote the leaky split." in text
        cells = set(Page(page).cells)
        assert set(found.evaluation.classes) <= cells
        assert {signal.name for signal in found.profile.signals} <= cells
        assert set(found.manifest.versions) <= cells
        assert {"seed", "spec.sample_rate", "data_hash"} <= cells
        assert {model_hash(found.manifest), *found.manifest.files.values()} <= cells

    def test_silence_is_set_apart(self, page: str, found: Findings) -> None:
        """Windows with sound are measured beside all of them, and the rest is counted, if there is any."""
        text = re.sub(r"\s+", " ", Page(page).text)
        assert "12.5 % of the windows are silent: more than 60 dB under the loudest of their clip." in text
        assert f"{100 * found.evaluation.sounding['accuracy'].value:.1f} %" in text
        assert "windows with sound" in text
        everything = msgspec.structs.replace(found.evaluation, silent=0.0, sounding={})
        assert "with sound" not in report.html(msgspec.structs.replace(found, evaluation=everything))

    def test_a_regression_has_its_own_pictures(self, measured: Findings) -> None:
        """A scatter and residuals in place of classes, and the measures in their unit."""
        text = report.html(measured)
        page = Page(text)
        labels = {attributes.get("aria-label") for attributes in page.all("div")}
        assert any("Scatter" in (label or "") for label in labels)
        assert any("Residuals" in (label or "") for label in labels)
        assert "mean absolute error in rpm" in page.text
        assert "Confusion" not in page.text

    def test_the_worst_mistakes_come_first(self, found: Findings) -> None:
        """Wrong clips by confidence, each with what it is and what it was called."""
        clips = [clip.name for clip in found.dataset.clips]
        answers = (
            Answer(clips[0], "healthy", "healthy", 1.0),
            Answer(clips[1], "healthy", "cavitation", 0.6),
            Answer(clips[2], "imbalance", "healthy", 0.8),
        )
        told = msgspec.structs.replace(found, evaluation=msgspec.structs.replace(found.evaluation, answers=answers))
        text = report.html(told)
        mistakes = text[text.index('<section id="mistakes">') :]
        assert "called healthy, 80 % sure" in mistakes
        assert mistakes.index(clips[2]) < mistakes.index(clips[1])
        assert clips[0] not in mistakes
        assert "2 held-out clips were called something else" in Page(text).text

    def test_the_largest_errors_come_first(self, measured: Findings) -> None:
        """Of a regression, whichever their sign."""
        clips = [clip.name for clip in measured.dataset.clips]
        answers = (
            Answer(clips[0], "1000", "1001.5", low=999.0, high=1004.0),
            Answer(clips[1], "1000", "900", low=850.0, high=950.0),
            Answer(clips[2], "1000", "1050"),
        )
        told = msgspec.structs.replace(
            measured, evaluation=msgspec.structs.replace(measured.evaluation, answers=answers)
        )
        text = report.html(told)
        mistakes = text[text.index('<section id="mistakes">') :]
        assert mistakes.index(clips[1]) < mistakes.index(clips[2]) < mistakes.index(clips[0])
        assert "off by -100; interval 850 to 950" in mistakes
        assert "off by +50<" in mistakes

    def test_what_there_is_not_is_not_shown(self, found: Findings) -> None:
        """No search, importances, calibration, answers or survey: still a page, and no link into nowhere."""
        bare = msgspec.structs.replace(
            found,
            search=None,
            importances=(),
            evaluation=msgspec.structs.replace(found.evaluation, reliability=None, answers=(), leaky={}),
            survey=msgspec.structs.replace(found.survey, facts=()),
        )
        page = Page(report.html(bare))
        ids = {attributes["id"] for attributes in page.all("section")}
        links = {str(attributes["href"]).removeprefix("#") for attributes in page.all("a")}
        assert {"worth", "data", "classes", "profile", "settings"} == ids == links
        assert [] == page.all("audio")

    def test_many_classes_stay_readable(self, found: Findings) -> None:
        """Of sixty classes the matrix has those that are mistaken, the examples the largest, and both say so."""
        names = tuple(f"class-{number:02}" for number in range(60))
        matrix = [[9 if row == column else int(column == row + 1) for column in range(60)] for row in range(60)]
        evaluation = msgspec.structs.replace(
            found.evaluation,
            classes=names,
            confusion=tuple(map(tuple, matrix)),
            per_class=tuple(ClassResult(name, 10, 0.9, 0.9, 0.9, None, None) for name in names),
            answers=tuple(Answer("gone.wav", name, name, 0.5) for name in names),
        )
        page = Page(report.html(msgspec.structs.replace(found, evaluation=evaluation)))
        assert "30 classes with fewer mistakes are left out." in page.text
        assert f"One clip of the {report.EXAMPLES} largest classes" in re.sub(r"\s+", " ", page.text)


class TestForeignText:
    def test_no_name_is_markup(self, found: Findings) -> None:
        """Whatever a file, a class, a column or a setting is called, it is shown as that and runs nowhere."""
        text = report.html(renamed(found, HOSTILE))
        page = Page(text)
        assert [] == page.all("script") == page.all("img")
        assert [] == [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
        shown = '<script>alert("1")</script><img src=x onerror=alert(1)>\'"&\ufffd\ufffd {{ 7 * 7 }}'
        assert page.text.count(shown) > 15
        text.encode("utf-8")

    def test_nor_would_the_page_let_it_run(self, page: str) -> None:
        """If markup ever got through, the page's own policy forbids scripts and the network."""
        policies = [meta["content"] for meta in Page(page).all("meta") if meta.get("http-equiv")]
        assert ["default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"] == policies


class TestOneFile:
    def test_it_refers_to_nothing_else(self, page: str) -> None:
        """Every source is in the page, every link leads within it, and every style asks for nothing."""
        attributes = [
            (name, str(value))
            for _, each in Page(page).elements
            for name, value in each.items()
            if name in {"src", "href", "xlink:href", "srcset", "action", "poster"}
        ]
        assert len(attributes) > 20
        assert [] == [value[:80] for _, value in attributes if not value.startswith(("data:", "#"))]
        assert [] == re.findall(r"@import|url\((?!#)", page)

    def test_links_lead_somewhere(self, page: str) -> None:
        """Every section can be reached, every reference of a picture resolves, and no id stands twice."""
        elements = Page(page).elements
        ids = Counter(attributes["id"] for _, attributes in elements if "id" in attributes)
        assert {1} == set(ids.values())
        wanted = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page))
        assert {first or second for first, second in wanted} <= set(ids)

    def test_the_same_findings_give_the_same_bytes(self, page: str, found: Findings) -> None:
        """There is no clock in it but the model's."""
        assert page == report.html(found)

    def test_it_can_be_mailed(self, page: str) -> None:
        """Excerpts have a budget and pictures are small."""
        assert len(page.encode()) < 8_000_000

    def test_a_clip_that_is_gone_costs_its_player_only(self, found: Findings) -> None:
        """It is still listed, and the rest is there."""
        clips = tuple(msgspec.structs.replace(clip, path=Path("/nowhere.wav")) for clip in found.dataset.clips)
        page = Page(
            report.html(msgspec.structs.replace(found, dataset=msgspec.structs.replace(found.dataset, clips=clips)))
        )
        assert [] == page.all("audio")
        assert "This clip can no longer be read." in page.text


class TestInstalled:
    def test_the_wheel_has_the_templates(self, tmp_path: Path) -> None:
        """Whoever installs the package gets the page with it."""
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
        subprocess.run(build, cwd=TEMPLATES.parents[1], check=True, capture_output=True)
        (wheel,) = tmp_path.glob("*.whl")
        names = {f"trainer/templates/{path.name}" for path in TEMPLATES.iterdir()}
        assert 3 <= len(names)
        assert names <= set(zipfile.ZipFile(wheel).namelist())


class TestForEverybody:
    def test_pictures_and_players_have_words(self, page: str) -> None:
        """Every picture says what it shows, every player what it plays."""
        elements = Page(page).elements
        for place, (tag, attributes) in enumerate(elements):
            if tag == "svg":
                above, box = elements[place - 1]
                assert ("div", "img") == (above, box.get("role"))
                assert box.get("aria-label")
                assert "true" == attributes.get("aria-hidden")
            if tag == "audio":
                assert "Listen to" in str(attributes.get("aria-label"))

    def test_tables_have_headers(self, page: str) -> None:
        """Every table has a caption, and every header says whether it is of a row or of a column."""
        assert len(Page(page).all("table")) == len(Page(page).all("caption")) > 5
        assert {"row", "col"} == {attributes.get("scope") for attributes in Page(page).all("th")}

    def test_what_scrolls_can_be_reached_by_keyboard(self, page: str) -> None:
        """It has a name and takes the focus."""
        boxes = [each for each in Page(page).all("div") if each.get("class") == "scroll"]
        assert boxes
        assert all(each.get("tabindex") == "0" and each.get("aria-label") for each in boxes)

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_contrast(self, theme: str) -> None:
        """Text stands out from whatever is behind it by 4.5 to 1, the least that WCAG 2 asks of it."""
        colours = dict(_colours(theme))
        texts = [_rgb(colours[name]) for name in ("ink", "soft", "accent", "wrong")]
        grounds = [_rgb(colours[name]) for name in ("paper", "wash")]
        assert min(_contrast(text, ground) for text in texts for ground in grounds) >= 4.5
        cells = re.findall(r"rgb\(var\(--(\w+)\) / calc\(var\(--weight\) \* (\.\d+)\)\)", STYLE)
        assert ["good", "bad"] == [tone for tone, _ in cells]
        for tone, strength in cells:
            strongest = float(strength)
            cell = [
                strongest * colour + (1 - strongest) * paper
                for colour, paper in zip(map(float, colours[tone].split()), grounds[0], strict=True)
            ]
            assert _contrast(texts[0], cell) >= 4.5, tone


def _colours(theme: str) -> Iterator[tuple[str, str]]:
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)
    return ((name, value) for name, value in re.findall(r"--(\w+): ([^;]+);", light if theme == "light" else dark))


def _rgb(colour: str) -> list[float]:
    return [float(int(colour[place : place + 2], 16)) for place in (1, 3, 5)]


def _contrast(one: list[float], other: list[float]) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(colour: list[float]) -> float:
        parts = [each / 255 for each in colour]
        red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
