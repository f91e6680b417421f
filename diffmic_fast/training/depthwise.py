"""Depthwise convolutions in bfloat16 on CPUs, with a backward pass composed of fast cases.

oneDNN (torch 2.14, AVX-512) has no fast bfloat16 code for two gradients of a depthwise convolution: that of the images
for a stride above 1, and that of a weight wider than 3 x 3. One step of tf_efficientnet_lite0 spends two thirds of its
time in them. Both are equal to calls that are fast:

- the gradient of the images is that of stride 1 for the output's gradient with zeros between its pixels;
- a weight's gradient consists of blocks of 3 x 3, each that of a 3 x 3 convolution of the shifted images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 3  # side of the weights whose gradient is fast


def has_fast_backward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> bool:
    """Whether `depthwise_conv2d` computes this call of `conv2d`, with a faster backward pass; arguments as there."""
    channels, each, *kernel = weight.shape
    return (
        images.device.type == "cpu"
        and images.ndim == 4
        # As autocast, which leaves float64 alone.
        and {images.dtype, weight.dtype} <= {torch.float32, torch.bfloat16}
        and bias is None
        and groups == channels == images.shape[1] > 1
        and each == 1
        and all(isinstance(value, tuple) for value in (stride, padding, dilation))
        and dilation == (1, 1)
        and min(kernel) >= _BLOCK
        and (max(stride) > 1 or max(kernel) > _BLOCK)
        and torch.is_grad_enabled()
        and (images.requires_grad or weight.requires_grad)
    )


def depthwise_conv2d(
    images: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """`conv2d` with one filter per channel, in bfloat16.

    Args:
        images: [B, C, H, W] floating, rounded to bfloat16.
        weight: [C, 1, kh, kw] floating, likewise; both sides at least 3.
        stride: of rows and columns.
        padding: zeros before and after rows and columns.

    Returns:
        [B, C, h, w] bfloat16. Gradients have the dtypes of the arguments; products are of bfloat16 numbers.
    """
    result: Tensor = _DepthwiseConv2d.apply(images, weight, _Geometry(stride, padding))
    return result


class _Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
        ctx.dtypes = images.dtype, weight.dtype
        images, weight = images.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(images, weight)
        ctx.geometry = geometry
        return F.conv2d(images, weight, None, *geometry, 1, weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        grad = grad.bfloat16().contiguous(memory_format=torch.channels_last)
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_images = _image_gradient(grad, images, weight, ctx.geometry)
            of_images = of_images.to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(grad, images, weight, ctx.geometry)
            of_weight = of_weight.to(ctx.dtypes[1])
        return of_images, of_weight, None


def _image_gradient(grad: Tensor, images: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    stride, padding = geometry
    if max(stride) > 1:
        sides = [
            size + 2 * pad - kernel + 1
            for size, pad, kernel in zip(images.shape[2:], padding, weight.shape[2:], strict=True)
        ]
        spaced = _zeros(*grad.shape[:2], *sides)
        spaced[:, :, :: stride[0], :: stride[1]] = grad
        grad = spaced
    return _gradient(grad, images, weight, _Geometry((1, 1), padding), of_images=True)


def _weight_gradient(grad: Tensor, images: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    stride, padding = geometry
    kernel = weight.shape[2:]
    if max(kernel) <= _BLOCK:
        return _gradient(grad, images, weight, geometry, of_images=False)
    rows, columns = padding
    padded = F.pad(images, (columns, columns, rows, rows))
    block = weight[:, :, :_BLOCK, :_BLOCK].contiguous()
    # Images that a block of the weight meets; the last block overlaps the one before it, with the same values.
    seen = [(n - 1) * s + _BLOCK for n, s in zip(grad.shape[2:], stride, strict=True)]
    starts = [[*range(0, k - _BLOCK, _BLOCK), k - _BLOCK] for k in kernel]
    result = torch.empty_like(weight)
    for i in starts[0]:
        for j in starts[1]:
            shifted = padded[:, :, i : i + seen[0], j : j + seen[1]]
            shifted = shifted.contiguous(memory_format=torch.channels_last)
            result[:, :, i : i + _BLOCK, j : j + _BLOCK] = _gradient(
                grad, shifted, block, _Geometry(stride, (0, 0)), of_images=False
            )
    return result


def _gradient(
    grad: Tensor, images: Tensor, weight: Tensor, geometry: _Geometry, *, of_images: bool
) -> Tensor:
    """One of the two gradients of a depthwise convolution, by PyTorch."""
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad,
        images,
        weight,
        None,
        *geometry,
        (1, 1),
        False,
        (0, 0),
        weight.shape[0],
        (of_images, not of_images, False),
    )
    return gradients[0 if of_images else 1]


def _zeros(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last).zero_()
