"""Gradients of linear layers' weights, made when a backward pass has freed what it went over.

A denoiser's two wide weights are 300 MB at F = 6144, and so are their gradients. A backward pass makes these first, and
keeps them while it goes on through the image encoder, whose activations are all there yet when it gets to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Of a gradient that autocast computes in bfloat16: 6 MB at F = 6144. (Zen 4, one thread, 96 rows: 156 ms for a whole
# gradient with its conversion, 121 ms by 512 rows; a fresh matrix costs as much as the product.)
_ROWS = 512


class LaterGradients(TorchFunctionMode):
    """A block of forward passes whose products leave their weights' gradients for `add`, which gives the same numbers.

        with LaterGradients(weights) as later:
            loss = model(images)
        loss.backward()
        later.add()

    Between the passes there are an input and an output gradient a product. Everything else has its gradient as ever:
    weights that carry hooks, and all of them where they are used otherwise than by `torch.nn.functional.linear` (which
    `nn.Linear` calls).
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
        """Calls of anything else go through."""
        kwargs = kwargs or {}
        if func is F.linear and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self._linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        parameter = self._weights.get(id(weight))
        if parameter is None or _has_hooks(parameter):
            return F.linear(input, weight, bias)
        output = F.linear(input, weight.detach(), bias)
        if not output.requires_grad:  # which nobody would notice the gradient of
            return F.linear(input, weight, bias)
        rows = input.detach()
        output.register_hook(lambda grad: self._products.append((parameter, rows, grad)))
        return output

    def add(self) -> None:
        """Add the gradients that a backward pass has left, to `grad` of their weights."""
        while self._products:
            weight, rows, grad = self._products.pop()
            grad = grad.flatten(0, -2)
            rows = rows.to(grad.dtype).flatten(0, -2)
            if weight.grad is None:
                weight.grad = _product(grad.t(), rows, weight.dtype)
            else:
                weight.grad += grad.t() @ rows


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """(a @ b).to(dtype), a few rows at a time where that converts, so that there is no second matrix in memory."""
    if a.dtype == dtype:
        return a @ b
    found = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    for some, rows in zip(found.split(_ROWS), a.split(_ROWS), strict=True):
        some.copy_(rows @ b)
    return found


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
