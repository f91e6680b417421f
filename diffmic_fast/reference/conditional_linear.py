"""A conditional layer of the denoiser (docs/algorithm.md, "Denoiser")."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ConditionalLayer(NamedTuple):
    """Parameters and running statistics of one conditional layer.

    Attributes:
        weight: [out, in].
        bias: [out].
        gamma: [T + 1, out], one row per timestep.
        norm_weight, norm_bias, running_mean, running_var: [out], the parameters and running statistics of BatchNorm1d.
    """

    weight: Tensor
    bias: Tensor
    gamma: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def conditional_linear(
    h: Tensor,
    layer: ConditionalLayer,
    timesteps: Tensor,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """softplus(BN(gamma_t * (W h + b))).

    Args:
        h: [B, in], or [S, B, in] for S guidance branches.
        layer: parameters; the running statistics are updated in place in training.
        timesteps: [B] or [1] int64 in [0, T], shared by the branches.
        training: normalise with the statistics of the batch, computed for each branch separately, and update the
            running statistics once per branch, in order. Otherwise normalise with the running statistics.
        momentum: weight of a batch in the running statistics.
        eps: epsilon of BatchNorm.

    Returns:
        [B, out] or [S, B, out].
    """
    product = F.linear(h, layer.weight, layer.bias)
    return conditional_norm(
        product, layer, timesteps, training=training, momentum=momentum, eps=eps
    )


def conditional_norm(
    product: Tensor,
    layer: ConditionalLayer,
    timesteps: Tensor,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """softplus(BN(gamma_t * product)), product = W h + b [B, out] or [S, B, out]; else as `conditional_linear`."""
    scaled = layer.gamma[timesteps] * product
    # On the CPU the backward pass of batch_norm reads these as contiguous, whatever their strides are (torch 2.14).
    running = layer.running_mean.contiguous(), layer.running_var.contiguous()
    affine = layer.norm_weight.contiguous(), layer.norm_bias.contiguous()
    normed = [
        F.batch_norm(branch, *running, *affine, training, momentum, eps)
        for branch in (scaled if scaled.ndim == 3 else scaled[None])
    ]
    if training:
        for statistic, updated in zip(
            (layer.running_mean, layer.running_var), running, strict=True
        ):
            if not statistic.is_contiguous():
                statistic.copy_(updated)
    return F.softplus(torch.stack(normed).view_as(scaled))
