"""Depthwise convolutions under `bfloat16_passes`: as exact as PyTorch's own in bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffmic_fast.training.depthwise import has_fast_backward
from diffmic_fast.training.precision import bfloat16_passes

CPU = torch.device("cpu")

# Channels, (height, width), kernel, stride, padding, groups
CASES = [
    (5, (11, 8), 3, 2, 1, 5),
    (5, (12, 9), 5, 1, 2, 5),
    (5, (12, 9), 5, 2, 2, 5),
    (3, (13, 17), 7, 3, 3, 3),
    (3, (13, 17), 4, 1, 0, 3),
    (2, (9, 9), 6, (2, 1), (0, 3), 2),
    (4, (9, 7), (3, 5), (1, 2), (1, 2), 4),
    (7, (5, 5), 5, 1, 2, 7),
]


def _gradients(layer, x, upper, dtype):
    x = x.clone().requires_grad_()
    if dtype == torch.bfloat16:
        with bfloat16_passes(CPU):
            result = layer(x)
    else:
        result = F.conv2d(
            x.to(dtype), layer.weight.to(dtype), None, layer.stride, layer.padding, 1, layer.groups
        )
    assert result.dtype == dtype
    return result, torch.autograd.grad(result, (x, layer.weight), upper.to(dtype))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_are_those_of_the_rounded_numbers(case, layout):
    """Against float64 on the same bfloat16 numbers, only the results' own rounding remains: half a unit is 2**-9."""
    channels, size, kernel, stride, padding, groups = case
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(channels, channels, kernel, stride, padding, groups=groups, bias=False)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    x = torch.randn(3, channels, *size, generator=generator).bfloat16().float()
    x = x.contiguous(memory_format=layout)
    exact = layer(x)
    assert has_fast_backward(
        x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    upper = torch.randn(exact.shape, generator=generator).bfloat16()
    wanted, (of_x, of_weight) = _gradients(layer, x, upper, torch.float64)
    found, gradients = _gradients(layer, x, upper, torch.bfloat16)
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=2**-8)
    for gradient, exact_gradient in zip(gradients, (of_x, of_weight), strict=True):
        assert gradient.dtype == torch.float32 and gradient.shape == exact_gradient.shape
        scale = float(exact_gradient.abs().max())
        torch.testing.assert_close(
            gradient.double(), exact_gradient.double(), rtol=2**-8, atol=2**-9 * scale
        )


@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "bias", "dilation", "expected"),
    [
        (3, 2, 6, False, 1, True),
        (5, 1, 6, False, 1, True),
        (3, 1, 6, False, 1, False),  # fast as it is
        (3, 2, 6, True, 1, False),
        (3, 2, 6, False, 2, False),
        (3, 2, 2, False, 1, False),
        (2, 2, 6, False, 1, False),
    ],
)
def test_which_convolutions_are_replaced(kernel, stride, groups, bias, dilation, expected):
    layer = nn.Conv2d(6, 6, kernel, stride, 1, dilation, groups, bias)
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    arguments = (x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, groups)
    assert has_fast_backward(*arguments) is expected
    with torch.no_grad():
        assert not has_fast_backward(*arguments)
    assert not has_fast_backward(x.detach(), layer.weight.detach(), *arguments[2:])


def test_gradient_of_one_argument():
    """Frozen weights, or images that need no gradient, get none; the other gradient is unchanged."""
    layer = nn.Conv2d(4, 4, 5, 2, 2, groups=4, bias=False)
    x = torch.randn(2, 4, 10, 10)
    found = {}
    for images, weight in ((True, True), (True, False), (False, True)):
        y = x.clone().requires_grad_(images)
        layer.weight.requires_grad_(weight)
        layer.weight.grad = None
        with bfloat16_passes(CPU):
            layer(y).float().square().sum().backward()
        assert (y.grad is not None) == images and (layer.weight.grad is not None) == weight
        for name, grad in (("images", y.grad), ("weight", layer.weight.grad)):
            if grad is not None:
                assert torch.equal(found.setdefault(name, grad.clone()), grad)
