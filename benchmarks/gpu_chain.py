"""A denoiser of any size with random weights, and its chain by definition in every precision.

Values are drawn on the CPU, so every device gets the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmic_fast.diffusion import make_schedule
from diffmic_fast.reference.conditional_linear import ConditionalLayer, conditional_linear
from diffmic_fast.reference.conditioning import conditioning
from diffmic_fast.reference.denoise import DenoiserWeights, StepTable, chain

T = 40
SCHEDULE = make_schedule("linear", T, 1e-3, 0.1)


def device_of(backend: str) -> torch.device:
    """The device of a backend's tensors; of "triton" the CPU, for its interpreter, if there is no GPU."""
    on_gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def make_weights(
    features: int, classes: int, device: torch.device, timesteps: int = T
) -> DenoiserWeights:
    """Random weights whose activations neither vanish nor grow."""
    g = torch.Generator().manual_seed(features)

    def layer(width: int) -> ConditionalLayer:
        parts = (
            torch.randn(features, width, generator=g) / width**0.5,
            torch.randn(features, generator=g) * 0.1,
            torch.rand(timesteps + 1, features, generator=g),
            torch.rand(features, generator=g) + 0.5,
            torch.randn(features, generator=g) * 0.1,
            torch.randn(features, generator=g) * 0.1,
            torch.rand(features, generator=g) + 0.5,
        )
        return ConditionalLayer(*(part.to(device) for part in parts))

    return DenoiserWeights(
        layer(2 * classes),
        (layer(features), layer(features)),
        (torch.randn(classes, features, generator=g) / features**0.5).to(device),
        (torch.randn(classes, generator=g) * 0.1).to(device),
    )


def make_inputs(
    rows: int, features: int, classes: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [rows, F], prior and guidance [rows, C]."""
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, features, generator=g)
    prior, guidance = torch.randn(2, rows, classes, generator=g).softmax(dim=-1)
    return x.to(device), prior.to(device), guidance.to(device)


def _to_bfloat16(t: Tensor) -> Tensor:
    return t.float().bfloat16().to(t.dtype)


def _to_float8(weight: Tensor) -> Tensor:
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 448
    rounded = (weight.float() / scale).to(torch.float8_e4m3fn)
    return rounded.to(weight.dtype) * scale.to(weight.dtype)


def _unchanged(t: Tensor) -> Tensor:
    return t


_Rounding = Callable[[Tensor], Tensor]
# What the two hidden products round, weights and activations (docs/algorithm.md, "Quantisation").
ROUNDINGS: dict[str, tuple[_Rounding, _Rounding]] = {
    "fp32": (_unchanged, _unchanged),
    "bf16": (_to_bfloat16, _to_bfloat16),
    "fp8": (_to_float8, _to_bfloat16),
}


def rounded_denoise(
    inputs: Sequence[Tensor],
    weights: DenoiserWeights,
    steps: StepTable,
    precision: str,
    dtype: torch.dtype,
    **noise: Any,
) -> Tensor:
    """y_0 [M, C] by the definition of `denoise`, evaluated in `dtype`.

    Args:
        inputs: features, prior and guidance.
        weights, steps: as in `denoise`.
        precision: a key of `ROUNDINGS`; the values that it rounds are rounded here, too.
        dtype: float64 or float32.
        noise: what addresses the noise, as in `denoise`.
    """
    of_weights, of_activations = ROUNDINGS[precision]
    x, prior, guidance = (t.to(dtype) for t in inputs)
    first, *hidden = (
        ConditionalLayer(*(t.to(dtype) for t in layer))
        for layer in (weights.conditioning, *weights.hidden)
    )
    hidden = [layer._replace(weight=of_weights(layer.weight)) for layer in hidden]
    output = weights.output_weight.to(dtype), weights.output_bias.to(dtype)

    def predict(y: Tensor, t: Tensor) -> Tensor:
        h = conditioning(x, y, guidance, first, t, eps=weights.eps[0])
        for layer, eps in zip(hidden, weights.eps[1:], strict=True):
            h = conditional_linear(of_activations(h), layer, t, eps=eps)
        return F.linear(h, *output)

    table = StepTable(steps.timesteps, *(c.to(dtype) for c in steps[1:-1]), steps.start)
    return chain(predict, prior, table, **noise)
