"""A conditional layer: gamma and BatchNorm around a product, then softplus (spec, section 4)."""

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
        gamma: [T + 1, out], one row a timestep.
        norm_weight, norm_bias, running_mean, running_var: [out], those of BatchNorm1d.
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
        h: [B, in], or [S, B, in] for S streams.
        layer: parameters; the running statistics are updated in place in training.
        timesteps: [B] or [1] int64 in [0, T], shared by the streams.
        training: normalise with the statistics of the batch, taken for each stream on its own, and update the running
            statistics once a stream, in order. Otherwise use the running statistics.
        momentum: weight of a batch in the running statistics.
        eps: BatchNorm's.

    Returns:
        [B, out] or [S, B, out].
    """
    return conditional_norm(
        F.linear(h, layer.weight, layer.bias),
        layer,
        timesteps,
        training=training,
        momentum=momentum,
        eps=eps,
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
    """softplus(BN(gamma_t * product)): what stands around the product W h + b, [B, out] or [S, B, out]."""
    scaled = layer.gamma[timesteps] * product
    streams = scaled if scaled.ndim == 3 else scaled[None]
    normed = torch.stack(
        [
            F.batch_norm(
                stream,
                layer.running_mean,
                layer.running_var,
                layer.norm_weight,
                layer.norm_bias,
                training,
                momentum,
                eps,
            )
            for stream in streams
        ]
    )
    return F.softplus(normed.view_as(scaled))
