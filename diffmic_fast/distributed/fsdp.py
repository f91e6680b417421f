"""Weights divided over the processes of a run (`training.fsdp`), by PyTorch's FSDP2.

A model is one group of parameters: most of the denoiser's are in the conditional layers, whose weights the kernels read
themselves, so that no call of a module could gather them. What is divided is what is kept from step to step: weights,
gradients, moving averages, optimizer state. A process has a model whole from a call of it to the end of the backward
pass, and in a block `undivided`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffmic_fast.distributed.processes import Processes


def divide(module: nn.Module) -> None:
    """Leave each process its share of every parameter, of the first one's values; buffers stay whole.

    By `fully_shard`, in place: parameters are `DTensor`s, and whole from a call of the module to the end of its
    backward pass. Convolutions lose their channels-last weights, which it does not take.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    module.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)
    mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    if hasattr(module, "forward_branches"):  # the denoiser's in training
        register_fsdp_forward_method(module, "forward_branches")


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
