"""The calibration after the last epoch: both checkpoints, interruption, resumption, and runs without one."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import write_images
from training_runs import assert_same_run, flat, make_config, with_training

from diffmic_fast.checkpoint import load_model, read_checkpoint, weights_digest
from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.sources import open_source
from diffmic_fast.training import calibration as module
from diffmic_fast.training.datasets import make_dataset
from diffmic_fast.training.interruption import Interrupted
from diffmic_fast.training.trainer import Trainer


@pytest.fixture(scope="module")
def calibrated_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """60 training and 27 validation images."""
    root = tmp_path_factory.mktemp("calibrated")
    write_images(root / "train", 20)
    write_images(root / "test", 9, seed=1)
    config = with_training(make_config(root), batch_size=20)
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, samples=2))


@pytest.fixture(scope="module")
def finished(calibrated_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    Trainer(calibrated_config, out, quiet=True).fit()
    return out


def test_both_checkpoints_are_calibrated_for_their_own_weights(finished, calibrated_config):
    for name in ("ckpt.pth", "ckpt_best.pth"):
        model, _ = load_model(finished / name)
        assert model.calibration is not None, name
        assert model.calibration.weights == weights_digest(model)
        assert (model.calibration.images, model.calibration.samples) == (27, 2)
        assert model.calibration.novelty is not None
    sampling = calibrated_config.sampling
    images = torch.randn(2, 3, 32, 32)
    found = model.predict(images, sampler=sampling.sampler, steps=sampling.steps, samples=2)
    assert found.calibrated


def test_the_guidance_files_have_no_calibration(finished):
    for name in ("aux_ckpt.pth", "aux_ckpt_best.pth"):
        parts = torch.load(finished / name, weights_only=True)
        assert len(parts) == 2 and "diffmic_fast" not in parts[1]


def test_a_resumed_finished_run_fits_a_missing_calibration(finished, calibrated_config, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for path in finished.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    parts = torch.load(out / "ckpt.pth", weights_only=True)
    del parts[1]["diffmic_fast"]["calibration"]
    torch.save(parts, out / "ckpt.pth")
    Trainer(calibrated_config, out, quiet=True, resume=out / "ckpt.pth").fit()
    assert_same_run(finished, out)


def test_an_interruption_leaves_valid_checkpoints(
    finished, calibrated_config, tmp_path, monkeypatch
):
    seen = []
    calibrate = module.calibrate

    def striking(*args: Any, on_batch: Any, **named: Any) -> Any:
        def strike(images: int) -> None:
            seen.append(images)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            on_batch(images)

        return calibrate(*args, on_batch=strike, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, "calibrate", striking)
        with pytest.raises(
            Interrupted, match=r"calibration after the last epoch; saved .*ckpt\.pth$"
        ):
            Trainer(calibrated_config, tmp_path, quiet=True).fit()
    assert len(seen) == 3
    for name in ("ckpt.pth", "ckpt_best.pth"):
        assert load_model(tmp_path / name)[0].calibration is None
    Trainer(calibrated_config, tmp_path, quiet=True, resume=tmp_path / "ckpt.pth").fit()
    assert_same_run(finished, tmp_path)
    one, other = (
        flat(torch.load(p / "ckpt_best.pth", weights_only=True)) for p in (finished, tmp_path)
    )
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key


def test_more_training_leaves_the_calibration_out(finished, calibrated_config, tmp_path):
    """A checkpoint that a longer run writes has other weights."""
    trainer = Trainer(calibrated_config, tmp_path, quiet=True, resume=finished / "ckpt.pth")
    trainer.save()
    assert read_checkpoint(tmp_path / "ckpt.pth").calibration is None


@pytest.mark.parametrize("case", ["no validation", "few", "no denoiser"])
def test_runs_without_a_calibration_say_why(config, calibrated_config, tmp_path, capsys, case):
    reason = {
        "no validation": "there are no validation images",
        "few": "there must be at least 20 validation images, got 6",
        "no denoiser": "the denoiser was not trained",
    }[case]
    if case == "no validation":
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, validation_table=None)
        )
    elif case == "no denoiser":
        config = with_training(calibrated_config, epochs=0)
    Trainer(config, tmp_path).fit()
    assert capsys.readouterr().err.splitlines()[-1] == f"probabilities are not calibrated: {reason}"
    assert read_checkpoint(tmp_path / "ckpt.pth").calibration is None


def test_the_fit_is_reported_and_draws_nothing(finished, calibrated_config, tmp_path):
    parts = torch.load(finished / "ckpt.pth", weights_only=True)
    del parts[1]["diffmic_fast"]["calibration"]
    torch.save(parts, tmp_path / "ckpt.pth")
    data = calibrated_config.data
    validation = make_dataset(calibrated_config, open_source(data, "validation"), train=False)
    lines: list[str] = []
    states = random.getstate(), torch.get_rng_state()
    module.calibrate_run(
        tmp_path,
        calibrated_config,
        open_source(data, "train"),
        validation,
        device=torch.device("cpu"),
        on_batch=lambda: None,
        say=lines.append,
        quiet=True,
    )
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert len(lines) == 1
    assert lines[0].startswith("ckpt.pth: temperature scaling, fitted on 27 validation images; ")
