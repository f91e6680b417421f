"""The exponential moving average of the denoiser's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffmic_fast.distributed.fsdp import local_shard, shard_like


class MovingAverage:
    """Exponential moving average of a module's trainable parameters, by name, sharded as they are.

    average <- decay * average + (1 - decay) * parameter, from the initial parameters. Buffers (running statistics)
    are not averaged. `torch.optim.swa_utils.AveragedModel` has the same arithmetic; it would copy the whole module and
    rename the entries of published checkpoints.

    Attributes:
        values: the averages by parameter name.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.values = {
            name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad
        }
        self._module = module
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Average in the present parameters."""
        self._average(_shards(self.values.values()), _shards(self._parameters()), 0)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the averages from tensors that are not sharded, by name."""
        for name, value in self.values.items():
            local_shard(value).copy_(local_shard(shard_like(values[name], value)))

    @torch.no_grad()
    def reset(self, prefix: str) -> None:
        """Restart the averages of the parameters whose names begin with `prefix` at their present values."""
        for name, parameter in self._module.named_parameters():
            if name.startswith(prefix) and name in self.values:
                local_shard(self.values[name]).copy_(local_shard(parameter))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """A block in which the module has the averages as its parameters."""
        parameters = _shards(self._parameters())
        kept = [parameter.clone() for parameter in parameters]
        _copy(parameters, _shards(self.values.values()))
        try:
            yield
        finally:
            _copy(parameters, kept)

    def _parameters(self) -> list[Tensor]:
        parameters = dict(self._module.named_parameters())
        return [parameters[name] for name in self.values]


def _shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local_shard(tensor.detach()) for tensor in tensors]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
