"""Keys of images by content."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmic_fast.ops._operators import register

# A thread hashes 1 GB/s, 32 images of 224 pixels in 20 ms; starting threads takes a tenth of a millisecond.
_THREADED_BYTES = 1 << 20


def image_ids(images: Tensor) -> Tensor:
    """A 64-bit key per image, a BLAKE2 hash of its float32 pixels: the same in every batch and on every device.

    Args:
        images: [B, 3, H, W] floating. On a GPU they are copied to the host.

    Returns:
        [B] int64 on the device of `images`.
    """
    return _image_ids(Images(images))


class Images(NamedTuple):
    """Arguments of the operator `image_ids`."""

    images: Tensor


def _hash(call: Images) -> Tensor:
    images = call.images
    pixels = images.detach().to("cpu", torch.float32).contiguous().numpy()
    threads = min(torch.get_num_threads(), len(pixels))
    if threads == 1 or pixels.nbytes < _THREADED_BYTES:
        keys = list(map(_key, pixels))
    else:
        with ThreadPoolExecutor(threads) as pool:  # hashlib releases the interpreter lock
            keys = list(pool.map(_key, pixels))
    return torch.tensor(keys, dtype=torch.int64, device=images.device)


def _key(image: np.ndarray) -> int:
    digest = hashlib.blake2b(image.data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# An operator, so that a compiled or exported model calls it instead of tracing into it.
_image_ids = register(
    "image_ids",
    Images,
    Tensor,
    _hash,
    lambda call: call.images.new_empty(call.images.shape[0], dtype=torch.int64),
)
