"""The report in a real browser, on a desk, a phone and paper: of real trainings, and with names that burst a line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright

from tests.conftest import missing
from tests.trainer.findings import learned, searched
from trainer import report
from trainer.dataset import load
from trainer.results import Answer, ClassResult, Evaluation
from trainer.training import fit
from worker import bundle

CHROMIUM = "chromium"
SWITCHES = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),  # as it can run anywhere
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),  # and by itself asks nobody
    "--autoplay-policy=no-user-gesture-required",
)

DESK, PHONE, PAPER = 1280, 360, 690  # CSS pixels; the last is A4 within its margins

STICKING_OUT = """() => [...document.querySelectorAll("body *")].filter(element => {
  const box = element.getBoundingClientRect();
  const scrolls = element.parentElement.closest(".scroll");
  if (box.width === 0 || scrolls && getComputedStyle(scrolls).overflowX === "auto") return false;
  return box.right > innerWidth + 1 || box.left < -1;
}).map(element => element.outerHTML.slice(0, 120))"""

PICTURES = """() => Promise.all([...document.querySelectorAll("img, svg image")].map(async element => {
  const picture = new Image();
  picture.src = element.src || element.href.baseVal;
  await picture.decode();
  return picture.naturalWidth;
}))"""

PLAY = """() => Promise.all([...document.querySelectorAll("audio")].map(player => {
  player.muted = true;
  return player.play();
}))"""

HEARD = """() => [...document.querySelectorAll("audio")].every(player =>
  !player.error && player.duration > 0 && player.currentTime > 0)"""


class Opened(NamedTuple):
    """A page, what it asked the network for, and what it complained of."""

    page: Page
    requests: list[str]
    complaints: list[str]


@pytest.fixture(scope="module", params=["esc10", "notes", "wide"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a real classifier, of a real regressor, and one of names that are too long."""
    if shutil.which(CHROMIUM) is None:
        missing("there is no chromium")
    out: Path = tmp_path_factory.mktemp("reports") / request.param
    data: Path = request.getfixturevalue("machines" if request.param == "wide" else request.param)
    if request.param == "wide":
        out.mkdir()
        found = learned(load(data), bundle.load(request.getfixturevalue("machine_bundle")).manifest)
        (out / bundle.REPORT).write_text(report.html(_wide(found)), encoding="utf-8")
    else:
        every = load(data, label="midi_pitch" if request.param == "notes" else "label")
        some = msgspec.structs.replace(every, clips=every.clips[::10])
        fit(some, out, trees=20, report=True, search=searched({}), jobs=1)
    return out / bundle.REPORT


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which(CHROMIUM) or missing("there is no chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(SWITCHES))
        yield browser
        browser.close()


@pytest.fixture
def look(browser: Browser, file: Path) -> Iterator[Callable[..., Opened]]:
    """Open the report in a window of so many pixels, without a network."""
    contexts = []

    def opened(width: int, **settings: Any) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 800}, offline=True, **settings)
        contexts.append(context)
        page = context.new_page()
        found = Opened(page, [], [])
        page.set_default_timeout(60_000)

        def noted(request: Request) -> None:
            if not request.url.startswith(("data:", file.as_uri())):
                found.requests.append(request.url)

        page.on("request", noted)
        page.on("console", lambda message: found.complaints.append(message.text))
        page.on("pageerror", lambda error: found.complaints.append(str(error)))
        page.goto(file.as_uri())
        return found

    yield opened
    for context in contexts:
        context.close()


class TestReport:
    @pytest.mark.parametrize("width", [DESK, PHONE])
    def test_nothing_sticks_out(self, look: Callable[..., Opened], width: int) -> None:
        """The page is as wide as the window, and so is all in it that does not scroll by itself."""
        page = look(width).page
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        assert [] == page.evaluate(STICKING_OUT)

    def test_it_is_seen_and_heard_without_a_network(self, look: Callable[..., Opened]) -> None:
        """Every picture has pixels, every player plays, nobody is asked for anything, and nothing complains."""
        opened = look(DESK)
        page = opened.page
        widths = page.evaluate(PICTURES)
        assert len(widths) == page.locator("audio").count() > 10
        assert min(widths) > 0
        page.evaluate(PLAY)
        page.wait_for_function(HEARD)
        assert [] == opened.requests
        assert [] == opened.complaints

    def test_it_prints(self, look: Callable[..., Opened]) -> None:
        """On paper it is light whatever the screen was, has no players, and nothing is cut off at the margin."""
        page = look(PAPER, color_scheme="dark").page
        assert "rgb(255, 255, 255)" != page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(media="print")
        assert "rgb(255, 255, 255)" == page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert not page.locator("audio, nav").filter(visible=True).count()
        assert [] == page.evaluate(STICKING_OUT)
        assert page.pdf(format="A4").startswith(b"%PDF")


def _wide(found: report.Findings) -> report.Findings:
    """The same findings with thirty classes and names as long as a file system lets them be."""
    names = tuple(f"{number}_{'a_name_without_any_space' * 6}" for number in range(30))
    evaluation: Evaluation = msgspec.structs.replace(
        found.evaluation,
        label=names[0],
        how=f"Held out by {names[1]}.",
        classes=names,
        confusion=tuple(tuple(100 * (row == column) + 1 for column in range(30)) for row in range(30)),
        per_class=tuple(ClassResult(name, 12345, 0.9, 0.9, 0.9, 0.9, 0.9, background=True) for name in names),
        answers=tuple(
            Answer(clip.name, names[n % 30], names[n * 7 % 30], 0.9) for n, clip in enumerate(found.dataset.clips)
        ),
    )
    search = msgspec.structs.replace(searched(evaluation.clip), scoring=names[2], best={names[3]: names[4]})
    return msgspec.structs.replace(
        found,
        manifest=msgspec.structs.replace(found.manifest, name=names[5], label=names[0], versions={names[6]: names[7]}),
        evaluation=evaluation,
        survey=msgspec.structs.replace(
            found.survey, counts=dict.fromkeys(names, 12345), background=names, warnings=names
        ),
        search=search,
        importances=tuple(msgspec.structs.replace(each, family=names[8]) for each in found.importances),
    )
