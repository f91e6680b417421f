"""Progress on standard error: few lines in a file, a bar on a terminal."""

from __future__ import annotations

import io
import sys

from diffmic_fast import progress_bar
from diffmic_fast.progress_bar import INTERVAL, ProgressBar


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress_bar.time, "monotonic", lambda: self.now)


def test_a_file_has_a_line_now_and_then(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with ProgressBar("predict", 5000, 1000) as bar:
        for _ in range(30):
            clock.now += INTERVAL / 10
            bar.update(60)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "predict: 1,600 of 5,000 images, 20.0 images/s, 02:50 left",
        "predict: 2,200 of 5,000 images, 20.0 images/s, 02:20 left",
        "predict: 2,800 of 5,000 images, 20.0 images/s, 01:50 left",
    ]


def test_a_short_command_and_a_quiet_one_write_nothing(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with ProgressBar("evaluate", 10) as bar:
        clock.now += INTERVAL / 2
        bar.update(10)
    with ProgressBar("evaluate", 10, quiet=True) as bar:
        clock.now += 2 * INTERVAL
        bar.set_postfix(loss="1")
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar("predict", 10) as bar:
        bar.update(10)
        bar.set_postfix(loss="1")
    text = terminal.getvalue()
    assert "predict" in text and "0/10" in text and "\n" not in text
