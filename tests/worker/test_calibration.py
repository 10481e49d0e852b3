"""Calibration: the answer stays, the odds are what they should be, and the bits are the same everywhere."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from worker.calibration import Calibration, ConformalInterval, TemperatureScaling

votes = st.lists(st.lists(st.integers(0, 100), min_size=3, max_size=3).filter(any), min_size=1, max_size=20)
scalings = st.builds(TemperatureScaling, st.integers(1, 128), st.sampled_from([0.0005, 0.005, 0.5]))


def probabilities(rows: list[list[int]]) -> NDArray[np.float64]:
    array = np.array(rows, float)
    shares: NDArray[np.float64] = array / array.sum(axis=1, keepdims=True)
    return shares


class TestTemperatureScaling:
    @given(votes, scalings)
    def test_probabilities_stay_what_they_are(self, rows: list[list[int]], scaling: TemperatureScaling) -> None:
        """They are between 0 and 1, sum up to one, and whichever was the largest still is."""
        before = probabilities(rows)
        after = scaling.apply(before)
        assert np.all((after >= 0) & (after <= 1))
        np.testing.assert_allclose(1.0, after.sum(axis=1))
        largest = after.max(axis=1)
        np.testing.assert_array_equal(largest, after[np.arange(len(rows)), before.argmax(axis=1)])

    @given(votes, scalings)
    def test_it_is_a_power(self, rows: list[list[int]], scaling: TemperatureScaling) -> None:
        """What roots and products give is what the formula says."""
        before = probabilities(rows)
        powers = (before + scaling.smoothing) ** (scaling.sixteenths / 16)
        np.testing.assert_allclose(powers / powers.sum(axis=1, keepdims=True), scaling.apply(before), rtol=1e-12)

    @given(votes, scalings)
    def test_a_row_does_not_depend_on_its_batch(self, rows: list[list[int]], scaling: TemperatureScaling) -> None:
        """Alone, or in another layout, each row has the same bits."""
        before = probabilities(rows)
        together = scaling.apply(before)
        np.testing.assert_array_equal(together, np.concatenate([scaling.apply(row[None]) for row in before]))
        np.testing.assert_array_equal(together, scaling.apply(np.asfortranarray(before)))

    def test_the_bits_are_known(self) -> None:
        """Only operations that IEEE 754 defines to the last bit are used, so every machine gives these."""
        after = TemperatureScaling(37, 0.005).apply(np.array([[0.11, 0.55, 0.34]]))
        expected = ["0x1.3c6f70051d0bap-6", "0x1.78a8c93df8ec8p-1", "0x1.f5ceed0778ac8p-3"]
        assert expected == [number.hex() for number in after[0].tolist()]

    def test_one_is_no_change_but_for_the_smoothing(self) -> None:
        """Sixteen sixteenths leave the odds."""
        after = TemperatureScaling(16, 1e-12).apply(np.array([[0.2, 0.5, 0.3]]))
        np.testing.assert_allclose([[0.2, 0.5, 0.3]], after, rtol=1e-9)

    @pytest.mark.parametrize(("sixteenths", "smoothing"), [(0, 0.1), (-3, 0.1), (16, 0.0), (16, -1.0), (16, np.nan)])
    def test_nonsense_is_refused(self, sixteenths: int, smoothing: float) -> None:
        """What would turn the order around, or divide zero by zero, is no setting; nor from a file."""
        with pytest.raises(ValueError, match="expected"):
            TemperatureScaling(sixteenths, smoothing)


class TestConformalInterval:
    def test_by_hand(self) -> None:
        """Value and spread stay; the interval is as wide as the trees disagree, and never closed."""
        after = ConformalInterval(0.9, 2.0, 0.5).apply(np.array([[60.0, 1.0], [-3.0, 0.0]]))
        assert [[60.0, 1.0, 57.0, 63.0], [-3.0, 0.0, -4.0, -2.0]] == after.tolist()

    @pytest.mark.parametrize(("factor", "floor"), [(-1.0, 0.5), (np.inf, 0.5), (1.0, 0.0), (1.0, np.nan)])
    def test_nonsense_is_refused(self, factor: float, floor: float) -> None:
        """An interval that ends before it begins is none."""
        with pytest.raises(ValueError, match="expected"):
            ConformalInterval(0.9, factor, floor)


@pytest.mark.parametrize("calibration", [TemperatureScaling(30, 0.005), ConformalInterval(0.9, 1.7, 1 / 3)])
def test_it_travels(calibration: Calibration) -> None:
    """Written as JSON, as in a manifest, it is read back to the last bit."""
    read = msgspec.json.decode(msgspec.json.encode(calibration), type=TemperatureScaling | ConformalInterval)
    assert calibration == read
