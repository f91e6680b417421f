"""CUDA graphs of the reverse chain, and the objects that own them, kept between calls."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

Kept = TypeVar("Kept")


def usable(device: torch.device) -> bool:
    """Whether work on a device may be captured: on a GPU, unless the caller captures its current stream already.

    A capture cannot contain another one. The launches then become part of the caller's graph.
    """
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """The handle of PyTorch's current CUDA stream on a device."""
    return torch.cuda.current_stream(device).cuda_stream


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture the launches of a function as a CUDA graph.

    `torch.cuda.graph` would synchronise the device and empty the allocator's cache. The capture mode "thread_local"
    leaves other threads free to call CUDA meanwhile: in the mode "global" an allocation of theirs would invalidate the
    capture, and fail itself.

    Args:
        step: launches kernels on the current stream. They have been compiled, and it neither synchronises nor copies
            from or to the CPU.
        device: the GPU.

    Returns:
        A function that replays the graph on the current stream. It reads and writes the addresses that `step` used.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    return graph.replay


class Store(Generic[Kept]):
    """Objects kept between calls, the least recently used of which are dropped first.

    An object is lent to one call at a time, so that threads with the same key do not share its memory: `take` removes
    it, `give` puts it back.

    Args:
        most: number of objects kept.
        most_bytes: sum of their sizes.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self._kept: OrderedDict[Hashable, tuple[Kept, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def bytes(self) -> int:
        """Sum of the sizes of the objects."""
        with self._lock:
            return sum(size for _, size in self._kept.values())

    def take(self, key: Hashable) -> Kept | None:
        """Remove and return the object of a key; None if there is none."""
        with self._lock:
            found = self._kept.pop(key, None)
        return None if found is None else found[0]

    def give(self, key: Hashable, value: Kept, size: int) -> None:
        """Keep an object of `size` bytes, in place of one with the same key, and drop what exceeds the limits."""
        with self._lock:
            dropped = [self._kept.pop(key, None)]
            if size <= self.most_bytes:
                self._kept[key] = value, size
            total = sum(size for _, size in self._kept.values())
            while len(self._kept) > self.most or total > self.most_bytes:
                _, last = self._kept.popitem(last=False)
                total -= last[1]
                dropped.append(last)
        del dropped  # frees their memory, outside of the lock

    def clear(self) -> None:
        """Drop all objects."""
        with self._lock:
            dropped, self._kept = self._kept, OrderedDict()
        del dropped
