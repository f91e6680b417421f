"""`denoise` on a GPU, at the published size: the chain of `bench_denoise` beside what PyTorch makes of it there.

Peers: the reference with the encoder hoisted out, eager, compiled, and as a CUDA graph; once, the published program's
way, an encoder pass at every step. Limits of the device, in the same rounds: reading the two hidden weights once a step
(a sum over as many bytes), and the products' multiply-adds (a large matrix product in bfloat16).

`python -m benchmarks gpu --write` on a machine with an NVIDIA GPU; `make gpu` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench_denoise import FEATURES, SIDE, _inputs, _table, _weights
from benchmarks.harness import Maker, Setup
from diffmic_fast.models.encoders import ImageEncoder
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights, StepTable, chain, predict_noise

ROWS = (1, 8, 32, 64)
STEPS = 100
PRECISIONS = {"fp32": 4, "bf16": 2, "fp8": 1}  # bytes of a hidden weight
_READ, _MULTIPLY = "limit: reading the weights", "limit: multiply-adds, bf16"
_SIDE = 4096  # of the matrices whose product is timed


def setups(
    device: str = "cuda", rows: tuple[int, ...] = ROWS, steps: int = STEPS
) -> Iterator[Setup]:
    """Steps one after the other, over rows; then the steps of one row by windows."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks gpu: PyTorch finds no GPU here")
    for count in rows:
        yield _over_rows(device, count, steps)
    peers: dict[str, Maker] = {}
    for name in PRECISIONS:
        peers[f"{name}, one after the other"] = partial(_chain, device, 1, steps, name, 1)
        peers[f"{name}, windows"] = partial(_chain, device, 1, steps, name, None)
    title = f"1 row, {steps} steps, several at once, on {device}"
    yield Setup(title, peers, "fp32, one after the other", {"rows": 1, "steps": steps})


def _over_rows(device: str, rows: int, steps: int) -> Setup:
    peers: dict[str, Maker] = {
        "hoisted": partial(_hoisted, device, rows, steps),
        **{name: partial(_chain, device, rows, steps, name, 1) for name in PRECISIONS},
        _READ: partial(_read, device, steps),
        "published way, one step": partial(_published_step, device, rows),
    }
    limits = {"fp32": {_READ: 1.0}, "bf16": {_READ: 0.5}, "fp8": {_READ: 0.25}}
    if device == "cuda":
        peers["hoisted, compiled"] = partial(_compiled, device, rows, steps)
        peers["hoisted, CUDA graph"] = partial(_graphed, device, rows, steps)
        peers[_MULTIPLY] = partial(_multiply, device)
        for name in ("bf16", "fp8"):  # whose products are the same
            limits[name][_MULTIPLY] = 2 * FEATURES**2 * rows * steps / _SIDE**3
    return Setup(
        f"chain, {steps} steps, {rows} rows, F = {FEATURES}, on {device}",
        peers,
        "hoisted, compiled" if device == "cuda" else "hoisted",
        {"rows": rows, "steps": steps, "features": FEATURES},
        1.0,
        limits,
    )


def _finished(device: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call without gradients, until the device is done with it."""

    def run() -> None:
        with torch.no_grad():
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _on(device: str, rows: int) -> tuple[Tensor, Tensor, DenoiserWeights]:
    weights = _weights()
    layers = [
        ConditionalLayer(*(part.to(device) for part in layer))
        for layer in (weights.conditioning, *weights.hidden)
    ]
    there = DenoiserWeights(
        layers[0],
        (layers[1], layers[2]),
        weights.output_weight.to(device),
        weights.output_bias.to(device),
        weights.eps,
    )
    x, prior = _inputs(rows)
    return x.to(device), prior.to(device), there


def _chain(
    device: str, rows: int, steps: int, precision: str, window: int | None
) -> Callable[[], object]:
    x, prior, weights = _on(device, rows)
    backend = "cuda" if device == "cuda" else "cuda-emulated"
    options = {"backend": backend, "precision": precision, "window": window}
    return _finished(device, partial(denoise, x, prior, prior, weights, _table(steps), **options))


def _hoisted(device: str, rows: int, steps: int) -> Callable[[], object]:
    x, prior, weights = _on(device, rows)
    return _finished(
        device, partial(denoise, x, prior, prior, weights, _table(steps), backend="reference")
    )


def _predictor(device: str, rows: int) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    x, prior, weights = _on(device, rows)
    return lambda y, t: predict_noise(x, y, prior, weights, t), prior


def _compiled(device: str, rows: int, steps: int) -> Callable[[], object]:
    predict, prior = _predictor(device, rows)
    return _finished(device, partial(chain, torch.compile(predict), prior, _table(steps)))


def _graphed(device: str, rows: int, steps: int) -> Callable[[], object]:
    """eps as a CUDA graph, replayed at every step; the few operations of the step itself are launched."""
    predict, prior = _predictor(device, rows)
    y, t = prior.clone(), torch.zeros(1, dtype=torch.int64, device=device)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            predict(y, t)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        eps = predict(y, t)

    def replay(state: Tensor, timestep: Tensor) -> Tensor:
        y.copy_(state)
        t.copy_(timestep)
        graph.replay()
        return eps

    return _finished(device, partial(chain, replay, prior, _table(steps)))


def _published_step(device: str, rows: int) -> Callable[[], object]:
    """The image encoder, and a step."""
    _, prior, weights = _on(device, rows)
    encoder = ImageEncoder("resnet18", FEATURES).eval().to(device)
    images = torch.randn(rows, 3, SIDE, SIDE, device=device)
    one: StepTable = _table(1)

    def step() -> None:
        denoise(encoder(images), prior, prior, weights, one, backend="reference")

    return _finished(device, step)


def _read(device: str, steps: int) -> Callable[[], object]:
    """As many bytes as the hidden weights have in float32, once a step."""
    weights = torch.zeros(2, FEATURES, FEATURES, device=device)

    def read() -> None:
        for _ in range(steps):
            weights.sum()

    return _finished(device, read)


def _multiply(device: str) -> Callable[[], object]:
    """_SIDE^3 multiply-adds in bfloat16."""
    a = torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16)
    return _finished(device, partial(torch.mm, a, a))
