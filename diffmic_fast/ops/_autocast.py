"""Autocast: operations that run in float32.

PyTorch runs its losses and norms in float32 under autocast; so do the operations here, except `conditional_linear`,
whose matrix product is in the dtype of autocast, and `rois`, which keeps the dtype of the pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from diffmic_fast.checks import autocast_enabled
from diffmic_fast.reference.conditional_linear import ConditionalLayer

P = ParamSpec("P")
R = TypeVar("R")


def in_float32(operation: Callable[P, R]) -> Callable[P, R]:
    """Decorates an operation that runs in float32 under autocast.

    If autocast is enabled for the device of the first argument, the call is made with autocast disabled and with all
    half-precision tensors converted to float32, those in layers and other tuples too. Float64 stays. Running statistics
    that the operation updates in a converted layer are copied to the caller's layer.
    """

    @functools.wraps(operation)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(tensor, Tensor) or not active(tensor):
            return operation(*args, **kwargs)
        converted: Any = tuple(map(single, args))
        options: Any = {name: single(value) for name, value in kwargs.items()}
        with off(tensor):
            found = operation(*converted, **options)
        _copy_statistics((*args, *kwargs.values()), (*converted, *options.values()))
        return found

    return wrapper


def active(tensor: Tensor) -> bool:
    """Whether autocast is enabled for the device of the tensor."""
    return autocast_enabled(tensor.device)


def off(tensor: Tensor) -> torch.autocast:
    """A block with autocast disabled for the device of the tensor."""
    return torch.autocast(tensor.device.type, enabled=False)


def single(value: Any) -> Any:
    """The value with half-precision tensors converted to float32, inside tuples and NamedTuples too."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if not isinstance(value, tuple):
        return value
    parts = map(single, value)
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _copy_statistics(given: tuple[Any, ...], converted: tuple[Any, ...]) -> None:
    for layer, copy in zip(given, converted, strict=True):
        if isinstance(layer, ConditionalLayer):
            for name in ("running_mean", "running_var"):
                if getattr(layer, name) is not getattr(copy, name):
                    getattr(layer, name).copy_(getattr(copy, name))
