"""`rois` in CUDA: schedules, shapes of every kernel variant, and saliency that is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_backends import CUDA_BACKENDS, device_of, schedule, seeds
from rois_cases import (
    NOT_FINITE,
    PIXELS,
    assert_same_bits,
    not_finite_saliency,
    origins_around,
    random_images,
    strided,
)
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.ops import rois as ops
from diffmic_fast.reference import rois as reference

pytestmark = pytest.mark.parametrize("backend", CUDA_BACKENDS)


def rois(backend: str, saliency: Tensor, images: Tensor, *arguments: Any) -> ops.Rois:
    """`rois` on the backend's device, with results on the CPU."""
    device = device_of(backend)
    found = ops.rois(saliency.to(device), images.to(device), *arguments, backend=backend)
    return ops.Rois(*(part.cpu() for part in found))


def cut_crops(backend: str, images: Tensor, origins: Tensor, *arguments: Any) -> Tensor:
    device = device_of(backend)
    return ops.cut_crops(images.to(device), origins.to(device), *arguments, backend=backend).cpu()


def choose_windows(backend: str, saliency: Tensor, *arguments: Any) -> Tensor:
    return ops.choose_windows(saliency.to(device_of(backend)), *arguments, backend=backend).cpu()


@pytest.mark.parametrize(("dtype", "value"), NOT_FINITE)
def test_non_finite_saliency_marks_its_image(
    backend: str, dtype: torch.dtype, value: float
) -> None:
    saliency = not_finite_saliency(dtype, value)[15:19]
    good = [0, 1, 3]
    for pixels in (torch.float32, torch.bfloat16, torch.uint8):
        images = random_images((4, 3, 6, 6), pixels)
        found = rois(backend, saliency, images, (2, 2), 2)
        assert (found.cells[2] == -1).all() and (found.origins[2] == -1).all()
        marked = found.crops[2]
        assert (marked.isnan() if pixels.is_floating_point else marked == 0).all()
        expected = reference.rois(saliency[good], images[good], (2, 2), 2)
        for of_good, wanted in zip(found, expected, strict=True):
            assert torch.equal(of_good[good], wanted)
    assert torch.equal(choose_windows(backend, saliency, (1, 1), 2), found.cells)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_of_every_dtype(backend: str, dtype: torch.dtype) -> None:
    """Sums are in float32: half types have the error of one rounding each of the result and the share."""
    images = torch.randint(0, 4, (2, 3, 30, 41)).to(dtype).requires_grad_()
    origins = origins_around(2, 5, 30, 41)
    weight = torch.randn(2, 5, 3, 9, 8).to(dtype)
    crops = cut_crops(backend, images, origins, (9, 8), "all")
    found = torch.autograd.grad(crops, images, weight)[0]
    exact = images.detach().double().requires_grad_()
    crops64 = reference.cut_crops(exact, origins, (9, 8), "all")
    expected = torch.autograd.grad(crops64, exact, weight.double())[0]
    error = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=10 * error)


@pytest.mark.parametrize(
    ("side", "dtype"),
    [(40, torch.float32), (72, torch.float64)],  # one block per plane, and two
)
def test_bits_do_not_depend_on_the_schedule(backend: str, side: int, dtype: torch.dtype) -> None:
    saliency = random_images((2, 3, 7, 7), torch.float32)
    images = random_images((2, 1, side, side), dtype)
    origins = torch.tensor([[[-3, 5], [side - 8, side - 8]], [[4, 4], [-20, 0]]])
    grad = random_images((2, 2, 1, 16, 16), dtype)
    expected = reference.rois(saliency, images, (16, 16), 3, "all")
    expected_crops = reference.cut_crops(images, origins, (16, 16), "all")
    backward = torch.ops.diffmic_fast.cut_crops_backward.default
    first = None
    device = device_of(backend)
    for seed in seeds(backend, 50):
        schedule(backend, seed)
        found = rois(backend, saliency, images, (16, 16), 3, "all")
        assert torch.equal(found.cells, expected.cells)
        assert_same_bits(found.crops, expected.crops)
        assert_same_bits(cut_crops(backend, images, origins, (16, 16), "all"), expected_crops)
        there = (tensor.to(device) for tensor in (grad, images, origins))
        images_grad = backward(*there, [16, 16], "all", backend).cpu()
        first = images_grad if first is None else first
        assert_same_bits(images_grad, first)
    cpu = backward(grad, images, origins, [16, 16], "all", "cpu")
    torch.testing.assert_close(first, cpu, rtol=1e-5, atol=1e-5)


def test_maps_larger_than_shared_memory(backend: str) -> None:
    saliency = random_images((2, 9, 56, 61), torch.float32)
    assert _native.cuda(backend).choose_windows_workspace(2, (56, 61), (3, 2)) > 0
    expected = reference.choose_windows(saliency, (3, 2), 4)
    assert torch.equal(choose_windows(backend, saliency, (3, 2), 4), expected)


@pytest.mark.parametrize("dtype", PIXELS)
def test_planes_of_several_blocks(backend: str, dtype: torch.dtype) -> None:
    images = random_images((2, 2, 250, 263), dtype)
    there = images.to(device_of(backend))
    assert _native.cuda(backend).cut_crops_workspace(there, 3, (16, 16), False, False) > 0
    origins = torch.tensor([[[-3, 5], [240, 250], [9, 16]], [[4, 4], [20, 0], [7, 7]]])
    for view in (images, strided(images, "slice"), strided(images, "transposed")):
        found = cut_crops(backend, view, origins, (16, 16), "all")
        assert_same_bits(found, reference.cut_crops(images, origins, (16, 16), "all"))


def test_gradient_of_planes_of_several_blocks(backend: str) -> None:
    """The gradient of the fill is divided among the pixels of the minimum, over all blocks."""
    images = torch.randint(0, 4, (2, 2, 72, 75)).double().requires_grad_()
    scratch = _native.cuda(backend).cut_crops_workspace(
        images.detach().to(device_of(backend)), 3, (16, 16), False, True
    )
    assert scratch > 0
    origins = torch.tensor([[[-3, 5], [64, 70], [9, 16]], [[4, 4], [-20, 0], [7, 66]]])
    weight = torch.randn(2, 3, 2, 16, 16, dtype=torch.float64)
    crops = cut_crops(backend, images, origins, (16, 16), "all")
    expected = reference.cut_crops(images, origins, (16, 16), "all")
    found, wanted = (torch.autograd.grad(each, images, weight)[0] for each in (crops, expected))
    torch.testing.assert_close(found, wanted)


def test_a_workspace_that_is_too_small(backend: str) -> None:
    device = device_of(backend)
    images = torch.zeros(1, 1, 200, 200, device=device)
    crops = torch.empty(1, 1, 1, 4, 4, device=device)
    corners = torch.zeros(1, 1, 2, dtype=torch.int64, device=device)
    scratch = torch.zeros(5, dtype=torch.int64, device=device)
    with pytest.raises(
        ValueError, match=r"^rois\.cut_crops: zeroed workspace must have 6 elements, got 5$"
    ):
        _native.cuda(backend).cut_crops(images, corners, False, crops, scratch, 0)
