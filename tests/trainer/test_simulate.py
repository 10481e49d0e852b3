"""The simulated machines: their files are reproducible, and the faults are where the formulas put them."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from scipy import signal

from trainer.simulate import FAULTS, LABELS, MACHINES, Bearing, Machine, Shaft, _impacts, simulate, synthesize
from worker.errors import Fatal

RATE = 16_000
CLIPS = 40  # every machine with every fault, and four more

Spectrum = NDArray[np.float64]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("simulated") / "out", seed=3, clips=CLIPS, seconds=0.5)


def rows_of(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def clip(label: str, machine: Machine, seed: int) -> tuple[NDArray[np.float64], float]:
    """Return a clip of 4 s and its shaft's frequency in Hz; the machine's own sound depends on the seed alone."""
    waveform, rpm = synthesize(label, machine, 4.0, RATE, np.random.default_rng(seed))
    return waveform, rpm / 60


def power_spectrum(waveform: NDArray[np.float64]) -> Spectrum:
    """Return the power spectrum in bins of 0.25 Hz."""
    return np.asarray(np.abs(np.fft.rfft(waveform * signal.windows.hann(waveform.size))) ** 2)


def envelope_spectrum(waveform: NDArray[np.float64], band: tuple[float, float]) -> Spectrum:
    """Return the power spectrum of the squared envelope in a band, as bearings are diagnosed."""
    sos = signal.butter(4, band, "bandpass", fs=RATE, output="sos")
    envelope = np.abs(signal.hilbert(signal.sosfiltfilt(sos, waveform))) ** 2
    return power_spectrum(envelope - envelope.mean())


def line(spectrum: Spectrum, hertz: float) -> float:
    """Return the power of a line, within the 1 % by which a shaft's speed wanders."""
    return float(spectrum[int(hertz * 0.99 * 4) : int(hertz * 1.01 * 4) + 2].max())


def prominence(spectrum: Spectrum, hertz: float) -> float:
    """Return how far a line stands above what surrounds it, in dB."""
    around = np.median(spectrum[int(hertz * 0.8 * 4) : int(hertz * 1.2 * 4)])
    return float(10 * np.log10(line(spectrum, hertz) / around))


class TestFiles:
    def test_same_seed_gives_the_same_bytes(self, tmp_path: Path, simulated: Path) -> None:
        """Two runs with the same arguments write the same files, byte for byte."""
        again = simulate(tmp_path / "again", seed=3, clips=CLIPS, seconds=0.5)
        assert bytes_of(simulated.parent) == bytes_of(again.parent)

    def test_a_clip_does_not_depend_on_the_others(self, tmp_path: Path, simulated: Path) -> None:
        """The first clips of a smaller set are the first clips of the larger one."""
        smaller = bytes_of(simulate(tmp_path / "fewer", seed=3, clips=CLIPS - 4, seconds=0.5).parent / "audio")
        larger = bytes_of(simulated.parent / "audio")
        assert {name: larger[name] for name in smaller} == smaller

    def test_another_seed_gives_other_sounds(self, tmp_path: Path, simulated: Path) -> None:
        """No clip is the same under another seed."""
        other = bytes_of(simulate(tmp_path / "other", seed=4, clips=36, seconds=0.5).parent / "audio")
        here = bytes_of(simulated.parent / "audio")
        assert [] == [name for name, data in other.items() if here[name] == data]

    def test_the_manifest_names_every_file(self, simulated: Path) -> None:
        """The manifest and the folder list the same clips, under names that tell what they are."""
        rows = rows_of(simulated)
        assert ["filename", "label", "group", "rpm"] == list(rows[0])
        assert {row["filename"] for row in rows} == {f"audio/{name}" for name in bytes_of(simulated.parent / "audio")}
        assert "audio/machine-1_healthy_000.wav" == rows[0]["filename"]
        assert "audio/machine-2_inner-race_010.wav" == rows[10]["filename"]
        assert ("inner_race", "machine-2") == (rows[10]["label"], rows[10]["group"])

    def test_every_machine_has_every_fault(self, simulated: Path) -> None:
        """Classes are balanced, and no fault is the mark of one machine."""
        rows = rows_of(simulated)
        counts = Counter(row["label"] for row in rows)
        assert set(LABELS) == set(counts)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert len(LABELS) * len(MACHINES) == len({(row["label"], row["group"]) for row in rows})

    def test_clips_are_plausible_recordings(self, simulated: Path) -> None:
        """Each clip is mono PCM16 of the asked length, neither clipped nor silent, with a speed in range."""
        for row in rows_of(simulated):
            path = simulated.parent / row["filename"]
            info = soundfile.info(path)
            assert ("WAV", "PCM_16", 1, RATE, RATE // 2) == (
                info.format,
                info.subtype,
                info.channels,
                info.samplerate,
                info.frames,
            )
            waveform, _ = soundfile.read(path)
            assert np.abs(waveform).max() <= 0.9001, path.name
            assert 0.001 < np.sqrt(np.mean(waveform**2)) < 0.5, path.name
            assert 1180 < float(row["rpm"]) < 3640, path.name

    def test_progress_is_told(self, tmp_path: Path) -> None:
        """The callback hears of every clip, in order."""
        told: list[tuple[int, int]] = []
        simulate(tmp_path, clips=36, seconds=0.5, on_progress=lambda done, total: told.append((done, total)))
        assert [(done, 36) for done in range(1, 37)] == told


class TestRefusal:
    def test_an_earlier_run_is_replaced(self, tmp_path: Path) -> None:
        """A second run leaves nothing of the first, also where the first had more clips."""
        simulate(tmp_path, seed=1, clips=38, seconds=0.5)
        simulate(tmp_path, seed=2, clips=36, seconds=0.5)
        fresh = simulate(tmp_path / "elsewhere", seed=2, clips=36, seconds=0.5).parent
        expected = bytes_of(fresh)
        assert expected == {name: data for name, data in bytes_of(tmp_path).items() if not name.startswith("elsewhere")}

    @pytest.mark.parametrize("name", ["notes.txt", "audio/song.wav", "audio/machine-1_healthy_000.flac"])
    def test_foreign_files_are_never_overwritten(self, tmp_path: Path, name: str) -> None:
        """A folder that holds anything else is refused by name, and left as it is."""
        (tmp_path / "audio").mkdir()
        (tmp_path / name).write_text("mine")
        with pytest.raises(Fatal, match=rf"{Path(name).name}.*new or an empty folder"):
            simulate(tmp_path, clips=36)
        assert {name: b"mine"} == bytes_of(tmp_path)

    def test_a_foreign_manifest_is_never_overwritten(self, tmp_path: Path) -> None:
        """A manifest with other columns belongs to somebody."""
        (tmp_path / "manifest.csv").write_text("filename,label\nmine.wav,dog\n")
        with pytest.raises(Fatal, match=r"manifest\.csv"):
            simulate(tmp_path, clips=36)
        assert {"manifest.csv": b"filename,label\nmine.wav,dog\n"} == bytes_of(tmp_path)

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        """A path that is a file is an error for the person who named it, not a traceback."""
        (tmp_path / "out").write_text("mine")
        with pytest.raises(Fatal, match="name another folder"):
            simulate(tmp_path / "out", clips=36)

    def test_numbers_out_of_range_are_refused(self, tmp_path: Path) -> None:
        """Each number has a least value, and the message says which and why; nothing is written."""
        with pytest.raises(Fatal, match="clips is 35; expected at least 36, because every machine"):
            simulate(tmp_path / "out", clips=35)
        with pytest.raises(Fatal, match="seed is -1; expected at least 0"):
            simulate(tmp_path / "out", seed=-1)
        with pytest.raises(Fatal, match=r"seconds is 0\.1; expected at least 0\.5"):
            simulate(tmp_path / "out", seconds=0.1)
        with pytest.raises(Fatal, match="sample_rate is 8000; expected at least 16000"):
            simulate(tmp_path / "out", sample_rate=8000)
        assert not (tmp_path / "out").exists()


class TestFaults:
    def test_bearing_orders_are_the_published_ones(self) -> None:
        """BPFO and BPFI agree with what the test rigs' authors give for their bearings."""
        deep_groove = Bearing(9, 7.94, 39.04)  # 6205, Case Western Reserve University
        assert pytest.approx([3.585, 5.415], abs=0.001) == [deep_groove.bpfo, deep_groove.bpfi]
        roller = Bearing(16, 8.41, 71.50, 15.17)  # ZA-2115, University of Cincinnati, in Hz at 2000 rpm
        assert pytest.approx([236.4, 296.9], abs=0.1) == [roller.bpfo * 2000 / 60, roller.bpfi * 2000 / 60]

    @pytest.mark.parametrize(
        ("label", "present", "absent"), [("imbalance", (1,), (2, 3)), ("misalignment", (2, 3), (1,))]
    )
    def test_shaft_faults_raise_their_orders(
        self, label: str, present: tuple[int, ...], absent: tuple[int, ...]
    ) -> None:
        """An imbalance raises the first order of the same machine, a misalignment the second and third."""
        gains = []
        for seed, machine in enumerate(MACHINES):
            faulty, shaft = clip(label, machine, seed)
            healthy, same = clip("healthy", machine, seed)
            assert same == shaft
            with_fault, without = power_spectrum(faulty), power_spectrum(healthy)
            gains.append(
                [10 * np.log10(line(with_fault, k * shaft) / line(without, k * shaft)) for k in (*present, *absent)]
            )
        typical = np.median(gains, axis=0)
        assert typical[: len(present)].min() > 12
        assert np.abs(typical[len(present) :]).max() < 3

    @pytest.mark.parametrize("label", ["outer_race", "inner_race"])
    def test_race_faults_strike_at_the_formulas_rate(self, label: str) -> None:
        """The envelope in the housing's band has a line at BPFO or BPFI, and without the fault it has none."""
        faulty_lines: list[float] = []
        healthy_lines: list[float] = []
        for seed, machine in enumerate(MACHINES):
            order = machine.bearing.bpfo if label == "outer_race" else machine.bearing.bpfi
            band = (machine.housing[0] - 600, machine.housing[0] + 600)
            for sound, lines in ((label, faulty_lines), ("healthy", healthy_lines)):
                waveform, shaft = clip(sound, machine, seed)
                lines.append(prominence(envelope_spectrum(waveform, band), order * shaft))
        assert np.median(faulty_lines) > 15
        assert np.median(faulty_lines) > np.median(healthy_lines) + 6

    def test_only_the_inner_race_beats_at_the_shafts_rate(self) -> None:
        """A defect that turns through the load zone is modulated once a turn; one that stays is not."""
        beats = {}
        for label in ("outer_race", "inner_race"):
            lines = []
            for seed, machine in enumerate(MACHINES):
                waveform, shaft = clip(label, machine, seed)
                band = (machine.housing[0] - 600, machine.housing[0] + 600)
                lines.append(prominence(envelope_spectrum(waveform, band), shaft))
            beats[label] = np.median(lines)
        assert beats["inner_race"] > beats["outer_race"] + 6

    def test_cavitation_hisses_at_the_blades_rate(self) -> None:
        """The envelope of the treble has a line at the number of blades times the shaft's frequency."""
        lines = []
        for seed, machine in enumerate(MACHINES):
            waveform, shaft = clip("cavitation", machine, seed)
            lines.append(prominence(envelope_spectrum(waveform, (4000, 7800)), machine.blades * shaft))
        assert np.median(lines) > 12

    def test_rolling_elements_slip(self) -> None:
        """The intervals between impacts scatter by 1 to 2 % around those of the formula, and their errors add up."""
        shaft = Shaft(np.arange(60 * RATE) / RATE * 30, 1800.0, RATE)
        intervals = np.diff(_impacts(shaft, 3.585, np.random.default_rng(5)))
        assert pytest.approx(1 / 3.585, rel=0.001) == intervals.mean()
        assert 0.0095 < intervals.std() * 3.585 < 0.0205

    def test_severity_varies(self) -> None:
        """Of each fault there are faint and plain cases."""
        for name, fault in FAULTS.items():
            low, high = fault.level
            assert high - low >= 12, name
