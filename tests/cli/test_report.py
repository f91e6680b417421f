"""`predict --report` and `evaluate --report`."""

from __future__ import annotations

import shutil

import pytest
from command_line import one_error
from report_pages import HOSTILE, Page, assert_inert

from diffmic_fast import commands
from diffmic_fast._optional import MissingPackageError
from diffmic_fast.cli import main
from diffmic_fast.inference.predict import FilePredictor


def cards(page):
    return {i["data-name"]: i["data-label"] for i in page.all("li") if "data-name" in i}


def test_predict_reports_images_and_unreadable_files_and_continues(
    work, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "images"
    shutil.copytree(work / "images/test/dark", folder)
    hostile = f"{HOSTILE[1]}.png"
    shutil.copy(folder / "0.png", folder / hostile)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:300])
    # Inside the input folder, whose other files are reported.
    report = folder / "report"
    command = ["predict", str(work / "run"), str(folder), "--batch-size", "1"]
    output = ["--out", str(tmp_path / "p.csv"), "--report", str(report)]

    batches = FilePredictor.batches

    def interrupted(self, *args, **options):
        found = batches(self, *args, **options)
        yield from (next(found) for _ in range(2))
        raise KeyboardInterrupt

    monkeypatch.setattr(FilePredictor, "batches", interrupted)
    assert main([*command, *output]) == 130
    assert not (report / "index.html").exists()
    monkeypatch.undo()
    assert main([*command, *output, "--resume"]) == 3
    assert f"the report is {report / 'index.html'}" in capsys.readouterr().err
    page = Page(report / "index.html")
    assert_inert(page)
    shown = cards(page)
    assert sorted(shown) == sorted(["0.png", "1.png", "broken.png", hostile])
    assert [name for name, label in shown.items() if label == "unreadable"] == ["broken.png"]
    assert "The probabilities are not calibrated: the model has no calibration" in page.text

    before = (report / "index.html").read_text()
    assert main([*command, *output, "--resume"]) == 3
    assert cards(Page(report / "index.html")) == shown
    assert "is replaced" not in capsys.readouterr().err
    one_error(capsys, [*command, *output, "--resume", "--seed", "9"], "of another model or other")
    assert main([*command, *output]) == 3
    assert f"the earlier report in {report} is replaced" in capsys.readouterr().err
    assert len((report / "index.html").read_text()) == pytest.approx(len(before), abs=200)


def test_a_folder_that_has_another_page_is_an_error_before_any_work(work, tmp_path, capsys):
    (tmp_path / "index.html").write_text("mine")
    command = ["predict", "nowhere.pth", str(work / "images/test"), "--report", str(tmp_path)]
    one_error(capsys, command, "--report", "that is not of a report")
    assert (tmp_path / "index.html").read_text() == "mine"


def test_evaluate_reports_the_split_and_its_mistakes(work, tmp_path, capsys):
    command = [
        "evaluate",
        str(work / "run"),
        "--sampler",
        "ddim:2",
        "--sampler",
        "ddim:5",
        "--bootstrap",
        "20",
    ]
    report = tmp_path / "new" / "report"
    assert main([*command, "--report", str(report)]) == 0
    assert f"the report is {report / 'index.html'}" in capsys.readouterr().err
    page = Page(report / "index.html")
    assert_inert(page)
    for text in (
        "4 test images of 2 classes",
        "Accuracy by the number of steps",
        "dark",
        "ckpt.pth",
    ):
        assert text in page.text
    assert main([*command, "--report", str(report)]) == 0
    assert "is replaced" in capsys.readouterr().err
    (report / "index.html").write_text("mine")
    one_error(capsys, [*command, "--report", str(report)], "that is not of a report")
    assert (report / "index.html").read_text() == "mine"


def test_an_evaluation_replaces_all_pages_of_a_report_of_predictions(work, tmp_path, capsys):
    folder, report = work / "images/test", tmp_path / "report"
    assert main(["predict", str(work / "run"), str(folder), "--report", str(report)]) == 0
    shutil.copy(report / "index.html", report / "page-0002.html")
    (report / "page-0003.html").write_text("mine")
    capsys.readouterr()
    command = ["evaluate", str(work / "run"), "--batch-size", "8", "--bootstrap", "0"]
    assert main([*command, "--report", str(report)]) == 0
    assert f"the earlier report in {report} is replaced" in capsys.readouterr().err
    assert sorted(path.name for path in report.iterdir()) == ["index.html", "page-0003.html"]
    assert (report / "page-0003.html").read_text() == "mine"
    assert "ROC" in Page(report / "index.html").text


def test_train_ends_with_a_report_of_the_run(work, tmp_path, capsys, monkeypatch):
    page = Page(work / "run" / "report.html")
    assert_inert(page)
    assert "2 epochs of 2 classes: dark, light" in page.text

    def missing(module, *, extra, purpose):
        raise MissingPackageError(f"{purpose} needs {module}: pip install 'diffmic_fast[{extra}]'")

    monkeypatch.setattr(commands, "require", missing)
    out = tmp_path / "run"
    assert main(["train", "--config", str(work / "c.yml"), "--out", str(out)]) == 0
    assert "there is no report of the run: train: a report needs jinja2" in capsys.readouterr().err
    assert (out / "ckpt.pth").is_file() and not (out / "report.html").exists()
