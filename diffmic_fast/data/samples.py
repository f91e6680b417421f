"""Pixels of more than 8 bits: their samples, their range and how they are scaled to 8 bits."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import ImageFile, ImageOps

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_FULL = 65535
_JPEG2000_SIZ = b"\xff\x4f\xff\x51"

# Pillow keeps one byte of a 16-bit sample. Of the same data, the raw mode of the other byte order keeps the other byte.
_NATIVE, _SWAPPED = ("L", "B") if sys.byteorder == "little" else ("B", "L")
_OTHER_BYTE = {
    f"{channels};16{order}": f"{channels};16{other}"
    for channels in ("RGB", "RGBX", "RGBA")
    for order, other in (("B", "L"), ("L", "B"), ("N", _SWAPPED))
}

Opener = Callable[[], ImageFile.ImageFile]


class Decoded(NamedTuple):
    """An image in 8 bits.

    Attributes:
        pixels: [H, W, 3] uint8, RGB.
        largest: largest sample before scaling, of an image whose range is that of the setting `bit_depth`; else None.
    """

    pixels: np.ndarray
    largest: int | None = None


class SampleRange(NamedTuple):
    """The range of an image's samples, [0, top].

    Attributes:
        top: the sample of full brightness.
        origin: where the range comes from, for error messages.
        from_setting: whether it comes from `bit_depth`.
    """

    top: int
    origin: str
    from_setting: bool = False


def setting_range(bit_depth: int) -> SampleRange:
    """The range that the setting `bit_depth` gives to files that declare none."""
    return SampleRange(2**bit_depth - 1, f"the setting bit_depth is {bit_depth}", True)


def scale(samples: np.ndarray, limits: SampleRange, alpha: np.ndarray | None = None) -> np.ndarray:
    """Scale samples from [0, top] to [0, 255], rounded to nearest.

    Args:
        samples: integers, [H, W] or [H, W, 3].
        limits: their range.
        alpha: [H, W] in [0, 65535], opacity over black; None is opaque.

    Returns:
        uint8, of the same shape.

    Raises:
        ValueError: a sample is outside the range; nothing is clipped.
    """
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high > limits.top:
        raise ValueError(
            f"its samples must be in [0, {limits.top}] ({limits.origin}), got {low} … {high}"
        )
    numerator, divisor = samples.astype(np.uint64) * np.uint64(255), limits.top
    if alpha is not None:
        opacity = alpha.astype(np.uint64)
        numerator *= opacity[..., None] if samples.ndim == 3 else opacity
        divisor *= _FULL
    return ((numerator + np.uint64(divisor // 2)) // np.uint64(divisor)).astype(np.uint8)


def check_known_range(samples: np.ndarray, limits: SampleRange, *, wide: bool) -> None:
    """Raise ValueError if `wide` samples, of 32 bits or signed, take at most a quarter of their range."""
    largest = int(samples.max())
    if wide and samples.min() >= 0 and largest <= limits.top // 4:
        raise ValueError(
            f"its pixels are 32-bit or signed integers of at most {largest}, whose range is not known "
            f"({limits.origin}); save it with 8 or 16 bits"
        )


def as_rgb(grey: np.ndarray) -> np.ndarray:
    """Repeat [H, W] over three channels."""
    return np.repeat(grey[:, :, None], 3, axis=2)


def is_white_zero(image: ImageFile.ImageFile) -> bool:
    """Whether an opened TIFF file is WhiteIsZero and Pillow does not invert it while it decodes.

    Pillow inverts up to 8 bits by raw modes such as "L;I", but not 16.
    """
    tags = getattr(image, "tag_v2", {})
    return tags.get(_PHOTOMETRIC) == 0 and not _rawmode(image).rstrip("R").endswith("I")


def grey_transparency(image: ImageFile.ImageFile) -> int | None:
    """The transparent grey of an opened PNG file of 2 or 4 bits, scaled to 8 bits as Pillow scales its pixels.

    Pillow leaves it unscaled, so that it would be compared with other numbers.
    """
    factor = {"L;2": 85, "L;4": 17}.get(_rawmode(image))
    value = image.info.get("transparency")
    if image.format != "PNG" or factor is None or not isinstance(value, int):
        return None
    return value * factor if value * factor <= 255 else value


def needs_samples(image: ImageFile.ImageFile) -> bool:
    """Whether an opened, not yet decoded file has samples of more than 8 bits for `decode_samples`."""
    if image.mode.startswith("I"):
        return True
    if image.format == "PNG":
        return _rawmode(image).endswith(";16B")
    if image.format == "TIFF":
        return image.mode != "F" and max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8  # type: ignore[attr-defined]
    if image.format == "PPM":
        return image.mode == "RGB" and _maxval(image) == _FULL
    return image.format == "JPEG2000" and _jpeg2000_precision(image) == 16


def decode_samples(open_image: Opener, bit_depth: int, *, white_is_zero: bool) -> Decoded | None:
    """Decode a file for which `needs_samples` is true.

    Args:
        open_image: opens the file; called for each pass over it.
        bit_depth: bits in use in files that do not declare it.
        white_is_zero: 0 is white; grey only.

    Returns:
        The image, or None for colour whose upper 8 bits Pillow reads and whose range needs no more.

    Raises:
        ValueError: samples are outside their range, or the range is not known.
    """
    with open_image() as image:
        if image.mode.startswith("I"):
            return _decode_grey(image, bit_depth, white_is_zero)
        if white_is_zero:
            raise ValueError(
                "its pixels are WhiteIsZero (PhotometricInterpretation 0) and in colour"
            )
        significant = _significant_bits(image)
        read = _read_colour(image, open_image)
        if read is None:
            if bit_depth != 16:
                raise ValueError(
                    f"its 16-bit samples are read with bit_depth 16 only (the setting bit_depth is {bit_depth}); "
                    "save it as a 16-bit RGB PNG"
                )
            return None
        colour, alpha = read
        transparent = image.info.get("transparency")
        if alpha is not None:
            colour[alpha == 0] = 0
        elif transparent is not None:
            colour[(colour == np.asarray(transparent, np.uint16)).all(axis=2)] = 0
        limits = _png_range(significant, colour) or setting_range(bit_depth)
    if alpha is not None and limits.from_setting and bit_depth < 16:
        opaque = int(alpha.max())
        if 0 < opaque <= limits.top:
            raise ValueError(
                f"its largest alpha is {opaque}: whether opaque is {limits.top} or 65535 is not known; remove the "
                "alpha channel"
            )
    largest = int(colour.max()) if limits.from_setting else None
    return Decoded(scale(colour, limits, alpha), largest)


def _decode_grey(image: ImageFile.ImageFile, bit_depth: int, white_is_zero: bool) -> Decoded:
    declared, significant = _declared_range(image), _significant_bits(image)
    # Pillow's mode "I" is TIFF of 32 bits or signed, and rare formats; 16-bit PGM has it too, but a known range.
    wide = image.mode == "I" and image.format != "PPM"
    image.load()
    samples = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        samples[samples == transparent] = 0
    limits = declared or _png_range(significant, samples) or setting_range(bit_depth)
    largest = int(samples.max())
    check_known_range(samples, limits, wide=wide)
    grey = scale(samples, limits)
    if white_is_zero:
        grey = 255 - grey
    return Decoded(as_rgb(grey), largest if limits.from_setting else None)


def _declared_range(image: ImageFile.ImageFile) -> SampleRange | None:
    """The range that an opened grey file other than PNG declares, of samples as Pillow returns them."""
    if image.format == "TIFF":
        bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))  # type: ignore[attr-defined]
        if bits < 16:
            return SampleRange(2**bits - 1, f"the file declares {bits} bits per sample")
    if image.format == "PPM" and _maxval(image) < _FULL:
        return SampleRange(_FULL, "Pillow scales to 16 bits by maxval")
    if image.format == "JPEG2000":
        bits = _jpeg2000_precision(image)
        if bits < 16:
            top = (2**bits - 1) << (16 - bits)  # Pillow shifts samples to 16 bits
            return SampleRange(top, f"the file declares {bits} bits")
    return None


def _png_range(bits: int | None, samples: np.ndarray) -> SampleRange | None:
    """The range of 16-bit samples of a PNG file whose sBIT chunk declares so many bits; None for none or 16.

    The PNG specification (sBIT, sample depth scaling) puts the s significant bits uppermost, so that full brightness
    is 65535. Some writers leave them in the lower bits. The latter is assumed if no sample is above 2**s - 1 and the
    samples are not scaled as in the specification.
    """
    if bits is None or not 0 < bits < 16:
        return None
    origin = f"its sBIT chunk declares {bits} bits"
    top = 2**bits - 1
    if int(samples.max()) > top:
        return SampleRange(_FULL, origin)
    wide = samples.astype(np.int64)
    upper = wide >> (16 - bits)
    shifted = (wide == upper << (16 - bits)).all()
    scaled = (np.abs(wide - np.rint(upper * (_FULL / top))) <= 1).all()
    return SampleRange(_FULL if shifted or scaled else top, origin)


def _significant_bits(image: ImageFile.ImageFile) -> int | None:
    """The largest number of significant bits of a colour in the sBIT chunk of a PNG file; None without one."""
    if image.format != "PNG":
        return None
    file: Any = image.fp  # type: ignore[attr-defined]
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"sBIT":
                content = file.read(length)
                return max(content[: 1 if length < 3 else 3], default=None)
            if kind == b"IDAT":
                return None
            file.seek(length + 4, 1)
    finally:
        file.seek(position)
    return None


def _read_colour(
    image: ImageFile.ImageFile, open_image: Opener
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """16-bit samples [H, W, 3] and alpha [H, W] or None; None if Pillow has no way to them."""
    rawmode = _rawmode(image)
    if rawmode == "LA;16B":  # four bytes per pixel, which mode RGBA holds as they are
        _, pixels = _load(image, "RGBA")
        pixels = pixels.astype(np.uint16)
        grey = pixels[..., 0] << 8 | pixels[..., 1]
        return as_rgb(grey), pixels[..., 2] << 8 | pixels[..., 3]
    if image.format == "PPM" and image.tile[0][0] == "ppm":
        return _read_ppm(image), None
    other = _OTHER_BYTE.get(rawmode)
    if other is None or any(_rawmode_of(tile) != rawmode for tile in image.tile):
        return None
    mode, upper = _load(image, rawmode)
    with open_image() as again:
        _, lower = _load(again, other)
    samples = upper.astype(np.uint16) << 8 | lower
    return np.ascontiguousarray(samples[..., :3]), samples[..., 3] if mode == "RGBA" else None


def _load(image: ImageFile.ImageFile, rawmode: str) -> tuple[str, np.ndarray]:
    """Decode an opened file by another raw mode, with the EXIF orientation applied; its mode and bytes."""
    image.tile = [
        tile._replace(args=rawmode if isinstance(tile[3], str) else (rawmode, *tile[3][1:]))  # type: ignore[index]
        for tile in image.tile
    ]
    image.load()
    return image.mode, np.asarray(ImageOps.exif_transpose(image))


def _read_ppm(image: ImageFile.ImageFile) -> np.ndarray:
    """Samples of a binary PPM file of 16 bits, [H, W, 3] uint16."""
    width, height = image.size
    file: Any = image.fp  # type: ignore[attr-defined]
    file.seek(image.tile[0][2])
    data = file.read(width * height * 6)
    if len(data) < width * height * 6:
        raise ValueError("it is truncated")
    return np.frombuffer(data, ">u2").reshape(height, width, 3).astype(np.uint16)


def _rawmode(image: ImageFile.ImageFile) -> str:
    return _rawmode_of(image.tile[0]) if getattr(image, "tile", None) else ""


def _rawmode_of(tile: Any) -> str:
    first = tile[3] if isinstance(tile[3], str) or not tile[3] else tile[3][0]
    return first if isinstance(first, str) else ""


def _maxval(image: ImageFile.ImageFile) -> int:
    """Largest sample that the header of an opened PGM or PPM file declares; raw 16-bit data have 65535."""
    arguments: Any = image.tile[0][3]
    return int(arguments[-1]) if isinstance(arguments, tuple) else _FULL


def _jpeg2000_precision(image: ImageFile.ImageFile) -> int:
    """Bits per sample of an opened JPEG 2000 file: the largest of the SIZ marker (ISO/IEC 15444-1, A.5.1)."""
    file: Any = image.fp  # type: ignore[attr-defined]
    position = file.tell()
    file.seek(0)
    data = file.read(65536)
    file.seek(position)
    start = data.find(_JPEG2000_SIZ)
    if start < 0 or len(data) < start + 42:
        raise ValueError("its JPEG 2000 header is not found")
    (components,) = struct.unpack_from(">H", data, start + 40)
    sizes = data[start + 42 : start + 42 + 3 * components : 3]
    return max((size & 0x7F) + 1 for size in sizes)
