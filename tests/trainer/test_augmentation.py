"""Augmentations as written: what is read, what is refused with a reason, and that nothing gets lost as data."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.augmentation import CODECS, EXAMPLE, RANGES, Augmentation, read_augmentation
from worker.errors import Fatal

RANGE_OF = {
    name: st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda pair: (min(pair), max(pair)))
    for name, (low, high) in RANGES.items()
}


class TestReading:
    def test_the_example(self) -> None:
        """What the help shows is what it says."""
        assert read_augmentation(EXAMPLE) == Augmentation(
            noise=(10.0, 30.0), gain=(-12.0, 0.0), shift=0.2, codec=("mp3", "gsm"), copies=2
        )

    def test_one_number_is_a_range(self) -> None:
        """And blanks do not matter."""
        assert Augmentation(gain=(-6.0, -6.0), pitch=(-2.0, 2.0)) == read_augmentation(" gain = -6 , pitch=-2:2 ")

    @given(chosen=st.fixed_dictionaries({}, optional=RANGE_OF).filter(bool), copies=st.integers(1, 100))
    def test_whatever_is_written_comes_back(self, chosen: dict[str, tuple[float, float]], copies: int) -> None:
        """As text of the command line, and as the JSON of a manifest."""
        text = ",".join([f"{name}={low!r}:{high!r}" for name, (low, high) in chosen.items()] + [f"copies={copies}"])
        expected = msgspec.convert({"copies": copies, **chosen}, Augmentation)
        assert expected == read_augmentation(text)
        assert expected == msgspec.json.decode(msgspec.json.encode(expected), type=Augmentation)


class TestRefusals:
    @pytest.mark.parametrize(
        "text",
        ["", "noise", "noise=", "noise=loud", "noise=1:2:3", "shift=0.1:0.2", "echo=1", "copies=two", "gain=nan"],
    )
    def test_what_is_not_understood_is_quoted(self, text: str) -> None:
        """With all that could stand there, and an example."""
        with pytest.raises(Fatal, match=r"--augment has .*; expected some of stretch, pitch, .* as in noise=10:30"):
            read_augmentation(text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("gain=3:-3", r"gain is 3 to -3; expected a range within -100 to 60"),
            ("stretch=0:1", r"stretch is 0 to 1; expected a range within 0\.25 to 4"),
            ("shift=1.5", r"shift is 1\.5; expected more than 0, up to 1"),
            ("gain=3,copies=0", "copies is 0; expected 1 to 100"),
            ("gain=3,copies=101", "copies is 101; expected 1 to 100"),
            ("codec=mp3+aac", "codec is .*; expected some of vorbis, opus, mp3, ulaw, gsm, joined by +"),
            ("copies=3", "copies that nothing is done to; expected some of stretch, pitch"),
            ("gain=1,gain=2", "says twice what gain is"),
        ],
    )
    def test_what_makes_no_sense_is_explained(self, text: str, message: str) -> None:
        """The setting, what it is, and what it may be."""
        with pytest.raises(Fatal, match=f"--augment:? {message}"):
            read_augmentation(text)

    @pytest.mark.parametrize("codec", CODECS)
    def test_every_codec_has_a_name(self, codec: str) -> None:
        """Those that are known can be written."""
        assert (codec,) == read_augmentation(f"codec={codec}").codec
