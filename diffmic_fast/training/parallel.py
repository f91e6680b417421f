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


# ---- weights divided over the processes (training.fsdp) -----------------------------------------


def divide(module: nn.Module) -> None:
    """Leave each process its share of every parameter, of the first one's values; buffers stay whole.

    By `fully_shard`, in place: parameters are `DTensor`s, and whole from a call of the module to the end of its
    backward pass. Convolutions lose their channels-last weights, which it does not take.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)
    mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
    fully_shard(module, mesh=mesh, reshard_after_forward=False)


def is_divided(value: object) -> bool:
    """Whether it is a tensor of which this process has a share, or a module of such."""
    if isinstance(value, Tensor):
        return type(value) is not Tensor and hasattr(value, "full_tensor")
    return hasattr(value, "unshard")


def own_share(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: the share of a divided one (its memory), else all."""
    if not is_divided(tensor):
        return tensor
    share: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return share


def whole(value: Any, processes: Processes) -> Any:
    """Dictionaries and lists with whole tensors, on the CPU, for divided ones: on the first process, which keeps them.

    Every process has to call it, with the same.
    """
    if isinstance(value, dict):
        return {key: whole(each, processes) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(each, processes) for each in value)
    if not is_divided(value):
        return value
    found = value.full_tensor()
    return found.cpu() if processes.first else None


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, divided as `like` is."""
    if not is_divided(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device, like.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements)  # type: ignore[attr-defined]


@contextmanager
def undivided(*modules: nn.Module) -> Iterator[None]:
    """A block in which every process has the modules' weights whole, for what is no call of the module."""
    divided: list[Any] = [module for module in modules if is_divided(module)]
    for module in divided:
        module.unshard()
        # They are written anew behind autograd's back, and what is kept of weights goes by their versions.
        torch.autograd.graph.increment_version(list(module.parameters()))
    try:
        yield
    finally:
        for module in divided:
            module.reshard()


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
