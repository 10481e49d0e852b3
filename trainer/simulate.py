"""Labelled sounds of machines with faults: something honest to hear with no download.

This module owns six imaginary machines, the signal models of their faults, and the folder of
clips that it makes of them. It must not know about features or models.

A clip is built along the way that the sound takes: a shaft, its blades and the flow excite a
casing, a fault may join them, a room answers, and a microphone listens that has a gain error and
noise of its own. The models come from the literature. Levels are ours, and random: some faults
are plain and some nearly inaudible, so that the task is neither trivial nor hopeless. How well a
model does on these clips says nothing about how well it would do on a real machine.

References (MSSP is Mechanical Systems and Signal Processing, JSV the Journal of Sound and Vibration):
    Čudina (2003), Detection of cavitation phenomenon in a centrifugal pump using audible sound, MSSP 17(6).
    Madison (1949), Fan Engineering, 5th edition, Buffalo Forge.
    McFadden, Smith (1984), Model for the vibration produced by a single point defect in a bearing, JSV 96(1).
    Randall, Antoni (2011), Rolling element bearing diagnostics: a tutorial, MSSP 25(2).
    Xu, Marangoni (1994), Vibration analysis of a motor-flexible coupling-rotor system, JSV 176(5).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from math import cos, radians
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import msgspec
import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy import signal

from worker.errors import Fatal

MANIFEST: Final = "manifest.csv"
COLUMNS: Final = ("filename", "label", "group", "rpm")
CLIP_NAME: Final = re.compile(r"machine-\d_[a-z-]+_\d{3,}\.wav")

RPM_RANGE: Final = (1200.0, 3600.0)
LOWEST_SAMPLE_RATE: Final = 16_000  # the housings ring at up to 5.6 kHz
SHORTEST_SECONDS: Final = 0.5  # ten turns of the slowest shaft

FULL_SCALE: Final = 0.04  # RMS of a healthy machine at full speed and load: 28 dB of headroom
SELF_NOISE: Final = 1e-4  # RMS of the microphone: -80 dB of full scale, a cheap MEMS capsule at arm's length
GAIN_TOLERANCE: Final = 1.0  # dB, standard deviation between microphones of one type
HIGHEST_PEAK: Final = 0.9  # whoever records turns the gain down before it clips

# A strike loses treble on its way, and more of it out of the inner race, through the elements'
# soft contacts. That the loss is a low-pass with its corner here, in Hz, is an assumption of ours.
OUTER_PATH: Final = (4500.0, 7500.0)
INNER_PATH: Final = (1500.0, 3500.0)

Signal = NDArray[np.float64]


class Bearing(msgspec.Struct, frozen=True):
    """A rolling-element bearing whose inner race turns with the shaft; lengths in mm, the angle in degrees."""

    elements: int
    element_diameter: float
    pitch_diameter: float
    contact_angle: float = 0.0

    @property
    def bpfo(self) -> float:
        """Passes over a point of the outer race per turn: n/2 (1 - d/D cos φ) (Randall and Antoni 2011)."""
        return self.elements / 2 * (1 - self._ratio)

    @property
    def bpfi(self) -> float:
        """Passes over a point of the inner race per turn: n/2 (1 + d/D cos φ) (Randall and Antoni 2011)."""
        return self.elements / 2 * (1 + self._ratio)

    @property
    def _ratio(self) -> float:
        return self.element_diameter / self.pitch_diameter * cos(radians(self.contact_angle))


class Machine(msgspec.Struct, frozen=True):
    """What makes one machine sound unlike another; frequencies in Hz.

    ``casing`` modes colour everything the machine does; ``housing`` modes ring when a rolling
    element strikes a defect.
    """

    bearing: Bearing
    blades: int
    mains: float
    casing: tuple[float, ...]
    housing: tuple[float, ...]


MACHINES: Final = (
    Machine(Bearing(9, 7.94, 39.04), 7, 50.0, (310.0, 870.0, 1450.0), (2900.0, 4700.0)),
    Machine(Bearing(8, 6.75, 28.50), 5, 60.0, (420.0, 760.0, 1720.0), (2500.0, 4200.0)),
    Machine(Bearing(8, 7.92, 34.55), 6, 50.0, (260.0, 940.0, 1310.0), (3300.0, 5100.0)),
    Machine(Bearing(16, 8.41, 71.50, 15.17), 9, 60.0, (350.0, 690.0, 1580.0), (2300.0, 3900.0)),
    Machine(Bearing(13, 3.50, 25.60), 8, 50.0, (480.0, 1020.0, 1660.0), (3600.0, 5600.0)),
    Machine(Bearing(8, 5.97, 31.62), 5, 60.0, (290.0, 810.0, 1390.0), (2700.0, 4500.0)),
)
"""The bearings are those of public test rigs: 6205, 6203, UER204, ZA-2115, PRONOSTIA's and MFPT's."""


class Shaft(NamedTuple):
    """A turning shaft: its angle at each sample, in turns, and its mean speed."""

    turns: Signal
    rpm: float
    sample_rate: int


class Fault(NamedTuple):
    """A signal model and the range of its level against the healthy sound, in dB (RMS to RMS)."""

    model: Callable[[Shaft, Machine, np.random.Generator], Signal]
    level: tuple[float, float]


def imbalance(shaft: Shaft, machine: Machine, rng: np.random.Generator) -> Signal:
    """Return the shaft's first order: a mass m off the axis by e pulls with m e ω² once a turn."""
    del machine  # it is the same in all of them
    return _tones(shaft.turns, {1: 1.0}, rng)


def misalignment(shaft: Shaft, machine: Machine, rng: np.random.Generator) -> Signal:
    """Return the second and third order, where a bent coupling pulls, and overtones (Xu and Marangoni 1994)."""
    del machine  # it is the same in all of them
    return _tones(shaft.turns, {2: 1.0, 3: rng.uniform(0.4, 1.0), 4: 0.5, 6: 0.3}, rng)


def outer_race(shaft: Shaft, machine: Machine, rng: np.random.Generator) -> Signal:
    """Return the ringing after each impact on a defect that stays in the load zone (Randall and Antoni 2011)."""
    impacts = _impacts(shaft, machine.bearing.bpfo, rng)
    return _ringing(shaft, machine, impacts, np.ones(impacts.size), OUTER_PATH, rng)


def inner_race(shaft: Shaft, machine: Machine, rng: np.random.Generator) -> Signal:
    """Return the ringing after each impact on a defect that turns through the load zone.

    An impact is as strong as the load where it happens, by Stribeck's distribution
    q(θ) = (1 - (1 - cos θ) / 2ε)^1.5 within the load zone and 0 outside, here with ε = 0.5
    (McFadden and Smith 1984).
    """
    impacts = _impacts(shaft, machine.bearing.bpfi, rng)
    load = ((1 + np.cos(2 * np.pi * (impacts + rng.uniform()))) / 2) ** 1.5
    return _ringing(shaft, machine, impacts, load, INNER_PATH, rng)


def cavitation(shaft: Shaft, machine: Machine, rng: np.random.Generator) -> Signal:
    """Return noise above some kHz in bursts, one a blade, as bubbles collapse behind it (Čudina 2003)."""
    highpass = signal.butter(2, rng.uniform(2500, 4000), "highpass", fs=shaft.sample_rate, output="sos")
    hiss = signal.sosfilt(highpass, rng.standard_normal(shaft.turns.size))
    depth = rng.uniform(0.5, 0.9)
    blade = 1 + depth * np.cos(2 * np.pi * (machine.blades * shaft.turns + rng.uniform()))
    return np.asarray(hiss * blade**2)


FAULTS: Final[Mapping[str, Fault]] = MappingProxyType(
    {
        "imbalance": Fault(imbalance, (2.0, 14.0)),
        "misalignment": Fault(misalignment, (2.0, 14.0)),
        "outer_race": Fault(outer_race, (-8.0, 6.0)),
        "inner_race": Fault(inner_race, (-8.0, 6.0)),
        "cavitation": Fault(cavitation, (-30.0, -12.0)),
    }
)

LABELS: Final = ("healthy", *FAULTS)
SMALLEST_SET: Final = len(LABELS) * len(MACHINES)


def simulate(
    out: Path,
    *,
    seed: int = 0,
    clips: int = 240,
    seconds: float = 4.0,
    sample_rate: int = 16_000,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``clips`` sounds of faulty and healthy machines to ``out`` and return the path of their manifest.

    The clips are WAV (PCM16, mono) in ``out/audio``; ``out/manifest.csv`` gives each a ``label``
    (one of `LABELS`), a ``group`` (its machine) and its mean speed ``rpm``. The same arguments
    write the same bytes, and a clip depends only on the seed and on its own number. What an
    earlier run has written to ``out`` is replaced. ``on_progress`` is told (done, all).

    Raises:
        Fatal: ``out`` holds anything else, or a number is out of range.
    """
    for name, value, least, why in (
        ("seed", seed, 0, "a seed is not negative"),
        ("clips", clips, SMALLEST_SET, "every machine has every fault"),
        ("seconds", seconds, SHORTEST_SECONDS, "it takes some turns of the shaft to hear anything"),
        ("sample_rate", sample_rate, LOWEST_SAMPLE_RATE, "bearings ring that high"),
    ):
        if value < least:
            raise Fatal(f"{name} is {value}; expected at least {least}, because {why}")
    audio = _empty_audio_folder(out)
    with (out / MANIFEST).open("w", newline="", encoding="utf-8") as file:
        manifest = csv.writer(file, lineterminator="\n")
        manifest.writerow(COLUMNS)
        for index in range(clips):
            label = LABELS[index % len(LABELS)]
            number = index // len(LABELS) % len(MACHINES)
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
            waveform, rpm = synthesize(label, MACHINES[number], seconds, sample_rate, rng)
            name = f"machine-{number + 1}_{label.replace('_', '-')}_{index:03d}.wav"
            soundfile.write(audio / name, np.rint(waveform * 32767).astype(np.int16), sample_rate, subtype="PCM_16")
            manifest.writerow((f"audio/{name}", label, f"machine-{number + 1}", f"{rpm:.1f}"))
            if on_progress is not None:
                on_progress(index + 1, clips)
    return out / MANIFEST


def synthesize(
    label: str, machine: Machine, seconds: float, sample_rate: int, rng: np.random.Generator
) -> tuple[Signal, float]:
    """Return one clip, shape (seconds * sample_rate,), within ±0.9, and the mean speed in rpm that is heard in it."""
    room = _room(sample_rate, rng)
    samples = round(seconds * sample_rate)
    shaft = _shaft(samples + room.size - 1, sample_rate, rng)
    sound = _healthy(shaft, machine, rng)
    if label != "healthy":
        fault = FAULTS[label].model(shaft, machine, rng)
        level = 10 ** (rng.uniform(*FAULTS[label].level) / 20)
        sound += fault * (level * sound.std() / fault.std())
    heard = signal.fftconvolve(sound + _hum(shaft, machine, rng), room, mode="valid")
    heard *= FULL_SCALE * 10 ** (rng.normal(0, GAIN_TOLERANCE) / 20)
    heard += rng.normal(0, SELF_NOISE, samples)
    rpm = 60 * sample_rate * (shaft.turns[-1] - shaft.turns[-samples]) / (samples - 1)
    return heard * min(1.0, HIGHEST_PEAK / np.abs(heard).max()), float(rpm)


def _shaft(samples: int, sample_rate: int, rng: np.random.Generator) -> Shaft:
    """Return a shaft whose speed wanders by some tenths of a percent over seconds."""
    time = np.arange(samples) / sample_rate
    wander = sum(np.sin(2 * np.pi * (f * time + rng.uniform())) for f in rng.uniform(0.1, 0.8, 3))
    rpm = rng.uniform(*RPM_RANGE)
    speed = rpm * (1 + rng.uniform(0.001, 0.003) * wander)
    return Shaft(np.cumsum(speed / 60) / sample_rate, rpm, sample_rate)


def _healthy(shaft: Shaft, machine: Machine, rng: np.random.Generator) -> Signal:
    """Return a machine without a fault; its RMS is about 1 at full speed and load.

    Its level follows the fan law: 50 lg of the speed (Madison 1949). The flow noise has a corner
    that moves with the speed, since its eddies scale with the blades and pass at their speed.
    """
    load = rng.uniform(0.5, 1.0)
    speed = shaft.rpm / RPM_RANGE[1]
    residue = _tones(shaft.turns, dict(zip((1, 2, 3, 4), rng.lognormal(-2.0, 0.4, 4), strict=True)), rng)
    blades = _tones(shaft.turns, {machine.blades * k: rng.uniform(0.2, 0.5) / k**2 for k in (1, 2, 3)}, rng)
    corner = signal.butter(1, 1800 * speed * rng.uniform(0.8, 1.25), fs=shaft.sample_rate, output="sos")
    flow = signal.sosfilt(corner, rng.standard_normal(shaft.turns.size))
    excitation = residue + load * blades + (0.5 + 0.5 * load) * flow
    casing = 0.1 * _modes(machine.casing, 0.03, shaft.sample_rate, rng)
    casing[0] += 1.0
    return np.asarray(speed**2.5 * signal.fftconvolve(excitation, casing)[: excitation.size])


def _hum(shaft: Shaft, machine: Machine, rng: np.random.Generator) -> Signal:
    """Return the motor's hum at twice the mains frequency and its harmonics, whatever the speed."""
    cycles = 2 * machine.mains * np.arange(shaft.turns.size) / shaft.sample_rate
    return _tones(cycles, {1: 1.0, 2: 0.5, 3: 0.33}, rng) * 10 ** (rng.uniform(-40, -26) / 20)


def _room(sample_rate: int, rng: np.random.Generator) -> Signal:
    """Return the way to the microphone: the direct sound, then noise that decays by 60 dB in the reverberation time."""
    reverberation_time = rng.uniform(0.1, 0.4)
    time = np.arange(int(0.4 * sample_rate)) / sample_rate
    tail = rng.standard_normal(time.size) * 10 ** (-3 * time / reverberation_time)
    room = tail * (10 ** (rng.uniform(-15, -5) / 20) / np.linalg.norm(tail))
    room[0] = 1.0
    return np.asarray(room)


def _tones(cycles: Signal, amplitudes: Mapping[int, float], rng: np.random.Generator) -> Signal:
    """Return the sum of the given multiples of something that turns, each in a random phase."""
    return np.asarray(sum(a * np.sin(2 * np.pi * (k * cycles + rng.uniform())) for k, a in amplitudes.items()))


def _impacts(shaft: Shaft, order: float, rng: np.random.Generator) -> Signal:
    """Return the shaft's angle, in turns, at each of about ``order`` impacts a turn.

    The elements slip at random, so each interval is off by 1 to 2 % and the errors add up
    (Randall and Antoni 2011: pseudo-cyclostationary, not periodic).
    """
    first, last = shaft.turns[[0, -1]]
    count = int((last - first) * order)
    intervals = (1 + rng.uniform(0.01, 0.02) * rng.standard_normal(count)) / order
    impacts = first + np.cumsum(intervals)
    return np.asarray(impacts[impacts < last])


def _ringing(
    shaft: Shaft,
    machine: Machine,
    impacts: Signal,
    load: Signal,
    path: tuple[float, float],
    rng: np.random.Generator,
) -> Signal:
    """Return the decaying resonances of the housing after impacts at these angles, each about as strong as its load."""
    strength = load * rng.lognormal(0.0, 0.15, load.size)
    place = np.interp(impacts, shaft.turns, np.arange(shaft.turns.size))
    before = place.astype(np.intp)
    after = place - before
    train = np.bincount(before, strength * (1 - after), shaft.turns.size)
    train += np.bincount(np.minimum(before + 1, train.size - 1), strength * after, train.size)
    lowpass = signal.butter(1, rng.uniform(*path), fs=shaft.sample_rate, output="sos")
    modes = _modes(machine.housing, 0.04, shaft.sample_rate, rng)
    return np.asarray(signal.sosfilt(lowpass, signal.fftconvolve(train, modes)[: train.size]))


def _modes(frequencies: tuple[float, ...], damping: float, sample_rate: int, rng: np.random.Generator) -> Signal:
    """Return the impulse response of some modes: sines that decay with ``damping`` as a share of the critical one.

    How strong each of them is heard depends on where it is struck and where the microphone stands.
    """
    time = np.arange(int(0.1 * sample_rate)) / sample_rate
    omega = 2 * np.pi * np.array(frequencies)
    tones = np.exp(-damping * np.outer(time, omega)) * np.sin(np.outer(time, omega))
    return np.asarray(tones @ rng.lognormal(0.0, 0.25, omega.size))


def _empty_audio_folder(out: Path) -> Path:
    """Return ``out/audio``, made, and emptied of the clips of an earlier run; nothing else is ever deleted."""
    audio = out / "audio"
    found = [path for folder in (out, audio) if folder.is_dir() for path in folder.iterdir() if path != audio]
    for path in found:
        if not _is_ours(path):
            raise Fatal(f"{out} holds {path.name}, which no simulation has written; name a new or an empty folder")
    try:
        for path in found:
            path.unlink()
        audio.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Fatal(f"cannot write to {out}: {error}; name another folder") from error
    return audio


def _is_ours(path: Path) -> bool:
    if path.name != MANIFEST:
        return path.parent.name == "audio" and CLIP_NAME.fullmatch(path.name) is not None
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().strip() == ",".join(COLUMNS)
