"""Dual-guidance conditioning: the denoiser's first layer (docs/algorithm.md, "Denoiser" and "Training step")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffmic_fast.reference import philox
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
        x: [B, F] normalised image features, shared by the branches.
        y_t: [B, C], or [S, B, C] for S guidance branches.
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


class NoisedConditioning(NamedTuple):
    """Results of `noised_conditioning`.

    Attributes:
        h: [B, F] or [S, B, F], the output of the layer.
        y_t: [B, C] or [S, B, C], the noisy labels.
        noise: [B, C], the noise in them.
    """

    h: Tensor
    y_t: Tensor
    noise: Tensor


def noised_conditioning(
    x: Tensor,
    y_0: Tensor,
    guidance: Tensor,
    layer: ConditionalLayer,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int = 0,
    image_ids: Tensor | None = None,
    sample_ids: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> NoisedConditioning:
    """`conditioning` of y_t = a y_0 + (1 - a) guidance + d noise, a and d the two tables at the timestep of the row.

    Args:
        x, layer, timesteps, training, momentum, eps: as in `conditioning`; timesteps in [0, T).
        y_0: [B, C] label vectors, shared by the branches.
        guidance: [B, C] or [S, B, C], prior mean of the noisy labels and guidance of the layer.
        sqrt_alpha_bar, sqrt_one_minus_alpha_bar: [T], the tables of the schedule.
        noise: [B, C], shared by the branches. Default: Philox noise at (seed, image, sample, timestep 0).
        seed, image_ids, sample_ids: see `philox.normal`; default images are 0 … B-1, default samples 0.
    """
    rows, classes = y_0.shape
    if noise is None:
        if image_ids is None:
            image_ids = torch.arange(rows, device=x.device)
        if sample_ids is None:
            sample_ids = torch.zeros_like(image_ids)
        start = torch.zeros(1, dtype=torch.int64)
        noise = philox.normal(seed, image_ids, sample_ids, start, classes)[0].to(y_0)
    a, d = (table[timesteps][:, None] for table in (sqrt_alpha_bar, sqrt_one_minus_alpha_bar))
    y_t = a * y_0 + (1.0 - a) * guidance + d * noise
    h = conditioning(
        x, y_t, guidance, layer, timesteps, training=training, momentum=momentum, eps=eps
    )
    return NoisedConditioning(h, y_t, noise)
