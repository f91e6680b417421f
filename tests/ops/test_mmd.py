"""`mmd` against recorded values and its reference in float64."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from cuda_backends import CUDA_BACKENDS
from mmd_cases import BANDWIDTHS, TOLERANCE, assert_close, in_a_buffer, rows, value_and_gradients
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.ops.mmd import kernel_matrix, mmd
from diffmic_fast.reference import mmd as reference

_C = _native.extension()
ISAS = _C.mmd_instruction_sets()
BACKENDS = ["reference", "cpu", CUDA_BACKENDS[0]]
SHAPES = [
    *((1, 1, 1), (3, 7, 2), (32, 32, 5), (129, 1, 7), (97, 131, 33), (100, 140, 129)),
    *((385, 300, 3), (490, 300, 10), (101, 50, 230)),  # 9 and 10 blocks of 96, 5 of 48
]


def run_kernel(
    x: Tensor, y: Tensor, scales: list[float], *, unbiased: bool = False, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    value, gradients = x.new_empty(()), [r.new_full(r.shape, torch.nan) for r in (x, y)]
    _C.mmd(x, y, None, None, scales, None, unbiased, value, *gradients, **options)
    return value, *gradients


# ---- the recorded numbers, and the definition ------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", range(4))
def test_recorded_values_and_gradients(golden: Any, pair: int, backend: str) -> None:
    data = {key[2:]: value for key, value in golden("mmd").items() if key.startswith(f"{pair}/")}
    found = value_and_gradients(mmd, data["x"], data["y"], backend=backend)
    torch.testing.assert_close(found[0], data["mmd"], rtol=1e-5, atol=1e-5)
    kernel = kernel_matrix(data["x"], data["y"], backend=backend)
    torch.testing.assert_close(kernel, data["k_xy"], rtol=1e-5, atol=1e-5)
    for gradient, name in zip(found[1:], ("grad_x", "grad_y"), strict=True):
        scale = data[name].abs().max()
        assert float((gradient - data[name]).abs().max() / scale) < 1e-4


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_equals_the_formula(backend: str, bandwidth: Any, estimator: str) -> None:
    x, y = rows(4, 3), rows(5, 3, seed=1)
    z = torch.cat([x, y])
    if bandwidth == "median":
        squares = sorted(float((z[i] - z[j]).square().sum()) for i in range(9) for j in range(i))
        scales = [1 / (2 * squares[(36 - 1) // 2])]
    elif bandwidth is None:
        scales = [1 / 9]
    else:
        scales = [0.5 / b**2 for b in (bandwidth if isinstance(bandwidth, list) else [bandwidth])]
    p, q = torch.tensor([1.0, 0.0, 2.0, 0.5]), torch.tensor([0.25, 1.0, 1.0, 3.0, 0.5])

    def mean(a: Tensor, b: Tensor, wa: Tensor, wb: Tensor, skip: bool) -> Any:
        total, weight = 0.0, 0.0
        for i in range(len(a)):
            for j in range(len(b)):
                if skip and i == j:
                    continue
                kernel = sum(torch.exp(-c * (a[i] - b[j]).square().sum()) for c in scales)
                total += float(wa[i] * wb[j] * kernel) / len(scales)
                weight += float(wa[i] * wb[j])
        return total / weight

    skip = estimator == "unbiased"
    expected = mean(x, x, p, p, skip) + mean(y, y, q, q, skip) - 2 * mean(x, y, p, q, False)
    found = mmd(
        x,
        y,
        bandwidth=bandwidth,
        estimator=estimator,
        x_weights=p.double(),
        y_weights=q.double(),
        backend=backend,
    )
    assert float(found) == pytest.approx(expected, rel=1e-12, abs=1e-14)


# ---- the kernel ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], bandwidth: Any, dtype: torch.dtype) -> None:
    n, m, d = shape
    x, y = rows(n, d, dtype), rows(m, d, dtype, seed=1) + 0.5
    if bandwidth == "median":  # the same one for both: half a rounding may choose another pair
        bandwidth = reference.median_squared_distance(x.double(), y.double()) ** 0.5
    weights = {
        "x_weights": rows(n, 1, dtype)[:, 0].abs(),
        "y_weights": rows(m, 1, dtype)[:, 0].abs(),
    }
    for estimator in ("biased", "unbiased"):
        if estimator == "unbiased" and min(n, m) < 2:
            continue
        for options in ({}, weights):
            found = value_and_gradients(
                mmd, x, y, bandwidth=bandwidth, estimator=estimator, backend="cpu", **options
            )
            doubles = {key: value.double() for key, value in options.items()}
            expected = value_and_gradients(
                reference.mmd, x.double(), y.double(), bandwidth=bandwidth, estimator=estimator,
                **doubles,
            )  # fmt: skip
            assert_close(found, expected, dtype, bandwidth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scales", [[1 / 33**2], [0.01, 0.3]])
def test_every_instruction_set(isa: str, scales: list[float], dtype: torch.dtype) -> None:
    x, y = rows(97, 33, dtype), rows(131, 33, dtype, seed=1) + 0.5
    bandwidth = [(2 * scale) ** -0.5 for scale in scales]
    found = run_kernel(x, y, scales, isa=isa)
    expected = value_and_gradients(reference.mmd, x.double(), y.double(), bandwidth=bandwidth)
    assert_close(found, expected, dtype, bandwidth)
    kernel = x.new_empty((97, 131))
    _C.mmd_kernel_matrix(x, y, scales, None, kernel, isa=isa)
    wanted = reference.kernel_matrix(x.double(), y.double(), bandwidth=bandwidth)
    assert float((kernel.double() - wanted).abs().max()) <= TOLERANCE[dtype]
    squares = torch.pdist(torch.cat([x, y]).double()).square()
    median = _C.mmd_median_squared_distance(x, y, isa=isa)
    assert median == pytest.approx(float(squares.median()), rel=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("dtype", "bound", "last"), [(torch.float32, 3e-7, 13.0), (torch.float64, 1e-15, 37.0)]
)
def test_the_exponential(isa: str, dtype: torch.dtype, bound: float, last: float) -> None:
    """Of arguments x^2 / 2 without rounding errors of their own."""
    x = torch.arange(0, last, 1 / 64, dtype=dtype)[:, None]
    kernel = x.new_empty((len(x), 1))
    _C.mmd_kernel_matrix(x, x.new_zeros(1, 1), [0.5], None, kernel, isa=isa)
    expected = torch.exp(-x.double().square() / 2)
    error = ((kernel.double() - expected) / expected).abs()
    assert 0 < float(error.max()) < bound
    _C.mmd_kernel_matrix(x + 1e4, x.new_zeros(1, 1), [0.5], None, kernel, isa=isa)
    assert not kernel.any()


@pytest.mark.parametrize("kind", ["contiguous", "transposed", "slice", "spread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strides_and_surroundings(kind: str, dtype: torch.dtype) -> None:
    x, y = rows(35, 9, dtype), rows(130, 9, dtype, seed=1)
    expected = run_kernel(x, y, [0.1])
    u, v = in_a_buffer(x, kind), in_a_buffer(y, kind)
    weights = rows(70, 1, dtype)[:, 0].abs()
    buffer = x.new_full((35 * 9 + 130 * 9 + 7,), 42.0)
    found = buffer[3:4].view(()), buffer[5:320].view(35, 9), buffer[321:1491].view(130, 9)
    _C.mmd(u, v, None, None, [0.1], None, False, *found)
    assert all(map(torch.equal, found, expected))
    assert (buffer[[0, 1, 2, 4, 320, -1]] == 42).all()
    assert torch.equal(u, x) and torch.equal(v, y)
    for given in (weights[::2], weights[::2].contiguous()):
        value = x.new_empty(())
        _C.mmd(u, v, given, None, [0.1], None, False, value, None, None)
        wanted = mmd(x.double(), y.double(), bandwidth=5**0.5, x_weights=weights[::2].double())
        assert float(value) == pytest.approx(float(wanted), abs=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scales", [[1 / 65**2], [2.0]])
def test_bits_do_not_depend_on_threads_or_runs(isa: str, scales: list[float]) -> None:
    x, y = rows(400, 65, torch.float32), rows(301, 65, torch.float32, seed=1)
    expected = run_kernel(x, y, scales, isa=isa, threads=1)
    for threads in (2, 3, 7, 2):
        found = run_kernel(x, y, scales, isa=isa, threads=threads)
        assert all(map(torch.equal, found, expected))
    median = {_C.mmd_median_squared_distance(x, y, n, isa) for n in (1, 2, 3)}
    assert len(median) == 1


def test_the_value_does_not_depend_on_which_gradients_are_wanted() -> None:
    x, y = rows(150, 9), rows(205, 9, seed=1)
    expected = run_kernel(x, y, [0.1])
    for wants_x in (False, True):
        for wants_y in (False, True):
            value, gx, gy = x.new_empty(()), torch.empty_like(x), torch.empty_like(y)
            _C.mmd(
                x, y, None, None, [0.1], None, True, value, gx if wants_x else None,
                gy if wants_y else None,
            )  # fmt: skip
            wanted = mmd(x, y, bandwidth=5**0.5, estimator="unbiased", backend="reference")
            assert float(value) == pytest.approx(float(wanted), abs=1e-14)
            _C.mmd(
                x, y, None, None, [0.1], None, False, value, gx if wants_x else None,
                gy if wants_y else None,
            )  # fmt: skip
            assert not wants_x or torch.equal(gx, expected[1])
            assert not wants_y or torch.equal(gy, expected[2])


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_rows_close_together_and_far_from_the_origin(offset: float) -> None:
    """|u|^2 + |v|^2 - 2uv would cancel these distances."""
    x, y = (
        rows(40, 16, torch.float32) * 0.01 + offset,
        rows(50, 16, torch.float32, 1) * 0.01 + offset,
    )
    found = value_and_gradients(mmd, x, y, bandwidth=0.05, backend="cpu")
    expected = value_and_gradients(reference.mmd, x.double(), y.double(), bandwidth=0.05)
    assert_close(found, expected, torch.float32, 0.05)
    kernel = kernel_matrix(x, y, bandwidth=0.05, backend="cpu").double()
    wanted = reference.kernel_matrix(x.double(), y.double(), bandwidth=0.05)
    assert float((kernel - wanted).abs().max()) <= TOLERANCE[torch.float32]


def test_a_narrow_kernel_in_a_wide_cloud() -> None:
    """Pairs close together, far from the mean of all rows: their gradient is accurate."""
    centres = rows(20, 8, torch.float32) * 1000
    x, y = (
        centres + 0.1 * rows(20, 8, torch.float32, 1),
        centres + 0.1 * rows(20, 8, torch.float32, 2),
    )
    found = value_and_gradients(mmd, x, y, bandwidth=0.3, backend="cpu")
    expected = value_and_gradients(reference.mmd, x.double(), y.double(), bandwidth=0.3)
    assert float(expected[1].abs().max()) > 0.005
    assert_close(found, expected, torch.float32, 0.3)


def test_equal_rows_are_at_distance_zero() -> None:
    x = rows(130, 37, torch.float32) * 100
    kernel = kernel_matrix(x, x.clone(), bandwidth=0.01, backend="cpu")
    assert torch.equal(kernel, torch.eye(130))
    value, gx, gy = value_and_gradients(mmd, x, x.clone(), bandwidth=0.01, backend="cpu")
    assert float(value) == 0 and not gx.any() and not gy.any()


def test_a_small_discrepancy_keeps_its_digits() -> None:
    """Wide kernels are 1 - something small, and the ones cancel."""
    x, y = rows(64, 64, torch.float32), rows(64, 64, torch.float32, seed=1)
    expected = reference.mmd(x.double(), y.double(), bandwidth=1e4)
    assert 0 < float(expected) < 1e-7
    found = mmd(x, y, bandwidth=1e4, backend="cpu")
    assert float(found) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_nan_propagates(bandwidth: Any, backend: str) -> None:
    for place in ((0, 0), (39, 4)):
        for value in (torch.nan, torch.inf):
            x, y = rows(40, 5, torch.float32), rows(41, 5, torch.float32, 1)
            x[place] = value
            found = value_and_gradients(mmd, x, y, bandwidth=bandwidth, backend=backend)
            assert found[0].isnan() and found[1][place[0], place[1]].isnan()
            assert mmd(y, x, bandwidth=bandwidth, backend=backend).isnan()
    weights = torch.ones(40)
    weights[7] = torch.nan
    x, y = rows(40, 5, torch.float32), rows(41, 5, torch.float32, 1)
    assert mmd(x, y, x_weights=weights, backend=backend).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, y = rows(33, 6, dtype), rows(34, 6, dtype, 1)
    found = value_and_gradients(mmd, x, y, backend="cpu")
    expected = value_and_gradients(mmd, x.float(), y.float(), backend="cpu")
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype and torch.equal(got, want.to(dtype))
    kernel = kernel_matrix(x, y, backend="cpu")
    assert torch.equal(kernel, kernel_matrix(x.float(), y.float(), backend="cpu").to(dtype))
    grads = value_and_gradients(lambda *a: kernel_matrix(*a, backend="cpu").sum(), x, y)
    assert grads[1].dtype == dtype and grads[1].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (5, 6), (700, 800)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_median_is_one_of_the_distances(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Whole numbers, whose distances have no rounding: few pairs and many, with ties."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-9, 9, (n, 3), generator=generator).to(dtype) for n in shape)
    found = _C.mmd_median_squared_distance(x, y, 2)
    assert found == reference.median_squared_distance(x, y)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("n", "d", "gradients"),
    [pytest.param(16384, 512, False, marks=pytest.mark.slow), (2048, 4096, True)],
)
def test_memory_is_linear_in_the_rows(n: int, d: int, gradients: bool) -> None:
    """Inputs of 67 MB: a copy of them and gradients of their size, nothing of n x n."""
    program = f"""
import torch
from diffmic_fast.ops.mmd import mmd
torch.set_num_threads(2)
small = torch.rand(300, 64, requires_grad=True)
mmd(small, small * 2, backend="cpu").backward()
x, y = torch.full(({n}, {d}), 0.5), torch.ones({n}, {d})
x.requires_grad_({gradients}), y.requires_grad_({gradients})
def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
before = kilobytes("VmRSS")
value = mmd(x, y, backend="cpu")
if {gradients}:
    value.backward()
print(1024 * (kilobytes("VmHWM") - before), float(value.detach()))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    grown, value = (float(word) for word in result.stdout.split())
    assert grown < 200e6 and value > 0


# ---- autograd and the compiler ---------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("bandwidth", [None, [0.5, 2.0]])
def test_gradcheck(bandwidth: Any, backend: str) -> None:
    x, y = rows(4, 3).requires_grad_(), rows(5, 3, seed=1).requires_grad_()
    for estimator in ("biased", "unbiased"):
        assert torch.autograd.gradcheck(
            lambda a, b, e=estimator: mmd(a, b, bandwidth=bandwidth, estimator=e, backend=backend),
            (x, y),
        )
    assert torch.autograd.gradcheck(
        lambda a, b: kernel_matrix(a, b, bandwidth=bandwidth, backend=backend), (x, y)
    )


@pytest.mark.parametrize("which", ["x", "y", "both"])
@pytest.mark.parametrize("shape", [(3, 7, 2), (97, 131, 33)])
def test_gradients_of_a_kernel_matrix(shape: tuple[int, ...], which: str) -> None:
    n, m, d = shape
    x, y = rows(n, d).requires_grad_(which != "y"), rows(m, d, seed=1).requires_grad_(which != "x")
    weight = rows(m, n, seed=2).T
    found, expected = (
        torch.autograd.grad(
            (kernel_matrix(x, y, bandwidth=[1.0, 4.0], backend=backend) * weight).sum(),
            [r for r in (x, y) if r.requires_grad],
        )
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_second_derivatives_raise() -> None:
    x, y = rows(4, 3).requires_grad_(), rows(5, 3, seed=1).requires_grad_()
    for value in (mmd(x, y, backend="cpu"), kernel_matrix(x, y, backend="cpu").sum()):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives: use backend='reference'"):
            gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_opcheck(backend: str) -> None:
    x, y = rows(6, 3).requires_grad_(), rows(5, 3, seed=1).requires_grad_()
    weights = torch.ones(6, dtype=torch.float64)
    ops = torch.ops.diffmic_fast
    median = torch.tensor(2.0, dtype=torch.float64)
    for call in (
        (x, y, None, None, [0.5], None, False, True, True),
        (x, y.detach(), weights, None, [0.5, 1.0], None, True, True, False),
        (x.detach(), y.detach(), None, None, [], median, True, False, False),
    ):
        torch.library.opcheck(ops.mmd.default, (*call, backend))
    torch.library.opcheck(ops.mmd_median.default, (x.detach(), y.detach(), backend))
    torch.library.opcheck(ops.mmd_kernel_matrix.default, (x, y, [0.5], None, backend))
    grad = rows(6, 5)
    torch.library.opcheck(
        ops.mmd_kernel_matrix_backward.default,
        (grad, x.detach(), y.detach(), [0.5], None, True, False, backend),
    )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_trace_records_the_operator(differentiable: bool) -> None:
    x, y = (rows(6, 3, seed=i).requires_grad_(differentiable) for i in range(2))
    traced = torch.jit.trace(lambda *pair: mmd(*pair, backend="cpu"), (x, y), check_trace=False)
    assert [n.kind() for n in traced.graph.nodes()].count("diffmic_fast::mmd") == 1
    others = rows(6, 3, seed=2), rows(6, 3, seed=3)
    torch.testing.assert_close(traced(*others), mmd(*others, backend="cpu"))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("bandwidth", [None, "median"])
def test_compiles_as_one_graph(bandwidth: Any, backend: str) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        value = mmd(x * 2, y, bandwidth=bandwidth, backend=backend)
        return value.sin() + kernel_matrix(x, y, bandwidth=bandwidth, backend=backend).mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, m in ((4, 6), (7, 5)):
        found = value_and_gradients(compiled, rows(n, 3), rows(m, 3, seed=1))
        expected = value_and_gradients(loss, rows(n, 3), rows(m, 3, seed=1))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# ---- bad arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_arguments_raise(backend: str) -> None:
    x = torch.zeros(4, 5)

    def bad(error: type[Exception], match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            mmd(*args, backend=backend, **options)

    bad(ValueError, r"mmd: y must be \[m, d=5\], got \(4, 7\)", x, torch.zeros(4, 7))
    bad(ValueError, "x must not be empty", torch.zeros(0, 5), x)
    bad(ValueError, "a row must not be empty", torch.zeros(4, 0), torch.zeros(4, 0))
    bad(TypeError, "x must be a floating-point tensor", x.long(), x)
    bad(TypeError, r"y must be torch.float32 .* got torch.float64", x, x.double())
    bad(TypeError, r"x must be a torch.Tensor, got list", [[1.0]], x)
    bad(ValueError, "at least two rows of x and two rows of y", x[:1], x, estimator="unbiased")
    bad(ValueError, "estimator must be .* got 'best'", x, x, estimator="best")
    bad(ValueError, "bandwidth must be in .* got 0", x, x, bandwidth=0.0)
    bad(ValueError, "bandwidth must be in .* got nan", x, x, bandwidth=torch.nan)
    bad(ValueError, "bandwidth must not be empty", x, x, bandwidth=[])
    bad(ValueError, "bandwidth must be 'median', .* got 'mean'", x, x, bandwidth="mean")
    bad(TypeError, "bandwidth must be of numbers, got '1'", x, x, bandwidth=["1"])
    bad(ValueError, r"x_weights must be \[4\].* got \(3,\)", x, x, x_weights=torch.ones(3))
    bad(TypeError, "y_weights must be floating", x, x, y_weights=torch.ones(4).long())
    bad(TypeError, "y_weights must be a torch.Tensor", x, x, y_weights=[1, 1, 1, 1])
    needing = torch.ones(4, requires_grad=True)
    bad(ValueError, "x_weights must not require gradients", x, x, x_weights=needing)
    if backend not in ("reference", "cpu"):
        return  # data that the host does not read: test_mmd_cuda.py
    bad(ValueError, "bandwidth='median' needs rows that differ", x, x, bandwidth="median")
    bad(ValueError, "y_weights must not be negative", x, x, y_weights=torch.tensor([1.0, 1, 1, -1]))
    bad(ValueError, "x_weights .* one of them must be more", x, x, x_weights=torch.zeros(4))
    one = torch.tensor([0.0, 1, 0, 0])
    bad(ValueError, "two of them must be more", x, x, x_weights=one, estimator="unbiased")


def test_invalid_backends_and_instruction_sets_raise() -> None:
    x = torch.zeros(4, 5)
    with pytest.raises(RuntimeError, match="triton"):
        mmd(x, x, backend="triton")
    with pytest.raises(ValueError, match="got 'fast'"):
        mmd(x, x, backend="fast")
    with pytest.raises(ValueError, match="isa must be auto, portable, avx2 or avx512, got sse"):
        run_kernel(x, x, [1.0], isa="sse")
    if "avx512" not in ISAS:
        with pytest.raises(
            ValueError, match="isa must be one that this processor supports, got avx512"
        ):
            run_kernel(x, x, [1.0], isa="avx512")
    with pytest.raises(ValueError, match="scales must not be empty"):
        run_kernel(x, x, [])
    with pytest.raises(ValueError, match="mmd: y must have shape"):
        run_kernel(x, torch.zeros(4, 6), [1.0])
