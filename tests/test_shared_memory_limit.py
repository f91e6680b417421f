"""The limit of a kernel's shared memory (csrc/cuda/common/shared_memory.h) is set once, to the largest value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
from denoise_cases import SCHEDULE, make_inputs, make_weights

from diffmic_fast import _native
from diffmic_fast.diffusion import make_steps
from diffmic_fast.ops.denoise import denoise

pytestmark = pytest.mark.emulated
_MOST = 227 * 1024


@pytest.fixture
def emulator() -> Iterator[ModuleType]:
    found = _native.cuda("cuda-emulated").emulator
    found.configure(shared_per_block=_MOST, mode="plain")
    yield found
    found.configure(mode="checked")


def test_launches_of_other_sizes_do_not_change_it(emulator: ModuleType) -> None:
    """Each launch setting its own size, one thread could lower the limit under another's launch."""
    before = emulator.shared_limits()
    steps = make_steps(SCHEDULE, "ddim", 2)
    with torch.no_grad():
        for rows, features in ((1, 40), (9, 130), (1, 40)):
            inputs, weights = make_inputs(rows, features, 3), make_weights(features, 3)
            denoise(*inputs, weights, steps, backend="cuda-emulated")
    limits = emulator.shared_limits()
    of_kernels = Counter(kernel for kernel, _ in limits)
    assert set(of_kernels.values()) == {1}
    assert all(bytes_ == _MOST for _, bytes_ in limits[len(before) :])
    assert limits


def test_threads_wait_until_it_is_set(emulator: ModuleType) -> None:
    """No thread goes on to its launch before the limit is set, which takes milliseconds in the emulator."""
    kernels = [16 * i for i in range(1, 6)]  # no addresses of kernels

    def launch(kernel: int) -> bool:
        emulator.allow_shared_memory(kernel)
        return (kernel, _MOST) in emulator.shared_limits()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(launch, kernels * 8))
    counts = Counter(kernel for kernel, _ in emulator.shared_limits())
    assert [counts[kernel] for kernel in kernels] == [1] * 5
