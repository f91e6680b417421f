"""Copies of small tensors from the CPU to a GPU that do not wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.ops._backend import stream_of

# More than this is faster through pinned memory than by the parameters of kernels, 4 KB each.
_MOST_BYTES = 1 << 16


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, with the values that it has at the time of the call.

    A copy from the CPU to a GPU does not wait for the device: `Tensor.to` would, from pageable memory. A CUDA graph
    that captures the copy keeps the values.

    Raises:
        RuntimeError: A CUDA graph is being captured and the CUDA kernels are not available.
    """
    if tensor.device == device or device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    if torch.compiler.is_compiling():
        return tensor.to(device)
    capturing = torch.cuda.is_current_stream_capturing()
    shape, dtype, reason = tensor.shape, tensor.dtype, _native.cuda_failure()
    if not reason and (capturing or tensor.nbytes <= _MOST_BYTES):
        target = torch.empty(shape, dtype=dtype, device=device)
        if tensor.numel() > 0:
            # A copy has unit stride, which a single element of a strided tensor may not have.
            source = tensor.detach().clone(memory_format=torch.contiguous_format)
            _native.cuda("cuda").upload(_bytes(source), _bytes(target), stream_of(target))
        return target
    if capturing:
        raise RuntimeError(
            f"a CUDA graph cannot capture a copy from the CPU here ({reason}): move the tensor to {device} before"
        )
    # Pinned memory of its own, also where `tensor` is pinned: the caller may overwrite that before the copy is made.
    # PyTorch reuses the memory only after the copy.
    staged = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    return staged.copy_(tensor.detach()).to(device, non_blocking=True)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
