"""The C library's allocator, for processes that train on a CPU."""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Make glibc reuse the memory of freed tensors instead of returning it to the system; for the whole process.

    By default every tensor above 32 MiB is mapped anew, and the system clears each of its pages at the first access. A
    training step of tf_efficientnet_lite0 (32 images of 224 pixels, bfloat16, Zen 4, two cores) takes 0.71 s instead of
    0.86 s. The process keeps the memory of its largest step.

    Returns:
        Whether the C library is glibc; with another one nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
    return all(library.mallopt(parameter, value) == 1 for parameter, value in settings)
