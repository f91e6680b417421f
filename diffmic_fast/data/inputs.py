"""Image files and Pillow images as the tensor that a model takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.data.bit_depth import warn_of_samples
from diffmic_fast.data.decode import decode
from diffmic_fast.data.pillow_images import decode_image
from diffmic_fast.data.samples import Decoded
from diffmic_fast.data.transforms import evaluation_transform

ImageInput = str | os.PathLike[str] | Image.Image
ImageInputs = ImageInput | Sequence[str | os.PathLike[str]] | Sequence[Image.Image]


def load_images(
    operation: str, inputs: ImageInputs, size: int, preprocessing: Preprocessing
) -> Tensor:
    """Decode, crop, resize and normalise images, as `predict` of the command line does.

    Warns if the samples of all images of more than 8 bits leave most of the bits of `preprocessing.bit_depth` unused.

    Args:
        operation: begins the messages of errors.
        inputs: a path, a Pillow image, or a list of paths or of Pillow images.
        size: side of the result in pixels.
        preprocessing: of the model.

    Returns:
        [B, 3, size, size] float32 on the CPU.

    Raises:
        TypeError: `inputs` are of another type, or paths and Pillow images in one list.
        ValueError: the list is empty.
        UnreadableImageError: an image cannot be read.
    """
    transform = evaluation_transform(size, preprocessing)
    images, samples = [], []
    for number, each in enumerate(_listed(operation, inputs)):
        decoded = _decode(each, number, preprocessing.bit_depth)
        images.append(transform(decoded.pixels))
        samples.append(decoded.largest)
    warn_of_samples(samples, preprocessing.bit_depth)
    return torch.stack(images)


def _decode(image: ImageInput, number: int, bit_depth: int) -> Decoded:
    if isinstance(image, Image.Image):
        return decode_image(image, f"image {number}", bit_depth=bit_depth)
    return decode(Path(image), bit_depth=bit_depth)


def _listed(operation: str, inputs: Any) -> list[ImageInput]:
    """The inputs as a list of one type."""
    if isinstance(inputs, (str, os.PathLike, Image.Image)):
        return [inputs]
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(
            f"{operation}: images must be a path, a Pillow image, or a list of paths or of Pillow images, got "
            f"{type(inputs).__name__}"
        )
    if not inputs:
        raise ValueError(f"{operation}: images must not be empty, got an empty list")
    for number, each in enumerate(inputs):
        if not isinstance(each, (str, os.PathLike, Image.Image)):
            hint = "; stack tensors to [B, 3, H, W]" if isinstance(each, Tensor) else ""
            raise TypeError(
                f"{operation}: the images of a list must be paths or Pillow images, got {type(each).__name__} at "
                f"{number}{hint}"
            )
        if isinstance(each, Image.Image) != isinstance(inputs[0], Image.Image):
            raise TypeError(
                f"{operation}: the images of a list must all be paths or all Pillow images, got "
                f"{type(inputs[0]).__name__} at 0 and {type(each).__name__} at {number}"
            )
    return list(inputs)
