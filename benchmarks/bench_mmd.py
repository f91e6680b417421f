"""`mmd`, forward and backward to both row sets: 32 x 5 (training), 1024 x 64 and 4096 x 64.

Peers: the published formula (the reference), where its n x m x d array is not absurd; the Gram
formula |u|^2 + |v|^2 - 2uv, as written and compiled; torch.cdist; the kernel on one thread and on
torch's threads, through the public call.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case, measure
from diffmic_fast.ops.mmd import mmd

SIZES = ((32, 5), (1024, 64), (4096, 64))
_LARGEST_REFERENCE = 1024


def gram(x: Tensor, y: Tensor) -> Tensor:
    """The discrepancy by matrix products."""

    def mean(u: Tensor, v: Tensor) -> Tensor:
        squares = u.square().sum(dim=1)[:, None] + v.square().sum(dim=1) - 2 * u @ v.T
        return torch.exp(-squares.clamp_min(0) / u.shape[1] ** 2).mean()

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def cdist(x: Tensor, y: Tensor) -> Tensor:
    """The discrepancy by torch.cdist."""

    def mean(u: Tensor, v: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(u, v).square() / u.shape[1] ** 2).mean()

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def run(rounds: int) -> list[Case]:
    """Time value and gradients; the large sizes in fewer rounds."""
    compiled = torch.compile(gram, dynamic=False)
    cases = []
    for n, d in SIZES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, d, generator=generator)
        y = torch.randn(n, d, generator=generator) + 0.1
        peers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        if n <= _LARGEST_REFERENCE:
            peers["reference"] = lambda u, v: mmd(u, v, backend="reference")
        peers |= {"Gram": gram, "Gram, compiled": compiled, "cdist": cdist}
        peers["cpu"] = lambda u, v: mmd(u, v, backend="cpu")
        value = float(mmd(x, y, backend="cpu"))
        for call in peers.values():
            assert math.isclose(float(call(x, y)), value, rel_tol=1e-3, abs_tol=1e-6)
        calls = {name: _both(call, x, y) for name, call in peers.items()}
        calls["cpu, 1 thread"] = _on_one_thread(calls["cpu"])
        baseline = "reference" if n <= _LARGEST_REFERENCE else "Gram, compiled"
        timings = measure(calls, rounds if n < 1024 else max(3, rounds // 8))
        cases.append(Case(f"mmd, forward and backward ({n} rows each, d = {d})", timings, baseline))
    return cases


def _both(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], object]:
    u, v = x.clone().requires_grad_(), y.clone().requires_grad_()
    return lambda: torch.autograd.grad(call(u, v), (u, v))


def _on_one_thread(call: Callable[[], object]) -> Callable[[], object]:
    def run_it() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            call()
        finally:
            torch.set_num_threads(threads)

    return run_it
