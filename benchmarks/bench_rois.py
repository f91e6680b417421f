"""`rois`: 32 images of 224 x 224, 7 x 7 cells, five classes, K = 6 crops of 32 x 32.

Peers: the kernel on one thread and on torch's threads, through the public call; the reference; and a Python loop over
images and crops in its best form: one minimum per image, only where a crop leaves it, and no validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Maker, Setup, copying, on_one_thread
from diffmic_fast.ops import rois as ops

BATCH, CLASSES, GRID, SIDE, CROP, COUNT = 32, 5, 7, 224, 32, 6
Call = Callable[[], object]
_WRITTEN = BATCH * COUNT * 3 * CROP * CROP  # numbers in all crops


def loop_windows(saliency: Tensor, count: int) -> Tensor:
    """Chosen cells of a 1 x 1 window, image by image and crop by crop."""
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


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Saliency, images, and origins inside and across edges, after the loop was compared with the operation."""
    generator = torch.Generator().manual_seed(0)
    saliency = torch.randn(BATCH, CLASSES, GRID, GRID, generator=generator)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    cells = ops.choose_windows(saliency, (1, 1), COUNT)
    origins = _to_pixels(cells)
    outside = origins - CROP // 2  # in most images a crop crosses the edge
    assert torch.equal(loop_windows(saliency, COUNT), cells)
    for corners in (origins, outside):
        found = ops.cut_crops(images, corners, (CROP, CROP))
        assert torch.equal(loop_crops(images, corners, CROP), found)
    return saliency, images, origins, outside


def _to_pixels(cells: Tensor) -> Tensor:
    return ops.cell_to_pixel(cells, (GRID, GRID), (SIDE, SIDE))


def _operations() -> Iterator[tuple[str, Call, Callable[..., object], int]]:
    """Title, the loop, the operation (of a backend), and bytes moved."""
    saliency, images, origins, outside = _inputs()
    size = (CROP, CROP)
    moved = 4 * (_WRITTEN + _WRITTEN // 3)

    def loop() -> Tensor:
        return loop_crops(images, _to_pixels(loop_windows(saliency, COUNT)), CROP)

    yield "rois: windows and crops", loop, partial(ops.rois, saliency, images, size, COUNT), 0
    choose = partial(ops.choose_windows, saliency, (1, 1), COUNT)
    yield "choose_windows", partial(loop_windows, saliency, COUNT), choose, 0
    minima = 4 * _planes_with_minimum(outside) * SIDE * SIDE
    for title, corners, read in (
        ("cut_crops, all inside", origins, 0),
        ("cut_crops, across the upper and left edges", outside, minima),
    ):
        cut = partial(ops.cut_crops, images, corners, size)
        yield title, partial(loop_crops, images, corners, CROP), cut, moved + read


def _made(call: Call) -> Call:
    return call


def setups() -> Iterator[Setup]:
    """Both parts and the whole, with crops inside their images and across the edges."""
    for title, loop, call, moved in _operations():
        kernel = partial(call, backend="cpu")
        peers: dict[str, Call] = {
            "loop": loop,
            "reference": partial(call, backend="reference"),
            "cpu, 1 thread": on_one_thread(kernel),
            "cpu": kernel,
        }
        makers: dict[str, Maker] = {name: partial(_made, call) for name, call in peers.items()}
        yield Setup(
            f"{title} ({BATCH} images {SIDE} x {SIDE}, K = {COUNT})",
            {**makers, "copy": partial(copying, _WRITTEN)},
            "loop",
            bytes_moved=moved,
            copy=("copy", 8 * _WRITTEN),
        )


def _planes_with_minimum(origins: Tensor) -> int:
    leaves = (origins < 0) | (origins > SIDE - CROP)
    return int(leaves.flatten(1).any(dim=1).sum())
