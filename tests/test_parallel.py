"""The threads of the C++ kernels: PyTorch's own, and others where those are not to be had."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from forked import ends_in_a_child

from diffmic_fast import _native

_C = _native.extension()

# A process of its own: PyTorch's threads are there from its first parallel operation on.
THREADS = """
import os, torch
from diffmic_fast import _native
_C = _native.extension()
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
x, y = torch.randn(500, 64), torch.randn(500, 64)
counts = [count()]
_C.mmd(x, y, None, None, [1e-3], False, torch.empty(()), None, None, threads=3)
counts.append(count())
torch.randn(1 << 20).mul(2)
counts.append(count())
_C.mmd(x, y, None, None, [1e-3], False, torch.empty(()), None, None, threads=3)
counts.append(count())
print(*counts)
"""


def value_and_gradients(threads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(500, 64, generator=generator) for _ in range(2))
    found = [torch.empty(()), torch.empty_like(x), torch.empty_like(y)]
    _C.mmd(x, y, None, None, [1e-3], False, *found, threads=threads)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="PyTorch without OpenMP")
def test_threads_are_those_that_pytorch_runs_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, check=True
    )
    first, *others = map(int, done.stdout.split())
    assert others == [first + 2] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_threads_of_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        torch.randn(1 << 20).mul(2)
    finally:
        torch.set_num_threads(before)
    expected = value_and_gradients(threads=3)

    def work() -> None:
        for threads in (3, 1, 2):
            found = value_and_gradients(threads)
            assert all(a.equal(b) for a, b in zip(found, expected, strict=True))

    assert ends_in_a_child(work)
    assert not ends_in_a_child(lambda: [][0])
