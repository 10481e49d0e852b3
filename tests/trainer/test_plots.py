"""Pictures: the same numbers give the same bytes, they fit any page, and no sound is too odd to be drawn."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from functools import cache
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from markupsafe import Markup

from trainer import plots
from trainer.results import Reliability, ReliabilityBin

RATE = 16000
TIME = np.arange(RATE) / RATE
TONE = (0.5 * np.sin(2 * np.pi * 1000 * TIME)).astype(np.float32)
SVG = "{http://www.w3.org/2000/svg}"

BINS = (ReliabilityBin(0.4, 0.5, 10), ReliabilityBin(0.9, 0.8, 30))
RELIABILITY = Reliability(before=BINS, after=BINS[1:], error_before=0.1, error_after=0.05)
TRUTH = np.arange(20.0)


@cache
def everything() -> dict[str, Markup]:
    """One of each kind of picture."""
    return {
        "sound": plots.sound(TONE, RATE, "sound"),
        "reliability": plots.reliability(RELIABILITY),
        "scatter": plots.scatter(TRUTH, TRUTH + 1, TRUTH - 1, TRUTH + 3),
        "residuals": plots.residuals(TRUTH, TRUTH + 1, TRUTH - 1, TRUTH + 3),
        "histogram": plots.histogram([1.0, 2.0, 2.0], "seconds", "histogram"),
    }


def parsed(picture: Markup) -> ET.Element:
    return ET.fromstring(picture)  # noqa: S314  # drawn just now


def crosses(picture: Markup) -> int:
    """Count the points that are marked as missed; the bars of their intervals are paler."""
    styles = [each.get("style", "") for each in parsed(picture).iter(f"{SVG}use")]
    return sum("--wrong" in style and "opacity" not in style for style in styles)


class TestEveryPicture:
    def test_the_same_numbers_give_the_same_bytes(self) -> None:
        """Nothing of the hour, the process or a random id is in them."""
        assert everything() == everything.__wrapped__()

    @pytest.mark.parametrize("name", everything())
    def test_it_fits_a_page(self, name: str) -> None:
        """It is well-formed, scales with its box, and brings no font, size, style sheet or link of its own."""
        picture = everything()[name]
        root = parsed(picture)
        assert f"{SVG}svg" == root.tag
        assert {"viewBox"} == set(root.attrib) & {"width", "height", "viewBox"}
        assert "font-family" not in picture
        assert "<style" not in picture
        links = re.findall(r'(?:href="|url\()([^")]*)', picture)
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)

    def test_no_id_is_in_two_pictures(self) -> None:
        """What a picture refers to is its own, also if all of them stand in one page."""
        ids = [set(re.findall(r'id="([^"]*)"', picture)) for picture in everything().values()]
        assert sum(map(len, ids)) == len(set().union(*ids))

    def test_colours_follow_the_page(self) -> None:
        """Every colour is a variable of the page, with a fallback; black on a dark page would not be seen."""
        for name, picture in everything().items():
            alone = re.sub(r"var\(--\w+, #\w+\)", "", picture)
            assert [] == re.findall(r"#[0-9a-f]{6}\b(?!\w)", re.sub(r'"#\w+"|url\(#\w+\)', "", alone)), name

    def test_text_stays_text(self) -> None:
        """Words can be searched for, read aloud and enlarged."""
        texts = [each.text for each in parsed(everything()["reliability"]).iter(f"{SVG}text")]
        assert {"mean confidence", "share that was right", "as sure as right"} <= set(texts)

    def test_nothing_global_is_touched(self) -> None:
        """Drawing needs no pyplot and leaves matplotlib's settings alone; who does not draw need not import it."""
        code = (
            "import sys, trainer.card, trainer.report, worker.service\n"
            "assert 'matplotlib' not in sys.modules\n"
            "from trainer import plots\n"
            "import matplotlib\n"
            "before = matplotlib.rcParams.copy()\n"
            "plots.histogram([1.0, 2.0], 'seconds', 'x')\n"
            "assert dict.__eq__(before, matplotlib.rcParams)\n"
            "assert 'matplotlib.pyplot' not in sys.modules\n"
        )
        assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode


class TestSound:
    @pytest.mark.parametrize("rate", [1000, 48000])
    @pytest.mark.parametrize(
        "samples",
        [
            np.zeros(0, np.float32),
            np.zeros(1, np.float32),
            np.ones(3, np.float32),
            np.zeros(20000, np.float32),
            np.tile(np.array([1, -1], np.float32), 5000),
            np.full(5000, 1e-40, np.float32),
            np.eye(1, 9000, 4000, dtype=np.float32)[0] * 1e6,
        ],
        ids=["nothing", "one sample", "three samples", "silence", "full scale", "denormals", "click"],
    )
    def test_no_sound_is_too_odd(self, samples: np.ndarray, rate: int) -> None:
        """It is drawn without a warning, well-formed and small."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            picture = plots.sound(samples, rate, "odd")
        parsed(picture)
        assert "nan" not in re.sub(r"base64,[^\"]*", "", picture)
        assert len(picture) < 100_000

    def test_a_tone_is_where_it_sounds(self) -> None:
        """The brightest band of the spectrogram is that of the tone, on the mel scale, in every column."""
        bright = plots._spectrogram(TONE, RATE).astype(int).sum(axis=-1)
        expected = float(plots._mel([1000.0])[0] / plots._mel([RATE / 2])[0]) * len(bright)
        assert np.abs(bright.argmax(axis=0) + 0.5 - expected).max() <= 1.0

    def test_a_long_sound_is_no_larger_than_a_short_one(self) -> None:
        """Columns are bounded, so that a page is."""
        noise = np.random.default_rng(0).normal(size=60 * RATE).astype(np.float32)
        assert plots._spectrogram(noise, RATE).shape[1] <= plots.COLUMNS + 2
        assert len(plots.sound(noise, RATE, "long")) < 100_000


class TestIntervals:
    def test_a_missed_truth_is_marked(self) -> None:
        """A cross for each interval that does not hold the truth, in both pictures, and a point for the others."""
        said = TRUTH.copy()
        low, high = said - 1, said + 1
        low[3], high[5] = said[3] + 0.5, said[5] - 0.5
        assert 2 == crosses(plots.scatter(TRUTH, said, low, high))
        assert 2 == crosses(plots.residuals(TRUTH, said, low, high))

    def test_no_interval_is_no_miss(self) -> None:
        """Where there is none, there is only a point."""
        none = np.full(20, np.nan)
        assert 0 == crosses(plots.scatter(TRUTH, TRUTH + 5, none, none))

    def test_many_clips_stay_small(self) -> None:
        """A hundred thousand clips are a thousand points."""
        many = np.arange(100_000.0)
        assert len(plots.scatter(many, many, many - 1, many + 1)) < 500_000
