"""The page of a training run."""

from __future__ import annotations

import pytest
from report_cases import write_run
from report_pages import HOSTILE, Page, assert_inert

from diffmic_fast.reports.training_report import write_training_report


def test_a_run_of_two_phases_with_validation(tmp_path):
    validation = {f"validation_{name}": 0.25 for name in ("accuracy", "macro_f1", "kappa", "ece")}
    run = write_run(
        tmp_path,
        [
            {"phase": "guidance", "guidance_loss": 1.5},
            {"phase": "guidance", "guidance_loss": 1.25},
            {"phase": "joint", "loss": 0.75, "guidance_loss": 1.0, "learning_rate": 0.001},
            {"phase": "joint", "loss": 0.5, "learning_rate": 0.0, **validation},
        ],
    )
    page = Page(write_training_report(run, ["a", HOSTILE[1]]))
    assert_inert(page)
    assert (run / "report.html").is_file()
    for text in (
        "4 epochs of 2 classes", "3 min 20 s", "2.0 images per second", "Validation: accuracy 25.0 %",
        "guidance 1 to 2 1.2500 1 min 40 s 2.0", "joint 3 to 4 0.5000", "Learning rate", HOSTILE[0],
        "Throughput", "3 1 0.75",
    ):  # fmt: skip
        assert text in page.text, text
    assert len(page.all("svg", role="img")) == 4


def test_the_tiles_have_the_last_measures_and_the_hours(tmp_path):
    rows = [
        {"phase": "joint", "loss": 0.5, "seconds": 4000.0, **measures(accuracy)}
        for accuracy in (0.25, 0.75)
    ]
    page = Page(write_training_report(write_run(tmp_path, [*rows, {"phase": "joint"}]), "ab"))
    for text in ("2 h 14 min", "Validation: accuracy 75.0 % epoch 2", "Validation: macro F1 0.750"):
        assert text in page.text, text


def measures(value):
    names = ("accuracy", "macro_f1", "kappa", "balanced_accuracy", "auc_ovo", "ece")
    return {f"validation_{name}": value for name in names}


def test_a_run_without_validation_and_one_without_epochs(tmp_path):
    page = Page(
        write_training_report(
            write_run(tmp_path / "a", [{"phase": "encoder", "encoder_loss": 0.5}]), "ab"
        )
    )
    assert "1 epoch of 2 classes: a, b" in page.text and "Validation:" not in page.text
    page = Page(write_training_report(write_run(tmp_path / "b", []), "ab"))
    assert "0 epochs" in page.text and not page.all("svg")
    with pytest.raises(OSError, match=r"log\.csv"):
        write_training_report(tmp_path / "c", "ab")
