"""Long use: memory that does not grow, and chains whose bits depend on nothing but the image and the seed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffmic_fast.config.model import DiffMICConfig
from diffmic_fast.models import DiffMIC
from diffmic_fast.models.guidance import Guidance, GuidanceDetail

CONFIG = DiffMICConfig(
    classes=3, image_size=32, timesteps=20, feature_dim=64, encoder="test_resnet", guidance_trunk="test_resnet",
    crops=2, crop_size=16,
)  # fmt: skip

# Memory after a third of the calls, when caches are full and the allocator has its pools, and after all of them.
PREDICTIONS = """
import sys
sys.path.insert(0, "tests")
import torch
from denoise_cases import current
from test_endurance import CONFIG
from diffmic_fast.models import DiffMIC

torch.set_num_threads(1)
torch.manual_seed(0)
model = DiffMIC(CONFIG).eval()
images = torch.randn(4, 3, 32, 32)
samplers = [("ddim", 3), ("ddpm_truncated", 4), ("ddpm", None)]
count = int(sys.argv[1])
for i in range(count):
    sampler, steps = samplers[i % 3]
    model.predict(
        images[: 1 + i % 4], sampler=sampler, steps=steps, samples=1 + i % 3, seed=i, trajectory=i % 5 == 0,
        saliency=i % 7 == 0, precision=("fp32", "int8")[i % 2],
    )
    if i % 100 == 0:  # the packed weights change
        with torch.no_grad():
            model.denoiser.lin2.lin.weight.add_(1e-6)
    if i == count // 3:
        before = current()
print((current() - before) / 2**20)
"""
STEPS = """
import sys
sys.path.insert(0, "tests")
import torch
from denoise_cases import current
from test_endurance import CONFIG
from diffmic_fast.config.training import TrainingConfig
from diffmic_fast.models import DiffMIC
from diffmic_fast.training.steps import Steps

torch.set_num_threads(1)
torch.manual_seed(0)
model = DiffMIC(CONFIG)
training = TrainingConfig(epochs=2, guidance_epochs=1, draws=3, accumulation=2, prior_dropout=0.5)
steps = Steps(model, training, seed=0)
count = int(sys.argv[1])
for i in range(count):
    images, labels = torch.randn(4 + i % 9, 3, 32, 32), torch.arange(4 + i % 9) % 3
    steps.guidance_step(images, labels, i / count)
    steps.denoiser_step(images, labels, i / count)
    if i % 20 == 0:
        with steps.average.applied():
            model.predict(images, sampler="ddim", steps=2)
    if i == count // 3:
        before = current()
print((current() - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "count", "most"),
    [
        pytest.param(PREDICTIONS, 10_000, 8, id="10000 predictions"),
        pytest.param(STEPS, 300, 16, id="200 steps after 100"),
    ],
)
def test_memory_does_not_grow(program: str, count: int, most: float) -> None:
    """Less than `most` MiB in the last two thirds of the calls; a leak of a call's results would be more."""
    found = subprocess.run(
        [sys.executable, "-c", program, str(count)], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    print(f"{count} calls: {float(found.stdout):.2f} MiB")
    assert float(found.stdout) < most


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def some(detail: GuidanceDetail, rows: torch.Tensor) -> GuidanceDetail:
    logits = Guidance(*(each[rows] for each in detail.logits))
    return GuidanceDetail(logits, *(each[rows] for each in detail[1:]))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "precision",
    ["fp32", *(pytest.param(each, marks=pytest.mark.slow) for each in ("bf16", "int8"))],
)
def test_chains_of_512_images_have_the_same_bits_in_any_batch_and_order(precision: str) -> None:
    """In batches of 1, 7 and 64, shuffled, on one and on two threads."""
    torch.manual_seed(0)
    model = DiffMIC(CONFIG).eval()
    images = torch.randn(512, 3, 32, 32)
    detail, features = model.guide(images), model.encode(images)
    options = {
        "sampler": "ddim",
        "steps": 4,
        "eta": 0.5,
        "samples": 2,
        "seed": 5,
        "precision": precision,
    }
    whole = model.predict(images, guidance=detail, features=features, **options).samples
    assert whole.std(dim=0).min() > 0
    for number in (1, 2):
        torch.set_num_threads(number)
        for size in (1, 7, 64):
            order = torch.randperm(512)
            found = torch.empty_like(whole)
            for rows in order.split(size):
                found[rows] = model.predict(
                    images[rows], guidance=some(detail, rows), features=features[rows], **options
                ).samples
            assert torch.equal(found, whole), (number, size)
