"""Several processes at one run: `torchrun --nproc-per-node N -m diffmic_fast train …`.

A single process is the case of one, and calls nothing of `torch.distributed`. Every process takes a contiguous shard of
each global batch; what is decided, decided by all (`any_of`), and what is written, written by the first one (`first`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: this one's number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def shard(self, items: Sequence[_T]) -> Sequence[_T]:
        """This process's part of a list: contiguous parts of nearly equal length, the longer ones first."""
        start = sum(sizes(len(items), self.count)[: self.rank])
        return items[start : start + sizes(len(items), self.count)[self.rank]]

    def all_of(self, value: _T) -> list[_T]:
        """The value of every process, in their order; what can be pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def any_of(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return flag if self.count == 1 else any(self.all_of(flag))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, the same bits on each."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes in their order; gradients reach this one's own."""
        if self.count == 1:
            return rows
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.count)]
        dist.all_gather(counts, torch.full_like(counts[0], rows.shape[0]))
        most = max(int(count) for count in counts)
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows.detach()
        found = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(found, padded)
        parts = [part[: int(count)] for part, count in zip(found, counts, strict=True)]
        parts[self.rank] = rows
        return torch.cat(parts)

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's buffers (running statistics)."""
        if self.count == 1:
            return
        for dtype in dict.fromkeys(buffer.dtype for buffer in module.buffers()):
            buffers = [buffer for buffer in module.buffers() if buffer.dtype == dtype]
            joined = torch.cat([buffer.flatten() for buffer in buffers])
            dist.broadcast(joined, 0)
            for buffer, values in zip(
                buffers, joined.split([b.numel() for b in buffers]), strict=True
            ):
                buffer.copy_(values.view_as(buffer))


def sizes(total: int, parts: int) -> list[int]:
    """`total` in `parts` nearly equal numbers, the larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def current() -> Processes:
    """The processes of the group that this one belongs to; one where there is none."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes()


@contextmanager
def started(device: str) -> Iterator[str]:
    """A block in which the processes that torchrun started are a group; nothing where it started none.

    Args:
        device: as in `choose_device`.

    Yields:
        The device of this process: on GPUs that of its local rank.

    Raises:
        ValueError: a single GPU named for several processes, or fewer GPUs than processes on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device.startswith("cuda:"):
        raise ValueError(
            f"device {device!r} is one GPU, and torchrun started {os.environ['WORLD_SIZE']} processes; use cuda, "
            "which gives each its own"
        )
    gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if gpu:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"device {device!r}: process {local} of this machine has no GPU, there are "
                f"{torch.cuda.device_count()}; start fewer processes, or use --device cpu"
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
