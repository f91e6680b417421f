"""`denoise` on a GPU over the number of rows, by both engines; and Triton's products by every tile.

What is measured decides two rules: which engine "auto" selects (`diffmic_fast.ops._engine`), and which tile a product
of a size takes (`diffmic_fast.triton.conditional_linear.configuration`). At the end stand the cases in which a rule
selects what took clearly longer than the fastest: constants of the rules are to be changed until there are none.

`python -m benchmarks engines --write` on a machine with an NVIDIA GPU writes benchmarks/results/engines.json and .csv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.harness import Case, Maker, Setup, finished
from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.ops import _engine as engine
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights

FEATURES = (1024, 6144)
ROWS = (32, 33, 64, 65, 128, 192, 256, 512, 1024, 4096)
STEPS, T, CLASSES = 50, 1000, 5
# A rule may cost this much: the timings of a round differ by a few per cent.
TOLERATED = 1.1

Call = Callable[[], object]


def setups(
    device: str = "cuda",
    features: Sequence[int] = FEATURES,
    rows: Sequence[int] = ROWS,
    steps: int = STEPS,
) -> Iterator[Setup]:
    """Chains by both engines, then products by every tile."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks engines: PyTorch finds no GPU here")
    for width in features:
        for count in rows:
            yield _chains(device, count, width, steps)
    for width in features:
        for count in rows:
            for kind in ("half", "ieee"):
                yield _products(device, count, width, kind)


def _chains(device: str, rows: int, features: int, steps: int) -> Setup:
    peers: dict[str, Maker] = {
        f"{precision}, {name}": partial(_chain, device, rows, features, steps, precision, name)
        for precision in engine.PRECISIONS
        for name in engine.ENGINES
    }
    sizes = {"rows": rows, "features": features, "steps": steps}
    title = f"chain, {steps} steps, {rows} rows, F = {features}, on {device}"
    return Setup(title, peers, f"{engine.PRECISIONS[0]}, cuda", sizes, 0.25)


def _products(device: str, rows: int, features: int, kind: str) -> Setup:
    from diffmic_fast.triton import conditional_linear as kernels

    peers: dict[str, Maker] = {
        _name(config): partial(_product, device, rows, features, kind, number)
        for number, config in enumerate(kernels.CONFIGS[kind])
    }
    return Setup(
        f"product of a layer, {kind}, {rows} rows, F = {features}, on {device}",
        peers,
        _name(kernels.configuration(kind, rows, features)),
        {"rows": rows, "features": features},
        0.5,
    )


def _name(config: object) -> str:
    sizes = config.kwargs  # type: ignore[attr-defined]
    return "x".join(str(sizes[f"BLOCK_{axis}"]) for axis in "MNK")


@lru_cache(maxsize=1)
def weights(features: int, device: str) -> DenoiserWeights:
    """Random weights: the time of a sequential chain does not depend on them."""
    generator = torch.Generator().manual_seed(0)

    def layer(width: int) -> ConditionalLayer:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        return ConditionalLayer(
            draw(features, width) / width**0.5, draw(features), draw(T + 1, features), draw(features),
            draw(features), draw(features), draw(features).square() + 0.5,
        )  # fmt: skip

    output = torch.randn(CLASSES, features, generator=generator) / features
    hidden = layer(features), layer(features)
    return DenoiserWeights(
        layer(2 * CLASSES), hidden, output.to(device), torch.zeros(CLASSES, device=device)
    )


def _chain(device: str, rows: int, features: int, steps: int, precision: str, name: str) -> Call:
    x, prior = torch.randn(rows, features, device=device), torch.rand(rows, CLASSES, device=device)
    backend = "cuda-emulated" if device == "cpu" and name == "cuda" else name
    return finished(
        device,
        partial(
            denoise, x, prior, prior, weights(features, device), make_steps(make_schedule("linear", T), "ddim", steps),
            precision=precision, backend=backend, window=1,
        ),
    )  # fmt: skip


def _product(device: str, rows: int, features: int, kind: str, number: int) -> Call:
    from diffmic_fast.triton import conditional_linear as kernels

    dtype = torch.bfloat16 if kind == "half" else torch.float32
    layer = weights(features, device).hidden[0]
    layer = layer._replace(weight=layer.weight.to(dtype))
    h = torch.randn(rows, features, device=device).to(dtype)
    out, t = torch.empty_like(h), torch.zeros(1, dtype=torch.int64, device=device)
    config = kernels.CONFIGS[kind][number]
    return finished(device, partial(kernels.launch, h, layer, t, out, 1e-5, config=config))


def summary(cases: Sequence[Case], card: engine.Card | None = None) -> str:
    """What the rules select although something else was clearly faster, one line each.

    Args:
        cases: measured setups of this benchmark.
        card: the GPU that measured them; by default the current one.
    """
    card = card or engine.card_of(torch.cuda.current_device())
    lines = []
    for case in cases:
        medians = {name: timing.median for name, timing in case.timings.items()}
        groups = {"": (case.baseline, medians)}
        if "steps" in case.sizes:
            groups = {}
            for precision in engine.PRECISIONS:
                chosen = engine.choose(case.sizes["rows"], case.sizes["features"], precision, card)
                own = {name: s for name, s in medians.items() if name.startswith(f"{precision}, ")}
                groups[precision] = f"{precision}, {chosen}", own
        for chosen, timings in groups.values():
            fastest = min(timings, key=lambda name: timings[name])
            ratio = timings[chosen] / timings[fastest]
            if ratio > TOLERATED:
                lines.append(f"{case.title}: {chosen} takes {ratio:.2f} times as long as {fastest}")
    return "\n".join(lines) or "the rules select what was fastest, or nearly"
