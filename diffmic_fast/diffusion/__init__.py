"""Noise schedules, the forward process and the samplers (docs/algorithm.md)."""

from diffmic_fast.diffusion.samplers import SAMPLERS, check_sampler, ddim, ddpm, make_steps
from diffmic_fast.diffusion.schedule import SCHEDULES, Schedule, make_betas, make_schedule, q_sample

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "Schedule",
    "check_sampler",
    "ddim",
    "ddpm",
    "make_betas",
    "make_schedule",
    "make_steps",
    "q_sample",
]
