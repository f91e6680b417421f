"""What the tests of `mmd` share: rows, where they lie in memory, and how exact results are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BANDWIDTHS: list[Any] = [None, 0.7, [0.5, 1.0, 3.0], "median"]

# Kernel values: a few roundings of the distance and one of the exponential. Means and gradients:
# sums of those, compared with the size of what is summed, for the sums of x and y cancel.
TOLERANCE = {torch.float32: 6e-7, torch.float64: 2e-15}


def rows(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + d + seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def in_a_buffer(tensor: Tensor, kind: str) -> Tensor:
    """The same values behind other strides; what lies around them would be noticed."""
    n, d = tensor.shape
    if kind == "transposed":
        view = tensor.new_full((d + 2, n + 3), torch.nan)[1:-1, 2:-1].T
    elif kind == "slice":
        view = tensor.new_full((n + 3, d + 3), torch.nan)[1:-2, 2:-1]
    elif kind == "spread":
        view = tensor.new_full((2 * n, 3 * d), torch.nan)[1::2, ::3]
    else:
        return tensor.contiguous()
    return view.copy_(tensor)


def value_and_gradients(call: Callable[..., Tensor], x: Tensor, y: Tensor, **options: Any) -> Any:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    value = call(x, y, **options)
    return value.detach(), *torch.autograd.grad(value, (x, y))


def assert_close(found: Any, expected: Any, dtype: torch.dtype, bandwidth: Any = None) -> None:
    """Value and gradients of `found`, in dtype, near those of the float64 definition."""
    # A slope is at most 1 / bandwidth.
    widths = [bandwidth] if isinstance(bandwidth, float) else bandwidth
    steepest = 1 / min(widths) if isinstance(widths, list) else 1.0
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        scale = 1.0 if i == 0 else steepest * 4 / len(want)
        assert float((got.double() - want).abs().max()) <= 4 * TOLERANCE[dtype] * scale
