"""training.precision: "auto" is resolved once per run, by the processor, and a resumed run keeps it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffmic_fast.checkpoint import read_checkpoint
from diffmic_fast.config.run import TrainingConfig, read_config
from diffmic_fast.distributed.processes import current
from diffmic_fast.models import DiffMIC
from diffmic_fast.training import precision as module
from diffmic_fast.training.interruption import Interrupted
from diffmic_fast.training.precision import bfloat16_passes, resolve_precision
from diffmic_fast.training.steps import Steps
from diffmic_fast.training.trainer import Trainer
from tests.training_runs import assert_same_run, with_training

CPU = torch.device("cpu")


@pytest.fixture
def pretend(monkeypatch):
    """Sets the name of the processor's bfloat16 instructions, or "" for none."""

    def to_have(instructions):
        obstacle = "" if instructions else "none"
        monkeypatch.setattr(module, "bfloat16_instructions", lambda: instructions)
        monkeypatch.setattr(module, "bfloat16_obstacle", lambda _: obstacle)

    return to_have


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [("AMX", "bf16"), ("AVX-512", "bf16"), ("Arm", "fp32"), ("", "fp32")],
)
def test_auto_follows_the_processor(instructions, expected, config, pretend):
    pretend(instructions)
    auto = with_training(config, precision="auto")
    assert resolve_precision(auto, CPU, current(), None) == with_training(
        config, precision=expected
    )
    cuda = resolve_precision(auto, torch.device("cuda"), current(), None)
    assert cuda.training.precision == "fp32"
    for precision in ("fp32", "bf16"):
        asked = with_training(config, precision=precision)
        assert resolve_precision(asked, CPU, current(), None) is asked


def test_bf16_requires_the_instructions_on_all_processes(config, pretend):
    pretend("AMX")
    auto = with_training(config, precision="auto")
    for other, expected in ((True, "bf16"), (False, "fp32")):
        processes = SimpleNamespace(all_gather=lambda own, other=other: [own, other])
        found = resolve_precision(auto, CPU, processes, None)
        assert found.training.precision == expected


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("begun", ["AVX-512", ""])
def test_a_resumed_run_keeps_its_precision(begun, config, pretend, tmp_path, capsys):
    """Also on another processor; the same bits as an unbroken run of the explicit precision."""
    chosen = "bf16" if begun else "fp32"
    asked = with_training(config, precision=chosen)
    Trainer(asked, tmp_path / "whole", quiet=True).fit()

    auto = with_training(config, precision="auto")
    out = tmp_path / "broken"

    def stop(epoch, step):
        if (epoch, step) == (1, 2):
            trainer.interruption.signum = 2

    pretend(begun)
    trainer = Trainer(auto, out, on_step=stop)
    with pytest.raises(Interrupted):
        trainer.fit()
    assert f"training.precision auto: {chosen}" in capsys.readouterr().err
    assert read_config(out / "config.yml").training.precision == chosen
    path = out / "ckpt.pth"
    assert read_checkpoint(path).extras["config"]["training"]["precision"] == chosen

    pretend("" if begun else "AVX-512")
    trainer = Trainer(auto, out, resume=path, quiet=True)
    assert trainer.config.training.precision == chosen
    assert trainer.steps.config.precision == chosen
    trainer.fit()
    assert_same_run(tmp_path / "whole", out)
    other = with_training(config, precision="fp32" if begun else "bf16")
    with pytest.raises(ValueError, match=r"training.precision: .* in the checkpoint"):
        Trainer(other, out, resume=path, quiet=True)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (1, 0), (3, 2)])
@pytest.mark.parametrize("side", [1, 2])
def test_weight_gradients_of_single_pixel_convolutions(stride, kernel, padding, side):
    """The error of bfloat16 is its rounding, and the same in every pass."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 64, side, side, generator=generator)
    layer = nn.Conv2d(64, 48, kernel, stride, padding).to(memory_format=torch.channels_last)
    exact = layer(x)
    upper = torch.randn(exact.shape, generator=generator)
    (wanted,) = torch.autograd.grad(exact, layer.weight, upper)
    found = []
    for _ in range(4):
        with bfloat16_passes(CPU):
            result = layer(x)
        assert result.dtype == torch.bfloat16 and result.shape == exact.shape
        found += torch.autograd.grad(result, layer.weight, upper.bfloat16())
    assert float((found[0] - wanted).norm()) < 0.02 * float(wanted.norm())
    assert all(torch.equal(found[0], other) for other in found)


def test_steps_reject_auto(config):
    model = DiffMIC(config.model)
    with pytest.raises(ValueError, match="precision must be fp32 or bf16, got auto"):
        Steps(model, dataclasses.replace(config.training, precision="auto"), seed=0)


@pytest.mark.parametrize("name", ["pmg2000", "aptos2019", "ham10000"])
def test_presets_with_published_settings_are_in_float32(name):
    assert read_config(name).training.precision == "fp32"
    assert TrainingConfig().precision == "fp32"
