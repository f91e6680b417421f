"""What the Triton kernels share: functions of single numbers, and where a launch goes."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def softplus(n):
    """ln(1 + exp(n)), by way of exp(-|n|), which cannot overflow; beyond 20 the second term is below n's rounding."""
    decay = tl.exp(-tl.abs(n))
    grown = 1.0 + decay
    # ln(1 + decay) to the last digits of a small decay: what the sum's rounding lost is multiplied back.
    rest = tl.where(grown == 1.0, decay, tl.log(grown) * (decay / (grown - 1.0)))
    return tl.maximum(n, 0.0) + rest


@triton.jit
def sigmoid(n):
    """1 / (1 + exp(-n)), the slope of softplus; not-a-number through the decay."""
    decay = tl.exp(-tl.abs(n))
    return tl.where(n > 0.0, 1.0, decay) / (1.0 + decay)


# Triton decides at each decorator, by TRITON_INTERPRET, whether a kernel is compiled or interpreted.
INTERPRETED = tl.constexpr(not isinstance(softplus, triton.JITFunction))


@triton.jit
def rounded(x, element: tl.constexpr):
    """float32 as `element`, ties to even as on a GPU; Triton's interpreter alone would cut bfloat16 off."""
    if INTERPRETED and element == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(element)


@triton.jit
def factor(x):
    """An operand of `tl.dot`; the interpreter would multiply the bits of bfloat16, whose products float32 holds."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The context in which kernels go to the tensor's GPU; none for the interpreter's tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
