"""`predict`: 32 images in the APTOS2019 setting, 224 px, ResNet-50 guidance, ResNet-18 encoder, F = 6144, C = 5, 60
truncated steps; whole, and in its three parts.

The published program's way is a model of its work in eager PyTorch, float32, contiguous layout, nothing folded: the
guidance model twice, then at each step the image encoder and the denoiser's layers. It takes minutes, and its steps are
alike: one guidance pass and one step are timed in every round, and its row is 2 of the first and 60 of the second.

Weights and images are random, which costs the same; the chain is the native one in all precisions that it has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import astuple
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, Timing, measure
from diffmic_fast import DiffMIC, DiffMICConfig
from diffmic_fast.diffusion import make_steps
from diffmic_fast.models import inference
from diffmic_fast.ops.denoise import PRECISIONS, denoise

IMAGES, SIDE, STEPS = 32, 224, 60
_PUBLISHED = "published way"
_PARTS = (f"{_PUBLISHED}, one guidance pass", f"{_PUBLISHED}, one step")


def run(rounds: int) -> list[Case]:
    """Everything in the same rounds, an eighth of those asked for."""
    torch.manual_seed(0)
    model = DiffMIC(DiffMICConfig(classes=5)).eval()
    images = torch.randn(IMAGES, 3, SIDE, SIDE)
    with torch.no_grad():
        whole = {
            f"predict, {precision}": partial(
                model.predict, images, sampler="ddpm_truncated", steps=STEPS, precision=precision
            )
            for precision in PRECISIONS
        }
        peers = {**_published(model, images), **whole, **_parts(model, images)}
        timings = measure(peers, max(2, rounds // 8))
    guidance, step = (timings.pop(name) for name in _PARTS)
    published = Timing(
        *(2 * g + STEPS * s for g, s in zip(astuple(guidance)[:4], astuple(step)[:4], strict=True)),
        calls=step.calls,
    )
    title = f"predict, {IMAGES} images, {STEPS} truncated steps"
    rows = {_PUBLISHED: published} | {name: timings.pop(name) for name in whole}
    timings = {_PARTS[0]: guidance, _PARTS[1]: step, **timings}
    return [
        Case(title, rows, _PUBLISHED),
        Case(f"its parts, {IMAGES} images", timings, "guidance, not folded"),
    ]


def _published(model: DiffMIC, images: Tensor) -> dict[str, Callable[[], object]]:
    published = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    denoiser = published.denoiser
    prior = torch.full((IMAGES, model.config.classes), 1 / model.config.classes)
    one = make_steps(model.schedule, "ddpm_truncated", 1)

    def step() -> None:
        features = denoiser.encode(images)
        denoise(features, prior, prior, denoiser.weights(), one, backend="reference")

    calls = (partial(published.guidance, images), step)
    return {name: partial(_not_folded, call) for name, call in zip(_PARTS, calls, strict=True)}


def _parts(model: DiffMIC, images: Tensor) -> dict[str, Callable[[], object]]:
    detail, features = model.guide(images), model.encode(images)
    peers: dict[str, Callable[[], object]] = {}
    for name, call in (("guidance", model.guide), ("encoder", model.encode)):
        peers[f"{name}, not folded"] = partial(_not_folded, partial(call, images))
        peers[name] = partial(call, images)
        # Elsewhere it is float32, which was timed.
        if not inference.bfloat16_obstacle(images.device):
            peers[f"{name}, bf16"] = partial(call, images, precision="bf16")
    for precision in PRECISIONS:
        peers[f"chain, {precision}"] = partial(
            model.predict,
            images,
            sampler="ddpm_truncated",
            steps=STEPS,
            precision=precision,
            guidance=detail,
            features=features,
        )
    return peers


def _not_folded(call: Callable[[], object]) -> None:
    least, inference._LEAST_PIXELS = inference._LEAST_PIXELS, 10**12
    try:
        call()
    finally:
        inference._LEAST_PIXELS = least
