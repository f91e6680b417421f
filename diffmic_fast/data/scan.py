"""A scan for unreadable image files before they are used: of headers and ends, or of everything."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

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
_LISTED = 100


def find_unreadable(
    sources: Sequence[ImageSource], *, bit_depth: int, extent: Literal["quick", "full"] = "quick"
) -> list[tuple[Path, str]]:
    """The unreadable files of a data set, in its order, each once.

    Args:
        sources: the images; those that are no files are readable.
        bit_depth: as in `load_image`.
        extent: "full" decodes every file. "quick" decodes only those whose header or end is not as their format has it,
            and those of rarer formats (all but JPEG, PNG, GIF and TIFF): truncated files are found; damage within a
            file and samples outside their range are not.

    Returns:
        Files and reasons.
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
    """Whether the header and the end of a file are as its format has them; False where that is not known."""
    try:
        # A named pipe would block.
        if not path.is_file():
            return False
        with strict_pillow(), Image.open(path) as image, open(path, "rb") as file:
            if image.mode not in _MODES and not needs_samples(image):
                return False
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL, 0))
            return _ends_as_it_should(image, file.read(), size)
    except Exception:  # damaged files raise many types; decoding says what is wrong
        return False


def _ends_as_it_should(image: Image.Image, tail: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that ends in `tail` is complete."""
    if image.format in ("JPEG", "MPO"):
        return tail.endswith(b"\xff\xd9")
    if image.format == "PNG":
        return tail.endswith(b"\0\0\0\0IEND\xaeB`\x82")
    if image.format == "GIF":
        return tail.endswith(b"\x3b")
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) != _WHITE_IS_ZERO:  # type: ignore[attr-defined]
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
