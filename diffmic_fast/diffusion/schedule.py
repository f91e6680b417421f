"""Noise schedules and the forward process (spec, sections 1 and 2)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SCHEDULES = ("linear", "const", "quad", "jsd", "sigmoid", "cosine", "cosine_anneal")


def make_betas(schedule: str, timesteps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """The betas of a schedule.

    Args:
        schedule: one of `SCHEDULES`.
        timesteps: T >= 1.
        start, end: first and last beta where the schedule has them ("const" uses `end`; "jsd" and "cosine" neither).

    Returns:
        [T] float32.

    Raises:
        ValueError: an unknown schedule or fewer than one timestep.
    """
    if timesteps < 1:
        raise ValueError(f"make_betas: timesteps must be at least 1, got {timesteps}")
    if schedule == "linear":
        return torch.linspace(start, end, timesteps)
    if schedule == "const":
        return end * torch.ones(timesteps)
    if schedule == "quad":
        return torch.linspace(start**0.5, end**0.5, timesteps) ** 2
    if schedule == "jsd":
        return 1.0 / torch.linspace(timesteps, 1, timesteps)
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, timesteps)) * (end - start) + start
    if schedule == "cosine":
        levels = [_cosine_level(i / timesteps) for i in range(timesteps + 1)]
        return torch.tensor(
            [min(1.0 - levels[i + 1] / levels[i], 0.999) for i in range(timesteps)],
        )
    if schedule == "cosine_anneal":
        last = max(timesteps - 1, 1)
        return torch.tensor(
            [
                start + 0.5 * (end - start) * (1.0 - math.cos(math.pi * i / last))
                for i in range(timesteps)
            ]
        )
    raise ValueError(
        f"make_betas: schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}"
    )


def _cosine_level(time: float) -> float:
    return math.cos((time + 0.008) / 1.008 * math.pi / 2.0) ** 2


class Schedule(NamedTuple):
    """The tables of a noise schedule, [T] float32 each, on the CPU.

    Attributes:
        betas: variance added at each timestep.
        alphas: 1 - betas.
        alpha_bar: running product of alphas.
        sqrt_alpha_bar: weight of the label in q(y_t | y_0).
        sqrt_one_minus_alpha_bar: deviation of q(y_t | y_0).
    """

    betas: Tensor
    alphas: Tensor
    alpha_bar: Tensor
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor


def make_schedule(
    schedule: str = "linear", timesteps: int = 1000, start: float = 1e-4, end: float = 2e-2
) -> Schedule:
    """Betas and all that follows from them, computed in float32 as the published program does.

    Raises:
        ValueError: as `make_betas`; betas outside [0, 1].
    """
    betas = make_betas(schedule, timesteps, start, end)
    if not bool(((betas >= 0) & (betas <= 1)).all()):
        raise ValueError(
            f"make_schedule: betas must be in [0, 1], got {float(betas.min())} … {float(betas.max())} from schedule "
            f"{schedule!r} with start {start} and end {end}"
        )
    alphas = 1.0 - betas
    alpha_bar = alphas.cumprod(dim=0)
    deviation = torch.sqrt(1.0 - alpha_bar)
    if schedule == "cosine":
        # Keeps sqrt(alpha_bar), recovered from this table, away from 0 at the end of the chain.
        deviation = deviation * 0.9999
    return Schedule(betas, alphas, alpha_bar, torch.sqrt(alpha_bar), deviation)


def q_sample(
    y: Tensor, prior: Tensor, schedule: Schedule, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """y_t = s y + (1 - s) prior + q noise, s = sqrt(alpha_bar_t) and q = sqrt(1 - alpha_bar_t).

    Args:
        y: [..., B, C] label vectors.
        prior: [..., B, C] prior means.
        timesteps: [B] int64 in [0, T).
        noise: [..., B, C].

    Returns:
        Shape of the broadcast, dtype of `y`.
    """
    s = schedule.sqrt_alpha_bar.to(y.device)[timesteps][:, None]
    q = schedule.sqrt_one_minus_alpha_bar.to(y.device)[timesteps][:, None]
    return s * y + (1.0 - s) * prior + q * noise
