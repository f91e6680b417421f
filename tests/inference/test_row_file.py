"""The output file of `predict`: rows while it runs, and its continuation after an interruption wherever it was cut."""

import csv
import dataclasses
import json
import os
import re
import time

import pytest

from diffmic_fast.data.files import file_version
from diffmic_fast.inference.output import save
from diffmic_fast.inference.predict import Heading, Predictions, Row
from diffmic_fast.inference.row_file import RowFile

HEADING = Heading(("a", 'b"|"', "c,\nd"), 0.9, None, "0123456789abcdef")
FAILED = [("gone\n.png", 'there is "no" such file')]


def row(name, label=1):
    return Row(
        name, label, HEADING.classes[label], (0.25, 0.5, 0.25), (0.1, 0.2, 0.3), True, "a", 0.4,
        0.125, None, 1.0, HEADING.classes[:2], 3.5, False,
    )  # fmt: skip


NAMES = [
    "plain.png", "with,comma.png", 'quo"te.png', "two\nlines.png", "return\r.png", "\r\n", "    {brace}.png",
    "\udcff.png", '"', "größe.png", "],", " 1.png ",
]  # fmt: skip
ROWS = [row(name, i % 3) for i, name in enumerate(NAMES)]


@pytest.fixture(params=[".csv", ".json"])
def complete(request, tmp_path):
    path = tmp_path / f"complete{request.param}"
    save(Predictions(HEADING, tuple(ROWS), tuple(FAILED)), path)
    return path


def write(path, *, resume=False, batch=1, unreadable=FAILED):
    """Write the rows that are missing."""
    target = RowFile(path, HEADING, resume=resume)
    rest = [each for each in ROWS if each.file not in set(target.files)]
    for i in range(0, len(rest), batch):
        target.write(rest[i : i + batch])
    target.finish(unreadable)
    return target


@pytest.mark.parametrize("batch", [1, 5])
def test_rows_written_one_by_one_are_the_file_written_at_once(complete, tmp_path, batch):
    path = tmp_path / f"rows{complete.suffix}"
    write(path, batch=batch)
    assert path.read_bytes() == complete.read_bytes()
    assert read_names(path) == NAMES


def read_names(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        if path.suffix == ".csv":
            return [record["file"] for record in csv.DictReader(file)]
        value = json.load(file)
    assert [tuple(entry.values()) for entry in value["unreadable"]] == FAILED
    return [record["file"] for record in value["predictions"]]


def test_a_file_cut_anywhere_is_continued_to_the_same_bytes(complete, tmp_path):
    whole = complete.read_bytes()
    path = tmp_path / f"cut{complete.suffix}"
    kept = set()
    sizes = {i + d for i, byte in enumerate(whole) if byte in b"\n\r{}" for d in (-1, 0, 1)}
    for size in sorted(sizes | set(range(0, len(whole), 11)) | {len(whole)}):
        path.write_bytes(whole[:size])
        kept.add(len(write(path, resume=True).files))
        assert path.read_bytes() == whole, size
    assert kept == set(range(len(NAMES) + 1))


def test_rows_are_readable_while_the_run_goes_on(complete, tmp_path):
    path = tmp_path / f"rows{complete.suffix}"
    target = RowFile(path, HEADING)
    assert not path.exists()
    for count in (2, 2, 3):
        target.write(ROWS[len(files_in(path)) : count])
        assert files_in(path) == NAMES[:count]
    target.close()


def files_in(path):
    """Names of the rows, read from a copy: the file itself is locked."""
    copy = path.with_name(f"copy{path.suffix}")
    if not path.exists():
        return []
    copy.write_bytes(path.read_bytes())
    target = RowFile(copy, HEADING, resume=True)
    target.close()
    return target.files


def test_a_file_is_written_by_one_process_at_a_time(complete, tmp_path):
    path = tmp_path / f"rows{complete.suffix}"
    first = RowFile(path, HEADING)
    second = RowFile(path, HEADING)
    first.write(ROWS[:2])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is being written by another process"):
        second.write(ROWS[:1])
    with pytest.raises(ValueError, match="is being written by another process"):
        RowFile(path, HEADING, resume=True)
    assert path.read_bytes() == before
    first.close()
    resumed = RowFile(path, HEADING, resume=True)
    with pytest.raises(ValueError, match="is being written by another process"):
        RowFile(path, HEADING, resume=True)
    resumed.close()
    write(path, resume=True)
    assert path.read_bytes() == complete.read_bytes()


def test_no_row_leaves_no_file_and_an_old_one_as_it_was(complete, tmp_path):
    target = RowFile(tmp_path / f"none{complete.suffix}", HEADING)
    target.finish(FAILED)
    assert not target.path.exists()
    before = complete.read_bytes()
    RowFile(complete, HEADING).finish(FAILED)
    assert complete.read_bytes() == before


def test_without_resume_a_file_is_replaced(complete):
    target = RowFile(complete, HEADING)
    assert target.files == []
    target.write(ROWS[:1])
    target.finish([])
    with open(complete, encoding="utf-8", newline="") as file:
        if complete.suffix == ".csv":
            assert len(list(csv.reader(file))) == 2
        else:
            assert len(json.load(file)["predictions"]) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"digest": "fedcba9876543210"},
        {"classes": ("a", "c,\nd", 'b"|"')},
        {"classes": ("a", 'b"|"', "c,\nd", "e")},
    ],
)
def test_rows_of_another_model_are_not_continued(complete, other):
    before = complete.read_bytes()
    with pytest.raises(ValueError, match=r"--resume: .*another --out"):
        RowFile(complete, dataclasses.replace(HEADING, **other), resume=True)
    assert complete.read_bytes() == before


@pytest.mark.parametrize("content", [b"something else\n", b"\xef\xbb\xbffile,label", b"{]"])
def test_a_file_of_something_else_is_not_continued(complete, content):
    complete.write_bytes(content)
    with pytest.raises(ValueError, match="--resume"):
        RowFile(complete, HEADING, resume=True)
    assert complete.read_bytes() == content


def test_a_row_with_missing_fields_is_named(tmp_path):
    path = tmp_path / "edited.csv"
    write(path)
    with open(path, "ab") as file:
        file.write(b"by hand.png,1,a\n")
    with pytest.raises(ValueError, match="must have 20 fields, got 3"):
        RowFile(path, HEADING, resume=True)


@pytest.mark.parametrize("suffix", [".csv", ".json"])
@pytest.mark.parametrize("change", ["later", "earlier", "content"])
def test_another_image_than_the_one_that_was_classified_is_named(tmp_path, suffix, change):
    """Whenever it changed: a copy keeps the time of modification, and a clock may be ahead."""
    image, path = tmp_path / "image.png", tmp_path / f"rows{suffix}"
    image.write_bytes(b"1")
    later = time.time_ns() + 3600 * 10**9
    os.utime(image, ns=(later, later))
    target = RowFile(path, HEADING)
    target.write([dataclasses.replace(row(str(image)), version=file_version(image))])
    target.write([row("another.png")])
    target.close()

    def resumed():
        target = RowFile(path, HEADING, resume=True)
        target.close()
        return target.files

    assert resumed() == [str(image), "another.png"]
    if change == "content":
        image.write_bytes(b"23")
    moment = {"later": later + 1, "earlier": later - 1, "content": later}[change]
    os.utime(image, ns=(moment, moment))
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"image\.png is not the file whose row is in .*another --out"
    ):
        resumed()
    assert path.read_bytes() == before
    image.unlink()
    assert resumed() == [str(image), "another.png"]


def test_damaged_rows_are_named(tmp_path):
    path = tmp_path / "rows.json"
    write(path)
    path.write_bytes(path.read_bytes().replace(b'"file"', b'"fill"', 1))
    with pytest.raises(ValueError, match=r"rows\.json is damaged: a row has no 'file'"):
        RowFile(path, HEADING, resume=True)
    path = tmp_path / "rows.csv"
    write(path)
    path.write_bytes(path.read_bytes().replace(b"plain.png", b"\0\0\0\0\0.png", 1))
    with pytest.raises(ValueError, match=r"rows\.csv is damaged"):
        RowFile(path, HEADING, resume=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_named_with_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    path.symlink_to("/dev/full")
    target = RowFile(path, HEADING)
    with pytest.raises(OSError, match=r"rows\.csv"):
        target.write(ROWS[:1])


def test_prediction_sets_can_be_taken_apart(tmp_path):
    heading = dataclasses.replace(HEADING, classes=("a\\", "b", "a|b"))
    cells = set()
    for members in (("a\\", "b"), ("a|b",), ("a\\",), ("a|b", "b")):
        path = tmp_path / "sets.csv"
        save(
            Predictions(heading, (dataclasses.replace(ROWS[0], prediction_set=members),), ()), path
        )
        with open(path, encoding="utf-8", newline="") as file:
            cell = next(csv.DictReader(file))["prediction_set"]
        assert (
            tuple(re.sub(r"\\(.)", r"\1", part) for part in re.findall(r"(?:\\.|[^|\\])+", cell))
            == members
        )
        cells.add(cell)
    assert len(cells) == 4
