"""Private interfaces of PyTorch that the models use, each in one place: why, and what happens when it is gone.

PyTorch has no public counterpart of any of them. Except where stated otherwise, a missing one raises an ImportError or
AttributeError in the first test of `tests/models` that reaches it; no result changes silently.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.utils._pytree
from torch import Tensor, nn

AnyBatchNorm = nn.modules.batchnorm._BatchNorm  # the base class of every BatchNorm
register_namedtuple = torch.utils._pytree._register_namedtuple  # names a type for torch.export.save

M = TypeVar("M", bound=nn.Module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more, or something else, than its class's `forward`."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def calls_only_forward(module: nn.Module) -> bool:
    """Whether a module has no hooks, and no code compiled by `nn.Module.compile`."""
    return not has_hooks(module) and getattr(module, "_compiled_call_impl", None) is None


def children_of(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """The submodules by name. `nn.Module.named_children` leaves out repeated ones and None."""
    return module._modules


def is_replica(module: nn.Module) -> bool:
    """Whether `nn.DataParallel` made this shallow copy for one call (False if the mark is gone)."""
    return getattr(module, "_is_replica", False)


def parameter_names(module: nn.Module) -> set[str]:
    """The names of a module's own parameters. `nn.Module.named_parameters` leaves out those that are None."""
    return set(module._parameters)


def with_parameters(module: M, **tensors: Tensor | None) -> M:
    """A shallow copy with these tensors as its parameters. `torch.func.functional_call` would change the module."""
    clone = copy.copy(module)
    clone._parameters = tensors  # type: ignore[assignment]
    return clone


def with_children(module: M, children: Mapping[str, Any]) -> M:
    """A shallow copy with other submodules, which need only be callable; parameters and buffers are shared."""
    clone = copy.copy(module)
    clone._modules = dict(children)
    return clone


def mark_batch_dynamic(images: Tensor) -> None:
    """Compile for any batch size from the start (the last batch of a folder is smaller), instead of twice."""
    import torch._dynamo  # slow to import

    torch._dynamo.maybe_mark_dynamic(images, 0)


def assert_async(condition: Tensor, message: str) -> None:
    """An assertion that can be traced and does not synchronise: on a GPU the error comes with a later call."""
    torch._assert_async(condition, message)


def add_each(tensors: list[Tensor], values: tuple[Tensor, ...]) -> None:
    """tensor += value for every pair, in one call: a step counts the batches of a hundred BatchNorms."""
    torch._foreach_add_(tensors, values)  # type: ignore[arg-type]


def convolution_operators_exist() -> bool:
    """Whether this torch has the operators of `convolve`, TorchInductor's; without them `execution` uses autocast."""
    return hasattr(torch.ops.mkldnn, "_convolution_pointwise") and hasattr(
        torch.ops.mkldnn, "_convolution_pointwise_"
    )


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer: nn.Conv2d,
    activation: str,
    scalars: list[float],
    residual: Tensor | None,
) -> Tensor:
    """activation(convolution(x) + residual) in one oneDNN call.

    Args:
        x: [B, in, H, W].
        weight, bias: Used in the place of the layer's own.
        layer: Gives stride, padding, dilation and groups.
        activation, scalars: TorchInductor's name ("none", "relu", "hardtanh", "swish") and its parameters; "none" or
            "relu" with a residual.
        residual: [B, out, h, w] or None; overwritten with the result.

    Returns:
        [B, out, h, w].
    """
    geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, *geometry, activation, scalars, ""
        )
    after = None if activation == "none" else activation
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        residual, x, weight, bias, *geometry, "add", 1.0, after, [], ""
    )
