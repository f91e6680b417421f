"""`mmd`, forward and backward to both row sets: 32 x 5 (training), and n x 64 over n.

Peers: the published formula (the reference), up to the sizes whose n x m x d array is reasonable; the Gram formula
|u|^2 + |v|^2 - 2uv, as written, compiled, and with `torch.set_float32_matmul_precision("medium")`; torch.cdist;
geomloss and pykeops where they are installed (`pip install .[bench]`); the kernel on one thread and on torch's threads,
through the public call. The limit is three multiply-adds per element of each pair of rows, in registers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.harness import Maker, Setup, on_one_thread, with_matmul_precision
from diffmic_fast import _native
from diffmic_fast.ops.mmd import mmd

SIZES = ((32, 5), (64, 64), (256, 64), (1024, 64), (4096, 64))
_LARGEST_REFERENCE = 1024
_LIMIT = "limit: multiply-adds"
_LONG_ENOUGH = 200_000_000  # multiply-adds beside which starting threads takes no time
_NEEDS = {
    "geomloss": ("geomloss",),
    "geomloss, online": ("geomloss", "pykeops"),
    "pykeops": ("pykeops",),
}

Formula = Callable[[Tensor, Tensor], Tensor]


def _discrepancy(mean: Formula, x: Tensor, y: Tensor) -> Tensor:
    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def gram(x: Tensor, y: Tensor) -> Tensor:
    """The discrepancy by matrix products."""

    def mean(u: Tensor, v: Tensor) -> Tensor:
        squares = u.square().sum(dim=1)[:, None] + v.square().sum(dim=1) - 2 * u @ v.T
        return torch.exp(-squares.clamp_min(0) / u.shape[1] ** 2).mean()

    return _discrepancy(mean, x, y)


def cdist(x: Tensor, y: Tensor) -> Tensor:
    """The discrepancy by torch.cdist."""
    return _discrepancy(
        lambda u, v: torch.exp(-torch.cdist(u, v).square() / u.shape[1] ** 2).mean(), x, y
    )


def keops(x: Tensor, y: Tensor) -> Tensor:
    """The discrepancy by reductions of symbolic matrices, which pykeops compiles."""
    lazy = importlib.import_module("pykeops.torch")

    def mean(u: Tensor, v: Tensor) -> Tensor:
        squares = ((lazy.Vi(u) - lazy.Vj(v)) ** 2).sum(-1)
        sums = (-squares / u.shape[1] ** 2).exp().sum(dim=1, backend="CPU")
        return sums.sum() / (len(u) * len(v))

    return _discrepancy(mean, x, y)


def geomloss(x: Tensor, y: Tensor, backend: str) -> Tensor:
    """The discrepancy by geomloss, whose loss is half of it; its kernel is exp(-|u-v|^2 / 2 blur^2)."""
    module = importlib.import_module("geomloss")
    loss = module.SamplesLoss("gaussian", blur=x.shape[1] / 2**0.5, backend=backend)
    return 2 * loss(x, y)


@cache
def _missing(module: str) -> str:
    """Why a package cannot be used; empty where it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # pykeops looks for compilers when it is imported
        return f"{type(error).__name__}: {error}"
    return ""


@cache
def _compiled() -> Formula:
    return torch.compile(gram, dynamic=False)


def setups() -> Iterator[Setup]:
    """Value and gradients; the large sizes in fewer rounds."""
    reasons = {
        name: "; ".join(filter(None, map(_missing, modules))) for name, modules in _NEEDS.items()
    }
    skipped = {name: reason for name, reason in reasons.items() if reason}
    formulas: dict[str, Formula] = {
        "reference": partial(mmd, backend="reference"),
        "Gram": gram,
        "Gram, compiled": lambda x, y: _compiled()(x, y),
        "cdist": cdist,
        "geomloss": partial(geomloss, backend="tensorized"),
        "geomloss, online": partial(geomloss, backend="online"),
        "pykeops": keops,
        "cpu": partial(mmd, backend="cpu"),
    }
    for n, d in SIZES:
        peers: dict[str, Maker] = {
            name: partial(_checked, formula, n, d)
            for name, formula in formulas.items()
            if name not in skipped and (name != "reference" or n <= _LARGEST_REFERENCE)
        }
        peers["cpu, 1 thread"] = lambda make=peers["cpu"]: on_one_thread(make())  # type: ignore[misc]
        peers["Gram, precision medium"] = partial(_medium, n, d)
        needed = 3 * (2 * n) ** 2 // 2 * d
        done = max(needed, _LONG_ENOUGH)
        peers[_LIMIT] = partial(_limit, done)
        yield Setup(
            f"mmd, forward and backward ({n} rows each, d = {d})",
            peers,
            "reference" if n <= _LARGEST_REFERENCE else "Gram, compiled",
            {"rows": n, "width": d},
            1.0 if n < 1024 else 1 / 8,
            {"cpu": {_LIMIT: needed / done}},
            skipped=skipped,
        )


@cache
def _rows(n: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    y = torch.randn(n, d, generator=generator) + 0.1
    return x.requires_grad_(), y.requires_grad_()


def _checked(formula: Formula, n: int, d: int) -> Callable[[], object]:
    """The call, after its value and gradients were compared with the kernel's."""
    x, y = _rows(n, d)

    def outcome(of: Formula) -> tuple[Tensor, ...]:
        value = of(x, y)
        return value, *torch.autograd.grad(value, (x, y))

    kernel = partial(mmd, backend="cpu")
    for got, want in zip(outcome(formula), outcome(kernel), strict=True):
        # Distances by matrix products lose digits, more of them for longer rows.
        size = float(want.detach().abs().max())
        torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * size + 1e-6 / n)
    return lambda: torch.autograd.grad(formula(x, y), (x, y))


def _medium(n: int, d: int) -> Callable[[], object]:
    """Not compared: on a processor with bfloat16 instructions its products may have that precision."""
    x, y = _rows(n, d)
    return with_matmul_precision("medium", lambda: torch.autograd.grad(gram(x, y), (x, y)))


def _limit(count: int) -> Callable[[], object]:
    return lambda: _native.extension().multiply_add_probe(count, torch.get_num_threads())
