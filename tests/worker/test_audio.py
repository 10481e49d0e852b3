"""What `worker.audio` makes of good, odd, damaged and hostile bytes."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from worker import audio
from worker.audio import Limits, Sound
from worker.errors import BadRecord
from worker.wav import plain_wav

LIMITS = Limits()
RNG = np.random.default_rng(7)

EXACT = [
    ("WAV", "PCM_U8", 8),
    ("WAV", "PCM_16", 16),
    ("WAV", "PCM_24", 24),
    ("WAV", "PCM_32", 32),
    ("WAV", "FLOAT", 16),
    ("WAV", "DOUBLE", 16),
    ("WAVEX", "PCM_16", 16),
    ("WAVEX", "FLOAT", 16),
    ("RF64", "PCM_16", 16),
    ("FLAC", "PCM_S8", 8),
    ("FLAC", "PCM_16", 16),
    ("FLAC", "PCM_24", 24),
]
CONTENT_TYPES = {"WAV": "audio/wav", "WAVEX": "audio/vnd.wave", "RF64": "audio/x-wav", "FLAC": "audio/flac"}


def encode(
    samples: NDArray[np.generic], rate: int = 16_000, container: str = "WAV", subtype: str | None = "PCM_16"
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def tone(seconds: float = 1.0, rate: int = 16_000, frequency: float = 440.0, level: float = 0.5) -> NDArray[np.float32]:
    time = np.arange(round(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def rejection(data: bytes, content_type: str | None, limits: Limits = LIMITS) -> tuple[str, str]:
    with pytest.raises(BadRecord) as caught:
        audio.decode(data, content_type, limits)
    return caught.value.reason, caught.value.detail


def with_flac_frames(data: bytes, frames: int) -> bytes:
    """Set the 36-bit number of samples in a FLAC's STREAMINFO; 0 means unknown."""
    forged = bytearray(data)
    forged[21] = forged[21] & 0xF0 | frames >> 32
    forged[22:26] = (frames & 0xFFFF_FFFF).to_bytes(4, "big")
    return bytes(forged)


def with_riff_sizes(data: bytes, riff: int, chunk: int) -> bytes:
    """Set the two sizes of a plain WAV file: of the file and of its data chunk."""
    assert b"data" == data[36:40]
    return data[:4] + riff.to_bytes(4, "little") + data[8:40] + chunk.to_bytes(4, "little") + data[44:]


class TestContainers:
    @pytest.mark.parametrize(("container", "subtype", "bits"), EXACT)
    @pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 2), (44_100, 1), (96_000, 6)])
    def test_lossless(self, container: str, subtype: str, bits: int, rate: int, channels: int) -> None:
        """Every integer comes back as itself over full scale, and channels are averaged."""
        low_bits = 32 - bits
        integers = RNG.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), size=(500, channels)) << low_bits
        scaled = integers / 2**31
        floating = subtype in {"FLOAT", "DOUBLE"}
        data = encode(scaled if floating else integers.astype(np.int32), rate, container, subtype)

        for content_type in (CONTENT_TYPES[container], None):
            sound = audio.decode(data, content_type, LIMITS)

            assert np.float32 == sound.samples.dtype
            assert rate == sound.sample_rate
            assert 500 / rate == sound.duration
            np.testing.assert_allclose(sound.samples, scaled.mean(axis=1), rtol=0, atol=2**-24)

    @pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
    @pytest.mark.parametrize("channels", [1, 2])
    def test_lossy(self, subtype: str, channels: int) -> None:
        """Vorbis and Opus give back the tone that went in."""
        wave = tone(rate=48_000)
        data = encode(np.repeat(wave[:, None], channels, axis=1), 48_000, "OGG", subtype)

        sound = audio.decode(data, "audio/ogg; codecs=opus", LIMITS)

        assert 48_000 == sound.sample_rate
        assert wave.size == sound.samples.size
        assert np.corrcoef(wave, sound.samples)[0, 1] > 0.99

    def test_telephone(self) -> None:
        """A WAV file may be mu-law, as calls are."""
        wave = tone(rate=8_000)

        sound = audio.decode(encode(wave, 8_000, "WAV", "ULAW"), "audio/wav", LIMITS)

        np.testing.assert_allclose(sound.samples, wave, atol=0.02)

    @pytest.mark.parametrize(
        "content_type",
        [
            "audio/wav",
            "audio/wave",
            "audio/x-wav",
            "audio/vnd.wave",
            "Audio/WAV",
            ' audio/wav ; codecs="1"',
            "application/octet-stream",
            "",
            None,
        ],
    )
    def test_aliases(self, content_type: str | None) -> None:
        """WAV goes by many names, in any case, with parameters, or by none."""
        assert 100 == audio.decode(encode(tone()[:100]), content_type, LIMITS).samples.size

    @pytest.mark.parametrize(
        ("content_type", "container", "subtype"),
        [("audio/x-flac", "FLAC", "PCM_16"), ("application/ogg", "OGG", "VORBIS"), ("audio/ogg", "OGG", "OPUS")],
    )
    def test_other_aliases(self, content_type: str, container: str, subtype: str) -> None:
        """FLAC and OGG have a second name each."""
        data = encode(tone(), container=container, subtype=subtype)

        assert 1.0 == audio.decode(data, content_type, LIMITS).duration

    @pytest.mark.parametrize("folder", ["esc10", "notes"])
    def test_real_clips(self, folder: str, request: pytest.FixtureRequest) -> None:
        """Real Vorbis and FLAC recordings decode to the very samples that soundfile reads from disk."""
        clips = sorted((request.getfixturevalue(folder) / "audio").iterdir())[::40]
        assert len(clips) > 5
        for clip in clips:
            expected, rate = soundfile.read(clip, dtype="float32")

            sound = audio.decode(clip.read_bytes(), None, LIMITS)

            assert rate == sound.sample_rate
            np.testing.assert_array_equal(expected, sound.samples)

    def test_float_beyond_full_scale(self) -> None:
        """A float file may leave [-1, 1]; that is its sender's business."""
        samples = np.array([3.0, -40_000.0, 0.5], np.float32)

        sound = audio.decode(encode(samples, subtype="FLOAT"), None, LIMITS)

        np.testing.assert_array_equal(samples, sound.samples)

    @pytest.mark.parametrize("size", [0x7FFF_F024, 0xFFFF_FFFF])
    def test_piped_wav(self, size: int) -> None:
        """A WAV written into a pipe has placeholders for its sizes, and is whole all the same."""
        data = with_riff_sizes(encode(tone()), size, size)

        assert 1.0 == audio.decode(data, "audio/wav", LIMITS).duration

    def test_piped_flac(self) -> None:
        """A FLAC written into a pipe does not know its length, and is whole all the same."""
        wave = encode(tone(), container="FLAC")

        sound = audio.decode(with_flac_frames(wave, 0), "audio/flac", LIMITS)

        np.testing.assert_array_equal(audio.decode(wave, None, LIMITS).samples, sound.samples)

    def test_longer_than_a_block(self) -> None:
        """Blocks join without a seam, wherever the sound ends."""
        for frames in (65_535, 65_536, 65_537, 200_000):
            integers = RNG.integers(-32_768, 32_768, frames).astype(np.int16)

            sound = audio.decode(encode(integers), None, LIMITS)

            np.testing.assert_array_equal(integers.astype(np.float32) / 32_768, sound.samples)

    def test_trainer_reads_what_the_stream_does_not(self) -> None:
        """`from_container` knows neither limits nor a list of formats."""
        long_aiff = encode(np.zeros(8_000 * 61, np.int16), 8_000, "AIFF")

        assert 61.0 == audio.from_container(long_aiff).duration
        assert "unknown-content-type" == rejection(long_aiff, None)[0]
        assert "unknown-content-type" == rejection(long_aiff, "audio/aiff")[0]

    def test_one_way_to_decode(self) -> None:
        """What the trainer reads is bit for bit what the worker reads."""
        data = encode(RNG.standard_normal((5_000, 2)) / 4, 22_050, "OGG", "VORBIS")

        np.testing.assert_array_equal(
            audio.from_container(data).samples, audio.decode(data, "audio/ogg", LIMITS).samples
        )


class TestRawSamples:
    INTEGERS = np.array([0, 1, -1, 256, -256, 32_767, -32_768, 12_345], np.int16)

    @pytest.mark.parametrize(
        "content_type",
        ["audio/L16;rate=16000;channels=1", "audio/l16; rate=16000", 'AUDIO/L16 ; Rate = "16000" ; CHANNELS="1"'],
    )
    def test_l16_is_big_endian(self, content_type: str) -> None:
        """RFC 2586 sends the most significant byte first."""
        sound = audio.decode(self.INTEGERS.astype(">i2").tobytes(), content_type, LIMITS)

        np.testing.assert_array_equal(self.INTEGERS / np.float32(32_768), sound.samples)
        assert 16_000 == sound.sample_rate
        assert 8 / 16_000 == sound.duration

    def test_byte_order_matters(self) -> None:
        """The same bytes are another sound in the other order: the two types must not be confused."""
        data = self.INTEGERS.astype("<i2").tobytes()

        little = audio.decode(data, "audio/pcm;rate=16000;format=s16le", LIMITS)
        big = audio.decode(data, "audio/L16;rate=16000", LIMITS)

        np.testing.assert_array_equal(self.INTEGERS / np.float32(32_768), little.samples)
        np.testing.assert_array_equal(self.INTEGERS.byteswap() / np.float32(32_768), big.samples)

    def test_float(self) -> None:
        """`f32le` is taken as it is, and the result does not share memory with the record."""
        samples = tone()[:50]

        sound = audio.decode(samples.tobytes(), "audio/pcm;rate=44100;channels=1;format=F32LE", LIMITS)

        np.testing.assert_array_equal(samples, sound.samples)
        assert sound.samples.flags.writeable

    def test_interleaved_channels(self) -> None:
        """Channels are interleaved, and averaged."""
        stereo = np.array([[100, 300], [-500, -700]], "<i2")

        sound = audio.decode(stereo.tobytes(), "audio/pcm;rate=8000;channels=2;format=s16le", LIMITS)

        np.testing.assert_array_equal(np.array([200, -600]) / np.float32(32_768), sound.samples)
        assert 2 / 8_000 == sound.duration

    @given(samples=st.lists(st.integers(-32_768, 32_767), min_size=1, max_size=300), channels=st.integers(1, 3))
    @settings(max_examples=100, deadline=None)
    def test_same_as_wav(self, samples: list[int], channels: int) -> None:
        """Raw samples and the same samples in a WAV file are the same sound."""
        frames = np.array(samples * channels, "<i2").reshape(-1, channels)
        declared = f"audio/pcm;rate=16000;channels={channels};format=s16le"

        raw = audio.decode(frames.tobytes(), declared, LIMITS)
        wav = audio.decode(encode(frames), "audio/wav", LIMITS)

        np.testing.assert_array_equal(wav.samples, raw.samples)
        assert wav.duration == raw.duration


class TestRejections:
    WAV = encode(tone())
    FLAC = encode(tone(), container="FLAC")
    OGG = encode(RNG.standard_normal(160_000) / 5, container="OGG", subtype="VORBIS")
    RAW = np.zeros(8, "<i2").tobytes()

    @pytest.mark.parametrize(
        ("data", "content_type", "reason", "detail"),
        [
            (b"", None, "empty", "no bytes"),
            (encode(np.zeros(0)), "audio/wav", "empty", "no samples"),
            (RAW, None, "unknown-content-type", "audio/pcm;rate=16000;channels=1;format=s16le"),
            (RAW, "application/octet-stream", "unknown-content-type", "audio/L16;rate=16000;channels=1"),
            (WAV, "text/plain", "unknown-content-type", "'text/plain'"),
            (RAW, "audio/pcm;rate=16000", "unknown-content-type", "format=s16le"),
            (RAW, "audio/pcm;rate=16000;format=u8", "unknown-content-type", "format=u8"),
            (FLAC, "audio/wav", "undecodable", "audio/wav, but the bytes begin with b'fLaC"),
            (WAV, "audio/ogg", "undecodable", "audio/ogg, but the bytes begin with b'RIFF"),
            (b"RIFF\x04\0\0\0AVI ", "audio/wav", "undecodable", "AVI"),
            (b"RIFF\x04\0\0\0WAVE", "audio/wav", "undecodable", "libsndfile: "),
            (b"fLaC" + bytes(100), "audio/flac", "undecodable", "libsndfile: "),
            (b"OggS" + bytes(100), "audio/ogg", "undecodable", "libsndfile: "),
            (WAV[:-1], "audio/wav", "undecodable", "cut off: 1 bytes of the container are missing after 32043"),
            (FLAC[:-100], "audio/flac", "undecodable", "libsndfile: "),
            (OGG[:-10], "audio/ogg", "undecodable", "cut off: 10 bytes"),
            (RAW[:-1], "audio/pcm;rate=16000;format=s16le", "undecodable", "15 bytes are no whole number of frames"),
            (RAW[:-2], "audio/L16;rate=16000;channels=2", "undecodable", "frames of 4 bytes"),
            (RAW, "audio/L16", "bad-rate", "rate=''"),
            (RAW, "audio/L16;rate=16k", "bad-rate", "rate='16k'"),
            (RAW, "audio/L16;rate=-16000", "bad-rate", "rate='-16000'"),
            (RAW, "audio/L16;rate=" + "9" * 5_000, "bad-rate", "rate='9999"),
            (RAW, "audio/L16;rate=999", "bad-rate", "999 samples a second; expected 1000 to 384000"),
            (encode(tone(), 400), None, "bad-rate", "400 samples a second"),
            (encode(tone(), 400_000), None, "bad-rate", "400000 samples a second"),
            (RAW, "audio/L16;rate=16000;channels=0", "bad-channels", "0 channels; expected 1 to 32"),
            (RAW, "audio/L16;rate=16000;channels=two", "bad-channels", "channels='two'"),
            (encode(np.zeros((10, 33))), None, "bad-channels", "33 channels; expected 1 to 32"),
            (encode(np.array([0, np.nan]), subtype="FLOAT"), None, "non-finite", "nan"),
            (encode(np.array([0, -np.inf]), subtype="FLOAT"), None, "non-finite", "-inf"),
            (encode(np.array([0, 1e300]), subtype="DOUBLE"), None, "non-finite", "inf"),
            (encode(np.array([[3e38, 3e38]]), subtype="FLOAT"), None, "non-finite", "e+38"),
            (np.array([np.nan], "<f4").tobytes(), "audio/pcm;rate=8000;format=f32le", "non-finite", "nan"),
        ],
    )
    def test_reason(self, data: bytes, content_type: str | None, reason: str, detail: str) -> None:
        """Each kind of damage has its word for programs and its detail for people."""
        got_reason, got_detail = rejection(data, content_type)

        assert reason == got_reason
        assert detail in got_detail

    @pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG"])
    def test_limits(self, container: str) -> None:
        """The limits are inclusive, whatever the container."""
        data = encode(tone(2.0), container=container, subtype=None)
        exact = Limits(max_bytes=len(data), max_seconds=2.0)

        assert 2.0 == audio.decode(data, None, exact).duration
        assert ("too-large", f"{len(data)} bytes, the limit is {len(data) - 1}; send shorter chunks") == rejection(
            data, None, Limits(max_bytes=len(data) - 1)
        )
        assert ("too-long", "2.0 s or more, the limit is 1.5 s") == rejection(data, None, Limits(max_seconds=1.5))

    def test_raw_too_long(self) -> None:
        """Raw samples have no header, but a length all the same."""
        assert "too-long" == rejection(bytes(16_002), "audio/L16;rate=8000", Limits(max_seconds=1.0))[0]

    def test_unknown_length_is_limited_too(self) -> None:
        """A FLAC that does not tell its length is stopped at the limit."""
        data = with_flac_frames(encode(np.zeros(8_000 * 120, np.int16), 8_000, "FLAC"), 0)

        assert len(data) < 8_000
        assert "too-long" == rejection(data, "audio/flac")[0]

    def test_channels_count(self) -> None:
        """Many channels at a high rate are a long sound: together they hold as much as one at the highest rate."""
        limits = Limits(max_seconds=1.0)
        data = encode(np.zeros((48_000, 8), np.int16), 48_000, "FLAC")
        assert 1.0 == audio.decode(data, None, limits).duration

        data = encode(np.zeros((96_000, 8), np.int16), 96_000, "FLAC")
        assert len(data) < 8_000
        reason, detail = rejection(data, None, limits)
        assert "too-long" == reason
        assert detail.startswith("96000 frames of 8 channels or more, the limit is 384000 samples")
        raw = bytes(2 * 32 * 12_001)
        assert "too-long" == rejection(raw, "audio/L16;rate=16000;channels=32", limits)[0]

    @pytest.mark.parametrize("frames", [2**31, 2**36 - 1])
    def test_a_lie_costs_no_memory(self, frames: int) -> None:
        """A tiny file that claims billions of frames allocates a block, not billions of frames."""
        flac = with_flac_frames(self.FLAC, frames)
        wav = with_riff_sizes(self.WAV, len(self.WAV) - 8, min(2 * frames, 2**32 - 2))
        audio.decode(self.WAV, None, LIMITS)
        tracemalloc.start()
        try:
            assert "too-long" == rejection(flac, "audio/flac")[0]
            with pytest.raises(BadRecord, match=f"the header claims {frames} frames, 16000 are there"):
                audio.from_container(flac)
            assert 1.0 == audio.decode(wav, "audio/wav", LIMITS).duration
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

        assert peak < 4 * 1024**2

    def test_the_detail_is_short(self) -> None:
        """A long content type is not repeated in full: the rejection has to fit into a record as well."""
        for content_type in (
            "audio/" + "x" * 10**6,
            "audio/pcm;format=" + "x" * 10**6,
            "audio/l16;rate=" + "9" * 10**6,
        ):
            assert len(rejection(self.RAW, content_type)[1]) < 500

    def test_the_detail_is_the_same_in_every_run(self) -> None:
        """No address or time is in a detail: a replay must write the same rejection."""
        details = {rejection(b"fLaC" + bytes(100), None) for _ in range(5)}

        assert 1 == len(details)
        assert "0x" not in details.pop()[1]


class TestStrangersBytes:
    """Whatever arrives, it is a finite sound within the limits, or a `BadRecord`."""

    ORIGINALS = tuple(
        encode(RNG.standard_normal((2_000, channels)) / 5, 16_000, container, subtype)
        for container, subtype, channels in [
            ("WAV", "PCM_16", 1),
            ("WAV", "PCM_24", 2),
            ("WAV", "IMA_ADPCM", 1),
            ("WAVEX", "FLOAT", 2),
            ("RF64", "PCM_16", 1),
            ("FLAC", "PCM_16", 1),
            ("OGG", "VORBIS", 1),
            ("OGG", "OPUS", 1),
        ]
    )
    CONTENT_TYPES = st.sampled_from(
        [None, "audio/wav", "audio/flac", "audio/ogg", "audio/L16;rate=16000", "audio/pcm;rate=8000;format=f32le"]
    )

    def outcome(self, data: bytes, content_type: str | None) -> bytes | str:
        try:
            sound = audio.waveform(data, content_type, 16_000, LIMITS)
        except BadRecord as error:
            return str(error)
        assert sound.samples.size > 0
        assert 1 == sound.samples.ndim
        assert bool(np.isfinite(sound.samples).all())
        assert 0 < sound.duration <= LIMITS.max_seconds
        return sound.samples.tobytes()

    @given(data=st.binary(max_size=400), content_type=st.one_of(CONTENT_TYPES, st.text(max_size=60)))
    @settings(max_examples=400, deadline=None)
    @example(data=b"OggS", content_type=None)
    @example(data=b"RF64\xff\xff\xff\xffWAVE", content_type=None)
    def test_random(self, data: bytes, content_type: str | None) -> None:
        """Random bytes under any content type."""
        self.outcome(data, content_type)

    @given(
        original=st.sampled_from(ORIGINALS),
        header=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=5),
        body=st.lists(st.tuples(st.integers(0, 8_000), st.integers(0, 255)), max_size=5),
        keep=st.one_of(st.just(1.0), st.floats(0.0, 1.0)),
    )
    @settings(max_examples=400, deadline=None)
    def test_damaged(
        self, original: bytes, header: list[tuple[int, int]], body: list[tuple[int, int]], keep: float
    ) -> None:
        """Real containers with bytes changed and cut off; the outcome is the same twice, as a replay needs it."""
        damaged = bytearray(original)
        for position, value in header + body:
            damaged[position % len(damaged)] = value
        data = bytes(damaged[: round(keep * len(damaged))])

        assert self.outcome(data, None) == self.outcome(data, None)

    @given(original=st.sampled_from(ORIGINALS), cut=st.integers(1, 1_500))
    @settings(max_examples=200, deadline=None)
    def test_cut_off(self, original: bytes, cut: int) -> None:
        """No prefix of a container passes for the whole."""
        with pytest.raises(BadRecord):
            audio.decode(original[:-cut], None, LIMITS)


def chunk(name: bytes, body: bytes, claimed: int | None = None) -> bytes:
    """A chunk of a WAV, with its padding, and perhaps a lie about its size."""
    size = len(body) if claimed is None else claimed
    return name + size.to_bytes(4, "little") + body + b"\0" * (len(body) % 2)


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + (len(body) if size is None else size).to_bytes(4, "little") + body


PCM_16 = bytes.fromhex("01000100803e0000007d000002001000")
"""A format chunk: integers, mono, 16,000 a second, 32,000 bytes a second, 2 bytes a frame, 16 bits."""


@st.composite
def formats(draw: st.DrawFn) -> bytes:
    """The body of a format chunk: mostly one that fits together, of a common or an odd encoding."""
    tag = draw(st.sampled_from([1, 1, 1, 3, 3, 2, 6, 7, 0x11]))
    bits = draw(st.sampled_from([8, 16, 24, 32, 64, 4, 12, 20]))
    channels = draw(st.sampled_from([1, 1, 2, 3, 9, 0, 33]))
    rate = draw(st.sampled_from([16_000, 44_100, 999, 384_001]))
    frame = draw(st.sampled_from([channels * bits // 8] * 6 + [0, 1, 4 * channels]))
    kind = draw(st.sampled_from(["", "", "long", "wavex", "wavex", "odd wavex"]))
    extension = b"\0\0" if kind == "long" else b""
    if "wavex" in kind:
        valid = bits if kind == "wavex" else draw(st.integers(0, 64))
        guid = tag.to_bytes(2, "little") + bytes.fromhex("000000001000800000aa00389b71")
        guid = guid if kind == "wavex" else guid[:-1] + draw(st.sampled_from([b"\x71", b"\0"]))
        extension = (22).to_bytes(2, "little") + valid.to_bytes(2, "little") + bytes(4) + guid
        tag = 0xFFFE
    fields = ((tag, 2), (channels, 2), (rate, 4), (rate * frame, 4), (frame, 2), (bits, 2))
    return b"".join(value.to_bytes(size, "little") for value, size in fields) + extension


REMARKS = st.builds(
    chunk,
    st.sampled_from([b"LIST", b"fact", b"JUNK", b"PEAK", b"cue ", b"smpl", b"bext", b"id3 ", b"xyz ", b"\0\0\0\0"]),
    st.binary(max_size=20),
)
INFO = st.lists(
    st.builds(chunk, st.sampled_from([b"ISFT", b"INAM", b"ICMT", b"IXYZ", b"abcd"]), st.binary(max_size=9)), max_size=3
).map(lambda texts: chunk(b"LIST", b"INFO" + b"".join(texts)))
FACT = st.binary(min_size=4, max_size=4).map(lambda count: chunk(b"fact", count))
PEAK = (
    st.sampled_from([16, 24])
    .flatmap(lambda size: st.binary(min_size=size, max_size=size))
    .map(lambda peaks: chunk(b"PEAK", peaks))
)
ANY_REMARKS = st.lists(st.one_of(REMARKS, INFO, FACT, PEAK), max_size=2)
SAMPLES = st.one_of(
    st.binary(max_size=200),
    st.lists(st.floats(width=32), max_size=20).map(lambda values: np.array(values, "<f4").tobytes()),
    st.lists(st.floats(), max_size=20).map(lambda values: np.array(values, "<f8").tobytes()),
)


@st.composite
def wavs(draw: st.DrawFn) -> bytes:
    """A WAV: ordinary, as encoders write into pipes, with remarks here and there, cut off, or nonsense."""
    samples = draw(SAMPLES)
    claimed = draw(st.sampled_from([None] * 6 + [0, 0xFFFF_FFFF, 0x7FFF_F024, len(samples) + 3, len(samples) // 2]))
    parts = [
        *draw(ANY_REMARKS),
        chunk(b"fmt ", draw(formats())),
        *draw(ANY_REMARKS),
        chunk(b"data", samples, claimed),
        *draw(ANY_REMARKS),
        *draw(st.sampled_from([[]] * 6 + [[b"\0"], [b"LIST"], [chunk(b"data", b"1234")], [chunk(b"fmt ", bytes(16))]])),
    ]
    if draw(st.integers(0, 9)) == 0:
        parts = draw(st.permutations(parts))
    data = riff(*parts, size=draw(st.sampled_from([None] * 5 + [0xFFFF_FFFF, 0, 0x7FFF_F024])))
    return data[: len(data) - draw(st.sampled_from([0] * 8 + [1, 2, 7]))]


class TestPlainWav:
    """An ordinary WAV is read without libsndfile, and nobody can tell."""

    def outcome(self, data: bytes, *, plain: bool) -> tuple[object, ...]:
        with pytest.MonkeyPatch.context() as patch:
            if not plain:
                patch.setattr(audio, "plain_wav", lambda _: None)
            try:
                sound = audio.decode(data, "audio/wav", LIMITS)
            except BadRecord as error:
                return error.reason, error.detail
            return sound.samples.dtype, sound.samples.shape, sound.samples.tobytes(), sound.sample_rate, sound.duration

    @given(data=wavs())
    @settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @example(data=riff(chunk(b"fmt ", PCM_16), chunk(b"data", b"OggS")))
    @example(data=riff(chunk(b"fmt ", PCM_16), chunk(b"data", b"wvpk and more")))
    @example(data=riff(chunk(b"fmt ", PCM_16), chunk(b"data", b"1234", 0), size=0))
    @example(data=riff(chunk(b"fmt ", PCM_16), chunk(b"data", b"12345", 0xFFFF_FFFF), size=0xFFFF_FFFF))
    def test_any(self, data: bytes) -> None:
        """Samples, rate, duration, or reason and detail are libsndfile's, to the last bit."""
        assert self.outcome(data, plain=False) == self.outcome(data, plain=True)

    @given(
        original=st.sampled_from(TestStrangersBytes.ORIGINALS[:5]),
        damage=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=4),
        cut=st.sampled_from([0, 0, 0, 1, 500]),
    )
    @settings(max_examples=500, deadline=None)
    def test_damaged(self, original: bytes, damage: list[tuple[int, int]], cut: int) -> None:
        """The same for real files with bytes of their headers changed."""
        data = bytearray(original)
        for position, value in damage:
            data[position] = value
        data = data[: len(data) - cut]

        assert self.outcome(bytes(data), plain=False) == self.outcome(bytes(data), plain=True)

    @pytest.mark.parametrize(("container", "subtype", "bits"), [each for each in EXACT if each[0].startswith("WAV")])
    @pytest.mark.parametrize("channels", [1, 2, 9])
    def test_ordinary_files_are_plain(self, container: str, subtype: str, bits: int, channels: int) -> None:
        """What libsndfile writes is found, so that the tests above compare two different things."""
        del bits
        data = encode(RNG.uniform(-1, 1, (4_001, channels)), 16_000, container, subtype)

        assert plain_wav(data) is not None
        assert self.outcome(data, plain=False) == self.outcome(data, plain=True)

    def test_real_clips(self, esc10: Path) -> None:
        """Real recordings, as WAV files of every depth, are libsndfile's to the last bit."""
        for clip in sorted((esc10 / "audio").iterdir())[::80]:
            samples, rate = soundfile.read(clip)
            for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"):
                data = encode(samples, rate, "WAV", subtype)
                assert plain_wav(data) is not None
                assert self.outcome(data, plain=False) == self.outcome(data, plain=True)

    @pytest.mark.parametrize("subtype", ["ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "GSM610"])
    def test_the_rest_is_for_libsndfile(self, subtype: str) -> None:
        """Compressed WAVs are none of this, and decode all the same."""
        data = encode(tone(), 16_000, "WAV", subtype)

        assert plain_wav(data) is None
        assert audio.decode(data, None, LIMITS).samples.size >= 16_000


class TestResample:
    @pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 384_000])
    def test_tone(self, rate: int) -> None:
        """A tone stays the same tone at another rate, and the length follows the rate."""
        resampled = audio.resample(tone(1.0, rate), rate, 16_000)

        assert np.float32 == resampled.dtype
        assert 16_000 == resampled.size
        inner = slice(800, -800)
        np.testing.assert_allclose(resampled[inner], tone()[inner], atol=1e-4)

    def test_no_aliases(self) -> None:
        """What lies above the new Nyquist rate is gone, not folded down."""
        resampled = audio.resample(tone(1.0, 48_000, frequency=11_000), 48_000, 16_000)

        assert np.abs(resampled[800:-800]).max() < 1e-4

    def test_identity(self) -> None:
        """The same rate is the same array."""
        samples = tone()

        assert samples is audio.resample(samples, 16_000, 16_000)

    @pytest.mark.parametrize("size", [1, 2, 3, 10])
    @pytest.mark.parametrize(("from_rate", "to_rate"), [(48_000, 16_000), (384_000, 8_000), (1_000, 48_000)])
    def test_very_short(self, size: int, from_rate: int, to_rate: int) -> None:
        """A few samples, or one, are still a sound at the other rate."""
        resampled = audio.resample(np.full(size, 0.25, np.float32), from_rate, to_rate)

        assert max(1, round(size * to_rate / from_rate)) == resampled.size
        assert bool(np.isfinite(resampled).all())

    def test_waveform(self) -> None:
        """A waveform has the model's rate and the duration of what was sent."""
        data = encode(tone(0.1001, 44_100), 44_100)

        sound: Sound = audio.waveform(data, "audio/wav", 16_000, LIMITS)

        assert 16_000 == sound.sample_rate
        assert 4_414 / 44_100 == sound.duration
        assert 1_601 == sound.samples.size


class TestToMono:
    def test_average(self) -> None:
        """Channels weigh the same, and opposite phases cancel."""
        samples = np.array([[1.0, -1.0], [0.5, 0.25]], np.float32)

        np.testing.assert_array_equal(np.array([0.0, 0.375], np.float32), audio.to_mono(samples))

    def test_large_values_do_not_overflow(self) -> None:
        """The mean of numbers that float32 can hold is one that it can hold."""
        samples = np.full((1, 4), 3e38, np.float32)

        np.testing.assert_array_equal(np.array([3e38], np.float32), audio.to_mono(samples))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("subtype", "bits"), [("FLOAT", 0x7F800001), ("DOUBLE", 0x7FF0000000000001)])
@pytest.mark.filterwarnings("error")
def test_a_signalling_nan_is_rejected_without_a_warning(subtype: str, bits: int, channels: int) -> None:
    """The processor reports one when it is cast; the rejection says all there is to say."""
    dtype = np.dtype("<f4" if subtype == "FLOAT" else "<f8")
    data = encode(np.full((8, channels), 0.5), subtype=subtype)
    hostile = data.replace(np.array(0.5, dtype).tobytes(), bits.to_bytes(dtype.itemsize, "little"))

    assert "non-finite" == rejection(hostile, "audio/wav")[0]


def test_a_sound_shorter_than_the_limit_is_rejected_and_one_as_long_is_not() -> None:
    """What would be mostly the silence that fills up a window is not predicted."""
    limits = audio.Limits(min_seconds=0.5)
    half, less = (np.zeros(count, "<i2").tobytes() for count in (8000, 7999))
    assert 0.5 == audio.waveform(half, "audio/pcm;rate=16000;format=s16le", 16000, limits).duration
    with pytest.raises(BadRecord, match=r"^too-short: 0\.499937 s of sound, expected 0\.5 or more") as rejected:
        audio.waveform(less, "audio/pcm;rate=16000;format=s16le", 16000, limits)
    assert "too-short" == rejected.value.reason
