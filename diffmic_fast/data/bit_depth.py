"""Detection of images whose samples use far fewer bits than the setting `bit_depth` says."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from diffmic_fast.data.decode import UnreadableImageError, decode, uses_bit_depth
from diffmic_fast.data.table import ImageSource

_SAMPLE = 64


def depth_notice(
    sources: Sequence[ImageSource], bit_depth: int, *, limit: int = _SAMPLE
) -> str | None:
    """What to say if the setting `bit_depth` is far above the bits in use; pixels are not changed.

    Of at most `limit` images, evenly spaced over `sources`, those whose range is that of the setting are decoded; of
    the others the header alone is read. Unreadable files are left out.

    Args:
        sources: the images of a training, or the files to predict.
        bit_depth: the setting.
        limit: how many images to look at.

    Returns:
        A sentence if the largest sample of all of them is below a quarter of the range, else None. None, too, if every
        sample is 0.
    """
    count = min(limit, len(sources))
    chosen = [sources[i * len(sources) // count] for i in range(count)]
    found = []
    for source in chosen:
        try:
            if isinstance(source, Path) and uses_bit_depth(source):
                found.append(decode(source, bit_depth=bit_depth).largest)
        except UnreadableImageError:
            continue
    looked_at = f" ({count} of {len(sources)} images were looked at)"
    return _notice(found, looked_at, bit_depth, "data.augmentation.bit_depth")


def _notice(found: Sequence[int | None], note: str, bit_depth: int, setting: str) -> str | None:
    """As `depth_notice`, from the largest sample of each image, None where the setting is not its range."""
    samples = [value for value in found if value is not None]
    largest = max(samples, default=0)
    if largest == 0 or largest >= 2 ** (bit_depth - 2):
        return None
    bits = max(largest.bit_length(), 8)
    share = 100 * largest / (2**bit_depth - 1)
    return (
        f"the largest value in {len(samples)} images of 16 bits{note} is {largest}, which takes {bits} bits, but "
        f"{setting} is {bit_depth}: the images have at most {share:.1f} % of full brightness. Set {setting}={bits} if "
        "that is their depth"
    )


def warn_of_unused_bits(sources: Sequence[ImageSource], bit_depth: int) -> None:
    """Warn with `depth_notice`, if there is one."""
    notice = depth_notice(sources, bit_depth)
    if notice is not None:
        warnings.warn(notice, stacklevel=2)


def warn_of_samples(largest: Sequence[int | None], bit_depth: int) -> None:
    """Warn, as `warn_of_unused_bits`, of images that were decoded, by the `Decoded.largest` of each."""
    notice = _notice(largest, "", bit_depth, "preprocessing.bit_depth")
    if notice is not None:
        warnings.warn(notice, stacklevel=2)
