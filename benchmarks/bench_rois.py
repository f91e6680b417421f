"""`rois`: 32 images of 224 x 224, 7 x 7 cells, five classes, K = 6 crops of 32 x 32.

Peers: the kernel on one thread and on torch's threads, through the public call; the reference; and
what is written first, a Python loop over images and crops. The loop is given its best form: one
minimum an image, only where a crop leaves it, and no check of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case, Timing, measure
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


def run(rounds: int) -> list[Case]:
    """Time both parts and the whole, with crops inside their images and with crops that leave them."""
    generator = torch.Generator().manual_seed(0)
    saliency = torch.randn(BATCH, CLASSES, GRID, GRID, generator=generator)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    cells = ops.choose_windows(saliency, (1, 1), COUNT)
    origins = ops.cell_to_pixel(cells, (GRID, GRID), (SIDE, SIDE))
    outside = origins - CROP // 2  # most images have a crop that leaves them
    size = (CROP, CROP)
    written = BATCH * COUNT * 3 * CROP * CROP * 4
    read = written // 3

    def whole(origins_of: Callable[[Tensor], Tensor]) -> Tensor:
        return loop_crops(images, origins_of(loop_windows(saliency, COUNT)), CROP)

    def to_pixels(found: Tensor) -> Tensor:
        return ops.cell_to_pixel(found, (GRID, GRID), (SIDE, SIDE))

    assert torch.equal(loop_windows(saliency, COUNT), cells)
    for corners in (origins, outside):
        assert torch.equal(loop_crops(images, corners, CROP), ops.cut_crops(images, corners, size))

    source = torch.randn(written // 4)
    target = torch.empty_like(source)
    cases = []
    for title, call, loop, moved in (
        (
            "rois: windows and crops",
            lambda name: ops.rois(saliency, images, size, COUNT, backend=name),
            lambda: whole(to_pixels),
            0,
        ),
        (
            "choose_windows",
            lambda name: ops.choose_windows(saliency, (1, 1), COUNT, backend=name),
            lambda: loop_windows(saliency, COUNT),
            0,
        ),
        (
            "cut_crops, all inside",
            lambda name: ops.cut_crops(images, origins, size, backend=name),
            lambda: loop_crops(images, origins, CROP),
            written + read,
        ),
        (
            "cut_crops, across the upper and left edges",
            lambda name: ops.cut_crops(images, outside, size, backend=name),
            lambda: loop_crops(images, outside, CROP),
            written + read + _planes_with_minimum(outside) * SIDE * SIDE * 4,
        ),
    ):
        timings = measure(
            {
                "loop": loop,
                "reference": lambda call=call: call("reference"),  # type: ignore[misc]
                "cpu, 1 thread": lambda call=call: _on_one_thread(call),  # type: ignore[misc]
                "cpu": lambda call=call: call("cpu"),  # type: ignore[misc]
                "copy": lambda: target.copy_(source),
            },
            rounds,
        )
        copy: Timing = timings.pop("copy")
        sizes = f"{BATCH} images {SIDE} x {SIDE}, K = {COUNT}"
        cases.append(Case(f"{title} ({sizes})", timings, "loop", moved, 2 * written / copy.best))
    return cases


def _planes_with_minimum(origins: Tensor) -> int:
    leaves = (origins < 0) | (origins > SIDE - CROP)
    return int(leaves.flatten(1).any(dim=1).sum())


def _on_one_thread(call: Callable[[str], object]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call("cpu")
    finally:
        torch.set_num_threads(threads)
