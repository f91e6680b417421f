"""The demonstration, with a small model."""

import csv
import functools
import os
import signal

import pytest
from PIL import Image

from diffmic_fast import demo
from diffmic_fast.cli import main
from diffmic_fast.demo import run_demo

SMALL = """
data: {kind: synthetic_fundus, synthetic_size: 32, synthetic_per_class: 2,
       synthetic_test_per_class: 2}
model: {classes: 5, image_size: 32, timesteps: 60, feature_dim: 16, encoder: test_resnet,
        guidance_trunk: test_resnet, crops: 2, crop_size: 16}
training: {batch_size: 4, epochs: 1, guidance_epochs: 1, warmup_epochs: 0}
sampling: {sampler: ddpm_truncated, steps: 3}
"""


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "small.yml"
    path.write_text(SMALL)
    return str(path)


def test_demo_writes_every_file_that_it_returns(preset, tmp_path, capsys):
    paths = run_demo(tmp_path / "out", preset=preset, device="cpu")
    assert all(p.exists() for p in paths.values())
    out = capsys.readouterr().out
    assert out.count("synthetic") >= 2 and "guidance alone" in out
    with open(paths["predictions"], newline="") as file:
        assert len(list(csv.DictReader(file))) == 10
    with Image.open(paths["picture"]) as picture:
        assert picture.format == "PNG" and picture.width > 1000
    again = run_demo(tmp_path / "out", preset=preset, device="cpu", quiet=True)
    assert again == paths
    assert capsys.readouterr().out == ""


def test_an_interrupted_demo_resumes_with_the_same_command(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_demo", functools.partial(run_demo, preset=preset))
    command = ["demo", "--out", str(tmp_path / "out"), "--device", "cpu"]

    def interrupt(epoch, step):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "Trainer", functools.partial(demo.Trainer, on_step=interrupt))
        assert main(command) == 128 + signal.SIGTERM
    err = capsys.readouterr().err
    assert "interrupted in epoch 1 of 2, after 1 steps" in err
    assert err.endswith("ckpt.pth, go on with the same command\n") and "--resume" not in err
    assert main(command) == 0
    # The interrupted epoch resumed after its first step: every epoch has one row.
    with open(tmp_path / "out" / "run" / "log.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
