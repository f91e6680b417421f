"""Weight gradients of linear layers, computed after the backward pass has freed its activations.

The denoiser's two wide weights are 300 MB each at F = 6144, and so are their gradients. A backward pass computes these
first and holds them while it goes on through the image encoder, all of whose activations are still in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Rows per block of a gradient that autocast computes in bfloat16: 6 MB at F = 6144. (Zen 4, one thread, 96 rows:
# 156 ms for a whole gradient and its conversion, 121 ms in blocks of 512 rows; allocating a second matrix costs as much
# as the product.)
_BLOCK_ROWS = 512


class DeferredGradients(TorchFunctionMode):
    """A block of forward passes whose weight gradients wait for `accumulate`, with the same numbers.

        with DeferredGradients(weights) as deferred:
            loss = model(images)
        loss.backward()
        deferred.accumulate()

    Until then each product holds its input and the gradient of its output. Only weights that
    `torch.nn.functional.linear` (and so `nn.Linear`) multiplies with are deferred; other uses of them, and weights with
    hooks, have their gradients computed in the backward pass.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._weights = {id(weight): weight for weight in weights if weight.requires_grad}
        self._products: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace calls of `linear`; other functions are called unchanged."""
        kwargs = kwargs or {}
        if func is F.linear and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self._linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        parameter = self._weights.get(id(weight))
        if parameter is None or _has_hooks(parameter):
            return F.linear(input, weight, bias)
        output = F.linear(input, weight.detach(), bias)
        if (
            not output.requires_grad
        ):  # neither input nor bias has a gradient: no hook would be called
            return F.linear(input, weight, bias)
        rows = input.detach()
        output.register_hook(lambda grad: self._products.append((parameter, rows, grad)))
        return output

    def accumulate(self) -> None:
        """Add the deferred gradients to `grad` of their weights."""
        while self._products:
            weight, rows, grad = self._products.pop()
            grad = grad.flatten(0, -2)
            rows = rows.to(grad.dtype).flatten(0, -2)
            if weight.grad is None:
                weight.grad = _product(grad.t(), rows, weight.dtype)
            else:
                weight.grad += grad.t() @ rows


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """(a @ b).to(dtype), converted in blocks of rows so that no second matrix is allocated."""
    if a.dtype == dtype:
        return a @ b
    product = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    blocks = zip(product.split(_BLOCK_ROWS), a.split(_BLOCK_ROWS), strict=True)
    for target, rows in blocks:
        target.copy_(rows @ b)
    return product


def _has_hooks(parameter: Tensor) -> bool:
    # Private: PyTorch has no public query for hooks. Where the attributes are gone, the first step fails here.
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
