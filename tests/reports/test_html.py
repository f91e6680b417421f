"""What all reports have in common: numbers as text, lines of many classes, settings, interrupted writes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from report_cases import write_run

from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.reports.html import number, percent, write_page
from diffmic_fast.reports.settings import sampling_settings
from diffmic_fast.reports.svg import style
from diffmic_fast.reports.training_report import write_training_report


def test_numbers_that_are_not_defined_are_a_dash():
    for undefined in (None, math.nan):
        assert percent(undefined) == number(undefined) == "-"
    assert percent(0.125) == "12.5 %" and percent(0.125, 0) == "12 %"
    assert number(0.12345) == "0.123" and number(2, 1) == "2.0"


def test_lines_of_28_classes_differ():
    assert len({(style(i)["color"], str(style(i)["linestyle"])) for i in range(28)}) == 28


def test_settings_name_the_sampling():
    options = SamplingOptions("ddim", 5, samples=3, views=2, seed=7)
    found = dict(sampling_settings(options, Path("run") / "ckpt.pth"))
    assert found["Samples per image"] == "3" and found["Mirror images"] == "2"
    assert (found["Sampler"], found["Seed"]) == (options.method, "7")


def test_an_interrupted_write_keeps_the_earlier_page(tmp_path):
    path = write_training_report(write_run(tmp_path, []), "ab")
    before = path.read_bytes()

    def drawings():
        raise KeyboardInterrupt("stop")
        yield

    values = {
        "rows": [], "classes": ["a"], "totals": [], "drawings": drawings(), "configuration": "",
        "table": {"caption": "x", "columns": [], "rows": []},
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt, match="stop"):
        write_page(path, "training.html", values)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yml", "log.csv", "report.html"]
