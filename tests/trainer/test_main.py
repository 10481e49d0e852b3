"""The trainer's command line: what it prints, what it refuses, and how it says so."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import joblib
import msgspec
import numpy as np
import pytest
import soundfile

from tests.system.processes import BIN
from trainer.__main__ import COMMANDS, main
from trainer.arguments import parser
from trainer.documents import Kept
from trainer.results import Evaluation
from worker import bundle

QUICK = ("--trees", "5", "--window-seconds", "0.25", "--window-hop-seconds", "0.25", "--no-report")


def write_tone(path: Path, frequency: float, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(4000) / 16_000
    noise = np.random.default_rng(seed).normal(scale=0.02, size=time.size)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * frequency * time) + noise, 16_000)


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    """Two classes of ten clips each, in a folder for each class."""
    for number in range(20):
        label, frequency = (("low", 400.0), ("high", 3000.0))[number % 2]
        write_tone(tmp_path / "tones" / label / f"{number:02}.wav", frequency, number)
    return tmp_path / "tones"


def usage_error(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Insist on argparse's refusal, with status 2 and no traceback, and return its last line."""
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert 2 == exit_.value.code
    printed = capsys.readouterr()
    assert "" == printed.out
    return printed.err.splitlines()[-1]


def refusal(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Insist on status 1 and one line on standard error, and return it."""
    assert 1 == main(argv)
    printed = capsys.readouterr()
    assert "" == printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("earshot-trainer: ")
    return line


class TestHelp:
    def test_the_commands_are_listed(self, capsys: pytest.CaptureFixture[str]) -> None:
        """What it is for, each command with its purpose, and what the exit statuses mean."""
        with pytest.raises(SystemExit) as exit_:
            main(["--help"])
        assert 0 == exit_.value.code
        text = capsys.readouterr().out
        for part in ("earshot-trainer", "simulate", "fit", "evaluate", "exit status: 0 done"):
            assert part in text

    @pytest.mark.parametrize("command", COMMANDS)
    def test_each_command_has_an_example(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Its help ends with a command line to copy, which the parser takes."""
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert 0 == exit_.value.code
        *_, heading, example = capsys.readouterr().out.strip().splitlines()
        assert "example:" == heading
        program, *arguments = example.split()
        assert ("earshot-trainer", command) == (program, arguments[0])
        parser().parse_args(arguments)

    def test_it_is_fast(self) -> None:
        """Help imports nothing that takes its time."""
        code = (
            "import sys, trainer.__main__ as t\n"
            "try: t.main(['--help'])\n"
            "except SystemExit: pass\n"
            "print({'sklearn', 'numba', 'librosa', 'scipy', 'joblib', 'numpy', 'kafka'} & {*sys.modules})"
        )
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert "set()" == printed.splitlines()[-1]

    def test_a_command_is_needed(self, capsys: pytest.CaptureFixture[str]) -> None:
        """None, or one that there is not, is wrong usage."""
        assert "required: COMMAND" in usage_error([], capsys)
        assert "invalid choice: 'train'" in usage_error(["train"], capsys)


class TestCommands:
    def test_simulate_and_fit(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The two commands of the example: clips, and a bundle that loads, with its figures in between."""
        clips, out = tmp_path / "clips", tmp_path / "machines"
        assert 0 == main(["simulate", str(clips), "--clips", "36", "--seconds", "0.5"])
        assert f"36 clips of 0.5 s, listed in {clips / 'manifest.csv'}\n" == capsys.readouterr().out
        assert 0 == main(["fit", str(clips), "--out", str(out), "--trees", "5"])
        printed = capsys.readouterr()
        assert "" == printed.err, "there is no progress bar where nobody looks at it"
        model = bundle.load(out).manifest
        lines = printed.out.splitlines()
        assert "36 clips of 6 groups, 18.0 s" == lines[0]
        held_out = lines.index("36 clips, 36 windows, 6 classes, 5 trees (random-forest)") + 1
        assert "held out: 5 folds of whole groups (6 groups of 36 clips)." == lines[held_out]
        accuracy, macro_f1 = lines[held_out + 2 : held_out + 4]
        assert f" {100 * model.metrics['accuracy']:.1f} % (" in accuracy
        assert f" {100 * model.metrics['window_accuracy']:.1f} % (" in accuracy
        assert f" {model.metrics['macro_f1']:.3f} (" in macro_f1
        assert "random split" in lines[held_out + 1]
        assert f"bundle written to {out}" == lines[-1]
        assert "machines" == model.name
        assert {bundle.MANIFEST, *bundle.FILES, *bundle.DOCUMENTS} == {path.name for path in out.iterdir()}

    def test_fit_a_quantity(self, machines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A numeric column is regression, and its errors are in its unit."""
        out = tmp_path / "speed"
        options = ["--label", "rpm", "--out", str(out), "--trees", "5", "--name", "speedometer", "--seed", "3"]
        windows = ["--window-seconds", "2", "--window-hop-seconds", "2", "--no-report"]
        assert 0 == main(["fit", str(machines), *options, *windows])
        model = bundle.load(out).manifest
        printed = capsys.readouterr().out
        assert "72 clips, 72 windows, rpm (regression), 5 trees (random-forest)\n" in printed
        (error,) = [line for line in printed.splitlines() if "mean absolute error in rpm" in line]
        assert f" {model.metrics['mae']:.3g} (" in error
        assert ("speedometer", 3) == (model.name, model.seed)
        assert (2.0, 2.0) == (model.spec.window_seconds, model.spec.window_hop_seconds)
        assert not (out / bundle.REPORT).exists()

    def test_settings_of_features_and_forest(self, tones: Path, tmp_path: Path) -> None:
        """What is typed is what the manifest says, and with what the forest was grown."""
        out = tmp_path / "out"
        forest = ["--forest", "extra-trees", "--max-depth", "3", "--max-features", "0.5", "--min-samples-leaf", "2"]
        features = ["--features", "article", "--level", "-23", "--precision", "float32"]
        options = [*QUICK, *forest, "--class-weight", "balanced", *features]
        assert 0 == main(["fit", str(tones), "--out", str(out), *options, "--folds", "3"])
        model = bundle.load(out)
        expected = {"kind": "extra-trees", "n_estimators": 5, "max_depth": 3, "max_features": 0.5}
        expected |= {"min_samples_leaf": 2, "min_samples_split": 2, "class_weight": "balanced"}
        assert expected == model.manifest.forest
        spec = model.featurizer.spec
        assert spec == model.manifest.spec
        assert (("article",), -23.0, "float32") == (
            tuple(each.name for each in spec.sets),
            spec.level_dbfs,
            spec.precision,
        )
        assert "level.gain" == model.profile.names[-1]
        assert {"folds": 3, "group": None} == model.manifest.validation
        pickled = joblib.load(out / bundle.FOREST)
        assert ("ExtraTreesClassifier", 3) == (type(pickled).__name__, pickled.max_depth)

    def test_features_from_a_file(self, tones: Path, tmp_path: Path) -> None:
        """One's own spec in TOML; what is typed beside it goes before it."""
        own = 'sample_rate = 8000\nwindow_seconds = 0.2\nwindow_hop_seconds = 0.2\n[[sets]]\nkind = "frames"'
        (tmp_path / "own.toml").write_text(f'{own}\nname = "own"\nfamilies = ["rms"]\n')
        options = [
            "--features",
            str(tmp_path / "own.toml"),
            "--window-hop-seconds",
            "0.1",
            "--trees",
            "5",
            "--no-report",
        ]
        assert 0 == main(["fit", str(tones), "--out", str(tmp_path / "out"), *options])
        spec = bundle.load(tmp_path / "out").manifest.spec
        assert (8000, 0.2, 0.1, "own") == (
            spec.sample_rate,
            spec.window_seconds,
            spec.window_hop_seconds,
            spec.sets[0].name,
        )

    @pytest.mark.parametrize("content", [b"window_seconds = 0.0", b"hum", b"\xff"])
    def test_a_file_that_is_no_spec_is_named(
        self, content: bytes, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Else nobody knows where to mend it."""
        own = tmp_path / "own.toml"
        own.write_bytes(content)
        said = refusal(["fit", str(tones), "--out", str(tmp_path / "out"), "--features", str(own)], capsys)
        assert said.startswith(f"earshot-trainer: {own}: ")

    def test_a_name_means_the_set_and_not_a_file_called_so(
        self, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a command does cannot hang on what lies in the folder where it is typed."""
        (tmp_path / "compact").write_text("no spec")
        monkeypatch.chdir(tmp_path)
        assert 0 == main(["fit", str(tones), "--out", "out", *QUICK, "--features", "compact"])
        assert "compact" == bundle.load(tmp_path / "out").manifest.spec.sets[0].name

    def test_augmented_copies_are_trained_on(self, tones: Path, tmp_path: Path) -> None:
        """They are told in the manifest, and counted among the windows they are not."""
        out = tmp_path / "out"
        assert 0 == main(["fit", str(tones), "--out", str(out), *QUICK, "--augment", "noise=10:20,copies=2"])
        manifest = bundle.load(out).manifest
        assert (20, {"noise": [10.0, 20.0], "copies": 2}) == (manifest.windows, manifest.augmentation)

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
    @pytest.mark.parametrize(("options", "name"), [(QUICK[:-1], r"br\udce9ve"), ((*QUICK, "--json"), r"br\\udce9ve")])
    def test_a_folder_whose_name_is_not_utf8(
        self, options: tuple[str, ...], name: str, tones: Path, tmp_path: Path
    ) -> None:
        """It is listened to, and named by what can be written, as is a clip in it that cannot be used."""
        (tones / "low" / "00.wav").write_bytes(b"not a sound")
        (tones / "low").rename(tones / os.fsdecode(b"br\xe9ve"))
        command = [str(BIN / "earshot-trainer"), "fit", str(tones), "--out", str(tmp_path / "out"), *options]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        assert (0, "") == (done.returncode, done.stderr)
        assert f"{name}/00.wav cannot be used" in done.stdout
        assert [r"br\udce9ve", "high"] == list(bundle.load(tmp_path / "out").manifest.classes)

    def test_groups_by_other_columns(self, notes: Path, tmp_path: Path) -> None:
        """As many folds as groups leave out one at a time, whatever the groups are made of."""
        options = ["--label", "midi_pitch", "--features", "article", "--trees", "2", "--no-report"]
        for group, folds, how in (
            ("group", "6", "each of 6 groups of clips tested by a forest that was trained on the others."),
            ("group+midi_pitch", "5", "5 folds of whole groups (206 groups of 313 clips)."),
        ):
            asked = ["--group", group, "--folds", folds]
            assert 0 == main(["fit", str(notes), "--out", str(tmp_path / "out"), *options, *asked])
            kept = msgspec.json.decode((tmp_path / "out" / bundle.EVALUATION).read_bytes())
            assert how == kept["evaluation"]["how"]

    def test_json(self, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Standard output is everything that was found out and nothing else."""
        out = tmp_path / "out"
        assert 0 == main(["fit", str(tones), "--out", str(out), *QUICK, "--json"])
        printed = capsys.readouterr().out
        assert 1 == len(printed.splitlines())
        found = msgspec.json.decode(printed)
        assert {"manifest", "evaluation", "importances", "skipped", "survey"} == set(found)
        assert bundle.load(out).manifest == msgspec.convert(found["manifest"], bundle.Manifest)
        kept = msgspec.json.decode((out / bundle.EVALUATION).read_bytes(), type=Kept)
        assert kept.evaluation == msgspec.convert(found["evaluation"], Evaluation)

    def test_esc50_as_it_is_published(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Its own table in meta/ and the clips in audio/ beside it: category is learnt, in the official folds."""
        data = tmp_path / "ESC-50"
        (data / "meta").mkdir(parents=True)
        with (data / "meta" / "esc50.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["filename", "fold", "target", "category", "esc10", "src_file", "take"])
            for number in range(20):
                fold, target = number // 4 + 1, number % 2
                name = f"{fold}-{number}-A-{target}.wav"
                write_tone(data / "audio" / name, (400.0, 3000.0)[target], number)
                writer.writerow([name, fold, target, ("cow", "bird")[target], "True", number, "A"])
        assert 0 == main(["fit", str(data), "--out", str(tmp_path / "out"), *QUICK])
        printed = capsys.readouterr().out
        assert "\n20 clips, 20 windows, 2 classes, 5 trees (random-forest)\n" in printed
        assert (
            "held out: the 5 folds of the data set, each tested by a forest that was trained on the others.\n"
            in printed
        )
        model = bundle.load(tmp_path / "out").manifest
        assert ("category", ("bird", "cow"), 1.0) == (model.label, model.classes, model.metrics["accuracy"])

    def test_what_cannot_be_used_is_told_first(
        self, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Each clip is named with its reason; so are clips that are the same."""
        for number in range(100):
            write_tone(tones / "high" / f"more-{number:03}.wav", 3000.0, 100 + number)
        for number in range(7):
            (tones / "high" / f"more-{number:03}.wav").write_bytes(b"not a sound %d" % number)
        (tones / "low" / "twin.wav").write_bytes((tones / "low" / "00.wav").read_bytes())
        assert 0 == main(["fit", str(tones), "--out", str(tmp_path / "out"), *QUICK])
        lines = capsys.readouterr().out.splitlines()
        warned = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
        assert warned[0].startswith("low/twin.wav has the same bytes as low/00.wav")
        for number in range(7):
            (line,) = [line for line in warned if line.startswith(f"{tones}/high/more-{number:03}.wav")]
            assert line.partition(": ")[2]
        assert any(line.startswith("114 clips, ") for line in lines[lines.index("") :])

    def test_a_terminal_without_the_letters(self, machines: Path, tmp_path: Path) -> None:
        """Where "R²" cannot be written the summary says so as well as it can, and the status is 0."""
        command = ["earshot-trainer", "fit", str(machines), "--label", "rpm", "--out", str(tmp_path / "out")]
        options = ["--trees", "2", "--window-seconds", "2", "--window-hop-seconds", "2", "--no-report"]
        ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
        done = subprocess.run(
            [BIN / command[0], *command[1:], *options], env=ascii_only, capture_output=True, text=True, check=False
        )
        assert (0, "") == (done.returncode, done.stderr)
        assert "R? " in done.stdout


class TestEvaluate:
    def test_new_clips(self, machine_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The measures of the model itself, as text and as JSON."""
        clips = tmp_path / "clips"
        assert 0 == main(["simulate", str(clips), "--clips", "36", "--seconds", "2", "--seed", "5"])
        capsys.readouterr()
        assert 0 == main(["evaluate", str(machine_bundle), str(clips)])
        printed = capsys.readouterr()
        assert printed.out.startswith("held out: 36 clips that the model was not trained on.\n")
        assert ("", False) == (printed.err, "random split" in printed.out)
        assert 0 == main(["evaluate", str(machine_bundle), str(clips), "--json"])
        found = msgspec.json.decode(capsys.readouterr().out, type=Evaluation)
        assert f" {100 * found.clip['accuracy'].value:.1f} % (" in printed.out

    def test_a_folder_that_is_no_bundle(self, tones: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It is one line that names it."""
        assert "has no manifest.json" in refusal(["evaluate", str(tones), str(tones)], capsys)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["{data}/nowhere", "--out", "{out}"], "nowhere does not exist; expected a folder of clips or a CSV"),
            (["{data}", "--out", "{out}", "--label", "rpm"], "has no manifest"),
            (["{data}", "--out", "{data}"], "exists and is no model bundle: name another folder, or remove it"),
            (["{data}", "--out", "{data}/low/00.wav/out"], "name another folder"),
            (["{data}", "--out", "{out}", "--task", "regression"], "regression expects a finite number"),
            (["{data}", "--out", "{out}", "--window-seconds", "0.01"], "window_hop_seconds is 0.5; expected"),
            (["{data}", "--out", "{out}", "--window-hop-seconds", "2"], "window_hop_seconds is 2.0; expected"),
            (["{data}", "--out", "{out}", "--sample-rate", "100"], "n_fft is 1024; expected"),
            (["{data}", "--out", "{out}", "--sample-rate", "1000000"], "n_mels is 40"),
            (["{data}", "--out", "{out}", "--features", "compact+loud"], "there is no feature set 'loud'; expected"),
            (["{data}", "--out", "{out}", "--features", "loud.toml"], "loud.toml: [Errno 2] No such file"),
            (["{data}", "--out", "{out}", "--level", "3"], "level_dbfs is 3.0; expected"),
            (["{data}", "--out", "{out}", "--precision", "float32"], "such as article"),
            (["{data}", "--out", "{out}", "--augment", "volume=3"], "volume"),
            (["{data}", "--out", "{out}", "--group", "machine"], "has no manifest"),
        ],
    )
    def test_what_has_to_be_changed_is_said_in_one_line(
        self, arguments: list[str], expected: str, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Status 1 and a sentence for the person who typed it, without a traceback; nothing is written."""
        filled = [each.format(data=tones, out=tmp_path / "out") for each in arguments]
        assert expected in refusal(["fit", *filled], capsys)
        assert not (tmp_path / "out").exists()

    def test_a_column_that_is_not_there(self, machines: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The columns that there are stand beside it."""
        text = refusal(["fit", str(machines), "--label", "speed", "--out", "out"], capsys)
        assert "has no column 'speed' to learn; --label may be label or rpm" in text

    def test_simulate_where_nothing_can_be_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A file is no folder, and too few clips are no data set."""
        (tmp_path / "file").write_text("")
        assert "cannot write to" in refusal(["simulate", str(tmp_path / "file"), "--clips", "36"], capsys)
        assert "clips is 5; expected at least 36" in refusal(["simulate", str(tmp_path / "x"), "--clips", "5"], capsys)

    def test_a_disk_that_fails(
        self, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What only turns up while writing is one line as well, with the file that it is about."""

        def full(self: Path, _content: bytes) -> int:
            raise OSError(28, "No space left on device", str(self))

        monkeypatch.setattr(Path, "write_bytes", full)
        text = refusal(["fit", str(tones), "--out", str(tmp_path / "out"), *QUICK, "--json"], capsys)
        assert "No space left on device" in text
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("option", "values"),
        [
            ("--trees", ("-1", "0", "1.5", "many", "")),
            ("--jobs", ("0", "-1")),
            ("--seed", ("-1", "4294967296", "1e3")),
            ("--sample-rate", ("0", "-16000", "16k")),
            ("--window-seconds", ("0", "-1", "nan", "inf", "1e12", "1s")),
            ("--window-hop-seconds", ("0", "nan", "inf")),
            ("--task", ("clustering",)),
            ("--folds", ("1", "0", "many")),
            ("--forest", ("boosted",)),
            ("--max-depth", ("0", "deep")),
            ("--max-features", ("0", "1.5", "log3")),
            ("--class-weight", ("heavy",)),
        ],
    )
    def test_nonsense_is_refused_where_it_is_typed(
        self, option: str, values: Sequence[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Status 2, with the option, what was given and what was expected."""
        for value in values:
            text = usage_error(["fit", "clips", "--out", "out", option, value], capsys)
            assert f"argument {option}: " in text
            assert repr(value) in text

    @pytest.mark.parametrize(
        ("option", "values"),
        [("--clips", ("0", "-3", "x")), ("--seconds", ("0", "nan", "inf", "1e9")), ("--seed", ("-1", "x"))],
    )
    def test_nonsense_for_simulate(
        self, option: str, values: Sequence[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The same."""
        for value in values:
            assert f"argument {option}: {value!r} is not " in usage_error(["simulate", "out", option, value], capsys)
