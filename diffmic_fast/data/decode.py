"""Decoding: the pixels of an image file, array or synthetic image as 8-bit RGB."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from diffmic_fast.data.synthetic_fundus import generate
from diffmic_fast.data.table import ArrayImage, ImageSource, SyntheticImage


class UnreadableImageError(ValueError):
    """An image file is missing or damaged, or has no well-defined RGB form.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str = "") -> None:
        """Create the error. Without a `reason`, `path` is the whole message, passed on from another process."""
        self.path = str(path)
        self.reason = reason
        super().__init__(f"cannot read image {self.path}: {reason}" if reason else self.path)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Keep both attributes when the error is pickled by a worker process."""
        return (UnreadableImageError, (self.path, self.reason))


def load_image(source: ImageSource | str, *, bit_depth: int = 16) -> np.ndarray:
    """Decode an image to RGB.

    What happens to a file depends on its pixels:

    - 16-bit grey (PNG, TIFF): scaled linearly from [0, 2**bit_depth - 1] to [0, 255] and rounded. A larger value makes
      the file unreadable; nothing is clipped.
    - 16-bit RGB, and 16-bit with transparency (PNG): the upper 8 bits of each channel, as Pillow reads them.
    - 8-bit grey, bilevel, palette and CMYK: converted to RGB.
    - Transparent: composited over black.
    - Several frames: the first one.
    - Floating point, or integers of which some are negative or above `bit_depth` bits: unreadable, since their range is
      not known.

    The orientation in the EXIF data is applied.

    Args:
        source: a file, `ArrayImage` or `SyntheticImage`.
        bit_depth: bits in use in 16-bit grey files (`AugmentationConfig.bit_depth`), for example 12 for much of
            radiography.

    Returns:
        [H, W, 3] uint8, RGB.

    Raises:
        UnreadableImageError: the file is missing, truncated, damaged, not an image, or unreadable as above.
    """
    if isinstance(source, ArrayImage):
        pixels = source.images[source.index]
        return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels
    if isinstance(source, SyntheticImage):
        return generate(source.grade, source.seed, source.size, source.index)
    try:
        with _truncated_files_rejected(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF data, transparency of palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image), bit_depth)
    except FileNotFoundError:
        raise UnreadableImageError(source, "there is no such file") from None
    except IsADirectoryError:
        raise UnreadableImageError(source, "it is a folder") from None
    except Image.UnidentifiedImageError:
        reason = "the file is empty" if Path(source).stat().st_size == 0 else "it is not an image"
        raise UnreadableImageError(source, reason) from None
    except Exception as error:
        # Pillow's decoders raise many types on damaged files: OSError, SyntaxError, IndexError, struct.error ...
        text = str(error) or type(error).__name__
        raise UnreadableImageError(source, text.replace(str(source), "it")) from error


def _to_rgb(image: Image.Image, bit_depth: int) -> np.ndarray:
    if image.mode.startswith("I"):
        return _grey_to_rgb(np.asarray(image), bit_depth)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image.alpha_composite(rgba)
    return np.array(image.convert("RGB"))


def _grey_to_rgb(pixels: np.ndarray, bit_depth: int) -> np.ndarray:
    top = 2**bit_depth - 1
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > top:
        raise ValueError(
            f"its grey values must be in [0, {top}] (the setting bit_depth is {bit_depth}), got {low} … {high}"
        )
    grey = ((pixels.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


_lock = threading.Lock()
_users = 0
_saved = False


@contextmanager
def _truncated_files_rejected() -> Iterator[None]:
    """Make Pillow raise on truncated files, even if other code has told it to pad them with grey.

    Pillow's switch is global, and threads decode side by side: the first one sets it, the last one restores it.
    """
    global _users, _saved
    with _lock:
        if _users == 0:
            _saved, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _saved
