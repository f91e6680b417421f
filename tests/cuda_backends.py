"""The backends of tests of GPU kernels: a GPU, the emulator of tests/emulator (CUDA) and Triton's interpreter.

With ``DIFFMIC_FAKE_GPU=1`` the tests for a GPU (``-m gpu``) run on the fake one of fake_gpu.py.
"""

from __future__ import annotations

import os

import pytest
import torch

from diffmic_fast import _native, triton

FAKE_GPU = os.environ.get("DIFFMIC_FAKE_GPU") == "1"
_GPU = "no GPU" if not torch.cuda.is_available() else _native.cuda_failure()
if FAKE_GPU:
    _GPU = ""

CUDA_BACKENDS = [
    pytest.param("cuda-emulated", marks=pytest.mark.emulated),  # conftest.py builds the kernels
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(bool(_GPU), reason=_GPU)]),
]

TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_TRITON = triton.unavailable(TRITON_DEVICE)
TRITON = pytest.param("triton", marks=pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON))


def device_of(backend: str) -> torch.device:
    """The device of a backend's tensors."""
    if backend == "triton":
        return TRITON_DEVICE
    return torch.device("cuda" if backend == "cuda" else "cpu")


def seeds(backend: str, count: int) -> range:
    """Schedules to test: seeds of the emulator, one run on a GPU."""
    return range(count if backend == "cuda-emulated" else 1)


def schedule(backend: str, seed: int) -> None:
    """Set the emulator's seed, which determines the schedule of the next launches."""
    if backend == "cuda-emulated":
        _native.cuda(backend).emulator.configure(seed=seed)


def restore_emulator() -> None:
    """Give the emulator, if it was built, the settings that it begins with."""
    if _native.attempt_emulated()[0] is not None:
        _native.cuda("cuda-emulated").emulator.configure(
            seed=1, preempt=24, mode="checked", multiprocessors=4, shared_per_block=227 * 1024
        )
