"""The pictures of the report, as SVG that stands inside a page.

This module owns how a picture is drawn: one size of text, one palette, the same bytes for the same numbers. It must
not know which clips or results are shown, and draws no text from outside: names belong to the page around it, which
can escape, wrap and read them aloud.

Colours are CSS variables with a fallback, so that a picture follows the page into the dark and onto paper. The
palette is after Okabe and Ito (2008), which the colour-blind can tell apart; shape says the same as colour.

matplotlib and librosa are imported where they draw: they take seconds, and who draws nothing should not wait.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from trainer.results import Reliability

WIDTH: Final = 360
"""The width of a picture in its own units: on a phone these are the pixels of the screen, and text is 11 of them."""

LEFT: Final = 46
RIGHT: Final = 10
"""The margins beside the axes, in the same units; there is room for the labels of the left one."""

COLOURS: Final = {"ink": "#1b1f23", "soft": "#57606a", "line": "#d0d7de", "accent": "#0072b2", "wrong": "#b34700"}
"""The names of the page's variables, and what stands for them elsewhere."""

RULES: Final = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 11,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["line"],
    "axes.unicode_minus": False,
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 3),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), COLOURS["soft"]),
    **dict.fromkeys(("xtick.color", "ytick.color"), COLOURS["line"]),
}

COLUMNS: Final = 240
"""Columns that a sound is drawn in: about one for each pixel."""

SHADES: Final = 32
"""Levels of a spectrogram: more cannot be told apart, and cost bytes."""

RANGE: Final = 80.0
"""Decibels under the loudest point of a spectrogram that are drawn."""

WAVE: Final = 0.28
"""Half the height of a waveform, the height of its spectrogram being one."""

POINTS: Final = 1000
"""Clips in a scatter: more only cover each other."""

DOTTED: Final = {"color": COLOURS["soft"], "linewidth": 1.0, "linestyle": (0, (2, 3))}

Vector = NDArray[np.float64]


def sound(samples: NDArray[np.float32], sample_rate: int, name: str) -> Markup:
    """Draw a waveform, shape (samples,), over its log-mel spectrogram; ``name`` is unique within the page."""
    samples = samples if samples.size else np.zeros(1, np.float32)
    seconds = samples.size / sample_rate
    with _rules(name):
        figure = _figure(184)
        axes = _axes(figure, 32, 150)
        image = _spectrogram(samples, sample_rate)
        axes.imshow(image, extent=(0, seconds, 0, 1), aspect="auto", origin="lower", interpolation="none")
        starts = np.unique(np.linspace(0, samples.size, COLUMNS, endpoint=False).astype(int))
        scale = WAVE / max(float(np.abs(samples).max()), 1e-6)
        low, high = np.minimum.reduceat(samples, starts) * scale, np.maximum.reduceat(samples, starts) * scale
        middle = 1.05 + WAVE
        axes.fill_between(starts / sample_rate, middle + low, middle + high, color=COLOURS["accent"], linewidth=0.6)
        hertz = [each for each in (250, 500, 1000, 2000, 4000, 8000, 16000) if each <= sample_rate / 2][-4:]
        axes.set_yticks(_mel([*hertz]) / _mel([sample_rate / 2]), [f"{each / 1000:g}" for each in hertz])
        axes.set(xlim=(0, seconds), ylim=(0, middle + WAVE), xlabel="seconds")
        axes.set_ylabel("kHz", loc="bottom")
        axes.spines[:].set_visible(False)
        return _svg(figure)


def reliability(found: Reliability) -> Markup:
    """Draw how often windows were right against how sure the model was, before and after calibration."""
    with _rules("reliability"):
        figure = _figure(300)
        axes = _axes(figure, 40, 236)
        axes.plot([0, 1], [0, 1], label="as sure as right", **DOTTED)
        for bins, label, colour, line, marker in (
            (found.before, "before calibration", COLOURS["wrong"], "--", "s"),
            (found.after, "after", COLOURS["accent"], "-", "o"),
        ):
            sure, right = [each.confidence for each in bins], [each.accuracy for each in bins]
            axes.plot(sure, right, color=colour, linestyle=line, marker=marker, markersize=5, label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="mean confidence")
        _upright(axes, "share that was right")
        axes.legend(loc="lower right", frameon=False)
        return _svg(figure)


def scatter(truth: Vector, said: Vector, low: Vector, high: Vector) -> Markup:
    """Draw what was said against what is true, with intervals; NaN where there is none. Shapes (clips,)."""
    with _rules("scatter"):
        figure = _figure(300)
        axes = _axes(figure, 40, 236)
        ends = [min(truth.min(), said.min()), max(truth.max(), said.max())]
        axes.plot(ends, ends, **DOTTED)
        _intervals(axes, truth, said, low, high, aim=truth)
        axes.set(xlabel="true")
        _upright(axes, "said")
        return _svg(figure)


def residuals(truth: Vector, said: Vector, low: Vector, high: Vector) -> Markup:
    """Draw by how much too high or too low was said, against what is true, with intervals. Shapes (clips,)."""
    with _rules("residuals"):
        figure = _figure(300)
        axes = _axes(figure, 40, 236)
        axes.axhline(0.0, **DOTTED)
        _intervals(axes, truth, said - truth, low - truth, high - truth, aim=np.zeros_like(truth))
        axes.set(xlabel="true")
        _upright(axes, "said minus true")
        return _svg(figure)


def histogram(values: Sequence[float], unit: str, name: str) -> Markup:
    """Draw how many clips have which value; ``name`` is unique within the page."""
    with _rules(name):
        figure = _figure(150)
        axes = _axes(figure, 40, 86)
        axes.hist(values, bins=24, color=COLOURS["accent"])
        axes.set(xlabel=unit)
        _upright(axes, "clips")
        axes.locator_params(axis="y", nbins=4, integer=True)
        return _svg(figure)


def _intervals(axes: Any, truth: Vector, value: Vector, low: Vector, high: Vector, *, aim: Vector) -> None:
    """Draw points and their intervals, and mark those that do not reach their ``aim``."""
    every = slice(None, None, -(-truth.size // POINTS))
    truth, value, low, high, aim = (each[every] for each in (truth, value, low, high, aim))
    missed = (aim < low) | (aim > high)  # never of NaN
    for chosen, colour, marker in ((~missed, COLOURS["accent"], "o"), (missed, COLOURS["wrong"], "x")):
        axes.vlines(truth[chosen], low[chosen], high[chosen], color=colour, linewidth=0.7, alpha=0.35)
        axes.scatter(truth[chosen], value[chosen], s=12, color=colour, marker=marker, linewidth=0.9)


def _spectrogram(samples: NDArray[np.float32], sample_rate: int) -> NDArray[np.uint8]:
    """Return the colours of a log-mel spectrogram, shape (bands, frames, 3)."""
    from librosa.feature import melspectrogram  # noqa: PLC0415  # see the top
    from matplotlib import colormaps  # noqa: PLC0415  # see the top

    n_fft = int(2 ** np.ceil(np.log2(max(64, sample_rate / 20))))  # 50 ms or more: fine enough for all bands
    hop_length = max(1, samples.size // COLUMNS)
    long_enough = np.pad(samples, (0, max(0, n_fft - samples.size)))
    power = melspectrogram(
        y=long_enough, sr=sample_rate, n_fft=n_fft, hop_length=hop_length, n_mels=min(64, n_fft // 16)
    )[:, : 1 + samples.size // hop_length]
    decibels = 10 * np.log10(np.maximum(power, 1e-10) / max(float(power.max()), 1e-10))
    colours: NDArray[np.uint8] = colormaps["magma"].resampled(SHADES)(1 + decibels / RANGE, bytes=True)
    return colours[..., :3]


def _mel(hertz: list[float]) -> Vector:
    from librosa import hz_to_mel  # noqa: PLC0415  # see the top

    mel: Vector = hz_to_mel(hertz)
    return mel


def _rules(name: str) -> AbstractContextManager[None]:
    """Return the style as a context; the ``name`` is what the ids within this picture are made from."""
    import matplotlib as mpl  # noqa: PLC0415  # see the top

    rules: dict[Any, Any] = {**RULES, "svg.hashsalt": name}
    return mpl.rc_context(rules)


def _figure(height: int) -> Any:
    from matplotlib.figure import Figure  # noqa: PLC0415  # see the top

    return Figure(figsize=(WIDTH / 72, height / 72))


def _axes(figure: Any, bottom: int, height: int) -> Any:
    """Return axes as wide as the picture allows, this far above its lower edge and so high, in its units."""
    whole = 72 * figure.get_figheight()
    return figure.add_axes((LEFT / WIDTH, bottom / whole, (WIDTH - LEFT - RIGHT) / WIDTH, height / whole))


def _upright(axes: Any, label: str) -> None:
    """Name the vertical axis above it: beside it, wide numbers would push the name out of the picture."""
    axes.set_title(label, loc="left", fontsize=RULES["font.size"], x=-LEFT / (WIDTH - LEFT - RIGHT))


def _svg(figure: Any) -> Markup:
    """Return a figure as an ``svg`` element that fits a page: no fixed size, font, colour or id of its own."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', ' aria-hidden="true"', text, count=1)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)  # it would hold for the page
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # the same in every picture, and nothing refers to them
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)  # base64 has no dots
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name}, {colour})")
    return Markup(text)  # noqa: S704  # drawn from numbers alone
