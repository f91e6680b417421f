"""Where GPU kernels are tested: on a GPU, and on the CPU, CUDA's in the emulator of tests/emulator, Triton's in its own
interpreter."""

from __future__ import annotations

import pytest
import torch

from diffmic_fast import _native, triton

_GPU = "no GPU" if not torch.cuda.is_available() else _native.cuda_failure()

CUDA_BACKENDS = [
    pytest.param("cuda-emulated", marks=pytest.mark.emulated),  # conftest.py builds the kernels
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(bool(_GPU), reason=_GPU)]),
]

TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_TRITON = triton.unavailable(TRITON_DEVICE)
TRITON = pytest.param("triton", marks=pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON))


def device_of(backend: str) -> torch.device:
    """Where the tensors of that backend's calls are."""
    if backend == "triton":
        return TRITON_DEVICE
    return torch.device("cuda" if backend == "cuda" else "cpu")


def seeds(backend: str, count: int) -> range:
    """Schedules to try: seeds of the emulator, one run of a GPU."""
    return range(count if backend == "cuda-emulated" else 1)


def schedule(backend: str, seed: int) -> None:
    """Let the emulator run the next launches in the order of that seed."""
    if backend == "cuda-emulated":
        _native.cuda(backend).emulator.configure(seed=seed)
