"""Tensors as the kernels take them: out of autograd's sight, no lazy signs, and laid out as they can read."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(tensor: Tensor) -> Tensor:
    """The tensor itself where it is contiguous, else a copy."""
    return tensor.detach().resolve_neg().contiguous()


def with_unit_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its rows have unit stride, else a copy."""
    tensor = tensor.detach().resolve_neg()
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


READABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def readable(tensor: Tensor) -> Tensor:
    """Of READABLE, what DLPack can say and a kernel takes: no gradient, no pending sign, float32 for half precision."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return tensor.detach().resolve_neg()
