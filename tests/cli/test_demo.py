"""The demonstration, made small."""

import csv

import pytest
from PIL import Image

from diffmic_fast.training.demo import run_demo

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


def test_demo_makes_everything_it_names(preset, tmp_path, capsys):
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
