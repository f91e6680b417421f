"""`rois`: where the saliency is highest, and the crops cut there (spec, section 3).

The signatures are those of `diffmic_fast.reference.rois` and a choice of backend: "reference",
"cpu", "cuda" or, for tests, "cuda-emulated". Both operations are `torch.library` operators, so they
are one node of a compiled graph and never traced into.

The CUDA kernels never wait for the GPU, so they cannot raise for saliency that is not finite. They
mark such an image instead, so that it cannot pass for another: its cells and origins are -1, its
crops not-a-number (0 for uint8, which has none), and so is every logit made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.checks import Arguments
from diffmic_fast.ops._backend import resolve, stream_of, transforming
from diffmic_fast.reference import rois as reference
from diffmic_fast.reference.rois import Channels, Rois, cell_to_pixel, window_size

__all__ = ["Rois", "cell_to_pixel", "choose_windows", "cut_crops", "rois", "window_size"]

_PIXELS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8)
_SALIENCY = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def choose_windows(
    saliency: Tensor, window: tuple[int, int], count: int, *, backend: str = "auto"
) -> Tensor:
    """The `count` windows of largest mean saliency, found greedily. No gradient passes.

    Args:
        saliency: [B, C, h, w] floating, C >= 1, any strides, finite; computed in float32.
        window: (height, width) in cells, not larger than the map.
        count: K >= 1, windows an image.
        backend: a backend's name, or "auto".

    Returns:
        [B, K, 2] int64, (row, column) of each upper-left cell.

    Raises:
        ValueError, TypeError: arguments that do not fit, named; saliency that is not finite, with
            the image's number (the CUDA kernels give that image cells of -1 instead).
        BackendError: the backend asked for cannot serve; a RuntimeError.
    """
    operation = "rois.choose_windows"
    Arguments(operation).tensor("saliency", saliency, "B C h w")
    _check_choice(operation, saliency, window, count)
    if transforming():
        return _reference(saliency, backend).choose_windows(saliency, window, count)
    return _choose_windows(saliency.detach(), window, count, backend)


def cut_crops(
    images: Tensor,
    origins: Tensor,
    size: tuple[int, int],
    channels: Channels = "first",
    *,
    backend: str = "auto",
) -> Tensor:
    """Crops of all images at once, differentiable in `images`.

    The part of a crop inside the image is aligned to the crop's lower right; the rest is the
    channel's minimum over its whole image, whose gradient is shared by the pixels that attain it.

    Args:
        images: [B, Ch, H, W] float32, float16, bfloat16, float64 or uint8; any strides.
        origins: [B, K, 2] int64, upper-left pixel (row, column) of each crop; any value.
        size: (height, width) of a crop in pixels; may exceed the image.
        channels: "first" cuts channel 0 and repeats it three times (as published), "all" cuts every
            channel.
        backend: a backend's name, or "auto".

    Returns:
        [B, K, 3 or Ch, height, width], contiguous, dtype of `images`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
        BackendError: the backend asked for cannot serve; a RuntimeError.
    """
    operation = "rois.cut_crops"
    args = Arguments(operation)
    args.tensor("images", images, "B Ch H W")
    args.integer("origins", origins, "B K 2")
    _check_cut(operation, images, size, channels)
    if transforming():
        return _reference(images, backend).cut_crops(images, origins, size, channels)
    return _cut_crops(images, origins, size, channels, backend)


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
        count: K, crops an image.
        channels: as in `cut_crops`.
        backend: a backend's name, or "auto".

    Returns:
        Cells [B, K, 2], origins [B, K, 2] in pixels, crops [B, K, 3 or Ch, height, width].

    Raises:
        ValueError, TypeError: arguments that do not fit, named; saliency that is not finite, with
            the image's number (the CUDA kernels mark that image's results instead).
        BackendError: the backend asked for cannot serve; a RuntimeError.
    """
    args = Arguments("rois")
    args.tensor("saliency", saliency, "B C h w")
    args.tensor("images", images, "B Ch H W")
    _pair("rois", "crop", crop)
    if 0 in (*images.shape[1:], *saliency.shape[1:]):
        raise ValueError(
            "rois: saliency and images must have a channel and a cell at least, got "
            f"{tuple(saliency.shape)} and {tuple(images.shape)}"
        )
    window = window_size(crop, _plane(images), _plane(saliency))
    _check_choice("rois", saliency, window, count)
    _check_cut("rois", images, crop, channels)
    if transforming():
        return _reference(images, backend).rois(saliency, images, crop, count, channels)
    crops, cells, origins = _rois(saliency.detach(), images, window, count, crop, channels, backend)
    return Rois(cells, origins, crops)


def _reference(tensor: Tensor, backend: str) -> ModuleType:
    """The reference, outside of our operators, for derivatives that these do not have."""
    resolve("rois", backend, tensor.device)  # which refuses a kernel asked for by name
    return reference


def _check_choice(operation: str, saliency: Tensor, window: tuple[int, int], count: int) -> None:
    _check_dtype(operation, "saliency", saliency, _SALIENCY)
    height, width = _pair(operation, "window", window)
    if saliency.shape[1] < 1:
        raise ValueError(
            f"{operation}: saliency must have at least one class, got {tuple(saliency.shape)}"
        )
    if height > saliency.shape[2] or width > saliency.shape[3]:
        raise ValueError(
            f"{operation}: window must lie in the saliency map of {_plane(saliency)} "
            f"cells, got {(height, width)}"
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
            f"{operation}: images must have a channel and a pixel at least, got "
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


def _readable(tensor: Tensor) -> Tensor:
    # What DLPack can say: no gradient, and no sign that is still to be applied.
    return tensor.detach().resolve_neg()


@torch.library.custom_op("diffmic_fast::choose_windows", mutates_args=())
def _choose_windows(saliency: Tensor, window: Sequence[int], count: int, backend: str) -> Tensor:
    name = resolve("rois", backend, saliency.device)
    if name == "reference":
        return reference.choose_windows(saliency, (window[0], window[1]), count)
    cells = saliency.new_empty((saliency.shape[0], count, 2), dtype=torch.int64)
    size = window[0], window[1]
    if name == "cpu":
        _native.extension().choose_windows(
            _readable(saliency), size, cells, torch.get_num_threads()
        )
    else:
        kernels = _native.cuda(name)
        scratch = _choice_scratch(kernels, saliency, size)
        kernels.choose_windows(_readable(saliency), size, cells, scratch, stream_of(saliency))
    return cells


@_choose_windows.register_fake
def _(saliency: Tensor, window: Sequence[int], count: int, backend: str) -> Tensor:
    return saliency.new_empty((saliency.shape[0], count, 2), dtype=torch.int64)


@torch.library.custom_op("diffmic_fast::cut_crops", mutates_args=())
def _cut_crops(
    images: Tensor, origins: Tensor, size: Sequence[int], channels: str, backend: str
) -> Tensor:
    name = resolve("rois", backend, images.device)
    if name == "reference":
        return reference.cut_crops(images, origins, (size[0], size[1]), cast(Channels, channels))
    crops = images.new_empty(_crops_shape(images, origins, size, channels))
    first = channels == "first"
    if name == "cpu":
        _native.extension().cut_crops(
            _readable(images), origins, first, crops, torch.get_num_threads()
        )
    else:
        kernels = _native.cuda(name)
        scratch = _cut_scratch(kernels, images, crops, first, backward=False).zero_()
        kernels.cut_crops(_readable(images), origins, first, crops, scratch, stream_of(images))
    return crops


@_cut_crops.register_fake
def _(images: Tensor, origins: Tensor, size: Sequence[int], channels: str, backend: str) -> Tensor:
    return images.new_empty(_crops_shape(images, origins, size, channels))


def _crops_shape(
    images: Tensor, origins: Tensor, size: Sequence[int], channels: str
) -> tuple[int, ...]:
    depth = 3 if channels == "first" else images.shape[1]
    return (*origins.shape[:2], depth, size[0], size[1])


@torch.library.custom_op("diffmic_fast::cut_crops_backward", mutates_args=())
def _cut_crops_backward(
    grad: Tensor, images: Tensor, origins: Tensor, size: Sequence[int], channels: str, backend: str
) -> Tensor:
    """Gradient of the images: each crop's inside goes back to its place, the rest to the minimum.

    Crops are added in their order, so the sum has one value.
    """
    name = resolve("rois", backend, images.device)
    if name not in ("reference", "cpu"):
        kernels = _native.cuda(name)
        images_grad = torch.empty_like(images, memory_format=torch.contiguous_format)
        first = channels == "first"
        scratch = _cut_scratch(kernels, images, grad, first, backward=True).zero_()
        kernels.cut_crops_backward(
            _readable(grad),
            _readable(images),
            origins,
            first,
            images_grad,
            scratch,
            stream_of(images),
        )
        return images_grad
    height, width = images.shape[2:]
    result = torch.zeros_like(images, memory_format=torch.contiguous_format)
    if channels == "first":
        grad = grad.sum(dim=2, keepdim=True)
    depth = grad.shape[2]
    for image, target, corners, crop_grads in zip(
        images, result, origins.tolist(), grad, strict=True
    ):
        fill_grad = grad.new_zeros(depth)
        for (top, left), crop_grad in zip(corners, crop_grads, strict=True):
            rows = slice(min(max(top, 0), height), min(max(top + size[0], 0), height))
            columns = slice(min(max(left, 0), width), min(max(left + size[1], 0), width))
            place = target[:depth, rows, columns]
            # Rows above the covered part, and columns to its left, are fill.
            above = size[0] - place.shape[1] if place.numel() else size[0]
            margin = size[1] - place.shape[2]
            if place.numel():
                place += crop_grad[:, above:, margin:]
            fill_grad += crop_grad[:, :above].sum(dim=(1, 2))
            fill_grad += crop_grad[:, above:, :margin].sum(dim=(1, 2))
        if bool(fill_grad.any()):
            least = image[:depth] == image[:depth].amin(dim=(1, 2), keepdim=True)
            share = fill_grad / least.sum(dim=(1, 2))
            target[:depth] += least * share[:, None, None]
    return result


@_cut_crops_backward.register_fake
def _(
    grad: Tensor, images: Tensor, origins: Tensor, size: Sequence[int], channels: str, backend: str
) -> Tensor:
    return torch.empty_like(images, memory_format=torch.contiguous_format)


def _no_second(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "rois: cut_crops has no second derivatives: use diffmic_fast.reference.rois.cut_crops, or torch.func, for them"
    )


_cut_crops_backward.register_autograd(_no_second)


def _save_for_backward(
    ctx: Any, inputs: tuple[Tensor, Tensor, Sequence[int], str, str], output: Tensor
) -> None:
    images, origins, size, channels, backend = inputs
    ctx.save_for_backward(images, origins)
    ctx.size, ctx.channels, ctx.backend = size, channels, backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    images, origins = ctx.saved_tensors
    images_grad = _cut_crops_backward(grad, images, origins, ctx.size, ctx.channels, ctx.backend)
    return images_grad, None, None, None, None


_cut_crops.register_autograd(_backward, setup_context=_save_for_backward)


# Both steps as one operator: one way through the dispatcher and one into the extension, which cost
# as much as the choice of windows itself.
@torch.library.custom_op("diffmic_fast::rois", mutates_args=())
def _rois(
    saliency: Tensor,
    images: Tensor,
    window: Sequence[int],
    count: int,
    size: Sequence[int],
    channels: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    name = resolve("rois", backend, images.device)
    if name == "reference":
        cells = reference.choose_windows(saliency, (window[0], window[1]), count)
        origins = cell_to_pixel(cells, _plane(saliency), _plane(images))
        crops = reference.cut_crops(images, origins, (size[0], size[1]), cast(Channels, channels))
        return crops, cells, origins
    crops, cells, origins = _empty_rois(saliency, images, count, size, channels)
    first = channels == "first"
    arguments = (
        _readable(saliency),
        _readable(images),
        (window[0], window[1]),
        first,
        cells,
        origins,
        crops,
    )
    if name == "cpu":
        _native.extension().rois(*arguments, torch.get_num_threads())
    else:
        kernels = _native.cuda(name)
        choice_scratch = _choice_scratch(kernels, saliency, (window[0], window[1]))
        cut_scratch = _cut_scratch(kernels, images, crops, first, backward=False)
        kernels.rois(*arguments, choice_scratch, cut_scratch, stream_of(images))
    return crops, cells, origins


def _choice_scratch(kernels: ModuleType, saliency: Tensor, window: tuple[int, int]) -> Tensor:
    needed = kernels.choose_windows_scratch(saliency.shape[0], _plane(saliency), window)
    return saliency.new_empty(needed, dtype=torch.float32)


def _cut_scratch(
    kernels: ModuleType, images: Tensor, crops: Tensor, first: bool, *, backward: bool
) -> Tensor:
    needed = kernels.cut_crops_scratch(
        _readable(images), crops.shape[1], (crops.shape[3], crops.shape[4]), first, backward
    )
    return images.new_empty(needed, dtype=torch.int64)


def _empty_rois(
    saliency: Tensor, images: Tensor, count: int, size: Sequence[int], channels: str
) -> tuple[Tensor, Tensor, Tensor]:
    cells = saliency.new_empty((saliency.shape[0], count, 2), dtype=torch.int64)
    origins = torch.empty_like(cells)
    return images.new_empty(_crops_shape(images, origins, size, channels)), cells, origins


@_rois.register_fake
def _(
    saliency: Tensor,
    images: Tensor,
    window: Sequence[int],
    count: int,
    size: Sequence[int],
    channels: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_rois(saliency, images, count, size, channels)


def _save_rois_for_backward(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Sequence[int], int, Sequence[int], str, str],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    _, images, _, _, size, channels, backend = inputs
    _, cells, origins = output
    ctx.mark_non_differentiable(cells, origins)
    ctx.save_for_backward(images, origins)
    ctx.size, ctx.channels, ctx.backend = size, channels, backend


def _rois_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    images, origins = ctx.saved_tensors
    images_grad = _cut_crops_backward(grad, images, origins, ctx.size, ctx.channels, ctx.backend)
    return None, images_grad, None, None, None, None, None


_rois.register_autograd(_rois_backward, setup_context=_save_rois_for_backward)
