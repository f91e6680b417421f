"""`SamplingOptions`: how labels are sampled, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diffmic_fast.diffusion.samplers import SAMPLERS, check_sampler, make_steps
from diffmic_fast.diffusion.schedule import Schedule
from diffmic_fast.limits import MAX_SAMPLES, MAX_SEED, MIN_SEED
from diffmic_fast.ops.denoise import PRECISIONS
from diffmic_fast.reference.denoise import StepTable

if TYPE_CHECKING:
    from diffmic_fast.config.run import SamplingConfig

# Numbers of mirror images that `SamplingOptions.views` may be.
VIEWS = (1, 2, 4)


@dataclass(frozen=True)
class SamplingOptions:
    """How `DiffMIC.predict` samples labels (docs/algorithm.md, "Sampling").

    Attributes:
        sampler: a key of `diffusion.SAMPLERS`.
        steps: number of denoiser evaluations; None for the whole chain.
        eta: in [0, 1], for samplers with `Sampler.takes_eta`; 0 is deterministic after the first draw.
        samples: S chains per image, from 1 to 10,000.
        seed: 64-bit key of the noise.
        precision: of the chain, one of `ops.denoise.PRECISIONS`; see `DiffMIC.predict`.
        compile: run the convolutions through `torch.compile`.
        views: mirror images of each image over which the guidance model's logits and the encoder's features are
            averaged: 1 the image alone, 2 with its horizontal mirror image, 4 also with the vertical ones of both.

    Raises:
        TypeError: from the constructor: a number is not a whole number, or `compile` is not a bool.
        ValueError: from the constructor: a value is out of its range. `steps` is held against a schedule by `check`.
    """

    sampler: str = "ddpm"
    steps: int | None = None
    eta: float = 0.0
    samples: int = 1
    seed: int = 0
    precision: str = "fp32"
    compile: bool = False
    views: int = 1

    def __post_init__(self) -> None:
        for name in ("samples", "seed", "steps", "views"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                if name == "steps" and value is None:
                    continue
                raise TypeError(f"{name} must be a whole number, got {value!r}")
        if not isinstance(self.compile, bool):
            raise TypeError(f"compile must be True or False, got {self.compile!r}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.samples > MAX_SAMPLES:
            raise ValueError(f"samples must be at most {MAX_SAMPLES}, got {self.samples}")
        if self.views not in VIEWS:
            raise ValueError(f"views must be 1, 2 or 4, got {self.views}")
        if not MIN_SEED <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must be from {MIN_SEED} to {MAX_SEED}, got {self.seed}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        check_sampler(self.sampler, self.steps, self.eta)

    @classmethod
    def from_config(cls, config: SamplingConfig) -> SamplingOptions:
        """The options of a configuration's section `sampling`."""
        return cls(
            config.sampler,
            config.steps,
            config.eta,
            config.samples,
            config.seed,
            views=config.views,
        )

    def with_sampler(self, text: str) -> SamplingOptions:
        """These options with a sampler given as on the command line.

        Args:
            text: "NAME[:STEPS[:ETA]]", such as "ddpm", "ddpm_truncated:60", "ddim:20" or "ddim:20:0.5".

        Raises:
            ValueError: `text` has another form, or the sampler does not take these values.
        """
        name, *values = text.split(":")
        try:
            steps = int(values[0]) if values else None
            eta = float(values[1]) if len(values) > 1 else 0.0
        except ValueError:
            raise ValueError(
                f"sampler: STEPS and ETA must be numbers in NAME[:STEPS[:ETA]], got {text!r}"
            ) from None
        if len(values) > 2 or name not in SAMPLERS:
            raise ValueError(
                f"sampler must be NAME[:STEPS[:ETA]] with NAME one of {', '.join(SAMPLERS)}, got {text!r}"
            )
        return replace(self, sampler=name, steps=steps, eta=eta)

    @property
    def method(self) -> str:
        """Sampler, steps and eta as in tables: "ddim 20", "ddim 20 eta 0.5"."""
        steps = f" {self.steps}" if self.steps else ""
        eta = f" eta {self.eta:g}" if self.eta else ""
        return f"{self.sampler}{steps}{eta}"

    def check(self, timesteps: int) -> None:
        """Raise a ValueError unless the sampler can walk a schedule of this many timesteps."""
        check_sampler(self.sampler, self.steps, self.eta, timesteps)

    def step_table(self, schedule: Schedule) -> StepTable:
        """The sampler's step table for a schedule; see `make_steps`."""
        return make_steps(schedule, self.sampler, self.steps, self.eta)
