"""Exponential moving averages of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffmic_fast.distributed.fsdp import local_shard, shard_like


class MovingAverage:
    """Exponential moving average of a module's trainable parameters, by name, sharded as they are.

    average <- decay * average + (1 - decay) * parameter, from the initial values.
    `torch.optim.swa_utils.AveragedModel` has the same arithmetic; it would copy the whole module and rename the entries
    of published checkpoints.

    Attributes:
        values: the averages by the names of the parameters and buffers.
    """

    def __init__(self, module: nn.Module, decay: float, *, buffers: bool = False) -> None:
        """Begin at the present values.

        Args:
            module: what is averaged.
            decay: of the average, in (0, 1).
            buffers: also average floating-point buffers (running statistics).
        """
        self._module, self._with_buffers = module, buffers
        self.values = {
            name: tensor.detach().clone()
            for name, tensor in self._tensors().items()
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
        }
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Average in the present values."""
        self._average(_shards(self.values.values()), _shards(self._present()), 0)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the averages from tensors that are not sharded, by name.

        Raises:
            ValueError: a name is missing, or its tensor has another shape.
        """
        for name, value in self.values.items():
            if name not in values or values[name].shape != value.shape:
                found = tuple(values[name].shape) if name in values else "none"
                raise ValueError(
                    f"checkpoint: the moving average of {name} must be {tuple(value.shape)}, got {found}"
                )
            local_shard(value).copy_(local_shard(shard_like(values[name], value)))

    @torch.no_grad()
    def assign(self) -> None:
        """Set the module to the averages."""
        _copy(_shards(self._present()), _shards(self.values.values()))

    def resume(self, values: Mapping[str, Tensor] | None) -> None:
        """`load`, or begin at the present values where a finished run, which has none, gets more epochs."""
        if values is None:
            _copy(_shards(self.values.values()), _shards(self._present()))
        else:
            self.load(values)

    @torch.no_grad()
    def reset(self, prefix: str) -> None:
        """Restart the averages of the parameters whose names begin with `prefix` at their present values."""
        for name, parameter in self._module.named_parameters():
            if name.startswith(prefix) and name in self.values:
                local_shard(self.values[name]).copy_(local_shard(parameter))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """A block in which the module has the averages as its values."""
        present = _shards(self._present())
        kept = [tensor.clone() for tensor in present]
        _copy(present, _shards(self.values.values()))
        try:
            yield
        finally:
            _copy(present, kept)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(self._module.named_parameters())
        if self._with_buffers:
            tensors |= {k: b for k, b in self._module.named_buffers() if b.is_floating_point()}
        return tensors

    def _present(self) -> list[Tensor]:
        tensors = self._tensors()
        return [tensors[name] for name in self.values]


def _shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local_shard(tensor.detach()) for tensor in tensors]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
