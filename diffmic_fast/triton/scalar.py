"""Element-wise functions of the Triton kernels, and the device of a launch."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def softplus(n):
    """ln(1 + exp(n)), from exp(-|n|), which cannot overflow; above 20 the second term is below the rounding of n."""
    decay = tl.exp(-tl.abs(n))
    grown = 1.0 + decay
    # log1p(decay): the quotient corrects the rounding of the sum `grown` for a small decay.
    rest = tl.where(grown == 1.0, decay, tl.log(grown) * (decay / (grown - 1.0)))
    return tl.maximum(n, 0.0) + rest


@triton.jit
def sigmoid(n):
    """1 / (1 + exp(-n)), the derivative of softplus; NaN propagates through the decay."""
    decay = tl.exp(-tl.abs(n))
    return tl.where(n > 0.0, 1.0, decay) / (1.0 + decay)


# triton.jit reads TRITON_INTERPRET when it is applied: kernels of this process are all compiled or all interpreted.
INTERPRETED = tl.constexpr(not isinstance(softplus, triton.JITFunction))


@triton.jit
def rounded(x, element: tl.constexpr):
    """float32 rounded to `element`, ties to even; the interpreter truncates to bfloat16, so it is rounded here."""
    if INTERPRETED and element == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(element)


@triton.jit
def factor(x):
    """An operand of `tl.dot`; the interpreter cannot multiply bfloat16, whose products are exact in float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context that makes the tensor's GPU current; a null context for CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
