"""The output file of `predict`: rows while it runs, and its continuation after an interruption wherever it was cut."""

import csv
import dataclasses
import json
import os

import pytest

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
    target.write(ROWS[:2])
    assert RowFile(path, HEADING, resume=True).files == NAMES[:2]
    target.write([])
    target.write(ROWS[2:3])
    assert RowFile(path, HEADING, resume=True).files == NAMES[:3]
    target.close()


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
    with pytest.raises(ValueError, match="must have 19 fields, got 3"):
        RowFile(path, HEADING, resume=True)


def test_an_image_changed_after_its_row_is_named(tmp_path):
    image, path = tmp_path / "image.png", tmp_path / "rows.csv"
    image.write_bytes(b"1")
    target = RowFile(path, HEADING)
    target.write([row(str(image))])
    target.close()
    now = os.stat(path).st_mtime
    os.utime(image, (now, now - 1))
    assert RowFile(path, HEADING, resume=True).files == [str(image)]
    os.utime(image, (now, now + 1))
    with pytest.raises(ValueError, match=r"image\.png has changed after its row"):
        RowFile(path, HEADING, resume=True)
    image.unlink()
    assert RowFile(path, HEADING, resume=True).files == [str(image)]
