"""Tensors in the form that kernels read: detached, negation applied, in a supported memory layout."""

from __future__ import annotations

import torch
from torch import Tensor

READABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def detached(tensor: Tensor) -> Tensor:
    """The tensor detached and with its negative bit resolved, as DLPack requires."""
    return tensor.detach().resolve_neg()


def compact(tensor: Tensor) -> Tensor:
    """The detached tensor, copied if it is not contiguous."""
    return tensor.detach().resolve_neg().contiguous()  # not `detached`: a call costs as much


def with_unit_rows(tensor: Tensor) -> Tensor:
    """The detached tensor, copied if the stride of its last dimension is not 1."""
    tensor = tensor.detach().resolve_neg()
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def readable(tensor: Tensor) -> Tensor:
    """The detached tensor, of a dtype in READABLE, as float32 or float64: half precision is converted to float32."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return detached(tensor)
