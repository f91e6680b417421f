"""Images, places of crops and comparisons for the tests of `rois`."""

from __future__ import annotations

import torch
from torch import Tensor

PIXELS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8]
SALIENCY = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INT64 = torch.iinfo(torch.int64)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


def random_images(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(3, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator).to(dtype)


def strided(tensor: Tensor, kind: str) -> Tensor:
    """The same values behind other strides; gaps are filled with a value that would be noticed."""
    sentinel = 1 if tensor.dtype == torch.uint8 else -1e4
    if kind == "contiguous":
        return tensor.contiguous()
    if kind == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if kind == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "slice":  # of a larger buffer, at an odd start
        larger = tensor.new_full([size + 3 for size in tensor.shape], sentinel)
        view = larger[1:-2, 2:-1, 3:, 1:-2]
    else:  # every second element of a larger buffer
        larger = tensor.new_full([2 * size for size in tensor.shape], sentinel)
        view = larger[::2, 1::2, ::2, 1::2]
    view.copy_(tensor)
    return view


STRIDES = ["contiguous", "channels_last", "transposed", "slice", "spread"]


def origins_around(batch: int, count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Origins inside, across every edge, and far outside."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-height - 9, 2 * height + 9, (batch, count, 1), generator=generator)
    columns = torch.randint(-width - 9, 2 * width + 9, (batch, count, 1), generator=generator)
    return torch.cat([rows, columns], dim=2)


NOT_FINITE = [
    (dtype, value) for dtype in SALIENCY for value in (torch.nan, torch.inf, -torch.inf)
] + [(torch.float64, 1e300), (torch.float32, 3.4e38)]  # or beyond float32, or with such a range


def not_finite_saliency(dtype: torch.dtype, value: float) -> Tensor:
    """Images 17 and 31 of 40 have it."""
    saliency = torch.zeros(40, 2, 3, 3, dtype=dtype)
    saliency[[17, 31], 1, 2, 2] = value
    saliency[[17, 31], 1, 0, 0] = -min(abs(value), 3.4e38) if dtype == torch.float32 else 0
    return saliency
