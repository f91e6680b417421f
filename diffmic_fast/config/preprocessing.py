"""`Preprocessing`: how the pixels of an image become the input of a model."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from diffmic_fast.config.fields import SECTION, Flag, Number, Positive

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(config=SECTION)
class Preprocessing:
    """The preprocessing of every image, in training and prediction; the defaults are the published settings.

    The size of the images is `DiffMICConfig.image_size`.

    Attributes:
        centre_square: crop the largest centred square before resizing. False resizes the whole image to a square,
            which changes its aspect ratio.
        bit_depth: bits in use of 16-bit images, gray or colour, whose file declares no other depth (12 for most
            radiography and CT). Pixels are divided by 2**bit_depth - 1; an image with a larger pixel is rejected, never
            clipped. No effect on 8-bit images.
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
    def from_augmentation(cls, config: Preprocessing) -> Preprocessing:
        """The preprocessing alone of an `AugmentationConfig`."""
        return Preprocessing(
            **{item.name: getattr(config, item.name) for item in fields(Preprocessing)}
        )
