"""The threads of the C++ kernels: those of PyTorch's OpenMP runtime, or threads of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from forked import ends_in_a_child

from diffmic_fast import _native

_C = _native.extension()

# In a subprocess: PyTorch starts its threads with its first parallel operation.
THREADS = """
import os, torch
from diffmic_fast import _native
_C = _native.extension()
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
x, y = torch.randn(500, 64), torch.randn(500, 64)
counts = [count()]
_C.mmd(x, y, None, None, [1e-3], None, False, torch.empty(()), None, None, threads=3)
counts.append(count())
torch.randn(1 << 20).mul(2)
counts.append(count())
_C.mmd(x, y, None, None, [1e-3], None, False, torch.empty(()), None, None, threads=3)
counts.append(count())
print(*counts)
"""


# A child that loads the extension after the fork; SIGALRM ends a deadlock.
LATE = """
import os, signal, torch
from diffmic_fast import _native
torch.set_num_threads(3)
torch.randn(1 << 20).mul(2)
x, y = torch.randn(500, 64), torch.randn(500, 64)
child = os.fork()
if child == 0:
    signal.alarm(30)
    _C = _native.extension()
    _C.mmd(x, y, None, None, [1e-3], None, False, torch.empty(()), None, None, threads=3)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


@pytest.fixture
def three_threads() -> Iterator[None]:
    """PyTorch with three threads, already started."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.randn(1 << 20).mul(2)
    yield
    torch.set_num_threads(before)


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return done.stdout


def value_and_gradients(threads: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (scale * torch.randn(500, 64, generator=generator) for _ in range(2))
    found = [torch.empty(()), torch.empty_like(x), torch.empty_like(y)]
    _C.mmd(x, y, None, None, [1e-3], None, False, *found, threads=threads)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="PyTorch without OpenMP")
def test_kernels_use_the_threads_of_pytorch() -> None:
    first, *others = map(int, run(THREADS).split())
    assert others == [first + 2] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("three_threads")
def test_forked_child_starts_its_own_threads() -> None:
    expected = value_and_gradients(threads=3)

    def work() -> None:
        for threads in (3, 1, 2):
            found = value_and_gradients(threads)
            assert all(a.equal(b) for a, b in zip(found, expected, strict=True))

    assert ends_in_a_child(work)
    assert not ends_in_a_child(lambda: [][0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_may_load_the_extension_first() -> None:
    assert run(LATE).split() == ["0"]


@pytest.mark.usefixtures("three_threads")
def test_threads_adopt_the_floating_point_environment() -> None:
    kept = value_and_gradients(threads=1, scale=1e-36)
    assert bool(((kept[1] != 0) & (kept[1].abs() < 1e-38)).any())
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormal numbers")
    try:
        flushed = value_and_gradients(threads=1, scale=1e-36)
        # With more threads than PyTorch has, new ones are started.
        found = [
            value_and_gradients(threads, scale=1e-36) for threads in (2, 3, 5) for _ in range(5)
        ]
    finally:
        torch.set_flush_denormal(False)
    assert not torch.equal(flushed[1], kept[1])
    for other in found:
        assert all(a.equal(b) for a, b in zip(other, flushed, strict=True))
    again = value_and_gradients(threads=3, scale=1e-36)
    assert all(a.equal(b) for a, b in zip(again, kept, strict=True))
