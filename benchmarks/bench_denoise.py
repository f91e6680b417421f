"""`denoise`: steps of a chain at the published size, F = 6144, C = 5, T = 1000.

Peers: the reference, which is the chain with the image encoder hoisted out, in stock PyTorch; the same compiled; and,
once, the published program's way, a ResNet-18 pass over the images at every step. Beside them, in the same rounds, the
two limits of the machine: reading the hidden weights once, and doing the two products' multiply-adds in registers.

The weights are those of a small denoiser (F = 256, fitted for some seconds to made-up features), every unit repeated 24
times with 1/24 of its weight behind it: the function, and so the behaviour of windows of steps, is the small model's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, measure
from diffmic_fast import _native
from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.models import ConditionalModel
from diffmic_fast.models.encoders import ImageEncoder
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights, StepTable, chain, predict_noise

SMALL, REPEATS, CLASSES, T, SIDE = 256, 24, 5, 1000, 224
FEATURES = SMALL * REPEATS
_LIMITS = ("limit: reading the weights", "limit: multiply-adds")


def fitted(steps: int = 300) -> DenoiserWeights:
    """The small denoiser, fitted to features whose first entries tell the class, and widened."""
    torch.manual_seed(0)
    model = ConditionalModel(CLASSES, T, SMALL, "resnet18")
    schedule = make_schedule("linear", T)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(steps):
        labels = torch.randint(CLASSES, (256,))
        y_0 = nn.functional.one_hot(labels, CLASSES).float()
        prior = (4 * y_0 + torch.randn(256, CLASSES)).softmax(dim=-1)
        t = torch.randint(T, (256,))
        noise = torch.randn(256, CLASSES)
        s = schedule.alpha_bar[t].sqrt()[:, None]
        y = s * y_0 + (1 - s) * prior + (1 - s.square()).sqrt() * noise
        eps = model.denoise_features(_features(labels), y, t, prior)
        loss = (eps - noise).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    weights = model.eval().weights()
    return DenoiserWeights(
        _widen(weights.conditioning, first=True),
        (_widen(weights.hidden[0]), _widen(weights.hidden[1])),
        _repeat(weights.output_weight, 1) / REPEATS,
        weights.output_bias.detach(),
        weights.eps,
    )


def _features(labels: Tensor) -> Tensor:
    x = torch.randn(len(labels), SMALL)
    x[:, :CLASSES] += 2 * nn.functional.one_hot(labels, CLASSES)
    return x


def _repeat(tensor: Tensor, dim: int) -> Tensor:
    return tensor.detach().repeat_interleave(REPEATS, dim)


def _widen(layer: ConditionalLayer, first: bool = False) -> ConditionalLayer:
    weight = _repeat(layer.weight, 0)
    return ConditionalLayer(
        weight if first else _repeat(weight, 1) / REPEATS,
        _repeat(layer.bias, 0),
        _repeat(layer.gamma, 1),
        *(_repeat(part, 0) for part in layer[3:]),
    )


def compiled_reference(
    features: Tensor, prior: Tensor, weights: DenoiserWeights, steps: StepTable
) -> Tensor:
    """The reference's chain with its evaluation of eps compiled."""
    predict = partial(_compiled, features, guidance=prior, weights=weights)
    return chain(lambda y, t: predict(y, timesteps=t), prior, steps)


@torch.compile(dynamic=False)
def _compiled(
    features: Tensor, y: Tensor, guidance: Tensor, weights: DenoiserWeights, timesteps: Tensor
) -> Tensor:
    return predict_noise(features, y, guidance, weights, timesteps)


def run(rounds: int) -> list[Case]:
    """Steps one after the other over 1, 32 and 256 rows, then 1000 steps of one row by windows."""
    weights, schedule = fitted(), make_schedule("linear", T)
    cases = []
    with torch.no_grad():
        for rows, steps in ((1, 40), (32, 8), (256, 2)):
            few = max(2, rounds if rows == 1 else rounds // 2)
            cases.append(_chain(weights, make_steps(schedule, "ddim", steps), rows, few))
        cases.append(_windows(weights, make_steps(schedule, "ddpm"), max(2, rounds // 8)))
    return cases


def _inputs(rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(CLASSES, (rows,))
    prior = (4 * nn.functional.one_hot(labels, CLASSES) + torch.randn(rows, CLASSES)).softmax(-1)
    return _repeat(_features(labels), 1), prior


def _limits(weights: DenoiserWeights, rows: int, steps: int) -> dict[str, Callable[[], object]]:
    extension, threads = _native.extension(), torch.get_num_threads()

    def read() -> None:
        for _ in range(steps):
            for layer in weights.hidden:
                extension.read_probe(layer.weight, threads)

    return {
        _LIMITS[0]: read,
        _LIMITS[1]: lambda: extension.multiply_add_probe(
            2 * FEATURES * FEATURES * rows * steps, threads
        ),
    }


def _chain(weights: DenoiserWeights, steps: StepTable, rows: int, rounds: int) -> Case:
    x, prior = _inputs(rows)
    count = len(steps.timesteps)
    call = partial(denoise, x, prior, prior, weights, steps, window=1)
    peers: dict[str, Callable[[], object]] = {
        "hoisted": partial(call, backend="reference", window=None),
        "hoisted, compiled": partial(compiled_reference, x, prior, weights, steps),
        "fp32": partial(call, backend="cpu"),
        "bf16": partial(call, backend="cpu", precision="bf16"),
        **_limits(weights, rows, count),
    }
    if rows == 32:
        encoder = ImageEncoder("resnet18", FEATURES).eval()
        images = torch.randn(rows, 3, SIDE, SIDE)
        one = make_steps(make_schedule("linear", T), "ddim", 1)

        def authors_step() -> None:
            features = encoder(images)
            denoise(features, prior, prior, weights, one, backend="reference")

        peers["published way, one step"] = authors_step
    timings = measure(peers, rounds)
    title = f"chain, {count} steps, {rows} rows, F = {FEATURES}"
    read, multiply = _LIMITS
    # bfloat16 weights are half the bytes; their products are float32 multiply-adds here.
    limits = {"fp32": {read: 1.0, multiply: 1.0}, "bf16": {read: 0.5, multiply: 1.0}}
    return Case(title, timings, "hoisted, compiled", limits=limits)


def _windows(weights: DenoiserWeights, steps: StepTable, rounds: int) -> Case:
    x, prior = _inputs(1)
    call = partial(denoise, x, prior, prior, weights, steps, backend="cpu")
    peers: dict[str, Callable[[], object]] = {
        "fp32, one after the other": partial(call, window=1),
        "fp32, windows": call,
        "bf16, one after the other": partial(call, window=1, precision="bf16"),
        "bf16, windows": partial(call, precision="bf16"),
    }
    title = f"1 row, {len(steps.timesteps)} steps, several at once"
    return Case(title, measure(peers, rounds), "fp32, one after the other")
