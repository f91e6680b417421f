"""Regions of interest: the windows of highest saliency, and the crops cut there.

The mathematics is in docs/algorithm.md, "Regions of interest". The order of every addition is part of the definition,
so that kernels can be tested against it bit for bit.
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
    """One map of all classes: each scaled to [0, 1] by its minimum and maximum, then added in class order.

    A class of constant saliency adds 0.

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

    K times: take the stride-1 window with the largest mean (the first in row-major order on a tie), record its
    upper-left cell, set the window to 0. The mean of a window is the float32 sum of its cells in row-major order,
    divided by their number.

    Args:
        saliency: [B, C, h, w] floating, finite, with finite extent; computed in float32.
        window: (height, width) in cells, not larger than the map.
        count: K >= 1.

    Returns:
        [B, K, 2] int64, (row, column) of each upper-left cell.

    Raises:
        ValueError: the saliency of an image is not finite, or a size does not fit.
    """
    _check_windows(saliency, window, count)
    return greedy_windows(saliency.detach(), window, count)


def greedy_windows(saliency: Tensor, window: tuple[int, int], count: int) -> Tensor:
    """`choose_windows` without checks, whose values a traced graph does not have."""
    batch, _, height, width = saliency.shape
    rows, columns = height - window[0] + 1, width - window[1] + 1
    remaining = class_map(saliency)
    cells = []
    size = remaining.new_tensor(float(window[0] * window[1]))
    row_index = torch.arange(height, device=saliency.device)[:, None]
    column_index = torch.arange(width, device=saliency.device)
    for _ in range(count):
        total = remaining.new_zeros(batch, rows, columns)
        for i in range(window[0]):
            for j in range(window[1]):
                total = total + remaining[:, i : i + rows, j : j + columns]
        mean = (total / size).flatten(1)
        # argmax guarantees no order among equal values; this takes the first.
        first = (mean == mean.amax(dim=1, keepdim=True)).int().cumsum(1).eq(0).sum(1)
        row, column = first // columns, first % columns
        cells.append(torch.stack((row, column), dim=1))
        inside = (row_index >= row[:, None, None]) & (row_index < row[:, None, None] + window[0])
        inside = inside & (column_index >= column[:, None, None])
        inside = inside & (column_index < column[:, None, None] + window[1])
        remaining = remaining.masked_fill(inside, 0.0)
    return torch.stack(cells, dim=1)


def _check_windows(saliency: Tensor, window: tuple[int, int], count: int) -> None:
    if saliency.ndim != 4 or saliency.shape[1] == 0:
        raise ValueError(
            f"rois.choose_windows: saliency must be [B, C, h, w] with C >= 1, got {tuple(saliency.shape)}"
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
            f"rois.choose_windows: window must lie in the saliency map of {grid} cells, got {tuple(window)}"
        )
    if saliency.shape[0]:
        narrow = saliency.detach().float()
        extent = narrow.amax(dim=(2, 3)) - narrow.amin(dim=(2, 3))
        finite = torch.isfinite(extent).all(dim=1)
        if not bool(finite.all()):
            image = int((~finite).nonzero()[0])
            raise ValueError(
                f"rois.choose_windows: saliency of image {image} is not finite (nan, inf, or a range beyond float32)"
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


def _numbers(origins: Tensor) -> list[list[list[int]]]:
    """The values of origins [B, K, 2]."""
    try:
        found: list[list[list[int]]] = origins.tolist()
        return found
    except RuntimeError:  # older versions of torch, for a tensor of a transform of torch.func
        return [[[int(value) for value in corner] for corner in corners] for corners in origins]


def cut_crops(
    images: Tensor, origins: Tensor, size: tuple[int, int], channels: Channels = "first"
) -> Tensor:
    """Crops of all images at once.

    The part of a crop inside the image is aligned to the lower right of the crop; the rest is the minimum of the
    channel over its image.

    Args:
        images: [B, Ch, H, W] float32, float16, bfloat16 or uint8; any strides.
        origins: [B, K, 2] int64, upper-left pixel (row, column) of each crop; may lie outside the image.
        size: (height, width) of a crop in pixels.
        channels: "first" cuts channel 0 and repeats it three times (as published), "all" cuts all channels.

    Returns:
        [B, K, 3 or Ch, height, width], contiguous, dtype of `images`. Differentiable in `images`.
    """
    height, width = images.shape[2:]
    if channels == "first":
        images = images[:, :1]
    crops = []
    for image, corners in zip(images, _numbers(origins), strict=True):
        fill = image.amin(dim=(1, 2))[:, None, None]
        for top, left in corners:
            inside = image[:, _inside(top, size[0], height), _inside(left, size[1], width)]
            crop = fill.expand(-1, *size).clone()
            if inside.numel():
                crop[:, size[0] - inside.shape[1] :, size[1] - inside.shape[2] :] = inside
            crops.append(crop)
    depth = 3 if channels == "first" else images.shape[1]
    shape = (*origins.shape[:2], images.shape[1], *size)
    stacked = torch.stack(crops).view(shape) if crops else images.new_empty(shape)
    return stacked.expand(-1, -1, depth, -1, -1).contiguous()


def cut_crops_backward(
    grad: Tensor, images: Tensor, origins: Tensor, channels: Channels = "first"
) -> Tensor:
    """The gradient of `cut_crops` in the images.

    Pixels of a crop that lie inside the image pass their gradient to it; the gradient of all others goes to the
    channel's minimum, in equal shares to the pixels that attain it. Crops are added in order, so the sum is exact to
    the bit.

    Args:
        grad: [B, K, 3 or Ch, height, width], the gradient of the crops.
        images, origins, channels: as in `cut_crops`.

    Returns:
        [B, Ch, H, W], contiguous, dtype of `images`.
    """
    height, width = images.shape[2:]
    result = torch.zeros_like(images, memory_format=torch.contiguous_format)
    if channels == "first":
        grad = grad.sum(dim=2, keepdim=True)
    depth, size = grad.shape[2], grad.shape[3:]
    for image, target, corners, crop_grads in zip(
        images, result, _numbers(origins), grad, strict=True
    ):
        fill_grad = grad.new_zeros(depth)
        for (top, left), crop_grad in zip(corners, crop_grads, strict=True):
            rows, columns = _inside(top, size[0], height), _inside(left, size[1], width)
            inside = target[:depth, rows, columns]
            # Rows above the part inside the image, and columns to its left, are filled.
            above = size[0] - inside.shape[1] if inside.numel() else size[0]
            margin = size[1] - inside.shape[2]
            if inside.numel():
                inside += crop_grad[:, above:, margin:]
            fill_grad += crop_grad[:, :above].sum(dim=(1, 2))
            fill_grad += crop_grad[:, above:, :margin].sum(dim=(1, 2))
        if bool(fill_grad.any()):
            least = image[:depth] == image[:depth].amin(dim=(1, 2), keepdim=True)
            share = fill_grad / least.sum(dim=(1, 2))
            target[:depth] += least * share[:, None, None]
    return result


def _inside(start: int, length: int, limit: int) -> slice:
    """The part of [start, start + length) in [0, limit)."""
    return slice(min(max(start, 0), limit), min(max(start + length, 0), limit))


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
        count: K, crops per image.
        channels: as in `cut_crops`.
    """
    image, grid = _size(images), _size(saliency)
    window = window_size(crop, image, grid)
    cells = choose_windows(saliency, window, count)
    origins = cell_to_pixel(cells, grid, image)
    return Rois(cells, origins, cut_crops(images, origins, crop, channels))


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[2], maps.shape[3]
