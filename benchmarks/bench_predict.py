"""Time of `predict` for 32 images in the APTOS2019 setting: total, guidance, encoder and chain.

224 pixels, ResNet-50 guidance, ResNet-18 encoder, F = 6144, C = 5, 60 truncated steps.

"Published way" is a re-implementation here of the published program's work: this package's modules in eager PyTorch,
float32, contiguous layout, BatchNorm not folded, the chain by the reference. It runs the guidance model twice, then at
each step the image encoder and the denoiser's layers. That takes minutes, and its steps are alike: one guidance pass
and one step are timed in every round, and its row is the sum of 2 of the first and 60 of the second. It is timed also
under `torch.autocast` in bfloat16, where the processor has such convolutions, and with
`torch.set_float32_matmul_precision("medium")`.

Weights and images are random, which costs the same; the chain is the native one in all its precisions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.harness import Maker, Setup, with_matmul_precision
from diffmic_fast import DiffMIC, DiffMICConfig
from diffmic_fast.diffusion import make_steps
from diffmic_fast.models import execution
from diffmic_fast.ops.denoise import PRECISIONS_OF
from diffmic_fast.reference.denoise import denoise

IMAGES, SIDE, STEPS = 32, 224, 60
PRECISIONS = PRECISIONS_OF["cpu"]
_PUBLISHED = "published way"
_AUTOCAST, _MEDIUM = f"{_PUBLISHED}, bf16 autocast", f"{_PUBLISHED}, matmul precision medium"
_GUIDANCE, _STEP = "one guidance pass", "one step"

Call = Callable[[], object]


def setups() -> Iterator[Setup]:
    """The whole, and its parts."""
    obstacle = execution.bfloat16_obstacle(torch.device("cpu"))
    ways = [_PUBLISHED, _MEDIUM] if obstacle else [_PUBLISHED, _AUTOCAST, _MEDIUM]
    peers: dict[str, Maker] = {
        f"{way}, {part}": partial(_published, way, part)
        for way in ways
        for part in (_GUIDANCE, _STEP)
    }
    peers |= {f"predict, {precision}": partial(_predict, precision) for precision in PRECISIONS}
    for part in ("guidance", "encoder"):
        peers[f"{part}, not folded"] = partial(_part, part, "fp32", False)
        peers[part] = partial(_part, part, "fp32", True)
        # Elsewhere it is float32, which is timed.
        if not obstacle:
            peers[f"{part}, bf16"] = partial(_part, part, "bf16", True)
    peers |= {f"chain, {precision}": partial(_chain, precision) for precision in PRECISIONS}
    yield Setup(
        f"predict, {IMAGES} images, {STEPS} truncated steps",
        peers,
        _PUBLISHED,
        effort=0.125,
        skipped={_AUTOCAST: obstacle} if obstacle else {},
        totals={way: {f"{way}, {_GUIDANCE}": 2, f"{way}, {_STEP}": STEPS} for way in ways},
    )


@cache
def _model() -> tuple[DiffMIC, Tensor]:
    torch.manual_seed(0)
    return DiffMIC(DiffMICConfig(classes=5)).eval(), torch.randn(IMAGES, 3, SIDE, SIDE)


def _predict(precision: str) -> Callable[..., object]:
    model, images = _model()
    return partial(
        model.predict, images, sampler="ddpm_truncated", steps=STEPS, precision=precision
    )


def _published(way: str, part: str) -> Call:
    model, images = _model()
    published = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    denoiser = published.denoiser
    prior = torch.full((IMAGES, model.config.classes), 1 / model.config.classes)
    one = make_steps(model.schedule, "ddpm_truncated", 1)

    def step() -> None:
        denoise(denoiser.encode(images), prior, prior, denoiser.weights(), one)

    work = partial(published.guidance, images) if part == _GUIDANCE else step
    call = torch.no_grad()(_not_folded(work))
    if way == _AUTOCAST:
        # A user's autocast block covers all steps, and casts weights once. Nested, so do these blocks.
        torch.autocast_increment_nesting()
        return torch.autocast("cpu", torch.bfloat16)(call)
    return with_matmul_precision("medium", call) if way == _MEDIUM else call


def _part(part: str, precision: str, folded: bool) -> Call:
    model, images = _model()
    method = model.guide if part == "guidance" else model.encode
    call = partial(method, images, precision=precision)
    return call if folded else _not_folded(call)


def _chain(precision: str) -> Call:
    model, images = _model()
    return partial(_predict(precision), guidance=model.guide(images), features=model.encode(images))


def _not_folded(call: Call) -> Call:
    return patch.object(execution, "_LEAST_PIXELS", 10**12)(call)
