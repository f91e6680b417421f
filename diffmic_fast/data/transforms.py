"""From pixels to what a model takes (spec section 5), by torchvision's transforms."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from diffmic_fast.config.data import AugmentationConfig


class ImageTransform:
    """Pixels uint8 [H, W, 3] to a normalised image float32 [3, size, size], in two steps.

    `prepare` is the same at every epoch and can be kept; `finish` augments (for training) and
    normalises. Calling the transform does both. Random numbers are torch's global ones.

    Attributes:
        size: side of the result in pixels.
        bit_depth: of 16-bit gray files (`decode.load_image`).
    """

    def __init__(self, size: int, config: AugmentationConfig, *, augment: bool) -> None:
        self.size = size
        self.bit_depth = config.bit_depth
        self._centre_square = config.centre_square
        self._augmentations = v2.Compose(_augmentations(config) if augment else [v2.Identity()])
        self._normalize = v2.Normalize(config.mean, config.std)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Both steps."""
        return self.finish(self.prepare(pixels))

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """Cut the centred square and resize: uint8 [H, W, 3] to uint8 [3, size, size]."""
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        if self._centre_square:
            image = F.center_crop(image, [min(image.shape[1:])])
        return F.resize(image, [self.size, self.size], antialias=True).contiguous()

    def finish(self, image: Tensor) -> Tensor:
        """Augment and normalise: uint8 [3, size, size] to float32."""
        return self._normalize(F.to_dtype(self._augmentations(image), torch.float32, scale=True))


def _augmentations(config: AugmentationConfig) -> list[v2.Transform]:
    steps: list[v2.Transform] = [v2.Identity()]
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
    """The transform of training images, augmented as `config` says (default: as published)."""
    return ImageTransform(size, config or AugmentationConfig(), augment=True)


def evaluation_transform(size: int, config: AugmentationConfig | None = None) -> ImageTransform:
    """The transform of images to classify: nothing random."""
    return ImageTransform(size, config or AugmentationConfig(), augment=False)
