"""Decoding: the pixels of an image file, array or synthetic image as 8-bit RGB."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from diffmic_fast.data.dicom import decode_dicom, is_dicom
from diffmic_fast.data.samples import (
    Decoded,
    Opener,
    decode_samples,
    grey_transparency,
    is_white_zero,
    needs_samples,
)
from diffmic_fast.data.synthetic_fundus import generate
from diffmic_fast.data.table import ArrayImage, ImageSource, SyntheticImage
from diffmic_fast.data.tiff import as_black_is_zero, is_tiff

_HEAD = 132  # bytes that tell the format of a file: DICOM's follow a preamble of 128
# Not enough file descriptors of the process or of the system, not enough memory.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


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

    - 16-bit grey, grey with alpha and colour (PNG, TIFF, PPM): scaled linearly from [0, 2**b - 1] to [0, 255] and
      rounded. b is the depth that the file declares, else `bit_depth`. A larger sample makes the file unreadable;
      nothing is clipped.
    - WhiteIsZero (TIFF): inverted.
    - 8-bit grey, bilevel, palette and CMYK: converted to RGB.
    - Transparent: composited over black.
    - Several frames: the first one.
    - DICOM: as in `dicom.decode_dicom`; needs pydicom.
    - Floating point, signed or 32-bit integers of which some are negative or above 2**b - 1 or all are at most a
      quarter of that: unreadable, since their range is not known.

    The orientation in the EXIF data is applied.

    Args:
        source: a file, `ArrayImage` or `SyntheticImage`.
        bit_depth: bits in use in 16-bit files that do not declare it (`AugmentationConfig.bit_depth`), for example 12
            for much of radiography.

    Returns:
        [H, W, 3] uint8, RGB.

    Raises:
        UnreadableImageError: the file is missing, truncated, damaged, not an image, or unreadable as above.
        MemoryError, OSError: there is not enough memory, or no free file descriptor, to read the file.
    """
    return decode(source, bit_depth=bit_depth).pixels


def decode(source: ImageSource | str, *, bit_depth: int = 16) -> Decoded:
    """`load_image`, with the largest sample of images whose range is that of `bit_depth`."""
    if isinstance(source, ArrayImage):
        pixels = source.images[source.index]
        return Decoded(np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels)
    if isinstance(source, SyntheticImage):
        return Decoded(generate(source.grade, source.seed, source.size, source.index))
    with unreadable_files_named(source), strict_pillow():
        if is_dicom(_head(source)):
            return decode_dicom(source, bit_depth)
        return decode_with_pillow(source, bit_depth)


def uses_bit_depth(source: Path | str) -> bool:
    """Whether the range of an image file may be that of the setting `bit_depth`, by its header.

    Raises:
        UnreadableImageError: the header cannot be read.
    """
    with unreadable_files_named(source), strict_pillow():
        if is_dicom(_head(source)):
            return True
        with _opener(source)[0]() as image:
            return needs_samples(image)


@contextmanager
def unreadable_files_named(source: Path | str) -> Iterator[None]:
    """Raise errors as an `UnreadableImageError` of the file.

    A shortage of memory or of file descriptors says nothing about the file and is raised as it is.
    """
    try:
        yield
    except FileNotFoundError:
        raise UnreadableImageError(source, "there is no such file") from None
    except IsADirectoryError:
        reason = (
            "it is a link to a folder, which is not followed"
            if Path(source).is_symlink()
            else "it is a folder"
        )
        raise UnreadableImageError(source, reason) from None
    except Image.UnidentifiedImageError:
        raise UnreadableImageError(source, _why_unidentified(source)) from None
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            raise
        # Decoders raise many types on damaged files: OSError, SyntaxError, IndexError, struct.error ...
        text = str(error) or type(error).__name__
        raise UnreadableImageError(source, text.replace(str(source), "it")) from error


def check_regular(source: Path | str) -> None:
    """Raise ValueError for a named pipe, a device or a socket, which could block for ever when it is read.

    Folders, whose error is raised when they are opened, pass.
    """
    if not stat.S_ISREG(mode := os.stat(source).st_mode) and not stat.S_ISDIR(mode):
        raise ValueError("it is not a regular file")


def _head(source: Path | str) -> bytes:
    check_regular(source)
    with open(source, "rb") as file:
        return file.read(_HEAD)


def _why_unidentified(source: Path | str) -> str:
    head = _head(source)
    if not head:
        return "the file is empty"
    if is_tiff(head):
        return "it is a TIFF file that is damaged or has a kind of pixels that is not supported"
    return "it is not an image"


def _opener(source: Path | str | bytes) -> tuple[Opener, bool]:
    """A function that opens an image file or its content with Pillow, and whether its pixels have to be inverted."""
    if isinstance(source, bytes):  # Pillow has opened it before
        with Image.open(io.BytesIO(source)) as image:
            return (lambda: Image.open(io.BytesIO(source))), is_white_zero(image)
    try:
        with Image.open(source) as image:
            return (lambda: Image.open(source)), is_white_zero(image)
    except Image.UnidentifiedImageError:
        changed = as_black_is_zero(Path(source).read_bytes()) if is_tiff(_head(source)) else None
        if changed is None:
            raise
        return (lambda: Image.open(io.BytesIO(changed))), True


def decode_with_pillow(source: Path | str | bytes, bit_depth: int) -> Decoded:
    """`decode` of an image file that is not DICOM, or of its content; raises what Pillow raises."""
    open_image, inverted = _opener(source)
    with open_image() as image:
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers, whose range is not known")
        deep = needs_samples(image)
    if deep:
        decoded = decode_samples(open_image, bit_depth, white_is_zero=inverted)
        if decoded is not None:
            return decoded
    with open_image() as image:
        transparent = grey_transparency(image)
        image.load()
        upright = ImageOps.exif_transpose(image)
        if transparent is not None:
            upright.info["transparency"] = transparent
        return Decoded(to_rgb(upright, inverted))


def to_rgb(image: Image.Image, inverted: bool) -> np.ndarray:
    """[H, W, 3] uint8 of an image with samples of at most 8 bits."""
    if inverted:
        if image.mode not in ("1", "L"):
            raise ValueError(
                "its pixels are WhiteIsZero (PhotometricInterpretation 0) and not plain gray"
            )
        return np.array(ImageOps.invert(image.convert("L")).convert("RGB"))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image.alpha_composite(rgba)
    return np.array(image.convert("RGB"))


_lock = threading.Lock()
_users = 0
_settings = ExitStack()


@contextmanager
def strict_pillow() -> Iterator[None]:
    """A block in which Pillow raises on truncated files and decompression bombs, and warns of nothing.

    Other code may have told Pillow to pad truncated files with grey. That switch and the filters of warnings are
    global, and threads decode side by side: the first one sets them, the last one restores them.
    """
    global _users
    with _lock:
        if _users == 0:
            _settings.callback(
                setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES
            )
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            _settings.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # damaged EXIF data, transparency of palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _settings.close()
