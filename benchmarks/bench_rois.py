"""`rois`: 32 images of 224 x 224, 7 x 7 cells, five classes, K = 6 crops of 32 x 32.

Peers: the kernel on one thread and on torch's threads, through the public call; the reference; and
what is written first, a Python loop over images and crops. The loop is given its best form: one
minimum an image, only where a crop leaves it, and no check of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.harness import Setup, on_one_thread
from diffmic_fast.ops import rois as ops

BATCH, CLASSES, GRID, SIDE, CROP, COUNT = 32, 5, 7, 224, 32, 6


def loop_windows(saliency: Tensor, count: int) -> Tensor:
    """Best cells of a 1 x 1 window, image by image and crop by crop."""
    cells = torch.empty(len(saliency), count, 2, dtype=torch.int64)
    columns = saliency.shape[3]
    for b in range(len(saliency)):
        total = torch.zeros(saliency.shape[2:])
        for one in saliency[b]:
            low, high = one.min(), one.max()
            total = total + (one - low) / (high - low)
        for k in range(count):
            best = int(total.argmax())
            cells[b, k, 0], cells[b, k, 1] = best // columns, best % columns
            total[best // columns, best % columns] = 0
    return cells


def loop_crops(images: Tensor, origins: Tensor, side: int) -> Tensor:
    """Channel 0 of every crop, repeated three times, image by image and crop by crop."""
    batch, count = origins.shape[:2]
    height, width = images.shape[2:]
    crops = torch.empty(batch, count, 3, side, side, dtype=images.dtype)
    for b in range(batch):
        image, low = images[b, 0], None
        for k in range(count):
            top, left = origins[b, k].tolist()
            if 0 <= top <= height - side and 0 <= left <= width - side:
                crops[b, k] = image[top : top + side, left : left + side]
                continue
            low = image.min() if low is None else low
            inside = image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
            crops[b, k] = low
            if inside.numel():
                crops[b, k, :, side - inside.shape[0] :, side - inside.shape[1] :] = inside
    return crops


@cache
def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Saliency, images, and corners inside and across edges; the loop finds and cuts the same."""
    generator = torch.Generator().manual_seed(0)
    saliency = torch.randn(BATCH, CLASSES, GRID, GRID, generator=generator)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    cells = ops.choose_windows(saliency, (1, 1), COUNT)
    origins = _to_pixels(cells)
    outside = origins - CROP // 2  # most images have a crop that leaves them
    assert torch.equal(loop_windows(saliency, COUNT), cells)
    for corners in (origins, outside):
        found = ops.cut_crops(images, corners, (CROP, CROP))
        assert torch.equal(loop_crops(images, corners, CROP), found)
    return saliency, images, origins, outside


def _to_pixels(cells: Tensor) -> Tensor:
    return ops.cell_to_pixel(cells, (GRID, GRID), (SIDE, SIDE))


def _both(backend: str) -> object:
    saliency, images, _, _ = _inputs()
    if backend == "loop":
        return loop_crops(images, _to_pixels(loop_windows(saliency, COUNT)), CROP)
    return ops.rois(saliency, images, (CROP, CROP), COUNT, backend=backend)


def _windows(backend: str) -> object:
    saliency = _inputs()[0]
    if backend == "loop":
        return loop_windows(saliency, COUNT)
    return ops.choose_windows(saliency, (1, 1), COUNT, backend=backend)


def _crops(outside: bool, backend: str) -> object:
    _, images, *corners = _inputs()
    if backend == "loop":
        return loop_crops(images, corners[outside], CROP)
    return ops.cut_crops(images, corners[outside], (CROP, CROP), backend=backend)


def setups() -> Iterator[Setup]:
    """Both parts and the whole, with crops inside their images and with crops that leave them."""
    written = BATCH * COUNT * 3 * CROP * CROP * 4
    read = written // 3
    for title, call, moved in (
        ("rois: windows and crops", _both, 0),
        ("choose_windows", _windows, 0),
        ("cut_crops, all inside", partial(_crops, False), written + read),
        (
            "cut_crops, across the upper and left edges",
            partial(_crops, True),
            written + read + _planes_with_minimum(_inputs()[3]) * SIDE * SIDE * 4,
        ),
    ):
        yield Setup(
            f"{title} ({BATCH} images {SIDE} x {SIDE}, K = {COUNT})",
            {
                "loop": lambda call=call: partial(call, "loop"),
                "reference": lambda call=call: partial(call, "reference"),
                "cpu, 1 thread": lambda call=call: on_one_thread(partial(call, "cpu")),
                "cpu": lambda call=call: partial(call, "cpu"),
                "copy": lambda: _copy(written // 4),
            },
            "loop",
            bytes_moved=moved,
            copy=("copy", 2 * written),
        )


def _copy(count: int) -> Callable[[], object]:
    source = torch.randn(count)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _planes_with_minimum(origins: Tensor) -> int:
    leaves = (origins < 0) | (origins > SIDE - CROP)
    return int(leaves.flatten(1).any(dim=1).sum())
