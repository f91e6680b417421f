"""The parts of `DiffMIC.loss` that need no model (docs/algorithm.md, "Training step")."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmic_fast.ops.mmd import mmd
from diffmic_fast.ops.noise_losses import noise_losses


class DiffMICLoss(NamedTuple):
    """The training loss and its terms, scalars.

    Attributes:
        total: noise + mmd_weight * (mmd_global + mmd_local); the one to differentiate.
        noise: Mean squared error of the fused branch's noise.
        mmd_global, mmd_local: Discrepancy between true and predicted noise of the other branches.
    """

    total: Tensor
    noise: Tensor
    mmd_global: Tensor
    mmd_local: Tensor


def antithetic_timesteps(
    count: int, timesteps: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw timesteps in pairs: floor(count / 2) + 1 from 0 … T - 1, then T - 1 minus each, cut to `count`.

    Args:
        count: Number of timesteps.
        timesteps: T.
        generator: CPU generator (default: torch's own).

    Returns:
        [count] int64 on the CPU.
    """
    drawn = torch.randint(0, timesteps, (count // 2 + 1,), generator=generator, device="cpu")
    return torch.cat((drawn, timesteps - 1 - drawn))[:count]


def denoising_loss(
    noise: Tensor, eps: Tensor, mmd_weight: float, gather: Callable[[Tensor], Tensor] | None
) -> DiffMICLoss:
    """The loss of predicted noise.

    Args:
        noise: [rows, C].
        eps: [3, rows, C], predicted by the fused, global and local branches.
        mmd_weight: Weight of the two MMD terms.
        gather: Collects the rows of several processes that the MMD terms compare; None for this process's alone.
    """
    if gather is None:
        error, mmd_global, mmd_local = noise_losses(noise, eps).unbind()
    else:
        error = F.mse_loss(eps[0], noise)
        noise, global_, local = (gather(rows) for rows in (noise, eps[1], eps[2]))
        mmd_global, mmd_local = mmd(noise, global_), mmd(noise, local)
    total = error + mmd_weight * (mmd_global + mmd_local)
    return DiffMICLoss(total, error, mmd_global, mmd_local)
