"""The calibration of a run by several processes: that of a single one, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from process_groups import in_processes
from training_fixtures import write_images
from training_runs import make_config

from diffmic_fast.checkpoint import read_checkpoint
from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.sources import open_source
from diffmic_fast.training.calibration import calibrate_run
from diffmic_fast.training.datasets import make_dataset
from diffmic_fast.training.trainer import Trainer


def calibrate_in(rank: int, folder: Path, config: RunConfig) -> list[str]:
    lines: list[str] = []
    validation = make_dataset(config, open_source(config.data, "validation"), train=False)
    training = open_source(config.data, "train")
    calibrate_run(
        folder,
        config,
        training,
        validation,
        device=torch.device("cpu"),
        on_batch=lambda: None,
        say=lines.append,
        quiet=True,
    )
    return lines


@pytest.mark.filterwarnings("ignore:.*before the denoiser's first step")
def test_two_processes_fit_what_one_fits(tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_images(images / "train", 18)
    write_images(images / "test", 7, seed=1)  # 21 images, an odd number for two processes
    config = make_config(images)
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        Trainer(config, folder, quiet=True).save()
    calibrate_in(0, alone, config)
    lines = in_processes(2, calibrate_in, together, config)
    assert lines[0] == lines[1] and len(lines[0]) == 1
    one, other = (read_checkpoint(folder / "ckpt.pth").calibration for folder in (alone, together))
    assert one is not None and other is not None and other.images == 21
    assert other.diffusion.factor == pytest.approx(one.diffusion.factor, rel=1e-3)
    torch.testing.assert_close(other.scores, one.scores, rtol=1e-3, atol=1e-4)
    assert one.novelty is not None and other.novelty is not None
    torch.testing.assert_close(other.novelty.neighbours, one.novelty.neighbours)
