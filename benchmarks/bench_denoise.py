"""`denoise`: steps of a chain at the published size, F = 6144, C = 5, T = 1000.

Peers: the reference, which runs the chain with the image encoder hoisted out, in stock PyTorch ("hoisted"); the same
compiled; stock PyTorch in bfloat16, in int8 and with a lower precision of float32 products (`denoise_peers`); its two
hidden products alone; and, one step of it, the published way: a ResNet-18 pass over the images at every step.

Two limits of the machine are measured in the same rounds: reading the hidden weights once, and the two products'
multiply-adds on random operands. Each is the best of several implementations, selected by timing them on this processor
before the first round (csrc/cpu/denoise/denoise_probes.inc.h): ways of reading with as many threads, on large pages as
the kernels' own memory; instructions of a precision on one thread.

The weights are those of a small denoiser (F = 256, fitted for some seconds to made-up features), every output channel
repeated 24 times, with 1/24 of the weight in the next layer: the function, and so the behaviour of windows of steps, is
the small model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor, nn

from benchmarks import denoise_peers
from benchmarks.harness import Maker, Setup, on_large_pages, with_matmul_precision
from diffmic_fast import _native
from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.ops.denoise import PRECISIONS_OF, denoise
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights, StepTable

SMALL, REPEATS, CLASSES, T, SIDE = 256, 24, 5, 1000, 224
FEATURES = SMALL * REPEATS
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STEPS = (10, 30, 100, 300, T)
_STOCK_STEPS = 10  # timed steps of a longer stock chain
TOLERANCE = 1e-5
_LARGEST_PUBLISHED = 32  # rows: an encoder pass per step takes long
_READ, _MULTIPLY = "limit: reading the weights", "limit: multiply-adds"
PRECISIONS = PRECISIONS_OF["cpu"]
_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of a hidden weight
# torch.compile compiles once per size, and silently stops beyond this many.
torch._dynamo.config.recompile_limit = 4 * len(ROWS)


def fitted(steps: int = 300) -> DenoiserWeights:
    """The small denoiser, fitted to features whose first entries tell the class, and widened."""
    from diffmic_fast.models import ConditionalModel  # needs torchvision, the rest does not

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


def setups() -> Iterator[Setup]:
    """Sequential steps over the number of rows; then one row over the number of steps, in windows too."""
    for rows in ROWS:
        yield _over_rows(rows)
    for steps in STEPS:
        yield _over_steps(steps)


def _over_rows(rows: int) -> Setup:
    # Enough for the hash of the weights that each call computes, one reading of them, to be little beside them.
    steps = max(8, min(60, 1024 // rows))
    peers = _stock(rows, steps)
    peers |= {name: partial(_chain, rows, steps, precision=name, window=1) for name in PRECISIONS}
    peers[_READ] = partial(_read, steps)
    limits = {}
    for name in PRECISIONS:
        bound = f"{_MULTIPLY}, {name}"
        peers[bound] = partial(_multiply, 2 * FEATURES * FEATURES * rows * steps, name)
        limits[name] = {_READ: _BYTES[name] / 4, bound: 1.0}
    if rows <= _LARGEST_PUBLISHED:
        peers["published way, one step"] = partial(published_step, rows)
    return Setup(
        f"chain, {steps} steps, {rows} rows, F = {FEATURES}",
        peers,
        "hoisted, compiled",
        {"rows": rows, "steps": steps, "features": FEATURES},
        1.0 if rows == 1 else 0.5 if rows <= 32 else 0.25,
        limits,
        skipped=denoise_peers.skipped(),
    )


def _over_steps(steps: int) -> Setup:
    # Stock PyTorch takes the same time for each step: a few are timed in every round.
    part = min(steps, _STOCK_STEPS)
    stock = _stock(1, part)
    totals = {}
    if part < steps:
        stock = {f"{name}, {part} steps": make for name, make in stock.items()}
        totals = {name.removesuffix(f", {part} steps"): {name: steps // part} for name in stock}
    peers = dict(stock)
    for name in PRECISIONS:
        call = partial(_chain, 1, steps, precision=name)
        peers[f"{name}, one after the other"] = partial(call, window=1)
        peers[f"{name}, windows"] = call
        if name != "int8":  # takes no tolerance
            peers[f"{name}, windows, {TOLERANCE:.0e}"] = partial(call, tolerance=TOLERANCE)
    return Setup(
        f"1 row, {steps} steps, several at once",
        peers,
        "fp32, one after the other",
        {"rows": 1, "steps": steps, "features": FEATURES},
        0.5 if steps <= 100 else 0.125,
        skipped=denoise_peers.skipped(),
        totals=totals,
    )


def _stock(rows: int, steps: int) -> dict[str, Maker]:
    """Stock PyTorch: the chain in every way of `denoise_peers`, and its products alone."""

    def floating(dtype: torch.dtype, compiled: bool) -> Callable[[], object]:
        chain = (*inputs(rows), weights(dtype), step_table(steps))
        return denoise_peers.floating(*chain, compiled=compiled)

    def products(dtype: torch.dtype) -> Callable[[], object]:
        return denoise_peers.products(rows, weights(dtype), steps)

    peers: dict[str, Maker] = {}
    for name, dtype in (("hoisted", torch.float32), ("stock bf16", torch.bfloat16)):
        peers[name] = partial(floating, dtype, False)
        peers[f"{name}, compiled"] = partial(floating, dtype, True)
    peers["stock fp32, matmul precision medium"] = lambda: with_matmul_precision(
        "medium", floating(torch.float32, True)
    )
    if not denoise_peers.skipped():
        peers["stock int8"] = lambda: denoise_peers.int8(
            *inputs(rows), weights(), step_table(steps)
        )
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        peers[f"stock {name} products"] = partial(products, dtype)
    return peers


@cache
def weights(dtype: torch.dtype = torch.float32) -> DenoiserWeights:
    """The fitted denoiser's."""
    return fitted() if dtype == torch.float32 else denoise_peers.cast(weights(), dtype)


def inputs(rows: int) -> tuple[Tensor, Tensor]:
    """Features [rows, F] and prior [rows, C]."""
    torch.manual_seed(1)
    labels = torch.randint(CLASSES, (rows,))
    prior = (4 * nn.functional.one_hot(labels, CLASSES) + torch.randn(rows, CLASSES)).softmax(-1)
    return _repeat(_features(labels), 1), prior


def step_table(steps: int) -> StepTable:
    """A respaced chain; with T steps the whole chain, with its noise."""
    schedule = make_schedule("linear", T)
    return make_steps(schedule, "ddpm") if steps == T else make_steps(schedule, "ddim", steps)


def _chain(
    rows: int,
    steps: int,
    precision: str = "fp32",
    window: int | None = None,
    tolerance: float = 0.0,
) -> Callable[[], object]:
    x, prior = inputs(rows)
    options = {"backend": "cpu", "precision": precision, "window": window, "tolerance": tolerance}
    return torch.no_grad()(
        partial(denoise, x, prior, prior, weights(), step_table(steps), **options)
    )


def published_step(rows: int, device: str = "cpu") -> Callable[[], object]:
    """The image encoder, and one step of the reference."""
    from diffmic_fast.models.encoders import ImageEncoder

    encoder = ImageEncoder("resnet18", FEATURES).eval().to(device)
    images = torch.randn(rows, 3, SIDE, SIDE, device=device)
    prior, one = inputs(rows)[1].to(device), step_table(1)
    there = denoise_peers.cast(weights(), device=device)

    def step() -> None:
        denoise(encoder(images), prior, prior, there, one, backend="reference")

    return torch.no_grad()(step)


@cache
def _memory() -> Tensor:
    """Memory of the size of the float32 hidden weights, for which `read_probe` is calibrated."""
    memory = on_large_pages(2 * FEATURES * FEATURES)
    _native.extension().calibrate_read_probe(memory, torch.get_num_threads())
    return memory


def _read(steps: int) -> Callable[[], object]:
    """Every hidden weight once per step."""
    memory, threads = _memory(), torch.get_num_threads()

    def read() -> None:
        for _ in range(steps):
            _native.extension().read_probe(memory, threads)

    return read


def _multiply(count: int, precision: str) -> Callable[[], object]:
    """Multiply-adds by the fastest instructions that this processor has for `precision`."""
    extension, threads = _native.extension(), torch.get_num_threads()
    return lambda: extension.multiply_add_probe(count, threads, precision=precision)
