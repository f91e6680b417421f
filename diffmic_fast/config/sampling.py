"""The section `sampling` of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from diffmic_fast.config.fields import SECTION, Count, Integer
from diffmic_fast.diffusion.samplers import SAMPLERS


@dataclass(config=SECTION)
class SamplingConfig:
    """How class probabilities are sampled.

    Attributes:
        sampler: "ddpm" (the whole chain), "ddpm_truncated" (the first `steps` table entries, the published test
            timesteps) or "ddim" (`steps` respaced over the whole chain).
        steps: denoiser evaluations per chain; None with "ddpm".
        eta: "ddim" only: 0 is deterministic after the first draw, 1 has the variance of "ddpm".
        samples: chains per image.
        seed: of the noise.
        batch_size: images per batch.

    Raises:
        ValueError: from the constructor, for a value of another type or out of its range.
    """

    sampler: Literal["ddpm", "ddpm_truncated", "ddim"] = "ddpm_truncated"
    steps: Integer | None = 60
    eta: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.0
    samples: Count = 1
    seed: Integer = 0
    batch_size: Count = 32


def check_steps(sampler: str, steps: int | None, timesteps: int) -> None:
    """Raise ValueError unless `sampler` takes `steps` of a schedule of `timesteps`."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler == "ddpm":
        if steps not in (None, timesteps):
            raise ValueError(
                f"sampler 'ddpm' takes all {timesteps} timesteps, got steps {steps}; leave steps out (null), or use "
                "'ddpm_truncated' or 'ddim'"
            )
    elif steps is None or not 1 <= steps <= timesteps:
        raise ValueError(
            f"sampler {sampler!r} must have steps from 1 to {timesteps} (the timesteps), got {steps}"
        )
