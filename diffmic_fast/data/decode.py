"""Pixels of one image: files of any common format, arrays and synthetic images, as RGB."""

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

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")


class UnreadableImageError(ValueError):
    """An image file that is missing, damaged or of a kind that has no sensible RGB form.

    Attributes:
        path: the file, as text.
        reason: what is wrong with it, in words.
    """

    def __init__(self, path: str | Path, reason: str = "") -> None:
        """Make the error; ``reason`` may be empty when another process passes on a whole text."""
        self.path = str(path)
        self.reason = reason
        super().__init__(f"cannot read image {self.path}: {reason}" if reason else self.path)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Keep both parts when the error crosses to another process."""
        return (UnreadableImageError, (self.path, self.reason))


def load_image(source: ImageSource | str, *, bit_depth: int = 16) -> np.ndarray:
    """Pixels of ``source`` as uint8 [H, W, 3], RGB.

    Files: the EXIF orientation is applied; palettes, CMYK and bilevel images are converted; what
    is transparent becomes black; of several frames the first counts. 16-bit gray is scaled from
    0 ... 2**bit_depth - 1 to 0 ... 255.

    Raises:
        UnreadableImageError: for a file that is missing, truncated, damaged or no image, or that
            has pixels above ``bit_depth`` bits or without a known range (float, 32-bit integer).
    """
    if isinstance(source, ArrayImage):
        pixels = source.images[source.index]
        return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels
    if isinstance(source, SyntheticImage):
        return generate(source.grade, source.seed, source.size, source.index)
    try:
        with _whole_files_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF and palette transparency notes
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
        # Pillow's decoders raise almost any type on damaged files (OSError, SyntaxError,
        # IndexError, struct.error, zlib.error, ...); all mean the same here.
        text = str(error) or type(error).__name__
        raise UnreadableImageError(source, text.replace(str(source), "it")) from error


def _to_rgb(image: Image.Image, bit_depth: int) -> np.ndarray:
    mode = image.mode
    if mode.startswith("I"):
        return _gray_to_rgb(np.asarray(image), bit_depth)
    if mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image.alpha_composite(rgba)
    return np.array(image.convert("RGB"))


def _gray_to_rgb(pixels: np.ndarray, bit_depth: int) -> np.ndarray:
    top = 2**bit_depth - 1
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > top:
        raise ValueError(
            f"its gray values go from {low} to {high}, outside 0 to {top} "
            f"(setting bit_depth is {bit_depth})"
        )
    gray = ((pixels.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)


_whole_files_lock = threading.Lock()
_whole_files_users = 0
_whole_files_saved = False


@contextmanager
def _whole_files_only() -> Iterator[None]:
    # Other code in the process may have switched Pillow to padding truncated files with gray; a
    # half image must not be diagnosed. Counted, because threads decode side by side.
    global _whole_files_users, _whole_files_saved
    with _whole_files_lock:
        if _whole_files_users == 0:
            _whole_files_saved = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _whole_files_users += 1
    try:
        yield
    finally:
        with _whole_files_lock:
            _whole_files_users -= 1
            if _whole_files_users == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _whole_files_saved


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """Image files of ``folder``, known by their ending in either case, sorted by path.

    Hidden files and folders are left out, and so is everything that is no image.

    Raises:
        ValueError: when ``folder`` is no folder or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"data: {folder} is not a folder")
    found = _walk(folder, recursive)
    if not found:
        hint = "" if recursive else " (folders inside it were not searched)"
        raise ValueError(f"data: there is no image file in {folder}{hint}")
    return sorted(found)


def _walk(folder: Path, recursive: bool) -> list[Path]:
    found: list[Path] = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            # A link to a folder could lead round in a circle.
            if recursive and not path.is_symlink():
                found += _walk(path, recursive)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            found.append(path)
    return found
