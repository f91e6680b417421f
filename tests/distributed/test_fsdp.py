"""Runs with weights sharded over two processes (`training.fsdp`) against runs with replicated ones."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from process_groups import in_processes
from torch import Tensor
from training_runs import TOGETHER, assert_same_run, rows, with_training

from diffmic_fast.checkpoint import NAME, load_model
from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion import make_steps as make_table
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.distributed.fsdp import gather_state, gathered, local_shard, shard_parameters
from diffmic_fast.distributed.processes import Processes
from diffmic_fast.inference.evaluate import evaluate
from diffmic_fast.models import DiffMIC, DiffMICConfig
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.training.datasets import make_dataset
from diffmic_fast.training.interruption import Interrupted
from diffmic_fast.training.trainer import Trainer


def run_both(rank: int, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Replicated and sharded runs, the sharded one also interrupted and resumed; its last validation."""
    found: dict[str, Any] = {}
    Trainer(config, folder / "replicated", quiet=True).fit()
    config = with_training(config, fsdp=True)
    trainer = Trainer(config, folder / "sharded", quiet=True)
    trainer.fit()
    assert trainer.last_evaluation is not None
    found["last"] = [r.probabilities for r in trainer.last_evaluation.results]

    def stop(epoch: int, step: int) -> None:
        if (epoch, step) == (2, 1) and rank == 1:  # weights and averages differ
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        Trainer(config, folder / "broken", quiet=True, on_step=stop).fit()
    Trainer(config, folder / "broken", resume=folder / "broken" / NAME, quiet=True).fit()
    return found


@pytest.mark.slow
def test_a_sharded_run_matches_a_replicated_one(shared_config: RunConfig, tmp_path: Path) -> None:
    """The same log and checkpoint; a validation sees the weights of its epoch."""
    config = with_training(shared_config, batch_size=4, **TOGETHER)
    last = in_processes(2, run_both, config, tmp_path)[0]["last"]
    plain, sharded = (tmp_path / name for name in ("replicated", "sharded"))
    for a, b in zip(rows(sharded), rows(plain), strict=True):
        for key in ("loss", "guidance_loss", "noise_loss", "mmd_global"):
            assert a[key] == b[key] or float(a[key]) == pytest.approx(float(b[key]), rel=0.02), key
    assert_same_run(sharded, tmp_path / "broken")
    files = [torch.load(folder / NAME, weights_only=True) for folder in (sharded, plain)]
    assert describe(files[0]) == describe(files[1])
    model, _ = load_model(sharded / NAME)
    dataset = make_dataset(config, open_source(config.data, "validation"), train=False)
    s = config.sampling
    again = evaluate(model, dataset, [SamplingOptions.from_config(s)], batch_size=s.batch_size)
    for result, seen in zip(again.results, last, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(result.probabilities), torch.as_tensor(seen), rtol=1e-4, atol=1e-5
        )


def describe(value: Any) -> Any:
    """Keys, types and shapes of the content of a checkpoint."""
    if isinstance(value, dict):
        return {key: describe(each) for key, each in value.items() if key not in ("fsdp", "random")}
    if isinstance(value, (list, tuple)):
        return [type(value), *map(describe, value)]
    return (type(value), *((value.shape, value.dtype) if isinstance(value, Tensor) else ()))


@pytest.mark.slow
def test_gathered_weights_are_read_anew() -> None:
    """Caches of weights compare versions, which an all-gather does not change by itself."""
    values = in_processes(2, run_chains)
    for first, second, expected, *_ in values:
        assert not torch.equal(first, second)
        torch.testing.assert_close(second, expected)
    # Rank 0 has broadcast its weights.
    drawn = [each[3] for each in values]
    assert not torch.equal(*drawn) and torch.equal(drawn[0] * 1.5, values[0][4])


def run_chains(rank: int) -> list[Tensor]:
    """A chain, one after the weights have changed, and what that should be."""
    torch.manual_seed(rank)
    model = DiffMIC(
        DiffMICConfig(classes=3, feature_dim=32, image_size=32, crop_size=16, timesteps=8)
    )
    drawn = model.denoiser.lin2.lin.weight.detach().clone()
    torch.manual_seed(2)
    features, prior = torch.randn(4, 32), torch.full((4, 3), 1 / 3)
    steps = make_table(model.schedule, "ddpm")

    def chain() -> Tensor:
        with gathered(model.denoiser), torch.no_grad():
            versions.append(model.denoiser.lin2.lin.weight._version)
            return denoise(features, prior, prior, model.denoiser.weights(), steps, seed=1).clone()

    model.eval()
    versions: list[int] = []
    shard_parameters(model.denoiser)
    found = [chain()]
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            local_shard(parameter).mul_(1.5)
    found.append(chain())
    assert versions[1] > versions[0]
    state = gather_state(dict(model.denoiser.state_dict()), Processes(0, 2))
    twin = DiffMIC(model.config).denoiser.eval()
    twin.load_state_dict(state)
    with torch.no_grad():
        found.append(denoise(features, prior, prior, twin.weights(), steps, seed=1))
    return [*found, drawn, twin.lin2.lin.weight.detach()]
