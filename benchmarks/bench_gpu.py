"""`denoise` on a GPU at the published size: the chain of `bench_denoise` beside PyTorch's there.

Peers: the reference with the encoder hoisted out, eager, compiled, and as a CUDA graph, in float32 and in bfloat16; one
step of the published way, with its encoder pass. Limits of the device, in the same rounds: reading the two hidden
weights once per step (a sum over as many bytes), and the products' multiply-adds (a large matrix product in bfloat16).
Weights are random, except for windows, whose number of sweeps depends on the model. The published way and the model of
the windows need torchvision and pydantic.

`python -m benchmarks gpu --write` on a machine with an NVIDIA GPU; `make gpu-time` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.bench_denoise import (
    CLASSES,
    FEATURES,
    T,
    inputs,
    published_step,
    step_table,
    weights,
)
from benchmarks.denoise_peers import cast
from benchmarks.gpu_chain import make_weights
from benchmarks.harness import Maker, Setup, finished
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.reference.denoise import DenoiserWeights, chain, predict_noise

ROWS = (1, 8, 32, 64)
STEPS = 100
PRECISIONS = {"fp32": 4, "bf16": 2, "fp8": 1}  # bytes of a hidden weight
_READ, _MULTIPLY = "limit: reading the weights", "limit: multiply-adds, bf16"
_PUBLISHED = "published way, one step"
_STOCK = {"hoisted": torch.float32, "hoisted bf16": torch.bfloat16}
_SIDE = 4096  # of the matrices whose product is timed

Call = Callable[[], object]


def setups(
    device: str = "cuda", rows: tuple[int, ...] = ROWS, steps: int = STEPS
) -> Iterator[Setup]:
    """Sequential steps over the number of rows; then the steps of one row in windows."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks gpu: PyTorch finds no GPU here")
    for count in rows:
        yield _over_rows(device, count, steps)
    if reason := _without_models():
        print(f"benchmarks gpu: without windows: {reason}")
        return
    peers: dict[str, Maker] = {}
    for name in PRECISIONS:
        peers[f"{name}, one after the other"] = partial(_chain, device, 1, steps, name, 1, True)
        peers[f"{name}, windows"] = partial(_chain, device, 1, steps, name, None, True)
    title = f"1 row, {steps} steps, several at once, on {device}"
    yield Setup(title, peers, "fp32, one after the other", {"rows": 1, "steps": steps})


def _over_rows(device: str, rows: int, steps: int) -> Setup:
    peers: dict[str, Maker] = {
        **{name: partial(_chain, device, rows, steps, name, 1) for name in PRECISIONS},
        _READ: partial(_read, device, steps),
    }
    for name, dtype in _STOCK.items():
        peers[name] = partial(_eager, device, rows, steps, dtype)
        if device == "cuda":
            peers[f"{name}, compiled"] = partial(_compiled, device, rows, steps, dtype)
            peers[f"{name}, CUDA graph"] = partial(_graphed, device, rows, steps, dtype)
    skipped = {}
    if reason := _without_models():
        skipped[_PUBLISHED] = reason
    else:
        peers[_PUBLISHED] = lambda: finished(device, published_step(rows, device))
    limits = {"fp32": {_READ: 1.0}, "bf16": {_READ: 0.5}, "fp8": {_READ: 0.25}}
    if device == "cuda":
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
        skipped=skipped,
        optional=tuple(name for name in peers if name.startswith(tuple(_STOCK))),
    )


def _without_models() -> str:
    """Why `diffmic_fast.models` cannot be imported; "" if it can."""
    try:
        import diffmic_fast.models  # noqa: F401
    except ModuleNotFoundError as error:
        return f"the models cannot be imported: {error}"
    return ""


def _on(device: str, rows: int, fitted: bool = False) -> tuple[Tensor, Tensor, DenoiserWeights]:
    x, prior = inputs(rows)
    some = weights() if fitted else _random_weights()
    return x.to(device), prior.to(device), cast(some, device=device)


@cache
def _random_weights() -> DenoiserWeights:
    return make_weights(FEATURES, CLASSES, torch.device("cpu"), T)


def _chain(
    device: str, rows: int, steps: int, precision: str, window: int | None, fitted: bool = False
) -> Call:
    x, prior, there = _on(device, rows, fitted)
    backend = "cuda" if device == "cuda" else "cuda-emulated"
    options = {"backend": backend, "precision": precision, "window": window}
    return finished(device, partial(denoise, x, prior, prior, there, step_table(steps), **options))


def _predictor(
    device: str, rows: int, dtype: torch.dtype
) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """The evaluation of eps in `dtype` from float32 states, and the prior [rows, C]."""
    x, prior, there = _on(device, rows)
    x, guidance, there = x.to(dtype), prior.to(dtype), cast(there, dtype)
    return lambda y, t: predict_noise(x, y.to(dtype), guidance, there, t).float(), prior


def _eager(device: str, rows: int, steps: int, dtype: torch.dtype) -> Call:
    predict, prior = _predictor(device, rows, dtype)
    return finished(device, partial(chain, predict, prior, step_table(steps)))


def _compiled(device: str, rows: int, steps: int, dtype: torch.dtype) -> Call:
    predict, prior = _predictor(device, rows, dtype)
    compiled = torch.compile(predict, dynamic=False)
    return finished(device, partial(chain, compiled, prior, step_table(steps)))


def _graphed(device: str, rows: int, steps: int, dtype: torch.dtype) -> Call:
    """eps as a CUDA graph, replayed at every step; the few operations of the step itself are launched."""
    predict, prior = _predictor(device, rows, dtype)
    y, t = prior.clone(), torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
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

    return finished(device, partial(chain, replay, prior, step_table(steps)))


def _read(device: str, steps: int) -> Call:
    """As many bytes as the float32 hidden weights, once per step."""
    memory = torch.zeros(2, FEATURES, FEATURES, device=device)

    def read() -> None:
        for _ in range(steps):
            memory.sum()

    return finished(device, read)


def _multiply(device: str) -> Call:
    """_SIDE^3 multiply-adds in bfloat16."""
    a = torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16)
    return finished(device, partial(torch.mm, a, a))
