"""Preprocessing and augmentation: from pixels to the input of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from diffmic_fast.config.data import AugmentationConfig
from diffmic_fast.config.preprocessing import Preprocessing


class ImageTransform:
    """Turns pixels [H, W, 3] uint8 into a normalised image [3, size, size] float32.

    `prepare` has the same result in every epoch, which can be cached; `finish` augments, for training, and normalises.
    Random numbers are from torch's global generator.

    Attributes:
        size: side of the image in pixels.
        bit_depth: of 16-bit files (`decode.load_image`).
    """

    def __init__(
        self, size: int, config: Preprocessing, augmentations: Sequence[v2.Transform] = ()
    ) -> None:
        self.size = size
        self.bit_depth = config.bit_depth
        self._centre_square = config.centre_square
        self._augmentations = v2.Compose([v2.Identity(), *augmentations])
        self._normalize = v2.Normalize(config.mean, config.std)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """`prepare`, then `finish`."""
        return self.finish(self.prepare(pixels))

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """Crop the centred square and resize: [H, W, 3] uint8 to [3, size, size] uint8."""
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        if self._centre_square:
            image = F.center_crop(image, [min(image.shape[1:])])
        return F.resize(image, [self.size, self.size], antialias=True).contiguous()

    def finish(self, image: Tensor) -> Tensor:
        """Augment and normalise: [3, size, size] uint8 to float32."""
        return self._normalize(F.to_dtype(self._augmentations(image), torch.float32, scale=True))


def _augmentations(config: AugmentationConfig) -> list[v2.Transform]:
    steps: list[v2.Transform] = []
    if config.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.vertical_flip:
        steps.append(v2.RandomVerticalFlip())
    if config.rotation or config.translate or config.scale:
        steps.append(
            v2.RandomAffine(
                config.rotation,
                translate=(config.translate, config.translate) if config.translate else None,
                scale=(1 - config.scale, 1 + config.scale) if config.scale else None,
                interpolation=v2.InterpolationMode.BILINEAR,
            )
        )
    if config.brightness or config.contrast:
        steps.append(v2.ColorJitter(config.brightness, config.contrast))
    return steps


def training_transform(size: int, config: AugmentationConfig | None = None) -> ImageTransform:
    """The transform of training images, augmented as in `config` (default: as published)."""
    config = config or AugmentationConfig()
    return ImageTransform(size, config, _augmentations(config))


def evaluation_transform(size: int, config: Preprocessing | None = None) -> ImageTransform:
    """The transform of images to classify, which is deterministic."""
    return ImageTransform(size, config or Preprocessing())
