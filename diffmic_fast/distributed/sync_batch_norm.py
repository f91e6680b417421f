"""BatchNorm with the statistics of the images of several processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function


def _summed(values: Tensor) -> Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


class _Sum(Function):
    """The sum over the processes; a gradient of it is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _summed(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _summed(grads[0])


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose batch is that of all processes, of whatever sizes theirs are.

    The semantics of `torch.nn.SyncBatchNorm`, which takes no tensors on a CPU: mean and variance (of the differences
    from that mean) in float32, running variance with n - 1. `from_norm` takes over another layer's tensors, so a state
    dict keeps its keys.

    Attributes:
        after: what the layer did behind its norm (timm's activation), or None.
    """

    after: nn.Module | None

    @classmethod
    def from_norm(cls, norm: nn.modules.batchnorm._BatchNorm) -> SyncBatchNorm:
        """The same layer with synchronised statistics.

        Raises:
            ValueError: a kind of BatchNorm that does more than is known here.
        """
        after: nn.Module | None = None
        if type(norm).__name__ == "BatchNormAct2d" and type(norm).__module__.startswith("timm."):
            after = nn.Sequential(norm.drop, norm.act)  # type: ignore[arg-type]
        elif type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, cls):
            raise ValueError(
                f"sync_batch_norm: a {type(norm).__name__} is not known, its statistics cannot be taken over "
                "all processes"
            )
        synced = cls(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
            setattr(synced, name, tensor)
        synced.after = after
        synced.train(norm.training)
        return synced

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"SyncBatchNorm: x must be [B, C, …], got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, …] to the same."""
        self._check_input_dim(input)
        out = self._normed(input) if self.training else super().forward(input)
        return out if self.after is None else self.after(out)

    def _normed(self, input: Tensor) -> Tensor:
        x = input.float()
        over = [i for i in range(x.ndim) if i != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.new_full((1,), x.numel() / x.shape[1])
        total = _Sum.apply(torch.cat((x.sum(over), count)))
        count = total[-1].detach()
        mean = total[:-1] / count
        centered = x - mean.view(shape)
        variance = _Sum.apply(centered.square().sum(over)) / count
        self._move(mean.detach(), variance.detach() * (count / (count - 1)))
        out = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics towards those of the batch."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def synchronize_statistics(module: nn.Module) -> None:
    """Put a `SyncBatchNorm` in the place of every BatchNorm inside a module."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, SyncBatchNorm.from_norm(child))
