"""Pillow images as 8-bit RGB: the pixels that their file gives, or those in memory."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from diffmic_fast.data.decode import (
    decode_with_pillow,
    strict_pillow,
    to_rgb,
    unreadable_files_named,
    uses_bit_depth,
)
from diffmic_fast.data.samples import (
    Decoded,
    as_rgb,
    check_known_range,
    needs_samples,
    scale,
    setting_range,
)

# Formats whose files may have more than 8 bits, which Pillow reduces when it loads colour.
_DEEP_FORMATS = ("PNG", "TIFF", "PPM", "JPEG2000")
_FORGOTTEN = (
    "Pillow has loaded it, after which the bit depth or transparency of its file is not known; give the path, or the "
    "image as Image.open returns it"
)


def decode_image(image: Image.Image, name: str, *, bit_depth: int = 16) -> Decoded:
    """Decode a Pillow image.

    An image as `Image.open` returns it, not loaded yet, gives the same pixels as its file (`decode.decode`), of which
    Pillow itself keeps 8 bits in colour. Any other one gives its pixels in memory: up to 8 bits as they are,
    16-bit and 32-bit grey from [0, 2**bit_depth - 1]. The orientation in its EXIF data is applied.

    Args:
        image: not changed.
        name: in errors, for an image without a file name.
        bit_depth: bits in use of grey images of more than 8 bits, unless their file declares others.

    Raises:
        UnreadableImageError: the image is truncated or damaged, or its pixels have no well-defined RGB form; or it was
            loaded from a file whose bit depth is not known any more.
    """
    with unreadable_files_named(_name(image, name)), strict_pillow():
        content = _content(image)
        if content is not None:
            return decode_with_pillow(content, bit_depth)
        return _decode_memory(image, bit_depth)


def _name(image: Image.Image, name: str) -> str:
    file = getattr(image, "filename", "")
    return os.fsdecode(file) if file else name


def _content(image: Image.Image) -> bytes | None:
    """The content of the file of an opened image that was not loaded or changed; None for any other."""
    file: Any = getattr(image, "fp", None)
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or file is None:
        return None
    if image.tell() != 0:  # another frame than the first
        return None
    position = file.tell()
    try:
        file.seek(0)
        content: bytes = file.read()
    finally:
        file.seek(position)
    with Image.open(io.BytesIO(content)) as again:
        same = (again.mode, again.size, again.format) == (image.mode, image.size, image.format)
    return content if same else None  # Image.draft changes mode and size


def _decode_memory(image: Image.Image, bit_depth: int) -> Decoded:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    if isinstance(image, ImageFile.ImageFile):
        if image.tile and needs_samples(image):
            raise ValueError(
                f"it is frame {image.tell()} of a file of more than 8 bits; save it as a file"
            )
        if not image.tile and _forgot_its_depth(image):
            raise ValueError(_FORGOTTEN)
    upright = ImageOps.exif_transpose(image)
    if not image.mode.startswith("I"):
        return Decoded(to_rgb(upright, inverted=False))
    limits = setting_range(bit_depth)
    samples = np.asarray(upright).astype(np.int64)
    check_known_range(samples, limits, wide=image.mode == "I")
    return Decoded(as_rgb(scale(samples, limits)), int(samples.max()))


def _forgot_its_depth(image: Image.Image) -> bool:
    """Whether a loaded image may differ from its file, which had more than 8 bits or a transparent grey."""
    if image.format not in _DEEP_FORMATS:
        return False
    grey_transparency = image.mode == "L" and isinstance(image.info.get("transparency"), int)
    if image.mode.startswith("I") or grey_transparency:
        return True
    file = getattr(image, "filename", "")
    return bool(file) and os.path.isfile(file) and uses_bit_depth(os.fsdecode(file))
