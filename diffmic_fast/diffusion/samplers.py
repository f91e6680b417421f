"""Samplers, each a table of coefficients for `denoise` (spec, section 6).

Three, and they are not the same: `ddpm` walks every timestep; `ddpm_truncated` is what the published program does with
"n test timesteps", the first n entries of the table from noise at unit scale; `ddim` (Song et al., ICLR 2021) jumps
over n timesteps spread on the whole chain, here for a chain that ends at N(prior, I).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmic_fast.diffusion.schedule import Schedule
from diffmic_fast.reference.denoise import StepTable

SAMPLERS = ("ddpm", "ddpm_truncated", "ddim")


def make_steps(
    schedule: Schedule, sampler: str = "ddpm", steps: int | None = None, eta: float = 0.0
) -> StepTable:
    """The step table of a sampler by name.

    Args:
        schedule: tables of T timesteps.
        sampler: one of `SAMPLERS`.
        steps: number of denoiser evaluations. "ddpm" has T and takes no other; "ddpm_truncated" and "ddim" need it.
        eta: "ddim" only: 0 is deterministic after the first draw, 1 has the variance of "ddpm".

    Raises:
        ValueError: an unknown sampler, steps or eta that it does not take.
    """
    total = len(schedule.betas)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
    if sampler != "ddim" and eta != 0.0:
        raise ValueError(f"eta belongs to the sampler 'ddim'; {sampler!r} takes none, got {eta}")
    if sampler == "ddpm":
        if steps not in (None, total):
            raise ValueError(
                f"the sampler 'ddpm' walks all {total} timesteps, got steps={steps}; use 'ddim' (respaced) or "
                "'ddpm_truncated' (first table entries) for fewer"
            )
        return ddpm(schedule, total)
    if steps is None:
        raise ValueError(f"the sampler {sampler!r} needs steps, the number of denoiser evaluations")
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be in [1, {total}], the length of the schedule; got {steps}")
    return ddpm(schedule, steps) if sampler == "ddpm_truncated" else ddim(schedule, steps, eta)


def ddpm(schedule: Schedule, steps: int) -> StepTable:
    """Ancestral sampling over the first `steps` timesteps of the schedule (all of them: the whole chain)."""
    timesteps = torch.arange(steps - 1, -1, -1)
    q = schedule.sqrt_one_minus_alpha_bar[timesteps]
    # Recovered from q as in the published program, with the digits that this loses near the end.
    s = torch.sqrt(1.0 - q.square())
    alphas = schedule.alphas[timesteps]
    s_next, q_next = _shift(s, 1.0), _shift(q, 0.0)
    variance = q.square()
    y0_weight = (1.0 - alphas) * s_next / variance
    y_weight = q_next.square() * alphas.sqrt() / variance
    prior_weight = 1.0 + (s - 1.0) * (alphas.sqrt() + s_next) / variance
    sigma = torch.sqrt(q_next.square() / variance * (1.0 - alphas))
    return _table(
        schedule, timesteps, s, q, y0_weight, y_weight, prior_weight, torch.zeros(steps), sigma
    )


def ddim(schedule: Schedule, steps: int, eta: float = 0.0) -> StepTable:
    """Jumps over `steps` timesteps spread evenly on the whole chain, from its last one ("trailing" spacing).

        y' = s' y0 + (1 - s') prior + sqrt(q'^2 - sigma^2) eps + sigma z
        sigma = eta q' / q sqrt(1 - (s / s')^2)

    Raises:
        ValueError: eta outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    total = len(schedule.betas)
    timesteps = (torch.arange(steps, 0, -1).double() * (total / steps)).round().long() - 1
    s = schedule.sqrt_alpha_bar[timesteps]
    q = schedule.sqrt_one_minus_alpha_bar[timesteps]
    s_next, q_next = _shift(s, 1.0), _shift(q, 0.0)
    sigma = eta * q_next / q * torch.sqrt((1.0 - (s / s_next).square()).clamp(min=0.0))
    eps_weight = torch.sqrt((q_next.square() - sigma.square()).clamp(min=0.0))
    return _table(
        schedule,
        timesteps,
        s,
        q,
        s_next,
        torch.zeros(steps),
        1.0 - s_next,
        eps_weight,
        sigma,
    )


def _shift(values: Tensor, last: float) -> Tensor:
    """The value each step moves to: the next one's, and `last` (the clean label) for the last step."""
    return torch.cat((values[1:], values.new_tensor([last])))


def _table(
    schedule: Schedule,
    timesteps: Tensor,
    s: Tensor,
    q: Tensor,
    y0_weight: Tensor,
    y_weight: Tensor,
    prior_weight: Tensor,
    eps_weight: Tensor,
    sigma: Tensor,
) -> StepTable:
    if torch.compiler.is_compiling():
        torch._assert_async(
            (s != 0).all(), "this sampler cannot walk this schedule: see make_steps"
        )
    elif len(lost := (s == 0).nonzero()):
        raise ValueError(
            "this sampler cannot walk this schedule: at timestep "
            f"{int(timesteps[lost[-1, 0]])} of {len(schedule.betas)} nothing is left of the label in float32 "
            "(sqrt(alpha_bar) is 0), so it cannot be estimated; use fewer timesteps or a smaller beta_end, or the "
            "sampler 'ddpm_truncated' below that timestep"
        )
    # The last step returns its estimate itself, free of rounding.
    for column, value in zip(
        (y0_weight, y_weight, prior_weight, eps_weight, sigma),
        (1.0, 0.0, 0.0, 0.0, 0.0),
        strict=True,
    ):
        column[-1] = value
    return StepTable(
        timesteps,
        s,
        q,
        y0_weight,
        y_weight,
        prior_weight,
        eps_weight,
        sigma,
        start=len(schedule.betas),
    )
