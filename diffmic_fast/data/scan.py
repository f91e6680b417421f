"""A scan for unreadable image files before they are used: of headers and ends, or of everything."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image

from diffmic_fast.data.decode import UnreadableImageError, load_image, strict_pillow
from diffmic_fast.data.samples import needs_samples
from diffmic_fast.data.table import ImageSource

_TAIL = 64
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I;16L")
_OFFSETS = (
    (273, 279),
    (324, 325),
)  # TIFF: StripOffsets and StripByteCounts, TileOffsets and TileByteCounts
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_COMPRESSION, _OLD_JPEG = 259, 6
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
# Bytes of a value of each TIFF type (TIFF 6.0, section 2; 13 is IFD).
_VALUE_SIZES = dict(zip(range(1, 14), (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), strict=True))
_LISTED = 100


def find_unreadable(
    sources: Sequence[ImageSource], *, bit_depth: int, extent: Literal["quick", "full"] = "quick"
) -> list[tuple[Path, str]]:
    """The unreadable files of a data set, in its order, each once.

    Args:
        sources: the images; arrays and synthetic images count as readable.
        bit_depth: as in `load_image`.
        extent: "full" decodes every file. "quick" decodes only JPEG, PNG and TIFF files without a valid header or end
            marker (TIFF: with tags or pixels beyond the end of the file), and all files of other formats: truncated
            files are found; damage within a file and samples outside their range are not.

    Returns:
        Files and reasons.

    Raises:
        MemoryError, OSError: there is not enough memory, or no free file descriptor, to read the files.
    """
    files = list(dict.fromkeys(source for source in sources if isinstance(source, Path)))

    def check(path: Path) -> str | None:
        if extent == "quick" and _looks_complete(path):
            return None
        try:
            load_image(path, bit_depth=bit_depth)
        except UnreadableImageError as error:
            return error.reason or str(error)
        return None

    # Reading waits for the disk or a network, and Pillow decodes without the interpreter's lock.
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        reasons = list(pool.map(check, files))
    return [(path, why) for path, why in zip(files, reasons, strict=True) if why is not None]


def describe(unreadable: Sequence[tuple[Path, str]]) -> str:
    """Lines with the number of unreadable files and their names and reasons, at most the first 100."""
    count = "1 image" if len(unreadable) == 1 else f"{len(unreadable)} images"
    lines = [f"{count} cannot be read; repair or remove what is listed:"]
    lines += [f"  {path}: {reason}" for path, reason in unreadable[:_LISTED]]
    if len(unreadable) > _LISTED:
        lines.append(f"  … and {len(unreadable) - _LISTED} more")
    return "\n".join(lines)


def _looks_complete(path: Path) -> bool:
    """Whether a file has a valid header and end marker; False where that is not known."""
    try:
        # A named pipe would block.
        if not path.is_file():
            return False
        with strict_pillow(), Image.open(path) as image, open(path, "rb") as file:
            if image.mode not in _MODES and not needs_samples(image):
                return False
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL, 0))
            return _has_valid_end(image, file.read(), size) and (
                image.format != "TIFF" or _tiff_directory_end(file) <= size
            )
    except Exception:  # damaged files raise many types; decoding says what is wrong
        return False


def _has_valid_end(image: Image.Image, tail: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that ends in `tail` is complete."""
    if image.format in ("JPEG", "MPO"):
        return tail.endswith(b"\xff\xd9")
    if image.format == "PNG":
        return tail.endswith(b"\0\0\0\0IEND\xaeB`\x82")
    # The end marker of GIF, one byte, also occurs within pixels.
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if tags.get(_PHOTOMETRIC) != _WHITE_IS_ZERO and tags.get(_COMPRESSION) != _OLD_JPEG:
            return all(end <= size for end in _tiff_ends(image))
    return False


def _tiff_ends(image: Image.Image) -> Iterator[int]:
    """Where the strips and tiles of the first frame end, in bytes; at least one."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    found = False
    for offsets, counts in _OFFSETS:
        for offset, count in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=True):
            found = True
            yield offset + count
    if not found:
        raise ValueError("there are no strips or tiles")


def _tiff_directory_end(file: BinaryIO) -> int:
    """Where the first directory of a TIFF file and the values of its tags end, in bytes.

    Raises:
        KeyError: the file is BigTIFF or a tag has an unknown type.
        struct.error: the directory is beyond the end of the file.
    """
    file.seek(0)
    head = file.read(8)
    order = _BYTE_ORDERS[head[:4]]
    (start,) = struct.unpack(f"{order}I", head[4:])
    file.seek(start)
    (count,) = struct.unpack(f"{order}H", file.read(2))
    end = start + 2 + 12 * count
    for _, kind, values, offset in struct.iter_unpack(f"{order}HHII", file.read(12 * count)):
        size = _VALUE_SIZES[kind] * values
        if size > 4:  # smaller values are in place of the offset
            end = max(end, offset + size)
    return end
