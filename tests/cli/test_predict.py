"""`diffmic-fast predict`: rows as they come, --resume, outputs, unreadable files."""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
from command_line import one_error
from PIL import Image

from diffmic_fast.cli import main
from diffmic_fast.data.loading import LoadingError
from diffmic_fast.inference.predict import FilePredictor


def test_predict_skips_an_unreadable_image_and_exits_with_3(work, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = (work / "images/test/dark/0.png").read_bytes()
    (folder / "a.png").write_bytes(good)
    (folder / "broken.png").write_bytes(good[:300])
    (folder / "c.png").write_bytes((work / "images/test/light/0.png").read_bytes())
    out, picture = tmp_path / "p.csv", tmp_path / "f.png"
    status = main(
        ["predict", str(work / "run" / "ckpt.pth"), str(folder), "--out", str(out),
         "--figure", str(picture), "--images-out", str(tmp_path / "each")]
    )  # fmt: skip
    assert status == 3
    err = capsys.readouterr().err
    assert f"unreadable: {folder / 'broken.png'}: " in err
    assert "1 of 3 files were unreadable" in err
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["file"] for r in rows] == [str(folder / "a.png"), str(folder / "c.png")]
    assert {r["class"] for r in rows} <= {"dark", "light"}
    assert picture.is_file() and len(list((tmp_path / "each").iterdir())) == 2


def test_predict_goes_on_with_an_interrupted_run(work, tmp_path, capsys):
    """Rows are kept, the incomplete one is made again, and a file that has become readable gets one."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, name in enumerate(("dark/0", "dark/1", "light/0", "light/1")):
        shutil.copy(work / "images/test" / f"{name}.png", folder / f"{i}.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:300])
    out, whole = tmp_path / "p.csv", tmp_path / "whole.csv"
    command = ["predict", str(work / "run"), str(folder), "--batch-size", "1"]
    assert main([*command, "--out", str(out)]) == 3
    shutil.copy(work / "images/test/light/0.png", folder / "2.png")
    rows = out.read_bytes()
    out.write_bytes(rows[:-5])  # within the row of 3.png
    capsys.readouterr()
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert "2 rows were in" in capsys.readouterr().err
    assert main([*command, "--out", str(whole)]) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert "4 rows were in" in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()

    one_error(capsys, [*command, "--resume"], "--resume continues a file", "--out")
    resume = ["--out", str(out), "--resume"]
    one_error(capsys, [*command, *resume, "--seed", "9"], "of another model or other options")
    one_error(capsys, [*command, *resume, "--figure", "f.png"], "--figure")
    one_error(capsys, ["predict", str(work / "run"), str(folder / "0.png"), *resume],
              "3 files that are not among those given", str(folder / "1.png"))  # fmt: skip
    assert out.read_bytes() == whole.read_bytes()


def test_rows_of_another_folder_are_not_continued(work, tmp_path, monkeypatch, capsys):
    """Relative names are the same in two folders; the images are not."""
    for name, source in (("a", "dark"), ("b", "light")):
        shutil.copytree(work / "images/test" / source, tmp_path / name / "images")
    for image in (tmp_path / "b/images").iterdir():
        os.utime(image, (1e9, 1e9))  # older than every row
    out = tmp_path / "rows.csv"
    command = ["predict", str(work / "run"), "images", "--out", str(out)]
    monkeypatch.chdir(tmp_path / "a")
    assert main(command) == 0
    before = out.read_bytes()
    monkeypatch.chdir(tmp_path / "b")
    capsys.readouterr()
    one_error(capsys, [*command, "--resume"], "is not the file whose row is in")
    assert out.read_bytes() == before


def test_outputs_inside_the_input_folder(work, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(work / "images/test/dark", folder)
    command = ["predict", str(work / "run"), str(folder), "--out", str(folder / "rows.csv"),
               "--images-out", str(folder / "pictures")]  # fmt: skip
    assert main(command) == 0
    before = (folder / "rows.csv").read_bytes()
    assert main([*command, "--resume"]) == 0
    assert (folder / "rows.csv").read_bytes() == before
    assert "unreadable" not in capsys.readouterr().err


def test_a_closed_standard_output_is_named(work, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["predict", str(work / "run"), str(work / "images/test")]) == 2
    assert "standard output is closed; name a file with --out" in capsys.readouterr().err


def test_predict_writes_rows_while_it_runs(work, tmp_path, monkeypatch):
    out = tmp_path / "p.json"
    files = [str(work / "images/test/dark" / f"{i}.png") for i in (0, 1)]
    seen = []
    batches = FilePredictor.batches

    def observed(self, *args, **options):
        for batch in batches(self, *args, **options):
            seen.append(out.read_text().count('"file"') if out.exists() else 0)
            yield batch

    monkeypatch.setattr(FilePredictor, "batches", observed)
    assert main(["predict", str(work / "run"), *files, "--batch-size", "1", "--out", str(out)]) == 0
    assert seen == [0, 1]
    assert [r["file"] for r in json.loads(out.read_text())["predictions"]] == files


def test_pictures_of_a_continued_run_keep_their_numbers(work, tmp_path):
    out, pictures = tmp_path / "p.csv", tmp_path / "each"
    files = [str(work / "images/test/dark" / f"{i}.png") for i in (0, 1)]
    command = ["predict", str(work / "run"), *files, "--out", str(out), "--images-out"]
    assert main([*command, str(pictures)]) == 0
    names = sorted(path.name for path in pictures.iterdir())
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:2]))
    (pictures / names[1]).unlink()
    assert main([*command, str(pictures), "--resume"]) == 0
    assert sorted(path.name for path in pictures.iterdir()) == names


def test_predict_reports_other_files_and_unused_bits_once(work, tmp_path, capsys):
    dark = np.arange(1024, dtype=np.uint16).reshape(32, 32)
    for i in range(2):
        Image.fromarray(dark + i).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "Thumbs.db").write_text("text")
    assert main(["predict", str(work / "run"), str(tmp_path)]) == 3
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert captured.err.count(f"unreadable: {tmp_path / 'notes.txt'}: it is not an image") == 1
    assert "Thumbs.db" not in captured.err
    assert captured.err.count("data.augmentation.bit_depth=11") == 1


def test_predict_prints_csv_alone_to_standard_output(work, capsys):
    assert main(["predict", str(work / "run"), str(work / "images/test/light")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("file,label,class,probability_dark") and len(lines) == 3


def test_predict_without_a_readable_image_fails_and_writes_nothing(work, tmp_path, capsys):
    (tmp_path / "x.png").write_text("no image")
    out = tmp_path / "p.json"
    assert main(["predict", str(work / "run"), str(tmp_path / "x.png"), "--out", str(out)]) == 1
    assert "none of the 1 files could be read" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("error", [LoadingError("a worker died"), MemoryError(), OSError("disk")])
def test_rows_that_are_kept_are_named_whatever_ends_a_run(
    work, tmp_path, monkeypatch, capsys, error
):
    """After the first batch."""
    batches = FilePredictor.batches

    def broken(self, *args, **options):
        yield next(iter(batches(self, *args, **options)))
        raise error

    monkeypatch.setattr(FilePredictor, "batches", broken)
    out = tmp_path / "rows.csv"
    assert (
        main(
            [
                "predict",
                str(work / "run"),
                str(work / "images/test"),
                "--batch-size",
                "1",
                "--out",
                str(out),
            ]
        )
        != 0
    )
    assert f"1 rows are in {out}; go on with --resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert (
        main(
            ["predict", str(work / "run"), str(work / "images/test"), "--out", str(out), "--resume"]
        )
        == 0
    )
    assert len(out.read_text().splitlines()) == 5
