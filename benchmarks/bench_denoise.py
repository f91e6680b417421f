"""`denoise`: steps of a chain at the published size, F = 6144, C = 5, T = 1000.

Peers: the reference, which is the chain with the image encoder hoisted out, in stock PyTorch; the same compiled; what
stock PyTorch makes of it in bfloat16, in int8 and with a lower precision of float32 products (`denoise_peers`); its two
hidden products alone; and, once, the published program's way, a ResNet-18 pass over the images at every step.

Beside them, in the same rounds, two limits of the machine: reading the hidden weights once, and the two products'
multiply-adds on random operands. Each is the best of several implementations, chosen by timing them on this processor
before the first round (csrc/cpu/denoise/denoise_probes.inc.h): ways of reading by as many threads, memory on large
pages as the kernels' own; instructions of a precision by one thread.

The weights are those of a small denoiser (F = 256, fitted for some seconds to made-up features), every unit repeated 24
times with 1/24 of its weight behind it: the function, and so the behaviour of windows of steps, is the small model's.
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
from diffmic_fast.models import ConditionalModel
from diffmic_fast.models.encoders import ImageEncoder
from diffmic_fast.ops.denoise import PRECISIONS_OF, denoise
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights, StepTable

SMALL, REPEATS, CLASSES, T, SIDE = 256, 24, 5, 1000, 224
FEATURES = SMALL * REPEATS
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STEPS = (10, 30, 100, 300, T)
_STOCK_STEPS = 10  # that are timed where a stock chain of more is a multiple of them
TOLERANCE = 1e-5  # of states, where windows of steps may have one
_LARGEST_PUBLISHED = 32  # rows; an encoder pass a step
_READ, _MULTIPLY = "limit: reading the weights", "limit: multiply-adds"
PRECISIONS = PRECISIONS_OF["cpu"]
_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of a hidden weight
# A size a compilation; more than this many, and torch.compile would quietly stop compiling.
torch._dynamo.config.recompile_limit = 4 * len(ROWS)


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


def setups() -> Iterator[Setup]:
    """Steps one after the other over rows; then one row's steps over their number, by windows too."""
    for rows in ROWS:
        yield _over_rows(rows)
    for steps in STEPS:
        yield _over_steps(steps)


def _over_rows(rows: int) -> Setup:
    # Beside which the fingerprint of the weights that each call takes, as long as a reading of them, is little.
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
        peers["published way, one step"] = partial(_published_step, rows)
    return Setup(
        f"chain, {steps} steps, {rows} rows, F = {FEATURES}",
        peers,
        "hoisted, compiled",
        {"rows": rows, "steps": steps, "features": FEATURES},
        1.0 if rows == 1 else 0.5 if rows <= 32 else 0.25,
        limits,
        skipped=_skipped(),
    )


def _over_steps(steps: int) -> Setup:
    # Stock PyTorch takes the same time for each step: a few of them are timed in every round.
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
        if name != "int8":  # which takes no tolerance
            peers[f"{name}, windows, {TOLERANCE:.0e}"] = partial(call, tolerance=TOLERANCE)
    return Setup(
        f"1 row, {steps} steps, several at once",
        peers,
        "fp32, one after the other",
        {"rows": 1, "steps": steps, "features": FEATURES},
        0.5 if steps <= 100 else 0.125,
        skipped=_skipped(),
        totals=totals,
    )


def _stock(rows: int, steps: int) -> dict[str, Maker]:
    """What PyTorch has: the chain in every way of `denoise_peers`, and its products alone."""
    peers: dict[str, Maker] = {}
    for name, dtype in (("hoisted", torch.float32), ("stock bf16", torch.bfloat16)):
        peers[name] = partial(_floating, rows, steps, dtype)
        peers[f"{name}, compiled"] = partial(_floating, rows, steps, dtype, compiled=True)
    peers["stock fp32, matmul precision medium"] = partial(_medium, rows, steps)
    if not denoise_peers.int8_obstacle():
        peers["stock int8"] = partial(_int8, rows, steps)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        peers[f"stock {name} products"] = partial(_products, rows, steps, dtype)
    return peers


def _skipped() -> dict[str, str]:
    obstacle = denoise_peers.int8_obstacle()
    return {"stock int8": obstacle} if obstacle else {}


@cache
def _weights() -> DenoiserWeights:
    return fitted()


@cache
def _stock_weights(dtype: torch.dtype) -> DenoiserWeights:
    return denoise_peers.cast(_weights(), dtype)


def _inputs(rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(CLASSES, (rows,))
    prior = (4 * nn.functional.one_hot(labels, CLASSES) + torch.randn(rows, CLASSES)).softmax(-1)
    return _repeat(_features(labels), 1), prior


def _table(steps: int) -> StepTable:
    """Of a respaced chain; of all timesteps the whole chain, with its noise."""
    schedule = make_schedule("linear", T)
    return make_steps(schedule, "ddpm") if steps == T else make_steps(schedule, "ddim", steps)


def _without_gradients(call: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(call)


def _chain(
    rows: int,
    steps: int,
    precision: str = "fp32",
    window: int | None = None,
    tolerance: float = 0.0,
) -> Callable[[], object]:
    x, prior = _inputs(rows)
    options = {"backend": "cpu", "precision": precision, "window": window, "tolerance": tolerance}
    return _without_gradients(
        partial(denoise, x, prior, prior, _weights(), _table(steps), **options)
    )


def _floating(
    rows: int, steps: int, dtype: torch.dtype, compiled: bool = False
) -> Callable[[], object]:
    return denoise_peers.floating(
        *_inputs(rows), _stock_weights(dtype), _table(steps), compiled=compiled
    )


def _medium(rows: int, steps: int) -> Callable[[], object]:
    call = denoise_peers.floating(*_inputs(rows), _weights(), _table(steps), compiled=True)
    return with_matmul_precision("medium", call)


def _int8(rows: int, steps: int) -> Callable[[], object]:
    return denoise_peers.int8(*_inputs(rows), _weights(), _table(steps))


def _products(rows: int, steps: int, dtype: torch.dtype) -> Callable[[], object]:
    return denoise_peers.products(rows, _stock_weights(dtype), steps)


def _published_step(rows: int) -> Callable[[], object]:
    """The image encoder, and a step."""
    encoder = ImageEncoder("resnet18", FEATURES).eval()
    images = torch.randn(rows, 3, SIDE, SIDE)
    prior, one = _inputs(rows)[1], _table(1)

    def step() -> None:
        denoise(encoder(images), prior, prior, _weights(), one, backend="reference")

    return _without_gradients(step)


@cache
def _memory() -> Tensor:
    """As much memory as the hidden weights take in float32; `read_probe` is ready to read it."""
    memory = on_large_pages(2 * FEATURES * FEATURES)
    _native.extension().calibrate_read_probe(memory, torch.get_num_threads())
    return memory


def _read(steps: int) -> Callable[[], object]:
    """Every hidden weight once a step."""
    memory, threads = _memory(), torch.get_num_threads()

    def read() -> None:
        for _ in range(steps):
            _native.extension().read_probe(memory, threads)

    return read


def _multiply(count: int, precision: str) -> Callable[[], object]:
    """Multiply-adds by the fastest instructions that this processor has for `precision`."""
    extension, threads = _native.extension(), torch.get_num_threads()
    return lambda: extension.multiply_add_probe(count, threads, precision=precision)
