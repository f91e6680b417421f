"""Noise schedules and the forward process (docs/algorithm.md, "Noise schedule" and "Forward process")."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffmic_fast.ops._transfer import to_device

# The tables are float32 on the CPU, whatever torch's defaults are.
_tensor = partial(torch.tensor, dtype=torch.float32, device="cpu")
_linspace = partial(torch.linspace, dtype=torch.float32, device="cpu")


def _cosine(timesteps: int, start: float, end: float) -> Tensor:
    def level(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2.0) ** 2

    levels = [level(i / timesteps) for i in range(timesteps + 1)]
    return _tensor([min(1.0 - after / before, 0.999) for before, after in pairwise(levels)])


def _cosine_anneal(timesteps: int, start: float, end: float) -> Tensor:
    last = max(timesteps - 1, 1)
    rise = [1.0 - math.cos(math.pi * i / last) for i in range(timesteps)]
    return _tensor([start + 0.5 * (end - start) * each for each in rise])


# Betas as functions of T, start and end.
_BETAS: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": lambda n, start, end: _linspace(start, end, n),
    "const": lambda n, start, end: _tensor([end] * n),
    "quad": lambda n, start, end: _linspace(start**0.5, end**0.5, n) ** 2,
    "jsd": lambda n, start, end: 1.0 / _linspace(n, 1, n),
    "sigmoid": lambda n, start, end: torch.sigmoid(_linspace(-6, 6, n)) * (end - start) + start,
    "cosine": _cosine,
    "cosine_anneal": _cosine_anneal,
}
SCHEDULES = tuple(_BETAS)


def make_betas(schedule: str, timesteps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """The betas of a schedule.

    Args:
        schedule: one of `SCHEDULES`.
        timesteps: T >= 1.
        start, end: limits of the betas; "const" has only `end`, "jsd" and "cosine" have neither.

    Returns:
        [T] float32.

    Raises:
        ValueError: `schedule` is unknown or `timesteps` is less than 1.
    """
    if timesteps < 1:
        raise ValueError(f"make_betas: timesteps must be at least 1, got {timesteps}")
    if schedule not in _BETAS:
        raise ValueError(
            f"make_betas: schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}"
        )
    return _BETAS[schedule](timesteps, start, end)


class Schedule(NamedTuple):
    """The tables of a noise schedule, each [T] float32 on the CPU.

    Attributes:
        betas: variance added at each timestep.
        alphas: 1 - betas.
        alpha_bar: cumulative product of alphas.
        sqrt_alpha_bar: s, weight of the label in q(y_t | y_0).
        sqrt_one_minus_alpha_bar: q, standard deviation of q(y_t | y_0).
    """

    betas: Tensor
    alphas: Tensor
    alpha_bar: Tensor
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor


def make_schedule(
    schedule: str = "linear", timesteps: int = 1000, start: float = 1e-4, end: float = 2e-2
) -> Schedule:
    """The betas of a schedule and the tables that follow from them, in float32 as in the published program.

    Args:
        schedule, timesteps, start, end: as in `make_betas`.

    Raises:
        ValueError: as `make_betas`, or a beta is outside [0, 1].
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
        # Keeps sqrt(alpha_bar), which samplers recover from this table, away from 0 at the end of the chain.
        deviation = deviation * 0.9999
    return Schedule(betas, alphas, alpha_bar, torch.sqrt(alpha_bar), deviation)


def q_sample(
    y: Tensor, prior: Tensor, schedule: Schedule, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """The noisy label y_t = s y + (1 - s) prior + q noise.

    Args:
        y: [..., B, C] label vectors.
        prior: [..., B, C] prior means.
        schedule: tables of T timesteps.
        timesteps: [B] int64 in [0, T).
        noise: [..., B, C].

    Returns:
        Shape of the broadcast, dtype of `y`.
    """
    s = to_device(schedule.sqrt_alpha_bar, y.device)[timesteps][:, None]
    q = to_device(schedule.sqrt_one_minus_alpha_bar, y.device)[timesteps][:, None]
    return s * y + (1.0 - s) * prior + q * noise
