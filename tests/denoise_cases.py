"""Models, inputs and measures for the tests of `denoise`."""

from __future__ import annotations

import torch
from rounding import assert_within_rounding
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.diffusion import make_schedule
from diffmic_fast.ops.denoise import PRECISIONS_OF
from diffmic_fast.reference import denoise as reference
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights, StepTable

INSTRUCTIONS = _native.extension().denoise_instructions()
PRECISIONS = PRECISIONS_OF["cpu"]
T = 40
SCHEDULE = make_schedule("linear", T, 1e-3, 0.1)


def make_weights(
    features: int, classes: int, seed: int = 0, dtype=torch.float32
) -> DenoiserWeights:
    """Weights whose layers neither die nor explode, in a buffer full of not-a-numbers."""
    g = torch.Generator().manual_seed(seed)

    def strided(values: Tensor) -> Tensor:
        buffer = torch.full((values.shape[0] + 2, values.shape[1] + 5), float("nan"), dtype=dtype)
        buffer[1:-1, 2:-3] = values.to(dtype)
        return buffer[1:-1, 2:-3]

    def layer(width: int) -> ConditionalLayer:
        return ConditionalLayer(
            strided(torch.randn(features, width, generator=g) / width**0.5),
            torch.randn(features, generator=g).to(dtype) * 0.1,
            strided(torch.rand(T + 1, features, generator=g)),
            torch.rand(features, generator=g).to(dtype) + 0.5,
            torch.randn(features, generator=g).to(dtype) * 0.1,
            torch.randn(features, generator=g).to(dtype) * 0.1,
            torch.rand(features, generator=g).to(dtype) + 0.5,
        )

    return DenoiserWeights(
        layer(2 * classes),
        (layer(features), layer(features)),
        strided(torch.randn(classes, features, generator=g) / features**0.5),
        torch.randn(classes, generator=g).to(dtype) * 0.1,
        (1e-5, 1e-4, 1e-3),
    )


def make_inputs(rows: int, features: int, classes: int, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    wide = torch.full((rows, features + 3), float("nan"))
    wide[:, 1:-2] = torch.randn(rows, features, generator=g)
    labels = torch.randn(2, rows, classes, generator=g).softmax(dim=-1)
    return wide[:, 1:-2], labels[0], labels[1]


def weights_on(device: torch.device, weights: DenoiserWeights) -> DenoiserWeights:
    """The weights there, each in memory as strided as before."""

    def move(t: Tensor) -> Tensor:
        if t.ndim < 2 or t.device == device:
            return t.to(device)
        wide = torch.full((t.shape[0], t.shape[1] + 3), float("nan"), device=device)
        wide[:, 1:-2] = t
        return wide[:, 1:-2]

    layers = [
        ConditionalLayer(*map(move, layer)) for layer in (weights.conditioning, *weights.hidden)
    ]
    return DenoiserWeights(
        layers[0], (layers[1], layers[2]), move(weights.output_weight), move(weights.output_bias),
        weights.eps,
    )  # fmt: skip


def as_double(weights: DenoiserWeights) -> DenoiserWeights:
    return DenoiserWeights(
        ConditionalLayer(*(t.double() for t in weights.conditioning)),
        tuple(ConditionalLayer(*(t.double() for t in layer)) for layer in weights.hidden),  # type: ignore[arg-type]
        weights.output_weight.double(),
        weights.output_bias.double(),
        weights.eps,
    )


def exact(inputs, weights, steps: StepTable, noise: Tensor) -> Tensor:
    """The definition in float64, every state."""
    double = StepTable(steps.timesteps, *(c.double() for c in steps[1:-1]), steps.start)
    return reference.denoise(
        *(t.double() for t in inputs), as_double(weights), double, noise=noise.double(), trajectory=True
    )  # fmt: skip


def assert_states(found: Tensor, inputs, weights, steps: StepTable, noise: Tensor) -> None:
    """All states of a float32 chain err no more than rounding explains.

    A chain multiplies the errors of its first steps, those of its coefficients too, so one disturbed chain shows what
    all chains do, and its deviation need not be multiplied again.
    """

    def definition() -> list[Tensor]:
        return [exact(inputs, weights, steps, noise)]

    assert found.dtype == torch.float32
    assert_within_rounding([found], definition, ["states"], runs=1, factor=1)


def to_bfloat16(t: Tensor) -> Tensor:
    return t.float().bfloat16().double()


def to_float8(weight: Tensor) -> Tensor:
    """Weights rounded to e4m3 with one scale per output channel, amax / 448."""
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 448
    scale[scale == 0] = 1.0
    return (weight.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


def one_rounded_step(
    inputs, weights, steps: StepTable, noise: Tensor, rounded, rounded_weight=None
) -> Tensor:
    """The definition's chain of one step in float64, `rounded` applied to what the hidden layers multiply, and to the
    weights `rounded_weight` where it is given."""
    x, prior, guidance = (t.double() for t in inputs)
    w, t = as_double(weights), steps.timesteps
    y = prior + noise[0].double()
    h = x * reference.conditional_linear(
        torch.cat((y, guidance), dim=1), w.conditioning, t, eps=w.eps[0]
    )
    for layer, eps in zip(w.hidden, w.eps[1:], strict=True):
        layer = layer._replace(weight=(rounded_weight or rounded)(layer.weight))
        h = reference.conditional_linear(rounded(h), layer, t, eps=eps)
    noise_found = h @ w.output_weight.T + w.output_bias
    s, q = float(steps.sqrt_alpha_bar[0]), float(steps.sqrt_one_minus_alpha_bar[0])
    y0 = (y - (1 - s) * prior - q * noise_found) / s
    return steps.y0_weight[0] * y0 + steps.y_weight[0] * y + steps.prior_weight[0] * prior


def status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[key].split()[0]) * 1024


def peak() -> int:
    return status("VmHWM")


def current() -> int:
    return status("VmRSS")


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
