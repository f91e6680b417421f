"""Samplers as tables of coefficients for `ops.denoise` (docs/algorithm.md, "Sampling").

A new sampler is a function that returns a `StepTable`, and an entry of `SAMPLERS`: the configuration, the command line
and `DiffMIC.predict` take their names and checks from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffmic_fast.diffusion.schedule import Schedule
from diffmic_fast.reference.denoise import StepTable


def make_steps(
    schedule: Schedule, sampler: str = "ddpm", steps: int | None = None, eta: float = 0.0
) -> StepTable:
    """Build the step table of a sampler.

    Args:
        schedule: tables of T timesteps.
        sampler: a key of `SAMPLERS`.
        steps: number n of denoiser evaluations; see `Sampler.whole_chain`.
        eta: in [0, 1], for samplers with `Sampler.takes_eta`: 0 is deterministic after the first draw, 1 has the
            variance of "ddpm".

    Returns:
        Table of n steps, on the CPU.

    Raises:
        ValueError: as `check_sampler`; or alpha_bar is 0 in float32 at a timestep of the chain.
        TypeError: `schedule` is no Schedule.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"make_steps: schedule must be a Schedule (make_schedule), got {type(schedule).__name__}"
        )
    total = len(schedule.betas)
    check_sampler(sampler, steps, eta, total)
    chosen = SAMPLERS[sampler]
    return chosen.table(schedule, total if steps is None else steps, eta)


def check_sampler(
    sampler: str, steps: int | None, eta: float, timesteps: int | None = None
) -> None:
    """Check the arguments of a sampler.

    Args:
        sampler, steps, eta: as in `make_steps`.
        timesteps: T of the schedule, or None where it is not known yet.

    Raises:
        ValueError: the sampler is unknown, or does not take these `steps` or this `eta`.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
    chosen = SAMPLERS[sampler]
    if eta != 0.0 and not chosen.takes_eta:
        raise ValueError(f"eta must be 0 for the sampler {sampler!r}, got {eta}")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if chosen.whole_chain:
        if timesteps is not None and steps not in (None, timesteps):
            raise ValueError(
                f"the sampler {sampler!r} walks all {timesteps} timesteps, got steps={steps}; leave steps out (None), "
                "or use 'ddim' (respaced) or 'ddpm_truncated' (first table entries)"
            )
    elif steps is None or steps < 1 or (timesteps is not None and steps > timesteps):
        end = "T" if timesteps is None else timesteps
        raise ValueError(
            f"steps must be in [1, {end}] (timesteps of the schedule) for the sampler {sampler!r}, got {steps}"
        )


def ddpm(schedule: Schedule, steps: int, eta: float = 0.0) -> StepTable:
    """Ancestral sampling over the first `steps` timesteps of the schedule; `eta` has no effect.

    With fewer than T the chain still starts from noise of unit scale, as with the published program's "test timesteps".
    """
    timesteps = torch.arange(steps - 1, -1, -1, device="cpu")
    q = schedule.sqrt_one_minus_alpha_bar[timesteps]
    # Recovered from q as in the published program, which loses digits near the end of the schedule.
    s = torch.sqrt(1.0 - q.square())
    alphas = schedule.alphas[timesteps]
    s_next, q_next = _shift(s, 1.0), _shift(q, 0.0)
    variance = q.square()
    table = StepTable(
        timesteps,
        s,
        q,
        y0_weight=(1.0 - alphas) * s_next / variance,
        y_weight=q_next.square() * alphas.sqrt() / variance,
        prior_weight=1.0 + (s - 1.0) * (alphas.sqrt() + s_next) / variance,
        eps_weight=torch.zeros_like(s),
        sigma=torch.sqrt(q_next.square() / variance * (1.0 - alphas)),
        start=len(schedule.betas),
    )
    return _with_exact_end(table)


def ddim(schedule: Schedule, steps: int, eta: float = 0.0) -> StepTable:
    """Sampling over `steps` timesteps spaced evenly over the whole chain (Song et al., ICLR 2021)."""
    total = len(schedule.betas)
    timesteps = (
        torch.arange(steps, 0, -1, device="cpu").double() * (total / steps)
    ).round().long() - 1
    s = schedule.sqrt_alpha_bar[timesteps]
    q = schedule.sqrt_one_minus_alpha_bar[timesteps]
    s_next, q_next = _shift(s, 1.0), _shift(q, 0.0)
    sigma = eta * q_next / q * torch.sqrt((1.0 - (s / s_next).square()).clamp(min=0.0))
    table = StepTable(
        timesteps,
        s,
        q,
        y0_weight=s_next,
        y_weight=torch.zeros_like(s),
        prior_weight=1.0 - s_next,
        eps_weight=torch.sqrt((q_next.square() - sigma.square()).clamp(min=0.0)),
        sigma=sigma,
        start=total,
    )
    return _with_exact_end(table)


class Sampler(NamedTuple):
    """What `make_steps` knows of a sampler.

    Attributes:
        table: builds the step table from (schedule, steps, eta).
        whole_chain: the sampler takes all T timesteps, so `steps` is T or None; else `steps` is in [1, T].
        takes_eta: `eta` may be other than 0.
    """

    table: Callable[[Schedule, int, float], StepTable]
    whole_chain: bool = False
    takes_eta: bool = False


SAMPLERS = {
    "ddpm": Sampler(ddpm, whole_chain=True),
    "ddpm_truncated": Sampler(ddpm),
    "ddim": Sampler(ddim, takes_eta=True),
}


def _shift(values: Tensor, last: float) -> Tensor:
    """The value of the next step for every step, `last` (that of the clean label) for the last one."""
    return torch.cat((values[1:], values.new_tensor([last])))


def _with_exact_end(table: StepTable) -> StepTable:
    """Check that every step can estimate the label, and let the last one return its estimate without rounding."""
    s = table.sqrt_alpha_bar
    if torch.compiler.is_compiling():
        torch._assert_async(
            (s != 0).all(), "this sampler cannot walk this schedule: see make_steps"
        )
    elif len(lost := (s == 0).nonzero()):
        raise ValueError(
            "this sampler cannot walk this schedule: sqrt(alpha_bar) must be positive in float32, got 0 at timestep "
            f"{int(table.timesteps[lost[-1, 0]])} of {table.start}, where the label cannot be estimated; use fewer "
            "timesteps or a smaller beta_end, or the sampler 'ddpm_truncated' below that timestep"
        )
    table.y0_weight[-1] = 1.0
    for column in (table.y_weight, table.prior_weight, table.eps_weight, table.sigma):
        column[-1] = 0.0
    return table
