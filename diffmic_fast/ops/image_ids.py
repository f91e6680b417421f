"""`image_ids`: keys of images by content, which address the noise of their chains."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffmic_fast.checks import Arguments
from diffmic_fast.ops._backend import resolve
from diffmic_fast.ops._operators import kernels_of, register
from diffmic_fast.reference import image_ids as reference

__all__ = ["image_ids"]


def image_ids(images: Tensor, *, backend: str = "auto") -> Tensor:
    """A 64-bit key per image, a BLAKE2b hash of its float32 pixels: the same in every batch and on every device.

    On a GPU the kernel hashes where the pixels are, and the call does not wait for it. A hash is a chain over the
    image's bytes: the kernel takes as long for one image as for several hundred.

    Args:
        images: [B, 3, H, W] floating, not empty.
        backend: name of a backend, or "auto". The reference copies pixels on a GPU to the host.

    Returns:
        [B] int64 on the device of `images`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape or dtype.
        BackendError: the requested backend cannot serve; a RuntimeError.
    """
    Arguments("image_ids").floating("images", images, "B 3 H W")
    if 0 in images.shape[1:]:
        raise ValueError(f"image_ids: images must have pixels, got {tuple(images.shape)}")
    return _image_ids(Images(images, resolve("image_ids", backend, images.device)))


class Images(NamedTuple):
    """Arguments of the operator `image_ids`, as in the function."""

    images: Tensor
    backend: str


def _run(call: Images) -> Tensor:
    if call.backend == "reference":
        return reference.image_ids(call.images)
    pixels = call.images.detach().to(torch.float32).contiguous().flatten(1)
    keys = _allocate(call)
    kernels, stream = kernels_of(call.backend, pixels)
    kernels.image_ids(pixels, keys, stream)
    return keys


def _allocate(call: Images) -> Tensor:
    return call.images.new_empty(call.images.shape[0], dtype=torch.int64)


# An operator, so that a compiled or exported model calls it instead of tracing into it.
_image_ids = register("image_ids", Images, Tensor, _run, _allocate)
