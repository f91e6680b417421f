"""Triton kernels: conditional layers, whole in evaluation mode and around a GEMM in training, and the reverse chain.

They run on the GPUs of any vendor that Triton supports. This package does not import Triton; its modules do.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def failure() -> str:
    """Why Triton cannot be imported; empty if it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return ""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), which takes CPU tensors."""
    from diffmic_fast.triton.scalar import INTERPRETED

    return bool(INTERPRETED.value)


def unavailable(device: torch.device) -> str:
    """Why the kernels cannot run on tensors of `device`; empty if they can."""
    if reason := failure():
        return reason
    if device.type == "cpu":
        if interpreted():
            return ""
        return "tensors must be on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1), got cpu"
    if device.type != "cuda":
        return f"tensors must be on a GPU, got {device}"
    if interpreted():
        return f"with TRITON_INTERPRET set, tensors must be on the CPU, got {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"Triton compiles for compute capability 8.0 and later, "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
        )
    return ""
