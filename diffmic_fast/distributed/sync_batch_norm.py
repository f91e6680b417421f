"""BatchNorm over the images of several processes, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

# Private, and the only base class of all BatchNorm layers, timm's included; the import fails where it is gone.
from torch.nn.modules.batchnorm import _BatchNorm


def _all_reduced(values: Tensor) -> Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


class _AllReduce(Function):
    """Sum over the processes; its gradient is the sum of theirs.

    `torch.distributed.nn.functional.all_reduce` does the same and is deprecated; its successor is private.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _all_reduced(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _all_reduced(grads[0])


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the batches of all processes, which may differ in size.

    The semantics of `torch.nn.SyncBatchNorm`, which supports no CPU tensors: mean and variance (two passes) in
    float32, unbiased running variance. `from_norm` takes over the tensors of another layer, so the keys of a state
    dict stay the same.

    Attributes:
        after: what the replaced layer applied after its norm (timm's dropout and activation), or None.
    """

    after: nn.Module | None

    @classmethod
    def from_norm(cls, norm: _BatchNorm) -> SyncBatchNorm:
        """The same layer with synchronised statistics.

        Raises:
            ValueError: a subclass of BatchNorm that is not supported.
        """
        after: nn.Module | None = None
        if type(norm).__name__ == "BatchNormAct2d" and type(norm).__module__.startswith("timm."):
            after = nn.Sequential(norm.drop, norm.act)  # type: ignore[arg-type]
        elif type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, cls):
            raise ValueError(
                f"sync_batch_norm: must be BatchNorm1d, 2d, 3d or timm's BatchNormAct2d, got {type(norm).__name__}"
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
            raise ValueError(f"SyncBatchNorm: input must be [B, C, …], got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, ...]."""
        self._check_input_dim(input)
        out = self._normed(input) if self.training else super().forward(input)
        return out if self.after is None else self.after(out)

    def _normed(self, input: Tensor) -> Tensor:
        x = input.float()
        over = [i for i in range(x.ndim) if i != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.new_full((1,), x.numel() / x.shape[1])
        total = _AllReduce.apply(torch.cat((x.sum(over), count)))
        count = total[-1].detach()
        mean = total[:-1] / count
        centered = x - mean.view(shape)
        variance = _AllReduce.apply(centered.square().sum(over)) / count
        self._update_statistics(mean.detach(), variance.detach() * (count / (count - 1)))
        out = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics."""
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
    """Replace every BatchNorm inside a module by a `SyncBatchNorm`."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, SyncBatchNorm.from_norm(child))
