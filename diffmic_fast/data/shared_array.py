"""Arrays in memory that worker processes share, without /dev/shm, of which containers have little."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import get_spawning_popen

import numpy as np
import torch
from torch import Tensor


class SharedArray:
    """A tensor whose values worker processes read and write.

    Forked processes inherit the memory, an anonymous mapping. When an array is passed to a process that is not forked,
    its values move into a memory-mapped temporary file, which is removed with the array.

    Attributes:
        tensor: the values, 0 at first. Read it anew for each use: passing the array to a process replaces it.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Allocate the memory.

        Raises:
            OSError: there is not enough.
        """
        self._path: str | None = None
        self._shape, self._dtype = shape, dtype
        # A mapping must not be empty.
        self._map(mmap.mmap(-1, max(math.prod(shape) * dtype.itemsize, 1)))

    def _map(self, memory: mmap.mmap) -> None:
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        count = math.prod(self._shape) * self._dtype.itemsize
        self.tensor: Tensor = flat[:count].view(self._dtype).view(self._shape)

    def _move_to_file(self) -> str:
        size = max(self.tensor.nbytes, 1)
        handle, path = tempfile.mkstemp(prefix="diffmic-cache-")
        weakref.finalize(self, _remove, path)
        try:
            # Reserved now: a full disk would end the process that writes to the mapping, by a signal.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            else:
                os.truncate(handle, size)
            memory = mmap.mmap(handle, size)
        finally:
            os.close(handle)
        values = self.tensor
        self._map(memory)
        self.tensor.copy_(values)
        return path

    def __reduce__(self) -> tuple[Callable[..., SharedArray], tuple[object, ...]]:
        """Pass the array to a process that is being started; otherwise copy it."""
        if get_spawning_popen() is None:
            return _copy, (self.tensor.numpy().copy(), self._dtype)
        if self._path is None:
            self._path = self._move_to_file()
        return _open, (self._path, self._shape, self._dtype)


def _copy(values: np.ndarray, dtype: torch.dtype) -> SharedArray:
    array = SharedArray(values.shape, dtype)
    array.tensor.copy_(torch.from_numpy(values))
    return array


def _open(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> SharedArray:
    array = SharedArray.__new__(SharedArray)
    array._path, array._shape, array._dtype = path, shape, dtype
    with open(path, "r+b") as file:
        array._map(mmap.mmap(file.fileno(), 0))
    return array


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
