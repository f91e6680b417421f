"""Regions of interest: where the saliency is highest, and the crops cut there (spec, section 3).

Everything here is exact: the order of every addition is part of the definition, so that a kernel can be held against
it bit for bit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Channels = Literal["first", "all"]


class Rois(NamedTuple):
    """The salient patches of a batch.

    Attributes:
        cells: [B, K, 2] int64, upper-left cell (row, column) of each window on the saliency map.
        origins: [B, K, 2] int64, upper-left pixel (row, column) of each crop.
        crops: [B, K, 3, ch, cw], dtype of the images.
    """

    cells: Tensor
    origins: Tensor
    crops: Tensor


def window_size(
    crop: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]
) -> tuple[int, int]:
    """Size of a crop in cells of the saliency map: round(crop * grid / image), half to even, at least 1.

    Args:
        crop, image: (height, width) in pixels.
        grid: (height, width) in cells.
    """
    height = max(1, round(crop[0] * grid[0] / image[0]))
    width = max(1, round(crop[1] * grid[1] / image[1]))
    return height, width


def class_map(saliency: Tensor) -> Tensor:
    """One map of all classes: each scaled to [0, 1] by its own minimum and maximum, then added in class order.

    A class whose saliency is constant counts 0.

    Args:
        saliency: [B, C, h, w], computed in float32.

    Returns:
        [B, h, w] float32.
    """
    saliency = saliency.float()
    low = saliency.amin(dim=(2, 3), keepdim=True)
    extent = saliency.amax(dim=(2, 3), keepdim=True) - low
    scaled = torch.where(extent > 0, (saliency - low) / extent, torch.zeros_like(saliency))
    total = torch.zeros_like(scaled[:, 0])
    for index in range(saliency.shape[1]):
        total = total + scaled[:, index]
    return total


def choose_windows(saliency: Tensor, window: tuple[int, int], count: int) -> Tensor:
    """The `count` windows of largest mean saliency, found greedily.

    K times: take the stride-1 window with the largest mean (the first in row-major order on a tie), note its
    upper-left cell, set the window to 0. A window's mean is the float32 sum of its cells in row-major order, divided by
    their number.

    Args:
        saliency: [B, C, h, w] floating, finite, with finite extent; computed in float32.
        window: (height, width) in cells, not larger than the map.
        count: K >= 1.

    Returns:
        [B, K, 2] int64, (row, column) of each upper-left cell.

    Raises:
        ValueError: saliency of an image is not finite, or sizes that do not fit.
    """
    _check_windows(saliency, window, count)
    saliency = saliency.detach()
    batch, _, height, width = saliency.shape
    rows, columns = height - window[0] + 1, width - window[1] + 1
    remaining = class_map(saliency)
    cells = torch.empty(batch, count, 2, dtype=torch.int64, device=saliency.device)
    size = torch.tensor(float(window[0] * window[1]), device=saliency.device)
    row_index = torch.arange(height, device=saliency.device)[:, None]
    column_index = torch.arange(width, device=saliency.device)
    for k in range(count):
        total = torch.zeros(batch, rows, columns, device=saliency.device)
        for i in range(window[0]):
            for j in range(window[1]):
                total = total + remaining[:, i : i + rows, j : j + columns]
        mean = (total / size).flatten(1)
        # argmax promises no order among equal values; the first one is asked for here.
        first = (mean == mean.amax(dim=1, keepdim=True)).int().cumsum(1).eq(0).sum(1)
        row, column = first // columns, first % columns
        cells[:, k, 0], cells[:, k, 1] = row, column
        inside = (row_index >= row[:, None, None]) & (row_index < row[:, None, None] + window[0])
        inside = inside & (column_index >= column[:, None, None])
        inside = inside & (column_index < column[:, None, None] + window[1])
        remaining = remaining.masked_fill(inside, 0.0)
    return cells


def _check_windows(saliency: Tensor, window: tuple[int, int], count: int) -> None:
    if saliency.ndim != 4 or saliency.shape[1] == 0:
        raise ValueError(
            "rois.choose_windows: saliency must be [B, C, h, w] with C >= 1, got "
            f"{tuple(saliency.shape)}"
        )
    if not saliency.is_floating_point():
        raise TypeError(
            f"rois.choose_windows: saliency must be floating point, got {saliency.dtype}"
        )
    if count < 1:
        raise ValueError(f"rois.choose_windows: count must be at least 1, got {count}")
    grid = tuple(saliency.shape[2:])
    if not (1 <= window[0] <= grid[0] and 1 <= window[1] <= grid[1]):
        raise ValueError(
            f"rois.choose_windows: window must lie in the saliency map of {grid} cells, got "
            f"{tuple(window)}"
        )
    if saliency.shape[0]:
        narrow = saliency.detach().float()
        extent = narrow.amax(dim=(2, 3)) - narrow.amin(dim=(2, 3))
        finite = torch.isfinite(extent).all(dim=1)
        if not bool(finite.all()):
            image = int((~finite).nonzero()[0])
            raise ValueError(
                f"rois.choose_windows: saliency of image {image} is not finite (nan, inf, or a "
                "range beyond float32)"
            )


def cell_to_pixel(cells: Tensor, grid: tuple[int, int], image: tuple[int, int]) -> Tensor:
    """Pixel (round(i / h * H), round(j / w * W)) of cell (i, j), rounding half to even, in float64.

    Args:
        cells: [..., 2] int64, (row, column).
        grid: (h, w) cells of the map.
        image: (H, W) pixels.

    Returns:
        Tensor of the same shape, int64.
    """
    scale = cells.new_tensor(grid, dtype=torch.float64)
    size = cells.new_tensor(image, dtype=torch.float64)
    return torch.round(cells.double() / scale * size).long()


def cut_crops(
    images: Tensor, origins: Tensor, size: tuple[int, int], channels: Channels = "first"
) -> Tensor:
    """Crops of all images at once.

    The part of a crop inside the image is aligned to the crop's lower right; the rest is the channel's minimum over
    its whole image.

    Args:
        images: [B, Ch, H, W] float32, float16, bfloat16 or uint8; any strides.
        origins: [B, K, 2] int64, upper-left pixel (row, column) of each crop; may lie outside the image.
        size: (height, width) of a crop in pixels.
        channels: "first" cuts channel 0 and repeats it three times (as published), "all" cuts every channel.

    Returns:
        [B, K, 3 or Ch, height, width], contiguous, dtype of `images`. Differentiable in `images`.
    """
    height, width = images.shape[2:]
    if channels == "first":
        images = images[:, :1]
    crops = []
    for image, corners in zip(images, origins.tolist(), strict=True):
        fill = image.amin(dim=(1, 2))[:, None, None]
        for top, left in corners:
            rows = slice(min(max(top, 0), height), min(max(top + size[0], 0), height))
            columns = slice(min(max(left, 0), width), min(max(left + size[1], 0), width))
            inside = image[:, rows, columns]
            crop = fill.expand(-1, *size).clone()
            if inside.numel():
                crop[:, size[0] - inside.shape[1] :, size[1] - inside.shape[2] :] = inside
            crops.append(crop)
    depth = 3 if channels == "first" else images.shape[1]
    shape = (*origins.shape[:2], images.shape[1], *size)
    stacked = torch.stack(crops).view(shape) if crops else images.new_empty(shape)
    return stacked.expand(-1, -1, depth, -1, -1).contiguous()


def rois(
    saliency: Tensor,
    images: Tensor,
    crop: tuple[int, int],
    count: int,
    channels: Channels = "first",
) -> Rois:
    """Choose the windows of a batch and cut their crops.

    Args:
        saliency: [B, C, h, w] floating.
        images: [B, Ch, H, W].
        crop: (height, width) of a crop in pixels.
        count: K, crops an image.
        channels: as in `cut_crops`.
    """
    image, grid = _size(images), _size(saliency)
    window = window_size(crop, image, grid)
    cells = choose_windows(saliency, window, count)
    origins = cell_to_pixel(cells, grid, image)
    return Rois(cells, origins, cut_crops(images, origins, crop, channels))


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[2], maps.shape[3]
