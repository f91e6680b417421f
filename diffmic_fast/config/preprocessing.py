"""`Preprocessing`: what happens to the pixels of an image before a trained model sees them."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from diffmic_fast.config.data import IMAGENET_MEAN, IMAGENET_STD, AugmentationConfig
from diffmic_fast.config.fields import SECTION, Flag, Number, Positive


@dataclass(config=SECTION, frozen=True)
class Preprocessing:
    """The pixel pipeline that a model was trained with; the side of its images is `DiffMICConfig.image_size`.

    The entries are those of `data.augmentation` that apply to every image (`AugmentationConfig`), with the same
    defaults, the published settings.

    Attributes:
        centre_square: crop the largest centred square before resizing.
        bit_depth: bits in use of images of more than 8 bits whose file declares no other depth.
        mean: subtracted from pixels in [0, 1], by channel.
        std: divided into the result, by channel.

    Raises:
        ValueError: from the constructor, for a value of another type or out of its range.
    """

    centre_square: Flag = True
    bit_depth: Annotated[int, Strict(), Field(ge=8, le=16)] = 16
    mean: tuple[Number, Number, Number] = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD

    @classmethod
    def from_augmentation(cls, config: AugmentationConfig) -> Preprocessing:
        """The entries of a configuration's `data.augmentation` that apply to every image."""
        return cls(**{item.name: getattr(config, item.name) for item in fields(cls)})

    def to_augmentation(self) -> AugmentationConfig:
        """A section `data.augmentation` with these entries; its other entries have their defaults."""
        return AugmentationConfig(**{item.name: getattr(self, item.name) for item in fields(self)})
