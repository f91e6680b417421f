"""Tensors in the form that kernels read: detached, negation applied, in a supported memory layout."""

from __future__ import annotations

import torch
from torch import Tensor

READABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def detached(tensor: Tensor) -> Tensor:
    """The tensor detached and with its negative bit resolved, as DLPack requires."""
    # A layer has seven tensors, and each call into PyTorch that changes nothing takes half a microsecond. Parameters
    # are detached in any case: the extension reads a torch.Tensor faster than an instance of a subclass.
    if tensor.requires_grad or type(tensor) is not Tensor:
        tensor = tensor.detach()
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def compact(tensor: Tensor) -> Tensor:
    """The detached tensor, copied if it is not contiguous."""
    return detached(tensor).contiguous()


def with_unit_rows(tensor: Tensor) -> Tensor:
    """The detached tensor, copied if the stride of its last dimension is not 1."""
    tensor = detached(tensor)
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def readable(tensor: Tensor) -> Tensor:
    """The detached tensor, of a dtype in READABLE, as float32 or float64: half precision is converted to float32."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return detached(tensor)


def empty_like(tensor: Tensor) -> Tensor:
    """Contiguous memory of the shape, dtype and device of a tensor."""
    # Half the time of tensor.new_empty(tensor.shape), which converts the shape to Python and back.
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def zeros_like(tensor: Tensor) -> Tensor:
    """Contiguous zeros of the shape, dtype and device of a tensor."""
    return torch.zeros_like(tensor, memory_format=torch.contiguous_format)


def of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; the tensor itself if it has that dtype."""
    # For which `to` takes ten times as long: a microsecond.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
