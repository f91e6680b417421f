"""Dual-guidance conditioning: noisy label and guidance of all streams to h1 (spec, section 4, first line)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmic_fast.reference.conditional_linear import ConditionalLayer, conditional_linear


def conditioning(
    x: Tensor,
    y_t: Tensor,
    guidance: Tensor,
    layer: ConditionalLayer,
    timesteps: Tensor,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """h1 = x * softplus(BN1(gamma1_t * (W1 [y_t ; guidance] + b1))).

    Args:
        x: [B, F] image features after `norm`, shared by the streams.
        y_t: [B, C], or [S, B, C] for S streams.
        guidance: shape of `y_t`.
        layer: first conditional layer, 2C -> F; running statistics are updated in place in training.
        timesteps: [B] or [1] int64 in [0, T].
        training, momentum, eps: as in `conditional_linear`.

    Returns:
        [B, F] or [S, B, F].
    """
    label = torch.cat((y_t, guidance), dim=-1)
    return x * conditional_linear(
        label, layer, timesteps, training=training, momentum=momentum, eps=eps
    )
