"""The processes of one run: `torchrun --nproc-per-node N -m diffmic_fast train …`.

Each process takes a contiguous shard of every global batch. Decisions are collective, and rank 0 writes. A single
process makes no collective call.
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
    """The processes of a run, as one of them sees them. All have to make the same collective calls.

    Attributes:
        rank: number of this process.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def shard(self, items: Sequence[_T]) -> Sequence[_T]:
        """This process's part of a sequence: contiguous parts of nearly equal length, the longer ones first."""
        sizes = split_sizes(len(items), self.world_size)
        start = sum(sizes[: self.rank])
        return items[start : start + sizes[self.rank]]

    def all_gather(self, value: _T) -> list[_T]:
        """Collective: the (picklable) value of every process, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_reduce(self, values: Tensor) -> Tensor:
        """Collective: the sum over the processes, the same bits on each."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def raise_together(self, reason: str) -> None:
        """Collective: raise ValueError on every process if one of them has a reason (not "")."""
        reasons = self.all_gather(reason)
        if reason:
            raise ValueError(reason)
        for rank, other in enumerate(reasons):
            if other:
                raise ValueError(f"process {rank}: {other}")

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Collective: the rows [counts[rank], ...] of all processes by rank; the gradient reaches the own rows only."""
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows.detach()
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        parts = [part[:count] for part, count in zip(gathered, counts, strict=True)]
        parts[self.rank] = rows
        return torch.cat(parts)

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Collective: copy the buffers (running statistics) of rank 0 to every process, one transfer per dtype."""
        if self.world_size == 1:
            return
        for dtype in dict.fromkeys(buffer.dtype for buffer in module.buffers()):
            buffers = [buffer for buffer in module.buffers() if buffer.dtype == dtype]
            joined = torch.cat([buffer.flatten() for buffer in buffers])
            dist.broadcast(joined, 0)
            parts = joined.split([buffer.numel() for buffer in buffers])
            for buffer, values in zip(buffers, parts, strict=True):
                buffer.copy_(values.view_as(buffer))


def split_sizes(total: int, parts: int) -> list[int]:
    """`total` as a sum of `parts` nearly equal numbers, the larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def current() -> Processes:
    """The processes of the default process group; a single one without a group."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes()


def is_first_process() -> bool:
    """Whether this process has rank 0, also before torchrun's processes have formed their group."""
    return (
        int(os.environ.get("RANK", "0")) == 0 if not dist.is_initialized() else dist.get_rank() == 0
    )


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """A block with the process group that torchrun asks for; without torchrun, or in a group, nothing is done.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".

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
