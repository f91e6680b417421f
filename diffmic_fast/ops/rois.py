"""`rois`: the regions of highest saliency, and the crops cut there (docs/algorithm.md, "Regions of interest").

The CUDA kernels never synchronise with the host, so they cannot raise for saliency that is not finite. They mark the
image instead: its cells and origins are -1, and its crops NaN (0 for uint8), as are all logits computed from them.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from diffmic_fast.checks import Arguments
from diffmic_fast.ops._backend import resolve
from diffmic_fast.ops._layout import READABLE, detached, empty_like
from diffmic_fast.ops._operators import Derivative, kernels_of, register
from diffmic_fast.ops._torch_internals import transforming
from diffmic_fast.reference import rois as reference
from diffmic_fast.reference.rois import Channels, Rois, cell_to_pixel, window_size

__all__ = ["Rois", "cell_to_pixel", "choose_windows", "cut_crops", "rois", "window_size"]

_PIXELS = (*READABLE, torch.uint8)


def choose_windows(
    saliency: Tensor, window: tuple[int, int], count: int, *, backend: str = "auto"
) -> Tensor:
    """The `count` windows of largest mean saliency, found greedily. Not differentiable.

    Args:
        saliency: [B, C, h, w] floating, C >= 1, any strides, finite; computed in float32.
        window: (height, width) in cells, not larger than the map.
        count: K >= 1, windows per image.
        backend: name of a backend, or "auto".

    Returns:
        [B, K, 2] int64, (row, column) of each upper-left cell.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value; saliency is not finite, with the
            index of the image (the CUDA kernels return cells of -1 for it instead).
        BackendError: the requested backend cannot serve; a RuntimeError.
    """
    operation = "rois.choose_windows"
    Arguments(operation).tensor("saliency", saliency, "B C h w")
    _check_choice(operation, saliency, window, count)
    if transforming():
        return _reference(saliency, backend).choose_windows(saliency, window, count)
    return _choose_windows(Choose(saliency.detach(), window, count, backend))


def cut_crops(
    images: Tensor,
    origins: Tensor,
    size: tuple[int, int],
    channels: Channels = "first",
    *,
    backend: str = "auto",
) -> Tensor:
    """Crops of all images at once, differentiable in `images`.

    The part of a crop inside the image is aligned to the lower right of the crop; the rest is the minimum of the
    channel over its image, whose gradient is shared by the pixels that attain it.

    Args:
        images: [B, Ch, H, W] float32, float16, bfloat16, float64 or uint8; any strides.
        origins: [B, K, 2] int64, upper-left pixel (row, column) of each crop; any value.
        size: (height, width) of a crop in pixels; may exceed the image.
        channels: "first" cuts channel 0 and repeats it three times (as published), "all" cuts all channels.
        backend: name of a backend, or "auto".

    Returns:
        [B, K, 3 or Ch, height, width], contiguous, dtype of `images`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
        BackendError: the requested backend cannot serve; a RuntimeError.
    """
    operation = "rois.cut_crops"
    args = Arguments(operation)
    args.tensor("images", images, "B Ch H W")
    args.integer("origins", origins, "B K 2")
    _check_cut(operation, images, size, channels)
    if transforming():
        return _reference(images, backend).cut_crops(images, origins, size, channels)
    return _cut_crops(Cut(images, origins, size, channels, backend))


def rois(
    saliency: Tensor,
    images: Tensor,
    crop: tuple[int, int],
    count: int,
    channels: Channels = "first",
    *,
    backend: str = "auto",
) -> Rois:
    """Choose the windows of a batch and cut their crops.

    Args:
        saliency: [B, C, h, w] floating.
        images: [B, Ch, H, W].
        crop: (height, width) of a crop in pixels.
        count: K, crops per image.
        channels: as in `cut_crops`.
        backend: name of a backend, or "auto".

    Returns:
        Cells [B, K, 2], origins [B, K, 2] in pixels, crops [B, K, 3 or Ch, height, width].

    Raises:
        ValueError, TypeError: as `choose_windows` and `cut_crops`.
        BackendError: the requested backend cannot serve; a RuntimeError.
    """
    args = Arguments("rois")
    args.tensor("saliency", saliency, "B C h w")
    args.tensor("images", images, "B Ch H W")
    _pair("rois", "crop", crop)
    if 0 in (*images.shape[1:], *saliency.shape[1:]):
        raise ValueError(
            "rois: saliency and images must have at least one channel and one cell, got "
            f"{tuple(saliency.shape)} and {tuple(images.shape)}"
        )
    window = window_size(crop, _plane(images), _plane(saliency))
    _check_choice("rois", saliency, window, count)
    _check_cut("rois", images, crop, channels)
    if transforming():
        return _reference(images, backend).rois(saliency, images, crop, count, channels)
    found = _rois(
        ChooseAndCut(
            saliency=saliency.detach(), images=images, window=window, number=count, size=crop, channels=channels,
            backend=backend,
        )
    )  # fmt: skip
    return Rois(found.cells, found.origins, found.crops)


def _reference(tensor: Tensor, backend: str) -> ModuleType:
    """The reference outside of the operators, for derivatives that these do not have."""
    resolve("rois", backend, tensor.device)  # raises for a kernel requested by name
    return reference


def _check_choice(operation: str, saliency: Tensor, window: tuple[int, int], count: int) -> None:
    _check_dtype(operation, "saliency", saliency, READABLE)
    height, width = _pair(operation, "window", window)
    if saliency.shape[1] < 1:
        raise ValueError(
            f"{operation}: saliency must have at least one class, got {tuple(saliency.shape)}"
        )
    if height > saliency.shape[2] or width > saliency.shape[3]:
        raise ValueError(
            f"{operation}: window must lie in the saliency map of {_plane(saliency)} cells, got {(height, width)}"
        )
    if count < 1:
        raise ValueError(f"{operation}: count must be at least 1, got {count}")


def _check_cut(operation: str, images: Tensor, size: tuple[int, int], channels: str) -> None:
    _check_dtype(operation, "images", images, _PIXELS)
    _pair(operation, "size", size)
    if channels not in ("first", "all"):
        raise ValueError(f"{operation}: channels must be 'first' or 'all', got {channels!r}")
    if 0 in images.shape[1:]:
        raise ValueError(
            f"{operation}: images must have at least one channel and one pixel, got "
            f"{tuple(images.shape)}"
        )


def _plane(maps: Tensor) -> tuple[int, int]:
    return maps.shape[2], maps.shape[3]


def _check_dtype(
    operation: str, name: str, value: Tensor, allowed: tuple[torch.dtype, ...]
) -> None:
    if value.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{operation}: {name} must be one of {names}, got {value.dtype}")


def _pair(operation: str, name: str, value: tuple[int, int]) -> tuple[int, int]:
    if len(value) != 2 or value[0] < 1 or value[1] < 1:
        raise ValueError(
            f"{operation}: {name} must be (height, width), both at least 1, got {tuple(value)}"
        )
    return value[0], value[1]


# ---- operators: the backend is resolved when they run -----------------------------------------


class Choose(NamedTuple):
    """Arguments of the operator `choose_windows`, as in the function; `number` is its `count`."""

    saliency: Tensor
    window: Sequence[int]
    number: int
    backend: str


class Cut(NamedTuple):
    """Arguments of the operator `cut_crops`, as in the function."""

    images: Tensor
    origins: Tensor
    size: Sequence[int]
    channels: str
    backend: str


class CutBackward(NamedTuple):
    """Arguments of the operator `cut_crops_backward`; `grad` is the gradient of the crops."""

    grad: Tensor
    images: Tensor
    origins: Tensor
    size: Sequence[int]
    channels: str
    backend: str


class ChooseAndCut(NamedTuple):
    """Arguments of the operator `rois`: those of `choose_windows` and `cut_crops`."""

    saliency: Tensor
    images: Tensor
    window: Sequence[int]
    number: int
    size: Sequence[int]
    channels: str
    backend: str


class Crops(NamedTuple):
    """Results of the operator `rois`."""

    crops: Tensor
    cells: Tensor
    origins: Tensor


def _allocate_cells(call: Choose | ChooseAndCut) -> Tensor:
    return call.saliency.new_empty((call.saliency.shape[0], call.number, 2), dtype=torch.int64)


def _allocate_crops(call: Cut | ChooseAndCut, origins: Tensor) -> Tensor:
    depth = 3 if call.channels == "first" else call.images.shape[1]
    return call.images.new_empty((*origins.shape[:2], depth, *call.size))


def _choice_workspace(kernels: ModuleType, call: Choose | ChooseAndCut) -> Tensor:
    saliency = call.saliency
    size = kernels.choose_windows_workspace(
        saliency.shape[0], _plane(saliency), (call.window[0], call.window[1])
    )
    return saliency.new_empty(size, dtype=torch.float32)


def _cut_workspace(
    kernels: ModuleType, images: Tensor, crops: Tensor, channels: str, *, backward: bool = False
) -> Tensor:
    _, count, _, height, width = crops.shape
    size = kernels.cut_crops_workspace(
        detached(images), count, (height, width), channels == "first", backward
    )
    return images.new_empty(size, dtype=torch.int64)


def _choose(call: Choose) -> Tensor:
    window = call.window[0], call.window[1]
    backend = resolve("rois", call.backend, call.saliency.device)
    if backend == "reference":
        return reference.choose_windows(call.saliency, window, call.number)
    cells = _allocate_cells(call)
    kernels, launch = kernels_of(backend, cells)
    workspace = () if backend == "cpu" else (_choice_workspace(kernels, call),)
    kernels.choose_windows(detached(call.saliency), window, cells, *workspace, launch)
    return cells


def _cut(call: Cut) -> Tensor:
    images, origins, first = call.images, call.origins, call.channels == "first"
    backend = resolve("rois", call.backend, images.device)
    if backend == "reference":
        size, channels = (call.size[0], call.size[1]), cast(Channels, call.channels)
        return reference.cut_crops(images, origins, size, channels)
    crops = _allocate_crops(call, origins)
    kernels, launch = kernels_of(backend, crops)
    workspace: tuple[Tensor, ...] = ()
    if backend != "cpu":
        workspace = (_cut_workspace(kernels, images, crops, call.channels).zero_(),)
    kernels.cut_crops(detached(images), origins, first, crops, *workspace, launch)
    return crops


def _cut_backward(call: CutBackward) -> Tensor:
    grad, images, origins, channels = call.grad, call.images, call.origins, call.channels
    backend = resolve("rois", call.backend, images.device)
    if backend in ("reference", "cpu"):
        return reference.cut_crops_backward(grad, images, origins, cast(Channels, channels))
    images_grad = empty_like(images)
    kernels, launch = kernels_of(backend, images)
    workspace = _cut_workspace(kernels, images, grad, channels, backward=True).zero_()
    kernels.cut_crops_backward(
        detached(grad),
        detached(images),
        origins,
        channels == "first",
        images_grad,
        workspace,
        launch,
    )
    return images_grad


def _choose_and_cut(call: ChooseAndCut) -> Crops:
    saliency, images, channels = call.saliency, call.images, call.channels
    backend = resolve("rois", call.backend, images.device)
    if backend == "reference":
        found = reference.rois(
            saliency, images, (call.size[0], call.size[1]), call.number, cast(Channels, channels)
        )
        return Crops(found.crops, found.cells, found.origins)
    crops, cells, origins = outputs = _allocate(call)
    kernels, launch = kernels_of(backend, images)
    workspace: tuple[Tensor, ...] = ()
    if backend != "cpu":
        cut_workspace = _cut_workspace(kernels, images, crops, channels)
        workspace = _choice_workspace(kernels, call), cut_workspace
    window = call.window[0], call.window[1]
    kernels.rois(
        detached(saliency), detached(images), window, channels == "first", cells, origins, crops, *workspace, launch,
    )  # fmt: skip
    return outputs


def _allocate(call: ChooseAndCut) -> Crops:
    cells, origins = _allocate_cells(call), _allocate_cells(call)
    return Crops(_allocate_crops(call, origins), cells, origins)


def _cut_gradients(call: Cut, _: Any, wanted: Set[str], grad: Tensor) -> dict[str, Tensor]:
    return {"images": _cut_crops_backward(CutBackward(grad, *call))}


def _rois_gradients(
    call: ChooseAndCut, outputs: Crops, wanted: Set[str], grad: Tensor, *_: Any
) -> dict[str, Tensor]:
    backward = CutBackward(
        grad=grad, images=call.images, origins=outputs.origins, size=call.size, channels=call.channels,
        backend=call.backend,
    )  # fmt: skip
    return {"images": _cut_crops_backward(backward)}


def _no_second_derivatives(*_: Any) -> Any:
    raise RuntimeError(
        "rois: cut_crops has no second derivatives: use diffmic_fast.reference.rois.cut_crops, or torch.func, for them"
    )


_choose_windows = register("choose_windows", Choose, Tensor, _choose, _allocate_cells)
_cut_crops = register(
    "cut_crops",
    Cut,
    Tensor,
    _cut,
    lambda call: _allocate_crops(call, call.origins),
    Derivative(_cut_gradients, saves=["images", "origins"]),
)
_cut_crops_backward = register(
    "cut_crops_backward",
    CutBackward,
    Tensor,
    _cut_backward,
    lambda call: empty_like(call.images),
    Derivative(_no_second_derivatives, saves=[]),
)
# One operator for both steps: a second pass through the dispatcher and into the extension would cost as much as the
# choice of windows itself.
_rois = register(
    "rois",
    ChooseAndCut,
    Crops,
    _choose_and_cut,
    _allocate,
    Derivative(_rois_gradients, saves=["images"], saved_results=["origins"]),
)
