"""Training steps in the published setting: 32 images of 224 px, ResNet-18 encoder, F = 6144, ResNet-50 guidance, C = 5.

Peers: the published way (`benchmarks.published`), timed whole, also with its forward passes under `torch.autocast` in
bfloat16, where the processor has such convolutions, and with `torch.set_float32_matmul_precision("medium")`; and
`training.steps.Steps`. All begin with the same weights, and before anything is timed both losses are computed from the
same noise and compared. None keeps a moving average.

A denoiser step has the guidance's probabilities given; a joint step is the guidance's forward pass, a denoiser step and
a step of the guidance model. Memory is that of a process of its own for each peer.

The small sizes show what a call costs beside its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.harness import Maker, Setup, with_matmul_precision
from benchmarks.published import Published, published_loss
from diffmic_fast import DiffMIC, DiffMICConfig
from diffmic_fast.config.run import TrainingConfig
from diffmic_fast.models.encoders import Trunk
from diffmic_fast.models.execution import bfloat16_obstacle
from diffmic_fast.ops.conditional_linear import conditional_linear
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.ops.mmd import mmd
from diffmic_fast.ops.noise_losses import noise_losses
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.training.steps import Steps

BATCH, SIDE, CLASSES = 32, 224, 5
SMALL_BATCH, SMALL_FEATURES = 8, 64
_PUBLISHED = "published way"
_AUTOCAST, _MEDIUM = f"{_PUBLISHED}, bf16 autocast", f"{_PUBLISHED}, matmul precision medium"

Call = Callable[[], object]


def setups() -> Iterator[Setup]:
    """Steps of the denoiser alone and with the guidance model, and calls of small sizes."""
    obstacle = bfloat16_obstacle(torch.device("cpu"))
    for title, joint in (("denoiser step", False), ("joint step", True)):
        _compare(joint)
        peers: dict[str, Maker] = {
            _PUBLISHED: partial(_published, joint),
            _MEDIUM: partial(_published_medium, joint),
            "fp32": partial(_ours, joint, "fp32"),
            "fp32, recomputed": partial(_ours, joint, "fp32", recompute=True),
        }
        half = {
            _AUTOCAST: partial(_published, joint, autocast=True),
            "bf16": partial(_ours, joint, "bf16"),
        }
        if not obstacle:
            peers |= half
        yield Setup(
            f"{title}, {BATCH} images",
            peers,
            _PUBLISHED,
            effort=0.125,
            skipped=dict.fromkeys(half, obstacle) if obstacle else {},
            memory=True,
        )
    size = f"B = {SMALL_BATCH}, F = {SMALL_FEATURES}, forward and backward"
    for name, make in (
        ("conditional_linear", _layer),
        ("conditioning", _first),
        ("mmd", _mmd),
        ("noise_losses", _losses),
    ):
        peers = {backend: partial(make, backend) for backend in ("reference", "auto")}
        yield Setup(f"{name}, {size}", peers, "reference", effort=10.0)


# ---- whole steps ------------------------------------------------------------------------------


class _Given(nn.Module):
    """A guidance model that returns given logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of the three branches."""
        return tuple(self.logits.detach())


@cache
def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, SIDE, SIDE, generator=generator), torch.arange(BATCH) % CLASSES


def _model(joint: bool) -> DiffMIC:
    torch.manual_seed(0)
    model = DiffMIC(DiffMICConfig(classes=CLASSES))
    if not joint:
        given = _Given(torch.randn(3, BATCH, CLASSES, generator=torch.Generator().manual_seed(1)))
        given.ds_net = given.dn_resnet = Trunk("resnet18")  # never called
        model.guidance = given  # type: ignore[assignment]
    return model.train()


def _steps(steps: Steps | Published, joint: bool) -> Call:
    images, labels = _batch()

    def step() -> None:
        steps.denoiser_step(images, labels, 1.0)
        if joint:
            steps.guidance_step(images, labels, 0.0)

    return step


def _ours(joint: bool, precision: Literal["fp32", "bf16"], *, recompute: bool = False) -> Call:
    config = TrainingConfig(
        ema_decay=None, warmup_epochs=1.0, recompute=recompute, precision=precision
    )
    return _steps(Steps(_model(joint), config, seed=0), joint)


def _published(joint: bool, *, autocast: bool = False) -> Call:
    config = TrainingConfig(warmup_epochs=1.0)
    return _steps(Published(_model(joint), config, seed=0, autocast=autocast), joint)


def _published_medium(joint: bool) -> Call:
    return with_matmul_precision("medium", _published(joint))


def _compare(joint: bool) -> None:
    """Compare both ways' losses from the same weights and noise."""
    images, labels = _batch()
    with torch.no_grad():
        ours = _model(joint).loss(images, labels, generator=torch.Generator().manual_seed(3)).total
        theirs = published_loss(_model(joint), images, labels, torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- small sizes ------------------------------------------------------------------------------


def _small_layer(width: int) -> tuple[ConditionalLayer, Tensor]:
    torch.manual_seed(0)
    f = SMALL_FEATURES
    learned = (
        torch.randn(f, width),
        torch.randn(f),
        torch.rand(11, f),
        torch.rand(f),
        torch.rand(f),
    )
    parts = (part.requires_grad_() for part in learned)
    layer = ConditionalLayer(*parts, torch.zeros(f), torch.ones(f))
    return layer, torch.randint(0, 11, (SMALL_BATCH,))


def _backward(leaves: list[Tensor], value: Callable[[], Tensor]) -> Call:
    return lambda: torch.autograd.grad(value().sum(), leaves)


def _layer(backend: str) -> Call:
    layer, t = _small_layer(SMALL_FEATURES)
    h = torch.randn(3, SMALL_BATCH, SMALL_FEATURES).requires_grad_()
    return _backward(
        [h, *layer[:5]], lambda: conditional_linear(h, layer, t, training=True, backend=backend)
    )


def _first(backend: str) -> Call:
    layer, t = _small_layer(2 * CLASSES)
    x = torch.randn(SMALL_BATCH, SMALL_FEATURES).requires_grad_()
    y, guidance = torch.randn(2, 3, SMALL_BATCH, CLASSES)
    return _backward(
        [x, *layer[:5]],
        lambda: conditioning(x, y, guidance, layer, t, training=True, backend=backend),
    )


def _mmd(backend: str) -> Call:
    x, y = torch.randn(2, SMALL_BATCH, CLASSES)
    y.requires_grad_()
    return _backward([y], lambda: mmd(x, y, backend=backend))


def _losses(backend: str) -> Call:
    noise, predictions = torch.randn(SMALL_BATCH, CLASSES), torch.randn(3, SMALL_BATCH, CLASSES)
    predictions.requires_grad_()
    return _backward([predictions], lambda: noise_losses(noise, predictions, backend=backend))
