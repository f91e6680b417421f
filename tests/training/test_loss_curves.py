"""Fifty joint steps of the published program and of ours: equal losses up to rounding."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmic_fast.config.run import RunConfig
from diffmic_fast.models import DiffMIC
from diffmic_fast.training.steps import Steps

SOURCE = Path(__file__).parents[2]


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The published program's joint step, from the benchmarks, which are not installed with the package."""
    if not (SOURCE / "benchmarks" / "published.py").exists():
        pytest.skip("the benchmarks are not beside the tests")
    monkeypatch.setattr(sys, "path", [*sys.path, str(SOURCE)])
    from benchmarks.published import Published

    return Published


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"), [(torch.float64, 50, 1e-9), (torch.float32, 50, 1e-3)]
)
def test_loss_curves_agree(
    published: Any, config: RunConfig, dtype: torch.dtype, steps: int, tolerance: float
) -> None:
    """Losses of both models in every step, and in float64 the running statistics after the last."""
    training = dataclasses.replace(
        config.training,
        ema_decay=None,
        encoder_learning_rate=1e-4,
        warmup_epochs=0.1,
        epochs=2,
        guidance_cosine=True,
    )
    torch.manual_seed(0)
    model = DiffMIC(config.model).to(dtype)
    theirs = published(copy.deepcopy(model), training, 7)
    ours = Steps(model, training, 7)
    generator = torch.Generator().manual_seed(1)
    first = []
    for number in range(steps):
        images = torch.randn(6, 3, 32, 32, generator=generator).to(dtype)
        labels = torch.randint(0, 3, (6,), generator=generator)
        epoch = 2 * number / steps
        expected, guidance = theirs.step(images, labels, epoch)
        found = ours.denoiser_step(images, labels, epoch)["loss"]
        assert found == pytest.approx(expected, abs=tolerance), number
        assert ours.guidance_step(images, labels, epoch / 2) == pytest.approx(
            guidance, abs=tolerance
        )
        first.append(expected)
    assert len(set(first)) == steps
    for name, value in theirs.model.state_dict().items():
        if dtype == torch.float64 and "running" in name:
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
