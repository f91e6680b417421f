"""The section `sampling` of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from diffmic_fast.config.fields import SECTION, Count, Integer, Samples, one_of
from diffmic_fast.diffusion.samplers import SAMPLERS
from diffmic_fast.limits import MAX_SEED, MIN_SEED


@dataclass(config=SECTION)
class SamplingConfig:
    """How class probabilities are sampled.

    Attributes:
        sampler: a key of `diffusion.SAMPLERS`: "ddpm" (the whole chain), "ddpm_truncated" (the first `steps` table
            entries, the published test timesteps) or "ddim" (`steps` respaced over the whole chain).
        steps: denoiser evaluations per chain; None with "ddpm".
        eta: for samplers with `Sampler.takes_eta`: 0 is deterministic after the first draw, 1 has the variance of
            "ddpm".
        samples: chains per image, at most 10,000.
        views: mirror images of each image whose guidance and features are averaged, 1, 2 (horizontal) or 4 (also
            vertical). The model should have been trained with such flips.
        seed: of the noise, from -2**63 to 2**64 - 1.
        batch_size: images per batch.

    Raises:
        ValueError: from the constructor, for a value of another type or out of its range.
    """

    sampler: Annotated[str, one_of(SAMPLERS)] = "ddpm_truncated"
    steps: Integer | None = 60
    eta: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.0
    samples: Samples = 1
    views: Literal[1, 2, 4] = 1
    seed: Annotated[int, Strict(), Field(ge=MIN_SEED, le=MAX_SEED)] = 0
    batch_size: Count = 32
