"""Data sets: every layout is understood, mistakes are named, and no recording is on both sides of a split."""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile

from trainer.dataset import Clip, Dataset, data_hash, join_equal_sounds, load
from worker.errors import Fatal

RATE = 8000


def write_sound(path: Path, seed: int = 0, *, rate: int = RATE, channels: int = 1, seconds: float = 0.05) -> Path:
    """Write a little noise; equal seeds give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (round(rate * seconds), channels))
    soundfile.write(path, samples, rate)
    return path


def write_manifest(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def listed(tmp_path: Path, labels: Sequence[str], column: str = "label") -> Path:
    """Write a manifest with a sound for each of these labels."""
    rows = []
    for number, label in enumerate(labels):
        write_sound(tmp_path / f"{number}.wav", number)
        rows.append({"filename": f"{number}.wav", column: label})
    return write_manifest(tmp_path / "manifest.csv", rows)


def dataset_of(clips: Sequence[tuple[str, str]], folds: Sequence[str] | None = None) -> Dataset:
    """Return a data set of (label, group) that lies nowhere."""
    return Dataset(
        tuple(
            Clip(Path(f"{i}.wav"), f"{i}.wav", label, group, folds[i] if folds else None, sha256=str(i))
            for i, (label, group) in enumerate(clips)
        ),
        "label",
        "classification",
    )


class TestFolders:
    def test_subfolders_are_the_classes(self, tmp_path: Path) -> None:
        """Each sound, however deep, is labelled with its top folder and is a group of its own."""
        write_sound(tmp_path / "cat" / "a.wav", 1)
        write_sound(tmp_path / "dog" / "b.FLAC", 2)
        write_sound(tmp_path / "dog" / "deep" / "c.ogg", 3)
        (tmp_path / "dog" / "notes.txt").write_text("not a sound")
        (tmp_path / "dog" / "._b.wav").write_text("what macOS leaves on foreign disks")
        dataset = load(tmp_path)
        assert ("label", "classification") == (dataset.label, dataset.task)
        assert ("all clips of 'cat' are of one group or fold (cat/a.wav): held out, it is never recognised",) == (
            dataset.warnings
        )
        assert [("cat/a.wav", "cat"), ("dog/b.FLAC", "dog"), ("dog/deep/c.ogg", "dog")] == [
            (clip.name, clip.label) for clip in dataset.clips
        ]
        assert [clip.name for clip in dataset.clips] == [clip.group for clip in dataset.clips]

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
    def test_a_name_that_is_not_utf8_becomes_one_that_is(self, tmp_path: Path) -> None:
        """What a disk calls a folder has to be written in manifests and predictions, and hashed."""
        write_sound(tmp_path / "a" / "a.wav").parent.rename(tmp_path / os.fsdecode(b"br\xe9ve"))

        dataset = load(tmp_path)

        assert [(r"br\udce9ve", r"br\udce9ve/a.wav")] == [(clip.label, clip.name) for clip in dataset.clips]
        assert dataset.clips[0].path.is_file()
        assert 64 == len(data_hash(dataset))

    def test_folder_names_are_classes_even_if_they_are_numbers(self, tmp_path: Path) -> None:
        """A folder per class is classification, unless the task says otherwise."""
        write_sound(tmp_path / "0.5" / "a.wav", 1)
        write_sound(tmp_path / "1.5" / "b.wav", 2)
        assert "classification" == load(tmp_path).task
        assert "regression" == load(tmp_path, task="regression").task

    def test_folders_have_no_columns(self, tmp_path: Path) -> None:
        """A column cannot be learnt where there is no manifest."""
        write_sound(tmp_path / "cat" / "a.wav")
        with pytest.raises(Fatal, match=r"has no manifest .*no column 'rpm'"):
            load(tmp_path, label="rpm")

    def test_an_empty_or_missing_folder_is_explained(self, tmp_path: Path) -> None:
        """The message says what was expected."""
        with pytest.raises(Fatal, match="holds no clips; expected a folder for each class"):
            load(tmp_path)
        with pytest.raises(Fatal, match="nowhere does not exist"):
            load(tmp_path / "nowhere")

    def test_sounds_that_lie_directly_in_the_folder(self, tmp_path: Path) -> None:
        """They have no class: they are counted, and what can be done is said; a table beside them is named."""
        write_sound(tmp_path / "a.wav")
        write_sound(tmp_path / "b.wav")
        with pytest.raises(Fatal, match=r"2 sounds lie directly in it; put each class into a folder of its own"):
            load(tmp_path)
        write_manifest(tmp_path / "labels.csv", [{"file": "a.wav", "label": "x"}, {"file": "b.wav", "label": "y"}])
        with pytest.raises(Fatal, match=r"2 sounds lie directly in it; if labels\.csv lists .*pass .*/labels\.csv$"):
            load(tmp_path)
        assert 2 == len(load(tmp_path / "labels.csv").clips)


class TestManifest:
    @pytest.mark.parametrize("name", ["manifest.csv", "meta.csv", "metadata.csv", "meta/esc50.csv"])
    def test_a_manifest_in_the_folder_is_found(self, tmp_path: Path, name: str) -> None:
        """A folder with a manifest is read by it, whatever else lies there."""
        write_sound(tmp_path / "audio" / "a.wav")
        write_manifest(tmp_path / name, [{"filename": "a.wav", "label": "cat"}])
        assert [(tmp_path / "audio" / "a.wav", "cat")] == [
            (clip.path.resolve(), clip.label) for clip in load(tmp_path).clips
        ]

    @pytest.mark.parametrize("column", ["filename", "file", "path"])
    @pytest.mark.parametrize("place", ["lists/a.wav", "lists/audio/a.wav", "audio/a.wav"])
    def test_files_are_found_where_data_sets_keep_them(self, tmp_path: Path, column: str, place: str) -> None:
        """Beside the manifest, in audio/ beside it, or in ../audio."""
        sound = write_sound(tmp_path / place)
        manifest = write_manifest(tmp_path / "lists" / "any.csv", [{column: "a.wav", "label": "cat"}])
        assert sound.samefile(load(manifest).clips[0].path)

    def test_fold_and_group_are_read(self, tmp_path: Path) -> None:
        """The optional columns are taken as they are, and blanks around a cell are not part of it."""
        write_sound(tmp_path / "a.wav")
        write_manifest(tmp_path / "meta.csv", [{"file": "a.wav", " label": " cat ", "fold": "2", "group": "mic-7"}])
        clip = load(tmp_path).clips[0]
        assert ("cat", "2", "mic-7") == (clip.label, clip.fold, clip.group)

    def test_without_groups_each_clip_is_its_own(self, tmp_path: Path) -> None:
        """Nothing is known of what belongs together, so nothing is assumed."""
        clips = load(listed(tmp_path, ["a", "b", "a"])).clips
        assert ["0.wav", "1.wav", "2.wav"] == [clip.group for clip in clips]
        assert {None} == {clip.fold for clip in clips}

    def test_esc50_is_read_as_it_is(self, tmp_path: Path) -> None:
        """The published table needs no edit: category is the label and src_file the group."""
        write_sound(tmp_path / "audio" / "1-100032-A-0.wav")
        row = {"filename": "1-100032-A-0.wav", "fold": "1", "target": "0", "category": "dog", "esc10": "True"}
        write_manifest(tmp_path / "meta" / "esc50.csv", [row | {"src_file": "100032", "take": "A"}])
        dataset = load(tmp_path)
        clip = dataset.clips[0]
        assert ("category", "classification") == (dataset.label, dataset.task)
        assert ("dog", "1", "100032") == (clip.label, clip.fold, clip.group)

    def test_a_spreadsheets_byte_order_mark_is_no_part_of_a_name(self, tmp_path: Path) -> None:
        """What Excel saves as CSV UTF-8 begins with a mark."""
        write_sound(tmp_path / "a.wav")
        (tmp_path / "meta.csv").write_text("filename,label\na.wav,Tür\n", encoding="utf-8-sig")
        assert "Tür" == load(tmp_path).clips[0].label


class TestTask:
    @pytest.mark.parametrize(
        ("labels", "task"),
        [
            (["1", "2", "3"], "classification"),
            ([str(n) for n in range(20)], "classification"),
            ([str(n) for n in range(21)], "regression"),
            (["1", "2", "2.5"], "regression"),
            (["1.0", "2.0"], "classification"),
            (["1.5", "loud"], "classification"),
            (["1.5", "nan"], "classification"),
        ],
    )
    def test_the_task_follows_from_the_labels(self, tmp_path: Path, labels: list[str], task: str) -> None:
        """Numbers are a quantity if they are not all whole, or of more than 20 values."""
        assert task == load(listed(tmp_path, labels)).task

    def test_the_task_can_be_stated(self, tmp_path: Path) -> None:
        """What the user says goes, and the label stays as it was written."""
        manifest = listed(tmp_path, ["1.50", "2.5"])
        dataset = load(manifest, task="classification")
        assert ("classification", "1.50") == (dataset.task, dataset.clips[0].label)
        assert "regression" == load(manifest).task

    def test_regression_needs_numbers(self, tmp_path: Path) -> None:
        """The message names the row, the column and the value."""
        manifest = listed(tmp_path, ["1.5", "inf"], column="rpm")
        with pytest.raises(Fatal, match=r"manifest\.csv, row 3: rpm is 'inf'; regression expects a finite number"):
            load(manifest, label="rpm", task="regression")


class TestMistakes:
    def test_an_unknown_column_names_those_there_are(self, tmp_path: Path) -> None:
        """Somebody who mistyped --label sees the names to choose from."""
        with pytest.raises(Fatal, match=r"manifest\.csv has no column 'lable' to learn; --label may be label"):
            load(listed(tmp_path, ["a"]), label="lable")

    def test_a_manifest_needs_a_column_of_files(self, tmp_path: Path) -> None:
        """Its possible names are given."""
        manifest = write_manifest(tmp_path / "meta.csv", [{"wav": "a.wav", "label": "cat"}])
        with pytest.raises(Fatal, match="none of the columns filename, file, path; it has wav, label"):
            load(manifest)
        manifest.write_text("")
        with pytest.raises(Fatal, match="it has no header"):
            load(manifest)

    @pytest.mark.parametrize("column", ["filename", "label", "fold", "group"])
    def test_an_empty_cell_is_named(self, tmp_path: Path, column: str) -> None:
        """File, row and column: what one needs to find it in a spreadsheet."""
        write_sound(tmp_path / "a.wav")
        row = {"filename": "a.wav", "label": "cat", "fold": "1", "group": "x"}
        write_manifest(tmp_path / "meta.csv", [row, row | {column: " "}])
        with pytest.raises(Fatal, match=rf"meta\.csv, row 3: the column '{column}' is empty"):
            load(tmp_path)

    def test_a_short_row_is_named(self, tmp_path: Path) -> None:
        """A row that ends early has an empty cell."""
        write_sound(tmp_path / "a.wav")
        (tmp_path / "meta.csv").write_text("filename,label\na.wav,cat\na.wav\n")
        with pytest.raises(Fatal, match="row 3: the column 'label' is empty"):
            load(tmp_path)

    def test_missing_files_are_counted(self, tmp_path: Path) -> None:
        """The first stands for all: whether a single one is lost or all lie elsewhere, is told by their number."""
        manifest = listed(tmp_path, ["a", "b", "c"])
        manifest.write_text(manifest.read_text() + "1.wav,d\n")
        for number in (1, 2):
            (tmp_path / f"{number}.wav").unlink()
        with pytest.raises(Fatal, match=r"row 3: there is no file '1\.wav'; .* \(missing: 2 of 3 files\)$"):
            load(manifest)

    def test_semicolons_are_no_commas(self, tmp_path: Path) -> None:
        """Many spreadsheets write them."""
        (tmp_path / "meta.csv").write_text("filename;label\na.wav;cat\n")
        with pytest.raises(Fatal, match=r"meta\.csv seems to be separated by ';'; expected commas"):
            load(tmp_path)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        """With its row, and the places that were searched."""
        manifest = listed(tmp_path, ["a", "b"])
        (tmp_path / "1.wav").unlink()
        with pytest.raises(Fatal, match=r"row 3: there is no file '1\.wav'; looked for .*audio/1\.wav"):
            load(manifest)

    def test_no_rows_are_no_data(self, tmp_path: Path) -> None:
        """A header alone is refused."""
        (tmp_path / "meta.csv").write_text("filename,label\n")
        with pytest.raises(Fatal, match="lists no clips"):
            load(tmp_path)

    def test_a_sound_is_no_manifest(self, tmp_path: Path) -> None:
        """A file that is not text is refused by name."""
        (tmp_path / "a.wav").write_bytes(b"RIFF\xff\xfe")
        with pytest.raises(Fatal, match=r"a\.wav cannot be read as CSV in UTF-8"):
            load(tmp_path / "a.wav")


class TestTargets:
    @pytest.mark.parametrize(("label", "expected"), [("rpm", ["1200.5", "900"]), ("load", ["0.25", "0.5"])])
    def test_one_of_several_targets_is_learnt(self, tmp_path: Path, label: str, expected: list[str]) -> None:
        """Each is a column, and one run learns one of them."""
        write_sound(tmp_path / "a.wav", 1)
        write_sound(tmp_path / "b.wav", 2)
        rows = [
            {"file": "a.wav", "rpm": "1200.5", "load": "0.25", "group": "x"},
            {"file": "b.wav", "rpm": "900", "load": "0.5", "group": "y"},
        ]
        dataset = load(write_manifest(tmp_path / "meta.csv", rows), label=label)
        assert (label, "regression", expected) == (dataset.label, dataset.task, [c.label for c in dataset.clips])

    def test_what_may_be_learnt_is_listed(self, tmp_path: Path) -> None:
        """The targets, and not the columns that mean something else."""
        write_sound(tmp_path / "a.wav")
        row = {"file": "a.wav", "start": "0", "end": "1", "fold": "1", "group": "x", "rpm": "1", "load": "2"}
        manifest = write_manifest(tmp_path / "meta.csv", [row])
        with pytest.raises(Fatal, match=r"no column 'label' to learn; --label may be rpm or load$"):
            load(manifest)


class TestBackground:
    def test_background_classes_are_learnt_and_marked(self, tmp_path: Path) -> None:
        """Folders of four names, however capitalised, are classes like the others and told apart from them."""
        for number, label in enumerate(["Background", "noise", "SILENCE", "other", "cat", "noisette"]):
            write_sound(tmp_path / label / "a.wav", number)
        dataset = load(tmp_path)
        assert ("Background", "SILENCE", "noise", "other") == dataset.background
        assert 6 == len({clip.label for clip in dataset.clips})

    def test_a_quantity_has_no_background(self, tmp_path: Path) -> None:
        """Numbers are no names."""
        assert () == load(listed(tmp_path, ["1.5", "2.5"])).background


def segments(tmp_path: Path, spans: Sequence[tuple[str, str]], **columns: Sequence[str]) -> Dataset:
    """Load segments of one file, "long.wav", with a label each, and more columns."""
    write_sound(tmp_path / "long.wav")
    rows = [
        {"filename": "long.wav", "label": "xy"[n % 2], "start": start, "end": end}
        | {name: cells[n] for name, cells in columns.items()}
        for n, (start, end) in enumerate(spans)
    ]
    return load(write_manifest(tmp_path / "meta.csv", rows))


class TestSegments:
    def test_rows_are_segments_of_a_long_file(self, tmp_path: Path) -> None:
        """Each with its span and a name of its own; an empty cell is the beginning or the end of the file."""
        clips = segments(tmp_path, [("0.5", "2"), ("", "0.5"), ("2", ""), ("", "")]).clips
        assert [(0.5, 2.0), (0.0, 0.5), (2.0, None), (0.0, None)] == [(clip.start, clip.end) for clip in clips]
        assert ["long.wav@0.5-2", "long.wav@0-0.5", "long.wav@2-", "long.wav"] == [clip.name for clip in clips]
        assert 1 == len({clip.sha256 for clip in clips})

    def test_segments_of_a_file_are_one_group(self, tmp_path: Path) -> None:
        """They were recorded together, and nothing needs to be said of that."""
        dataset = segments(tmp_path, [("0", "1"), ("1", "2"), ("0.5", "1.5")])
        assert ["long.wav"] * 3 == [clip.group for clip in dataset.clips]
        assert not [warning for warning in dataset.warnings if "held out together" in warning]

    def test_the_manifest_may_group_them_otherwise(self, tmp_path: Path) -> None:
        """Who knows better says so, but what overlaps is the same sound, and stays together."""
        dataset = segments(
            tmp_path, [("0", "1"), ("1", "2"), ("5", "9"), ("8", "10"), ("6", "7")], group=["a", "b", "c", "d", "e"]
        )
        groups = [clip.group for clip in dataset.clips]
        assert ["a", "b"] == groups[:2]
        assert 1 == len(set(groups[2:]))
        assert "long.wav@8-10 overlaps with long.wav@5-9; they are held out together" in dataset.warnings
        assert "long.wav@6-7 overlaps with long.wav@5-9; they are held out together" in dataset.warnings

    @pytest.mark.parametrize(
        ("start", "end", "message"),
        [
            ("soon", "2", "row 2: start is 'soon'; expected seconds"),
            ("-1", "2", "row 2: start is '-1'; expected seconds"),
            ("0", "inf", "row 2: end is 'inf'; expected seconds"),
            ("2", "2", "row 2: the segment ends at 2 s and starts at 2 s"),
        ],
    )
    def test_a_span_that_is_none_is_named(self, tmp_path: Path, start: str, end: str, message: str) -> None:
        """With its row and what was expected."""
        with pytest.raises(Fatal, match=message):
            segments(tmp_path, [(start, end)])

    def test_segments_of_a_file_in_two_folds_are_refused(self, tmp_path: Path) -> None:
        """The message names both, and their group."""
        with pytest.raises(Fatal, match=r"long\.wav@0-1 is in fold 1 and long\.wav@1-2 in fold 2, but both are of"):
            segments(tmp_path, [("0", "1"), ("1", "2")], fold=["1", "2"])


class TestEqualSounds:
    def test_they_are_held_out_together(self) -> None:
        """Whatever their bytes: equal sounds are one group, and said to be."""
        joined = join_equal_sounds(dataset_of([("x", "a"), ("y", "b"), ("x", "c")]), ["same", "other", "same"])
        assert ["a", "b", "a"] == [clip.group for clip in joined.clips]
        assert ("2.wav has the same sound as 0.wav; they are held out together",) == joined.warnings

    def test_a_contradiction_is_reported(self) -> None:
        """One of two labels must be wrong."""
        joined = join_equal_sounds(dataset_of([("x", "a"), ("y", "a")]), ["same", "same"])
        assert ("1.wav (y) has the same sound as 0.wav (x)",) == joined.warnings

    def test_across_official_folds(self) -> None:
        """The folds stay; the warning says what is done about it."""
        joined = join_equal_sounds(dataset_of([("x", "a"), ("x", "b")], folds=["1", "2"]), ["same", "same"])
        assert 1 == len({clip.group for clip in joined.clips})
        (warning,) = joined.warnings
        assert "left out of the training that is tested on the other (folds 2, 1)" in warning

    def test_what_is_known_is_not_said_again(self, tmp_path: Path) -> None:
        """Files with equal bytes were reported when they were found."""
        write_sound(tmp_path / "cat" / "a.wav", 1)
        write_sound(tmp_path / "dog" / "b.wav", 1)
        dataset = load(tmp_path)
        assert dataset == join_equal_sounds(dataset, ["same", "same"])


class TestIdenticalFiles:
    def test_equal_bytes_are_one_group(self, tmp_path: Path) -> None:
        """A copy under another name is held out with its original, through any chain of groups, and reported."""
        rows = []
        for number, (group, seed) in enumerate([("a", 1), ("b", 2), ("c", 3), ("a", 2), ("b", 3), ("d", 4)]):
            write_sound(tmp_path / f"{number}.wav", seed)
            rows.append({"filename": f"{number}.wav", "label": "cat", "group": group})
        dataset = load(write_manifest(tmp_path / "meta.csv", rows))
        groups = [clip.group for clip in dataset.clips]
        assert 1 == len(set(groups[:5]))
        assert groups[5] not in groups[:5]
        assert (
            "3.wav has the same bytes as 1.wav; they are held out together",
            "4.wav has the same bytes as 2.wav; they are held out together",
        ) == dataset.warnings

    def test_equal_bytes_under_two_labels_are_reported(self, tmp_path: Path) -> None:
        """One of them must be wrong."""
        write_sound(tmp_path / "cat" / "a.wav", 1)
        write_sound(tmp_path / "dog" / "b.wav", 1)
        assert "dog/b.wav (dog) has the same bytes as cat/a.wav (cat)" == load(tmp_path).warnings[1]


class TestFolds:
    def test_a_group_in_two_folds_is_refused(self, tmp_path: Path) -> None:
        """The message names both clips and their group."""
        rows = []
        for number, (group, fold) in enumerate([("a", "1"), ("b", "2"), ("a", "2")]):
            write_sound(tmp_path / f"{number}.wav", number)
            rows.append({"filename": f"{number}.wav", "label": "cat", "group": group, "fold": fold})
        manifest = write_manifest(tmp_path / "meta.csv", rows)
        with pytest.raises(Fatal, match=r"0\.wav is in fold 1 and 2\.wav in fold 2, but both are of group 'a'"):
            load(manifest)


class TestHash:
    def test_the_hash_is_of_the_data_not_of_the_place(self, tmp_path: Path) -> None:
        """A copy elsewhere, listed in another order, has the same hash."""
        for folder, order in (("here", 1), ("there", -1)):
            rows = []
            for number in range(3)[::order]:
                write_sound(tmp_path / folder / f"{number}.wav", number)
                rows.append({"filename": f"{number}.wav", "label": "cat"})
            write_manifest(tmp_path / folder / "meta.csv", rows)
        assert data_hash(load(tmp_path / "here")) == data_hash(load(tmp_path / "there"))

    @pytest.mark.parametrize("change", ["name", "label", "group", "fold", "sha256"])
    def test_everything_that_is_learnt_from_counts(self, change: str) -> None:
        """A renamed, relabelled, regrouped or altered clip is other data."""
        dataset = dataset_of([("x", "a"), ("y", "b")], folds=["1", "2"])
        altered = msgspec.structs.replace(dataset.clips[0], **{change: "other"})
        assert data_hash(dataset) != data_hash(msgspec.structs.replace(dataset, clips=(altered, dataset.clips[1])))


class TestRealRecordings:
    def test_esc10(self, esc10: Path) -> None:
        """All 400 clips are found, and nothing is wrong with them."""
        dataset = load(esc10)
        assert ("classification", 400, (), ()) == (
            dataset.task,
            len(dataset.clips),
            dataset.warnings,
            dataset.background,
        )
        assert {40} == set(Counter(clip.label for clip in dataset.clips).values())

    def test_notes(self, notes: Path) -> None:
        """The pitch is recognised as a quantity."""
        dataset = load(notes, label="midi_pitch")
        assert ("regression", "midi_pitch", 313) == (dataset.task, dataset.label, len(dataset.clips))


class TestGroupColumns:
    def test_other_columns_say_what_belongs_together(self, notes: Path) -> None:
        """The notes of one instrument are a group; asked for, those of one instrument and pitch are."""
        instruments = load(notes, label="midi_pitch")
        pitches = load(notes, label="midi_pitch", group="group+midi_pitch")
        assert 6 == len({clip.group for clip in instruments.clips})
        assert "cello+39" == pitches.clips[0].group
        assert (None, "group+midi_pitch") == (instruments.group, pitches.group)
        assert 100 < len({clip.group for clip in pitches.clips}) < len(pitches.clips)

    def test_a_column_that_is_not_there(self, notes: Path, tmp_path: Path) -> None:
        """The columns that there are stand beside it; folders have none."""
        with pytest.raises(Fatal, match=r"no column 'machine' to group by; it has filename, midi_pitch, group"):
            load(notes, label="midi_pitch", group="group+machine")
        (tmp_path / "dog").mkdir()
        with pytest.raises(Fatal, match=r"has no manifest .* no column 'machine'"):
            load(tmp_path, group="machine")
