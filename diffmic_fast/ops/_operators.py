"""How operators are made known to PyTorch.

Through `torch.library.Library`, whose calls cost half of a `custom_op`'s: at 32 rows the call is the cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("diffmic_fast", "FRAGMENT")


def register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """The operator `diffmic_fast::name`, served on the CPU and on GPUs.

    Args:
        schema: from the bracket on.
        kernel, fake: of real tensors, and of those that have shapes alone.
    """
    _library.define(name + schema)
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"diffmic_fast::{name}", fake, lib=_library)


def register_autograd(name: str, save: Callable[..., None], derive: Callable[..., Any]) -> None:
    """Its derivative: what is saved in the forward pass, and the backward pass.

    As `torch.library.register_autograd`, which reads the whole schema for every argument, in search of defaults that
    our operators have not: 75 us a call of `conditioning`.

    Args:
        name: an operator with a schema.
        save: (ctx, arguments, outputs).
        derive: (ctx, *gradients of the outputs) to those of the arguments.
    """
    operator = getattr(torch.ops.diffmic_fast, name).default

    class Derived(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                found = operator(*arguments)
            save(ctx, arguments, found)
            return found

        backward = staticmethod(derive)

    def derived(*arguments: Any) -> Any:
        tensors = (argument for argument in arguments if isinstance(argument, Tensor))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return Derived.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    _library.impl(name, derived, "Autograd")
