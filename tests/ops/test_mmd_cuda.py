"""`mmd` in CUDA: numerical results, schedules, strides, and errors that only the device can detect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_backends import CUDA_BACKENDS, device_of, schedule, seeds
from mmd_cases import BANDWIDTHS, TOLERANCE, assert_close, in_a_buffer, rows, value_and_gradients
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.ops import mmd as operations
from diffmic_fast.ops.mmd import kernel_matrix, mmd
from diffmic_fast.reference import mmd as reference

pytestmark = pytest.mark.parametrize("backend", CUDA_BACKENDS)

DTYPES = [torch.float32, torch.float64]
# One tile of 64 rows, two tiles of short rows, tiles shared by several blocks; rows of one stage of 32
# (float64: 16) elements, of several, and of more than 128 elements.
SHAPES = [(1, 1, 1), (3, 7, 2), (32, 32, 5), (31, 33, 40), (65, 63, 16), (129, 1, 7), (97, 131, 33),
          (20, 50, 133)]  # fmt: skip


def on(backend: str, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device_of(backend)) for tensor in tensors]


def assert_near(found: Any, expected: Any, dtype: torch.dtype, bandwidth: Any = None) -> None:
    assert_close([value.cpu() for value in found], expected, dtype, bandwidth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    n, m, d = shape
    x, y = rows(n, d, dtype), rows(m, d, dtype, seed=1) + 0.5
    weights = rows(n, 1, dtype)[:, 0].abs() * 1e3, rows(m, 1, dtype)[:, 0].abs()
    there = on(backend, x, y, *weights)
    cases: list[tuple[Any, str, bool]] = [(None, "biased", False), ([0.5, 2.0], "biased", True)]
    if min(n, m) > 1:
        cases.append((3.0, "unbiased", True))
    for bandwidth, estimator, weighted in cases:
        names = ("x_weights", "y_weights") if weighted else ()
        found = value_and_gradients(
            mmd, *there[:2], bandwidth=bandwidth, estimator=estimator, backend=backend,
            **dict(zip(names, there[2:], strict=False)),
        )  # fmt: skip
        doubles = {key: w.double() for key, w in zip(names, weights, strict=False)}
        expected = value_and_gradients(
            reference.mmd, x.double(), y.double(), bandwidth=bandwidth, estimator=estimator,
            **doubles,
        )  # fmt: skip
        assert_near(found, expected, dtype, bandwidth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
@pytest.mark.parametrize("shape", [(3, 7, 2), (70, 140, 9), (67, 65, 40)])
def test_kernel_matrix_and_its_gradients(
    shape: tuple[int, ...], bandwidth: Any, dtype: torch.dtype, backend: str
) -> None:
    n, m, d = shape
    x, y = rows(n, d, dtype), rows(m, d, dtype, seed=1)
    weight = rows(m, n, dtype, seed=2).T
    doubles = [x.double().clone().requires_grad_(), y.double().clone().requires_grad_()]
    wanted = reference.kernel_matrix(*doubles, bandwidth=bandwidth)
    expected = torch.autograd.grad((wanted * weight.double()).sum(), doubles)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in on(backend, x, y)]
    kernel = kernel_matrix(*leaves, bandwidth=bandwidth, backend=backend)
    found = torch.autograd.grad((kernel * weight.to(kernel.device)).sum(), leaves)
    # Rounding may make another distance the median.
    error = TOLERANCE[dtype] * (10 if bandwidth == "median" else 1)
    assert float((kernel.detach().cpu().double() - wanted.detach()).abs().max()) <= error
    for got, want in zip(found, expected, strict=True):
        assert float((got.cpu().double() - want).abs().max()) <= 10 * error * float(
            want.abs().max()
        )


@pytest.mark.parametrize("d", [2, 34])
def test_several_tiles_per_block(d: int, backend: str) -> None:
    """At least nine tiles of 64 columns, shared by at most eight blocks."""
    x, y = rows(3, d, torch.float32), rows(574, d, torch.float32, seed=1)
    weight = rows(3, 574, torch.float32, seed=2)

    def both(module: Any, x: Tensor, y: Tensor, weight: Tensor, **how: str) -> list[Tensor]:
        x = x.clone().requires_grad_()
        value = module.mmd(x, y, bandwidth=d**0.5, **how)
        kernel = (module.kernel_matrix(x, y, bandwidth=d**0.5, **how) * weight).sum()
        gradients = [torch.autograd.grad(result, x)[0] for result in (value, kernel)]
        return [value.detach(), *gradients]

    expected = both(reference, x.double(), y.double(), weight.double())
    found = both(operations, *on(backend, x, y, weight), backend=backend)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["x", "y", "neither"])
@pytest.mark.parametrize("shape", [(40, 30, 5), (90, 70, 33), (140, 90, 6)])
def test_the_value_does_not_depend_on_required_gradients(
    shape: tuple[int, ...], which: str, backend: str
) -> None:
    n, m, d = shape
    x, y = on(backend, rows(n, d, torch.float32), rows(m, d, torch.float32, seed=1))
    expected = value_and_gradients(mmd, x, y, backend=backend)
    u, v = x.clone().requires_grad_(which == "x"), y.clone().requires_grad_(which == "y")
    value = mmd(u, v, backend=backend)
    assert torch.equal(value.detach(), expected[0])
    if which != "neither":
        (gradient,) = torch.autograd.grad(value, u if which == "x" else v)
        assert torch.equal(gradient, expected[1 if which == "x" else 2])
        weight = torch.ones(n, m, device=x.device)
        wanted = torch.autograd.grad(
            kernel_matrix(u, v, backend=backend), u if which == "x" else v, weight
        )
        both = value_and_gradients(lambda a, b: kernel_matrix(a, b, backend=backend).sum(), x, y)
        assert torch.equal(wanted[0], both[1 if which == "x" else 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["contiguous", "transposed", "slice", "spread"])
def test_strides_and_surrounding_memory(kind: str, dtype: torch.dtype, backend: str) -> None:
    x, y = on(backend, rows(35, 36, dtype), rows(70, 36, dtype, seed=1))
    u, v = in_a_buffer(x, kind), in_a_buffer(y, kind)
    weights = on(backend, rows(70, 1, dtype)[:, 0].abs())[0][::2]
    kernels = _native.cuda(backend)
    scratch = x.new_empty(
        kernels.mmd_workspace(35, 70, 36, x.element_size(), True), dtype=torch.float64
    )
    results = []
    for a, b, w in ((x, y, weights.contiguous()), (u, v, weights)):
        buffer = x.new_full((35 * 36 + 70 * 36 + 7,), 42.0)
        outputs = buffer[3:4].view(()), buffer[5:1265].view(35, 36), buffer[1266:3786].view(70, 36)
        kernels.mmd(a, b, w, None, [0.1], None, False, *outputs, scratch, 0)
        assert (buffer[[0, 1, 2, 4, 1265, -1]] == 42).all()
        results.append(buffer)
    assert torch.equal(*results) and torch.equal(u, x) and torch.equal(v, y)
    matrices = [x.new_empty(35, 70) for _ in range(2)]
    kernels.mmd_kernel_matrix(x, y, [0.1], None, matrices[0], 0)
    kernels.mmd_kernel_matrix(u, v, [0.1], None, matrices[1], 0)
    assert torch.equal(*matrices)
    medians = [torch.ops.diffmic_fast.mmd_median(*pair, backend) for pair in ((x, y), (u, v))]
    assert torch.equal(*medians)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "d"), [((1, 1), 3), ((5, 6), 3), ((60, 68), 3), ((150, 90), 40)])
def test_the_median_is_one_of_the_distances(
    shape: tuple[int, int], d: int, dtype: torch.dtype, backend: str
) -> None:
    """Integers, whose distances are exact: one launch and several, with ties."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-9, 9, (n, d), generator=generator).to(dtype) for n in shape)
    found = torch.ops.diffmic_fast.mmd_median(*on(backend, x, y), backend)
    assert float(found) == reference.median_squared_distance(x, y)


@pytest.mark.skipif("avx2" not in _native.extension().mmd_instruction_sets(), reason="no avx2")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [5, 33, 133, 300])
def test_the_median_has_the_bits_of_the_cpu(d: int, dtype: torch.dtype, backend: str) -> None:
    x, y = rows(40, d, dtype), rows(31, d, dtype, seed=1)
    found = torch.ops.diffmic_fast.mmd_median(*on(backend, x, y), backend)
    cpu = _native.extension().mmd_median_squared_distance(x, y, 1, "avx2")
    assert float(found) == cpu


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 50), (torch.float64, 5)])
@pytest.mark.parametrize("shape", [(9, 6, 3), (66, 1, 33)])
def test_bits_do_not_depend_on_the_schedule(
    shape: tuple[int, ...], dtype: torch.dtype, count: int, backend: str
) -> None:
    """One launch, and blocks that share rows, with one and two stages of elements."""
    n, m, d = shape
    x, y = on(backend, rows(n, d, dtype), rows(m, d, dtype, seed=1))
    weights = torch.arange(1.0, n + 1, dtype=dtype, device=x.device)
    first: list[Tensor] = []
    for seed in seeds(backend, count):
        schedule(backend, seed)
        found = [
            *value_and_gradients(mmd, x, y, bandwidth="median", x_weights=weights, backend=backend),
            *value_and_gradients(lambda *a: (kernel_matrix(*a, backend=backend) ** 2).sum(), x, y),
        ]
        first = first or found
        assert all(map(torch.equal, found, first))
    schedule(backend, 0)


def test_the_median_does_not_depend_on_the_schedule(backend: str) -> None:
    x, y = on(backend, rows(128, 1, torch.float32), rows(1, 1, torch.float32, seed=1))
    expected = float(torch.pdist(torch.cat([x, y])).square().median())
    for seed in seeds(backend, 50):
        schedule(backend, seed)
        found = torch.ops.diffmic_fast.mmd_median(x, y, backend)
        assert float(found) == pytest.approx(expected, rel=1e-6)
    schedule(backend, 0)


def test_small_calls_need_no_workspace(backend: str) -> None:
    kernels = _native.cuda(backend)
    assert kernels.mmd_workspace(64, 64, 32, 4, True) == 0
    assert kernels.mmd_workspace(32, 32, 4096, 8, True) == 0
    assert kernels.mmd_median_workspace(64, 64, 4) == 0
    # O((n + m) d): at most eight partial sums, pairs of numbers, per element.
    for n, d in ((65, 32), (1000, 5), (20000, 512)):
        assert 0 < kernels.mmd_workspace(n, n, d, 4, True) <= 2 * n * d * 8 + 3 * 8 * 1024


def test_equal_rows_distant_rows_and_small_discrepancies(backend: str) -> None:
    (x,) = on(backend, rows(70, 37, torch.float32) * 100)
    kernel = kernel_matrix(x, x.clone(), bandwidth=0.01, backend=backend)
    assert torch.equal(kernel.cpu(), torch.eye(70))
    found = value_and_gradients(mmd, x, x.clone(), bandwidth=0.01, backend=backend)
    assert all(not tensor.any() for tensor in found)
    u, v = (rows(40, 16, torch.float32, seed) * 0.01 + 1000 for seed in (0, 1))
    found = value_and_gradients(mmd, *on(backend, u, v), bandwidth=0.05, backend=backend)
    expected = value_and_gradients(reference.mmd, u.double(), v.double(), bandwidth=0.05)
    assert_near(found, expected, torch.float32, 0.05)
    u, v = rows(64, 64, torch.float32), rows(64, 64, torch.float32, seed=1)
    small = reference.mmd(u.double(), v.double(), bandwidth=1e4)
    value = mmd(*on(backend, u, v), bandwidth=1e4, backend=backend)
    assert 0 < float(small) < 1e-7 and float(value) == pytest.approx(float(small), rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "bound", "last"), [(torch.float32, 3e-7, 13.0), (torch.float64, 1e-15, 37.0)]
)
def test_accuracy_of_the_exponential(
    dtype: torch.dtype, bound: float, last: float, backend: str
) -> None:
    """For arguments x^2 / 2 that are exact."""
    (x,) = on(backend, torch.arange(0, last, 1 / 32, dtype=dtype)[:, None])
    zero = x.new_zeros(1, 1)
    kernel = kernel_matrix(x, zero, bandwidth=1.0, backend=backend).double()
    expected = torch.exp(-x.double().square() / 2)
    assert 0 < float(((kernel - expected) / expected).abs().max()) < bound
    assert not kernel_matrix(x + 1e4, zero, bandwidth=1.0, backend=backend).any()


def test_invalid_weights_and_medians_give_nan(backend: str) -> None:
    x, y = on(backend, rows(40, 5, torch.float32), rows(30, 5, torch.float32, seed=1))
    equal = torch.zeros_like(x)
    ones, none = torch.ones(40, device=x.device), torch.zeros(40, device=x.device)
    one, negative = none.clone(), ones.clone()
    one[7], negative[7] = 1, -1
    found = [value_and_gradients(mmd, equal, equal, bandwidth="median", backend=backend)]
    for weights, estimator in ((none, "biased"), (negative, "biased"), (one, "unbiased")):
        found.append(
            value_and_gradients(mmd, x, y, x_weights=weights, estimator=estimator, backend=backend)
        )
    for value, *gradients in found:
        assert value.isnan() and all(gradient.isnan().all() for gradient in gradients)
    assert kernel_matrix(equal, equal, bandwidth="median", backend=backend).isnan().all()
    assert mmd(x, y, x_weights=one, backend=backend).isfinite()


def test_the_extension_validates_its_arguments(backend: str) -> None:
    (x,) = on(backend, torch.zeros(200, 5))
    kernels = _native.cuda(backend)
    value, scratch = x.new_empty(()), x.new_empty(5, dtype=torch.float64)
    matrix = x.new_empty(200, 200)
    with pytest.raises(ValueError, match=r"^mmd: workspace must have \d+ elements, got 5$"):
        kernels.mmd(x, x, None, None, [1.0], None, False, value, None, None, scratch, 0)
    wide = x.new_empty(100_001, dtype=torch.float64)[1:]
    with pytest.raises(ValueError, match="workspace must begin at a multiple of 16 bytes"):
        kernels.mmd(x, x, None, None, [1.0], None, False, value, None, None, wide, 0)
    with pytest.raises(ValueError, match="scales must be at most 256 on a GPU, got 257"):
        kernels.mmd_kernel_matrix(x, x, [1.0] * 257, None, matrix, 0)
    with pytest.raises(ValueError, match="scales must not be empty"):
        kernels.mmd_kernel_matrix(x, x, [], None, matrix, 0)
    with pytest.raises(ValueError, match=r"mmd\.kernel_matrix: kernel must have shape"):
        kernels.mmd_kernel_matrix(x, x, [1.0], None, matrix[:7], 0)
    with pytest.raises(ValueError, match="mmd: y must have shape"):
        kernels.mmd(x, x[:, :4], None, None, [1.0], None, False, value, None, None, scratch, 0)
    with pytest.raises(ValueError, match=r"mmd.median_.*: workspace must have \d+ elements"):
        kernels.mmd_median_squared_distance(x, x, scratch[0], scratch.long(), 0)
