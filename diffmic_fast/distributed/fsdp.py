"""Parameters sharded over the processes of a run (`training.fsdp`), by PyTorch's FSDP2.

A model is one parameter group: most of the denoiser's parameters are in the conditional layers, whose weights the
kernels read themselves, so that no call of a submodule could all-gather them. Weights, gradients, moving averages and
optimizer state are sharded; a process holds all weights of a model from a call of it to the end of the backward pass,
and in a block `gathered`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffmic_fast.distributed.processes import Processes


def shard_parameters(module: nn.Module) -> None:
    """Collective: shard the parameters in place, with the values of rank 0; buffers are replicated.

    Parameters become `DTensor`s. The weights of convolutions lose their channels-last layout, which `fully_shard`
    does not support.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    module.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)
    mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    if hasattr(module, "forward_branches"):  # called in training instead of the denoiser's forward
        register_fsdp_forward_method(module, "forward_branches")


class _Probe(nn.Module):
    """The sum of its weights, which begin as ones."""

    def __init__(self, count: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def gradient_divisor(device: torch.device) -> float:
    """Collective: what FSDP2 divides the sum of the processes' gradients by.

    It is the number of processes, but 1 in torch 2.7 on CPUs, whose backend gloo sums where an average is asked for.
    """
    probe = _Probe(dist.get_world_size(), device)
    shard_parameters(probe)
    with torch.enable_grad():
        probe(torch.ones((), dtype=torch.float32, device=device)).backward()
    assert probe.weight.grad is not None
    return dist.get_world_size() / float(full(probe.weight.grad)[0])


def is_sharded(value: object) -> bool:
    """Whether a value is a `DTensor` or an `FSDPModule`, told without the slow import of either."""
    if isinstance(value, Tensor):
        return type(value) is not Tensor and hasattr(value, "full_tensor")
    return hasattr(value, "unshard")


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor (a view); any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def full(tensor: Tensor) -> Tensor:
    """Collective for a sharded tensor: all of it; any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def gather_state(value: Any, processes: Processes) -> Any:
    """Collective: nested dicts and lists with their sharded tensors gathered, on the CPU of rank 0 (None elsewhere)."""
    if isinstance(value, dict):
        return {key: gather_state(each, processes) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gather_state(each, processes) for each in value)
    if not is_sharded(value):
        return value
    gathered = full(value)
    return gathered.cpu() if processes.is_rank_zero else None


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Collective: shard a tensor, which every process has in full, as `like` is sharded (or not)."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device, like.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements)  # type: ignore[attr-defined]


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Collective: a block in which every process has all weights, for calls other than of the module itself."""
    sharded: list[Any] = [module for module in modules if is_sharded(module)]
    for module in sharded:
        module.unshard()
        # The all-gather writes memory that autograd does not track, and caches of weights compare versions.
        torch.autograd.graph.increment_version(list(module.parameters()))
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
