"""Triton kernels of `conditional_linear`: products over many rows, and what stands around a product in training.

Nothing here is bound to one vendor's GPUs. Importing this package imports no Triton; its modules do, and want it.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def failure() -> str:
    """Why Triton's kernels cannot be used in this process; empty when they can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return ""


def interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter (`TRITON_INTERPRET=1`), on CPU tensors."""
    from diffmic_fast.triton.scalar import INTERPRETED

    return bool(INTERPRETED.value)


def unavailable(device: torch.device) -> str:
    """Why the kernels do not take tensors on that device; empty when they do."""
    if reason := failure():
        return reason
    if device.type == "cpu":
        if interpreted():
            return ""
        return "it takes tensors on a GPU, and on the CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"it takes tensors on a GPU, these are on {device}"
    if interpreted():
        return "TRITON_INTERPRET is set, with which it takes tensors on the CPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"Triton compiles for compute capability 8.0 and later, "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
        )
    return ""
