"""`rois`: kernels against the reference, bit for bit, and the reference against recorded values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cuda_backends import CUDA_BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from rois_cases import (
    INT64,
    NOT_FINITE,
    PIXELS,
    SALIENCY,
    STRIDES,
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

_C = _native.extension()

EMULATED = CUDA_BACKENDS[0]
KERNELS = ["cpu", EMULATED]
BACKENDS = ["reference", "cpu", EMULATED]

# ---- the recorded numbers --------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_windows_origins_and_crops(
    golden: Callable[[str], dict[str, Tensor]], backend: str
) -> None:
    record = golden("guidance")
    images = record["image_channel0"][:, None].expand(-1, 3, -1, -1)
    found = ops.rois(record["saliency"], images, (32, 32), 6, backend=backend)
    assert torch.equal(found.cells, record["window_index"])
    assert torch.equal(found.origins.double(), record["crop_origin"])
    assert torch.equal(found.crops, record["crops"][:, :, None].expand(-1, -1, 3, -1, -1))


def test_window_size_and_pixels_are_the_reference() -> None:
    assert ops.window_size((32, 32), (224, 224), (7, 7)) == (1, 1)
    assert ops.window_size((32, 48), (64, 64), (4, 4)) == (2, 3)
    assert ops.window_size((1, 1), (224, 224), (7, 7)) == (1, 1)
    assert ops.cell_to_pixel(torch.tensor([[[1, 2]]]), (4, 4), (10, 10)).tolist() == [[[2, 5]]]


# ---- choose_windows --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", SALIENCY)
@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize(
    ("shape", "window", "count"),
    [
        ((3, 5, 7, 7), (1, 1), 6),
        ((1, 2, 1, 1), (1, 1), 3),
        ((2, 7, 13, 9), (3, 2), 6),
        ((2, 1, 5, 8), (5, 8), 2),
        ((1, 3, 6, 33), (2, 17), 9),
        ((1, 9, 4, 5), (2, 2), 3),
    ],
)
def test_windows_equal_the_reference(
    backend: str,
    dtype: torch.dtype,
    kind: str,
    shape: tuple[int, ...],
    window: tuple[int, int],
    count: int,
) -> None:
    saliency = strided(random_images(shape, dtype), kind)
    expected = reference.choose_windows(saliency, window, count)
    assert_same_bits(ops.choose_windows(saliency, window, count, backend=backend), expected)


@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_windows_equal_the_reference_where_means_tie(backend: str, data: st.DataObject) -> None:
    """Few distinct values, so that ties, constant classes and emptied maps are common."""
    batch, classes = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 7))
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    window = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    count, levels = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    saliency = torch.randint(0, levels, (batch, classes, height, width), generator=generator) * 0.1
    expected = reference.choose_windows(saliency, window, count)
    assert torch.equal(ops.choose_windows(saliency, window, count, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_class_adds_nothing(backend: str) -> None:
    saliency = torch.full((1, 2, 3, 3), 5.0)
    saliency[0, 1, 2, 1] = 6.0
    cells = ops.choose_windows(saliency, (1, 1), 3, backend=backend)
    assert cells.tolist() == [[[2, 1], [0, 0], [0, 0]]]


@pytest.mark.parametrize("backend", KERNELS)
def test_half_subnormals_are_widened_exactly(backend: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    finite = values[values.isfinite()]
    saliency = finite[: len(finite) // 16 * 16].reshape(-1, 1, 4, 4)
    if backend == "cuda-emulated":
        saliency = saliency[::80]  # 50 blocks instead of 4,000
    expected = reference.choose_windows(saliency, (2, 2), 4)
    assert torch.equal(ops.choose_windows(saliency, (2, 2), 4, backend=backend), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("dtype", "value"), NOT_FINITE)
def test_saliency_that_is_not_finite_names_its_image(
    backend: str, dtype: torch.dtype, value: float
) -> None:
    with pytest.raises(ValueError, match=r"^rois\.choose_windows: saliency of image 17 is not fin"):
        ops.choose_windows(not_finite_saliency(dtype, value), (1, 1), 2, backend=backend)


def test_windows_do_not_depend_on_threads() -> None:
    saliency = random_images((301, 3, 14, 14), torch.float32)
    expected = reference.choose_windows(saliency, (2, 2), 6)
    for threads in (1, 2, 3, 7):
        cells = torch.zeros(301, 6, 2, dtype=torch.int64)
        _C.choose_windows(saliency, (2, 2), cells, threads)
        assert torch.equal(cells, expected)
    saliency[[299, 4]] = torch.nan
    with pytest.raises(ValueError, match="image 4 "):
        _C.choose_windows(saliency, (2, 2), cells, 3)


# ---- cut_crops -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", PIXELS)
@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("channels", ["first", "all"])
def test_crops_equal_the_reference(
    backend: str, dtype: torch.dtype, kind: str, channels: Any
) -> None:
    sizes = (
        ((3, 2, 17, 13), (5, 4)),
        ((2, 3, 9, 33), (9, 33)),
        ((1, 1, 3, 2), (7, 5)),
        ((2, 2, 12, 40), (3, 16)),  # rows of whole pieces of 16 bytes
    )
    for shape, size in sizes:
        images = strided(random_images(shape, dtype), kind)
        origins = origins_around(shape[0], 9, *shape[2:])
        expected = reference.cut_crops(images, origins, size, channels)
        found = ops.cut_crops(images, origins, size, channels, backend=backend)
        assert_same_bits(found, expected)


@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_crops_of_any_size_and_place_equal_the_reference(backend: str, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, most)) for most in (3, 4, 9, 9))
    count = data.draw(st.integers(0, 4))
    size = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    place = st.one_of(st.integers(-15, 15), st.integers(INT64.min, INT64.max))
    origins = torch.tensor(
        data.draw(st.lists(place, min_size=2 * count * shape[0], max_size=2 * count * shape[0])),
        dtype=torch.int64,
    ).reshape(shape[0], count, 2)
    dtype, kind = data.draw(st.sampled_from(PIXELS)), data.draw(st.sampled_from(STRIDES))
    channels: Any = data.draw(st.sampled_from(["first", "all"]))
    images = strided(random_images(shape, dtype, seed=sum(shape)), kind)
    expected = reference.cut_crops(images, origins, size, channels)
    if count == 0:
        assert ops.cut_crops(images, origins, size, channels, backend=backend).shape[1] == 0
    else:
        found = ops.cut_crops(images, origins, size, channels, backend=backend)
        assert_same_bits(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_beyond_the_edges(backend: str) -> None:
    """The part inside the image is aligned to the lower right of the crop, at every edge."""
    image = torch.arange(1.0, 13.0).reshape(1, 1, 3, 4)
    origins = torch.tensor([[[-1, -1], [2, 3], [0, 0], [3, 0], [-2, 0]]])
    crops = ops.cut_crops(image, origins, (2, 2), "all", backend=backend)[0, :, 0]
    assert crops.tolist() == [
        [[1, 1], [1, 1]],
        [[1, 1], [1, 12]],
        [[1, 2], [5, 6]],
        [[1, 1], [1, 1]],
        [[1, 1], [1, 1]],
    ]


@pytest.mark.parametrize("near", [INT64.max, INT64.max - 5, INT64.min, INT64.min + 5])
@pytest.mark.parametrize("backend", KERNELS)
def test_origins_at_the_limits_of_int64(backend: str, near: int) -> None:
    images = random_images((1, 1, 8, 8), torch.float32)
    origins = torch.tensor([[[near, 0], [0, near], [near, near], [2, 3]]])
    expected = reference.cut_crops(images, origins, (4, 4))
    assert_same_bits(ops.cut_crops(images, origins, (4, 4), backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_makes_the_minimum_nan(dtype: torch.dtype, backend: str) -> None:
    images = random_images((2, 1, 6, 6), dtype)
    images[0, 0, 5, 5], images[1, 0, 5, 5] = torch.nan, torch.inf
    images[1, 0, 5, 4] = -torch.inf
    origins = torch.tensor([[[-1, 0], [0, 0]]] * 2)
    crops = ops.cut_crops(images, origins, (2, 2), "all", backend=backend)
    assert crops[0, 0, 0, 0].isnan().all()
    assert torch.equal(crops[:, 1], images[:, :, :2, :2])
    assert torch.equal(crops[1, 0, 0, 0], torch.full((2,), -torch.inf, dtype=dtype))
    # A negative NaN is one too.
    images[0, 0, 5, 5] = -images[0, 0, 5, 5]
    assert ops.cut_crops(images, origins, (2, 2), "all", backend=backend)[0, 0, 0, 0].isnan().all()


class OnDevice:
    """A NumPy array as a GPU library exports one: NumPy rejects the stream argument."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, *, stream: int, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def cut_into(backend: str, images: Any, origins: Any, crops: Tensor) -> None:
    """The kernel itself, on strides that a tensor cannot have."""
    if backend == "cpu":
        _C.cut_crops(images, origins, False, crops, 2)
        return
    kernels = _native.cuda(backend)
    images, origins = OnDevice(images), OnDevice(origins)
    needed = kernels.cut_crops_workspace(images, crops.shape[1], crops.shape[3:], False, False)
    scratch = torch.zeros(needed, dtype=torch.int64)
    kernels.cut_crops(images, origins, False, crops, scratch, 0)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.uint8])
def test_numpy_strides_of_every_sign(backend: str, dtype: torch.dtype) -> None:
    base = random_images((2, 3, 11, 10), dtype).numpy()
    origins = origins_around(2, 5, 11, 10)
    for array in (
        base[:, ::-1, ::-1, ::-1],
        base[::-1, :, :, ::-2],
        np.broadcast_to(base[:1, :, :1, :], (2, 3, 11, 10)),
        np.broadcast_to(base[:, :, :, :1], (2, 3, 11, 10)),
    ):
        crops = torch.empty(2, 5, 3, 4, 3, dtype=dtype)
        turned = origins.numpy()[:, ::-1, :]
        cut_into(backend, array, turned, crops)
        expected = reference.cut_crops(
            torch.from_numpy(np.ascontiguousarray(array)), origins.flip(1), (4, 3), "all"
        )
        assert_same_bits(crops, expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", PIXELS)
def test_only_outputs_are_written(backend: str, dtype: torch.dtype) -> None:
    images = random_images((2, 3, 9, 8), dtype)
    origins = origins_around(2, 4, 9, 8)
    buffer = torch.full((2 * 4 * 3 * 5 * 7 + 6,), 42, dtype=dtype)
    crops = buffer[3:-3].view(2, 4, 3, 5, 7)
    cut_into(backend, images, origins, crops)
    assert_same_bits(crops, reference.cut_crops(images, origins, (5, 7), "all"))
    assert (buffer[:3] == 42).all() and (buffer[-3:] == 42).all()

    cells_buffer = torch.full((2 * 6 * 2 + 6,), -7)
    cells = cells_buffer[3:-3].view(2, 6, 2)
    saliency = random_images((2, 3, 5, 5), torch.float32)
    if backend == "cpu":
        _C.choose_windows(saliency, (2, 1), cells, 2)
    else:
        _native.cuda(backend).choose_windows(saliency, (2, 1), cells, torch.empty(0), 0)
    assert torch.equal(cells, reference.choose_windows(saliency, (2, 1), 6))
    assert (cells_buffer[:3] == -7).all() and (cells_buffer[-3:] == -7).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_inputs_are_not_changed(backend: str) -> None:
    images, saliency = (random_images((3, 2, 8, 8), torch.float32, seed) for seed in (1, 2))
    origins = origins_around(3, 4, 8, 8)
    before = images.clone(), saliency.clone(), origins.clone()
    ops.rois(saliency, images, (3, 3), 4, backend=backend)
    ops.cut_crops(images, origins, (3, 3), backend=backend)
    for now, then in zip((images, saliency, origins), before, strict=True):
        assert torch.equal(now, then)


def test_crops_do_not_depend_on_threads() -> None:
    images = random_images((24, 3, 224, 260), torch.float32)  # enough for a thread or four
    origins = origins_around(24, 6, 224, 260)
    expected = reference.cut_crops(images, origins, (64, 64), "all")
    for threads in (1, 2, 3, 50):
        crops = torch.empty_like(expected)
        _C.cut_crops(images, origins, False, crops, threads)
        assert_same_bits(crops, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend: str) -> None:
    found = ops.rois(torch.empty(0, 2, 7, 7), torch.empty(0, 3, 32, 32), (8, 8), 6, backend=backend)
    assert found.cells.shape == (0, 6, 2) and found.cells.dtype == torch.int64
    assert found.crops.shape == (0, 6, 3, 8, 8)


def test_a_lazily_negated_image_is_read_with_its_sign() -> None:
    images = torch.randn(1, 1, 5, 5, dtype=torch.complex64).conj().imag
    assert images.is_neg()
    origins = torch.tensor([[[1, 1]]])
    crops = ops.cut_crops(images, origins, (2, 2), "all", backend="cpu")
    assert torch.equal(crops[0, 0, 0], images.resolve_neg()[0, 0, 1:3, 1:3])


# ---- bad arguments ---------------------------------------------------------------------------

IMAGES, CORNERS = torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 2, dtype=torch.int64)
MAPS = torch.zeros(2, 3, 5, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.choose_windows(MAPS[0], (1, 1), 2), ValueError, r"saliency must be \[B, C"),
        (lambda: ops.choose_windows(MAPS.long(), (1, 1), 2), TypeError, "saliency must be one of"),
        (lambda: ops.choose_windows(MAPS[:, :0], (1, 1), 2), ValueError, "at least one class"),
        (lambda: ops.choose_windows(MAPS, (6, 1), 2), ValueError, r"window must lie .*\(6, 1\)"),
        (lambda: ops.choose_windows(MAPS, (0, 1), 2), ValueError, "window must be"),
        (lambda: ops.choose_windows(MAPS, (1, 1), 0), ValueError, "count must be at least 1"),
        (lambda: ops.choose_windows(None, (1, 1), 2), TypeError, "saliency must be a torch.Tensor"),
        (lambda: ops.cut_crops(IMAGES[0], CORNERS, (2, 2)), ValueError, r"images must be \[B, Ch"),
        (lambda: ops.cut_crops(IMAGES.int(), CORNERS, (2, 2)), TypeError, "images must be one of"),
        (lambda: ops.cut_crops(IMAGES, CORNERS.int(), (2, 2)), TypeError, "origins must be int64"),
        (lambda: ops.cut_crops(IMAGES, CORNERS[:1], (2, 2)), ValueError, "origins must be .*B=2"),
        (lambda: ops.cut_crops(IMAGES, CORNERS, (0, 2)), ValueError, "size must be"),
        (
            lambda: ops.cut_crops(IMAGES[..., :0], CORNERS, (2, 2)),
            ValueError,
            "at least one channel and one pi",
        ),
        (
            lambda: ops.cut_crops(IMAGES, CORNERS, (2, 2), "second"),  # type: ignore[arg-type]
            ValueError,
            "channels must be 'first' or 'all', got 'second'",
        ),
        (
            lambda: ops.cut_crops(IMAGES, CORNERS.to("meta"), (2, 2)),
            ValueError,
            "origins must be on cpu",
        ),
        (lambda: ops.rois(MAPS, IMAGES[:1], (2, 2), 2), ValueError, "images must be .*B=2"),
        (lambda: ops.rois(MAPS, IMAGES, (2, 0), 2), ValueError, "crop must be"),
        (
            lambda: ops.cut_crops(IMAGES, CORNERS, (2, 2), backend="cuda"),
            RuntimeError,
            "it takes tensors on a GPU, got cpu",
        ),
        (lambda: ops.rois(MAPS, IMAGES, (2, 2), 2, backend="x"), ValueError, "backend must be"),
    ],
)
def test_invalid_arguments_raise(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^rois.*" + message):
        call()


# ---- as operators of torch -------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    saliency, images = random_images((2, 3, 5, 5), torch.float32), torch.randn(2, 3, 12, 11)
    origins = origins_around(2, 4, 12, 11)
    choose = torch.ops.diffmic_fast.choose_windows.default
    cut = torch.ops.diffmic_fast.cut_crops.default
    both = torch.ops.diffmic_fast.rois.default
    torch.library.opcheck(choose, (saliency, [2, 1], 3, backend))
    for needs_grad in (False, True):
        leaf = images.clone().requires_grad_(needs_grad)
        torch.library.opcheck(both, (saliency, leaf, [2, 1], 3, [5, 4], "first", backend))
    for channels in ("first", "all"):
        for needs_grad in (False, True):
            leaf = images.clone().requires_grad_(needs_grad)
            torch.library.opcheck(cut, (leaf, origins, [5, 4], channels, backend))


@pytest.mark.parametrize("channels", ["first", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(channels: Any, backend: str) -> None:
    images = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    origins = origins_around(2, 3, 5, 6)
    assert torch.autograd.gradcheck(
        lambda x: ops.cut_crops(x, origins, (3, 4), channels, backend=backend),
        (images,),
        fast_mode=backend == "cuda-emulated",  # a few directions instead of every entry
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", ["first", "all"])
@settings(deadline=None)
@given(data=st.data())
def test_one_call_equals_both_steps(data: st.DataObject, channels: Any, backend: str) -> None:
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, count = integers(0, 3), integers(1, 4)
    grid, image = (integers(1, 9), integers(1, 9)), (integers(1, 40), integers(1, 40))
    crop = (integers(1, image[0] + 3), integers(1, image[1] + 3))
    window = ops.window_size(crop, image, grid)
    saliency = random_images((batch, 2, *grid), torch.float32, integers(0, 99))
    images = torch.randn(batch, 2, *image, dtype=torch.float64, requires_grad=True)
    if window[0] > grid[0] or window[1] > grid[1]:
        with pytest.raises(ValueError, match="window must lie in the saliency map"):
            ops.rois(saliency, images, crop, count, channels, backend=backend)
        return
    found = ops.rois(saliency, images, crop, count, channels, backend=backend)
    assert torch.equal(found.cells, reference.choose_windows(saliency, window, count))
    assert torch.equal(found.origins, ops.cell_to_pixel(found.cells, grid, image))
    expected = reference.cut_crops(images, found.origins, crop, channels)
    assert torch.equal(found.crops, expected)
    if not batch:
        return
    weight = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((c * weight).sum(), images)[0] for c in (found.crops, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("channels", ["first", "all"])
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_gradient_equals_the_reference(backend: str, channels: Any, kind: str) -> None:
    """Also where several pixels attain the minimum."""
    images = strided(torch.randint(0, 4, (3, 2, 9, 8)).double(), kind).requires_grad_()
    origins = origins_around(3, 7, 9, 8)
    crops = ops.cut_crops(images, origins, (4, 5), channels, backend=backend)
    weight = torch.randn_like(crops)
    found = torch.autograd.grad((crops * weight).sum(), images)[0]
    expected = torch.autograd.grad(
        (reference.cut_crops(images, origins, (4, 5), channels) * weight).sum(), images
    )[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_compiles_as_one_graph_for_any_batch() -> None:
    def scores(saliency: Tensor, images: Tensor) -> Tensor:
        found = ops.rois(saliency * 2, images, (6, 5), 3)
        return (found.crops.sin() + found.origins.sum()).sum(dim=(1, 2, 3, 4))

    compiled = torch.compile(scores, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 3, 7):
        saliency = random_images((batch, 2, 7, 7), torch.float32, batch)
        images = random_images((batch, 3, 20, 21), torch.float32, batch).requires_grad_()
        copy = images.detach().clone().requires_grad_()
        found, expected = compiled(saliency, images), scores(saliency, copy)
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        expected.sum().backward()
        assert images.grad is not None and copy.grad is not None
        torch.testing.assert_close(images.grad, copy.grad)


def test_meta_tensors() -> None:
    found = ops.rois(
        torch.empty(2, 3, 7, 7, device="meta"), torch.empty(2, 4, 32, 32, device="meta"), (8, 8), 5
    )
    assert found.cells.shape == (2, 5, 2) and found.crops.shape == (2, 5, 3, 8, 8)
