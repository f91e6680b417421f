"""Peers of `denoise` in stock PyTorch, each a line or two of a user's code.

All run the reference's chain, whose states are float32, with another evaluation of eps:

- fp32: the reference itself, or compiled, or compiled with `torch.set_float32_matmul_precision("medium")`, which lets
  oneDNN compute products in bfloat16. On Zen 4 it stays with float32 (an error of 5e-6 where bfloat16 has 1e-2), and is
  faster than MKL all the same, twice as fast at 8 rows;
- bf16: weights, features and activations after `.bfloat16()`, so the products are oneDNN's;
- int8: linear layers after `torch.ao.quantization.quantize_dynamic`: int8, with one scale per weight and one per call
  for the activations. torchao's `Int8DynamicActivationInt8WeightConfig`, its designated successor, was slower at 1, 5
  and 32 rows, so it is not timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmic_fast.reference.conditional_linear import ConditionalLayer, conditional_norm
from diffmic_fast.reference.denoise import DenoiserWeights, StepTable, chain, predict_noise


@torch.compile(dynamic=False)
def _compiled(
    features: Tensor, y: Tensor, guidance: Tensor, weights: DenoiserWeights, timesteps: Tensor
) -> Tensor:
    return predict_noise(features, y, guidance, weights, timesteps)


def floating(
    features: Tensor,
    prior: Tensor,
    weights: DenoiserWeights,
    steps: StepTable,
    *,
    compiled: bool = False,
) -> Callable[[], Tensor]:
    """The chain in the weights' dtype.

    Args:
        features: [M, F] float32.
        prior: [M, C] float32, also the guidance.
        weights: all float32, or all bfloat16.
        steps: the sampler.
        compiled: compile the evaluation of eps.
    """
    dtype = weights.output_weight.dtype
    x, guidance = features.to(dtype), prior.to(dtype)
    predict = _compiled if compiled else predict_noise

    def eps(y: Tensor, timesteps: Tensor) -> Tensor:
        return predict(x, y.to(dtype), guidance, weights, timesteps).float()

    return torch.no_grad()(partial(chain, eps, prior, steps))


def cast(
    weights: DenoiserWeights, dtype: torch.dtype | None = None, device: str | None = None
) -> DenoiserWeights:
    """Every weight in another dtype or on another device, as by `nn.Module.to`."""

    def layer(of: ConditionalLayer) -> ConditionalLayer:
        return ConditionalLayer(*(part.to(device, dtype) for part in of))

    return DenoiserWeights(
        layer(weights.conditioning),
        (layer(weights.hidden[0]), layer(weights.hidden[1])),
        weights.output_weight.to(device, dtype),
        weights.output_bias.to(device, dtype),
        weights.eps,
    )


def products(rows: int, weights: DenoiserWeights, steps: int) -> Callable[[], None]:
    """The two hidden products [rows, F] x [F, F] of each step alone, in the weights' dtype."""
    first, second = (layer.weight for layer in weights.hidden)
    h = torch.randn(rows, len(first)).to(first.dtype)

    def multiply() -> None:
        for _ in range(steps):
            F.linear(h, first)
            F.linear(h, second)

    return torch.no_grad()(multiply)


class _Denoiser(nn.Module):
    """The weights as modules: quantisation replaces `nn.Linear`."""

    def __init__(self, weights: DenoiserWeights) -> None:
        super().__init__()
        self.layers = (weights.conditioning, *weights.hidden)
        self.eps = weights.eps
        parts = [(layer.weight, layer.bias) for layer in self.layers]
        parts.append((weights.output_weight, weights.output_bias))
        self.linears = nn.ModuleList(_linear(*part) for part in parts)

    def forward(self, features: Tensor, y: Tensor, guidance: Tensor, timesteps: Tensor) -> Tensor:
        """eps [M, C], as `predict_noise`."""
        h = torch.cat((y, guidance), dim=-1)
        for i, (layer, eps) in enumerate(zip(self.layers, self.eps, strict=True)):
            h = conditional_norm(self.linears[i](h), layer, timesteps, eps=eps)
            h = features * h if i == 0 else h
        return self.linears[3](h)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    return linear.eval()


def skipped() -> dict[str, str]:
    """Peers that this torch lacks, and why."""
    try:
        _quantized(nn.Sequential(nn.Linear(4, 4)))
    except (ImportError, AttributeError, RuntimeError) as error:
        return {"stock int8": f"torch.ao.quantization.quantize_dynamic: {error}"}
    return {}


def int8(
    features: Tensor, prior: Tensor, weights: DenoiserWeights, steps: StepTable
) -> Callable[[], Tensor]:
    """The chain with dynamically quantised linear layers; arguments as those of `floating`."""
    model = _int8_model(weights)
    return torch.no_grad()(partial(chain, lambda y, t: model(features, y, prior, t), prior, steps))


@cache
def _int8_model(weights: DenoiserWeights) -> nn.Module:
    return _quantized(_Denoiser(weights).eval())


def _quantized(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
