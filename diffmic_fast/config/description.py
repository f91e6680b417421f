"""`ModelDescription`: architecture, class names, preprocessing and sampling options of a trained model."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from diffmic_fast.config.data import AugmentationConfig, DataConfig, check_class_names
from diffmic_fast.config.fields import SECTION, Name
from diffmic_fast.config.model import DiffMICConfig
from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.config.run import RunConfig
from diffmic_fast.config.sampling import SamplingConfig
from diffmic_fast.config.tree import Tree
from diffmic_fast.diffusion.samplers import check_sampler


@dataclass(config=SECTION)
class ModelDescription(Tree):
    """The part of a run's configuration that predictions with its model need; None where it is not known.

    Attributes:
        model: the architecture. Names of initial weights are left out by `from_run`: they may be paths.
        class_names: names of the classes, in order.
        preprocessing: of the images.
        sampling: how predictions are sampled by default.

    Raises:
        ValueError: from the constructor, for values of another type, out of their range, or at odds with each other.
    """

    model: DiffMICConfig
    class_names: Annotated[tuple[Name, ...], AfterValidator(check_class_names)] | None = None
    preprocessing: Preprocessing | None = None
    sampling: SamplingConfig | None = None

    def __post_init__(self) -> None:
        names, sampling = self.class_names, self.sampling
        if names is not None and len(names) != self.model.classes:
            raise ValueError(
                f"class_names must be {self.model.classes} names, one for each class of the model, got {len(names)}"
            )
        if sampling is not None:
            check_sampler(sampling.sampler, sampling.steps, sampling.eta, self.model.timesteps)

    @classmethod
    def from_run(cls, run: RunConfig, class_names: tuple[str, ...] | None) -> ModelDescription:
        """The description of a run's model; `class_names` take precedence over those of its section `data`."""
        return cls(
            without_initial_weights(run.model),
            class_names or run.data.class_names,
            Preprocessing.from_augmentation(run.data.augmentation),
            run.sampling,
        )

    def to_run(self) -> RunConfig | None:
        """A configuration for evaluation and prediction; None where the preprocessing is not known."""
        if self.preprocessing is None:
            return None
        augmentation = AugmentationConfig(**vars(self.preprocessing))
        data = DataConfig(class_names=self.class_names, augmentation=augmentation)
        # As `DiffMIC.predict` of a model without sampling options.
        sampling = self.sampling or SamplingConfig(sampler="ddpm", steps=None)
        return RunConfig(data, self.model, sampling=sampling)


def without_initial_weights(config: DiffMICConfig) -> DiffMICConfig:
    """The architecture without the names of the weights that its training began with."""
    return DiffMICConfig(**{**vars(config), "encoder_weights": None, "guidance_weights": None})
