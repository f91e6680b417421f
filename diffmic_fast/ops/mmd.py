"""`mmd`: maximum mean discrepancy of two sets of rows, for the training loss.

The kernels compute the value and both gradients in one pass, so the operator returns all three, and its backward pass
is a multiplication by a scalar.

The CUDA kernels never synchronise with the host, not even for a median, so they cannot raise for data: weights that are
negative or leave no pair, and rows of which at least half of all pairs are equal with bandwidth="median". They return
NaN instead.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from diffmic_fast.checks import Arguments
from diffmic_fast.ops._autocast import in_float32
from diffmic_fast.ops._backend import resolve
from diffmic_fast.ops._layout import READABLE, empty_like, of_dtype, readable
from diffmic_fast.ops._operators import Derivative, kernels_of, register
from diffmic_fast.reference import mmd as reference
from diffmic_fast.reference.mmd import Bandwidth, Estimator

__all__ = ["Bandwidth", "Estimator", "kernel_matrix", "mmd"]


@in_float32
def mmd(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: Bandwidth = None,
    estimator: Estimator = "biased",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """mean k(x, x) + mean k(y, y) - 2 mean k(x, y), k(u, v) = exp(-|u - v|^2 / d^2).

    See docs/algorithm.md, "Maximum mean discrepancy". Memory is O((n + m) d): neither differences nor kernel matrices
    are stored. Runs in float32 under autocast.

    Args:
        x: [n, d] float32, float64, float16 or bfloat16 (computed in float32), n >= 1 (unbiased: 2); any strides.
        y: [m, d], m >= 1 (unbiased: 2), dtype and device of `x`.
        bandwidth: b of a Gaussian kernel exp(-|u - v|^2 / (2 b^2)) in place of the default; of several (at most 256 for
            the CUDA kernels), the mean of the kernels; "median" is the median distance between the rows of x and y
            together, as a constant.
        estimator: "biased" takes means over all pairs, "unbiased" excludes the pairs of a row with itself from the
            first two.
        x_weights, y_weights: [n], [m], a weight >= 0 per row: a pair has the product of its two weights. Only their
            ratios matter. Not differentiable.
        backend: name of a backend, or "auto".

    Returns:
        Scalar of that dtype, differentiable in x and y; twice only with the reference. NaN in an argument gives NaN.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value; at least half of all pairs of rows
            are equal with bandwidth="median"; weights leave no pair (the CUDA kernels return NaN for these two).
        BackendError: the requested backend cannot serve; a RuntimeError.
    """
    _check("mmd", x, y)
    scales = _scales("mmd", x, bandwidth)
    unbiased = estimator == "unbiased"
    if not unbiased and estimator != "biased":
        raise ValueError(f"mmd: estimator must be 'biased' or 'unbiased', got {estimator!r}")
    if unbiased and (x.shape[0] < 2 or y.shape[0] < 2):
        raise ValueError(
            "mmd: the unbiased estimator needs at least two rows of x and two rows of y, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x_weights is not None:
        _check_weights("x_weights", x_weights, "x", x)
    if y_weights is not None:
        _check_weights("y_weights", y_weights, "y", y)
    backend = resolve("mmd", backend, x.device)
    if backend == "reference":
        return reference.mmd(
            x, y, bandwidth=bandwidth, estimator=estimator, x_weights=x_weights, y_weights=y_weights
        )
    records = torch.is_grad_enabled()
    return _mmd(
        Mmd(
            x=x, y=y, x_weights=x_weights, y_weights=y_weights, scales=scales,
            median=_median_of(x, y, bandwidth, backend), unbiased=unbiased,
            x_gradient=records and x.requires_grad, y_gradient=records and y.requires_grad, backend=backend,
        )
    ).value  # fmt: skip


@in_float32
def kernel_matrix(
    x: Tensor, y: Tensor, *, bandwidth: Bandwidth = None, backend: str = "auto"
) -> Tensor:
    """k(x_i, y_j) = exp(-|x_i - y_j|^2 / d^2), or the kernel of `bandwidth`.

    Runs in float32 under autocast.

    Args:
        x, y, bandwidth, backend: as in `mmd`.

    Returns:
        [n, m] of that dtype, differentiable in both; twice only with the reference.

    Raises:
        ValueError, TypeError, BackendError: as in `mmd`.
    """
    operation = "mmd.kernel_matrix"
    _check(operation, x, y)
    scales = _scales(operation, x, bandwidth)
    backend = resolve("mmd", backend, x.device)
    if backend == "reference":
        return reference.kernel_matrix(x, y, bandwidth=bandwidth)
    median = _median_of(x, y, bandwidth, backend)
    return _kernel_matrix(KernelMatrix(x=x, y=y, scales=scales, median=median, backend=backend))


def _check(operation: str, x: Tensor, y: Tensor) -> None:
    if (
        type(x) is Tensor
        and type(y) is Tensor
        and x.ndim == y.ndim == 2
        and x.shape[1] == y.shape[1]
        and x.dtype == y.dtype
        and x.dtype in READABLE
        and x.device == y.device
        and x.numel() > 0
        and y.numel() > 0
    ):
        return  # the checks below take as long as a kernel over 32 rows
    args = Arguments(operation)
    args.floating("x", x, "n d")
    args.floating("y", y, "m d")
    for name, value in (("x", x), ("y", y)):
        if value.dtype not in READABLE:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in READABLE)
            raise TypeError(f"{operation}: {name} must be one of {names}, got {value.dtype}")
    for letter, name in (("n", "x"), ("m", "y"), ("d", "a row")):
        if args.sizes[letter] == 0:
            raise ValueError(
                f"{operation}: {name} must not be empty, got {tuple(x.shape)} and {tuple(y.shape)}"
            )


def _check_weights(name: str, weights: Tensor, rows_name: str, rows: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"mmd: {name} must be a torch.Tensor, got {type(weights).__name__}")
    if weights.shape != rows.shape[:1]:
        raise ValueError(
            f"mmd: {name} must be [{rows.shape[0]}], one per row of {rows_name}, got "
            f"{tuple(weights.shape)}"
        )
    if weights.dtype not in READABLE:
        raise TypeError(f"mmd: {name} must be floating-point, got {weights.dtype}")
    if weights.device != rows.device:
        raise ValueError(
            f"mmd: {name} must be on {rows.device} as {rows_name}, got {weights.device}"
        )
    if weights.requires_grad:
        raise ValueError(f"mmd: {name} must not require gradients: detach() it")


def _scales(operation: str, x: Tensor, bandwidth: Bandwidth) -> list[float]:
    """c of each exp(-c |u - v|^2); none for the median, which depends on the data."""
    if bandwidth is None:
        return [1.0 / (x.shape[1] * x.shape[1])]
    if isinstance(bandwidth, str):
        if bandwidth != "median":
            raise ValueError(
                f"{operation}: bandwidth must be 'median', a number or numbers, got {bandwidth!r}"
            )
        return []
    values = [bandwidth] if isinstance(bandwidth, (int, float)) else list(bandwidth)
    if not values:
        raise ValueError(f"{operation}: bandwidth must not be empty")
    scales = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{operation}: bandwidth must be of numbers, got {value!r}")
        if not 1e-15 <= value <= 1e15:  # whose squares float32 can hold
            raise ValueError(f"{operation}: bandwidth must be in [1e-15, 1e15], got {value}")
        scales.append(1 / (2 * float(value) ** 2))
    return scales


def _median_of(x: Tensor, y: Tensor, bandwidth: Bandwidth, backend: str) -> Tensor | None:
    if bandwidth != "median":
        return None
    return _mmd_median(Median(x=x.detach(), y=y.detach(), backend=backend))


# ---- operators -------------------------------------------------------------------------------


class Mmd(NamedTuple):
    """Arguments of the operator `mmd`.

    Attributes:
        x, y, x_weights, y_weights, unbiased, backend: as in the function.
        scales: c of each kernel exp(-c |u - v|^2); empty if there is a median.
        median: the median squared distance, a scalar of float64, or None.
        x_gradient, y_gradient: whether the gradient is computed.
    """

    x: Tensor
    y: Tensor
    x_weights: Tensor | None
    y_weights: Tensor | None
    scales: Sequence[float]
    median: Tensor | None
    unbiased: bool
    x_gradient: bool
    y_gradient: bool
    backend: str


class Value(NamedTuple):
    """Results of the operator `mmd`; gradients that are not computed have no rows."""

    value: Tensor
    x_gradient: Tensor
    y_gradient: Tensor


class Median(NamedTuple):
    """Arguments of the operator `mmd_median`."""

    x: Tensor
    y: Tensor
    backend: str


class KernelMatrix(NamedTuple):
    """Arguments of the operator `mmd_kernel_matrix`, as in `Mmd`."""

    x: Tensor
    y: Tensor
    scales: Sequence[float]
    median: Tensor | None
    backend: str


class KernelMatrixBackward(NamedTuple):
    """Arguments of the operator `mmd_kernel_matrix_backward`, as in `Mmd`; `grad` is that of the matrix."""

    grad: Tensor
    x: Tensor
    y: Tensor
    scales: Sequence[float]
    median: Tensor | None
    x_gradient: bool
    y_gradient: bool
    backend: str


class Gradients(NamedTuple):
    """Results of the operator `mmd_kernel_matrix_backward`; those that are not computed have no rows."""

    x: Tensor
    y: Tensor


def _weights_of(weights: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if weights is None else readable(weights).to(rows.dtype)


def _sizes(x: Tensor, y: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], y.shape[0], x.shape[1], x.element_size()


def _memory(rows: Tensor, wanted: bool) -> Tensor | None:
    return empty_like(rows) if wanted else None


def _output(gradient: Tensor | None, rows: Tensor) -> Tensor:
    """A gradient as the operators return it, in the dtype of the argument."""
    if gradient is None:
        return rows.new_empty(0, rows.shape[1])
    return of_dtype(gradient, rows.dtype)


def _forward(call: Mmd) -> Value:
    x, y = readable(call.x), readable(call.y)
    value = x.new_empty(())
    x_gradient, y_gradient = _memory(x, call.x_gradient), _memory(y, call.y_gradient)
    kernels, launch = kernels_of(call.backend, x)
    workspace: tuple[Tensor, ...] = ()
    if call.backend != "cpu":
        size = kernels.mmd_workspace(*_sizes(x, y), call.x_gradient or call.y_gradient)
        workspace = (x.new_empty(size, dtype=torch.float64),)
    kernels.mmd(
        x, y, _weights_of(call.x_weights, x), _weights_of(call.y_weights, y), call.scales, call.median, call.unbiased,
        value, x_gradient, y_gradient, *workspace, launch,
    )  # fmt: skip
    return Value(
        of_dtype(value, call.x.dtype), _output(x_gradient, call.x), _output(y_gradient, call.y)
    )


def _fake_forward(call: Mmd) -> Value:
    return Value(call.x.new_empty(()), *_fake_gradients(call))


def _fake_gradients(call: Mmd | KernelMatrixBackward) -> Gradients:
    return Gradients(
        _output(_memory(call.x, call.x_gradient), call.x),
        _output(_memory(call.y, call.y_gradient), call.y),
    )


def _median(call: Median) -> Tensor:
    x, y = readable(call.x), readable(call.y)
    kernels, launch = kernels_of(call.backend, x)
    if call.backend == "cpu":
        found = kernels.mmd_median_squared_distance(x, y, launch)
        return torch.tensor(found, dtype=torch.float64)
    median = x.new_empty((), dtype=torch.float64)
    size = kernels.mmd_median_workspace(x.shape[0], y.shape[0], x.element_size())
    workspace = x.new_empty(size, dtype=torch.int64)
    kernels.mmd_median_squared_distance(x, y, median, workspace, launch)
    return median


def _matrix(call: KernelMatrix) -> Tensor:
    x, y = readable(call.x), readable(call.y)
    matrix = x.new_empty((x.shape[0], y.shape[0]))
    kernels, launch = kernels_of(call.backend, x)
    kernels.mmd_kernel_matrix(x, y, call.scales, call.median, matrix, launch)
    return of_dtype(matrix, call.x.dtype)


def _matrix_backward(call: KernelMatrixBackward) -> Gradients:
    x, y = readable(call.x), readable(call.y)
    gradients = _memory(x, call.x_gradient), _memory(y, call.y_gradient)
    kernels, launch = kernels_of(call.backend, x)
    workspace: tuple[Tensor, ...] = ()
    if call.backend != "cpu":
        size = kernels.mmd_kernel_matrix_workspace(*_sizes(x, y))
        workspace = (x.new_empty(size, dtype=torch.float64),)
    kernels.mmd_kernel_matrix_backward(
        readable(call.grad), x, y, call.scales, call.median, *gradients, *workspace, launch
    )
    x_gradient, y_gradient = gradients
    return Gradients(_output(x_gradient, call.x), _output(y_gradient, call.y))


class _Once(Function):
    """gradient -> gradient; its derivative, which the kernels do not have, is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "mmd: the kernels have no second derivatives: use backend='reference' for them"
        )


def _once(gradient: Tensor, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    # Gradients are recorded only in a backward pass with create_graph=True.
    return _Once.apply(gradient, grad, x, y) if torch.is_grad_enabled() else gradient


def _gradients(
    call: Mmd, result: Value, wanted: Set[str], grad: Tensor, *_: Any
) -> dict[str, Tensor]:
    found = {}
    for name, computed, gradient in (
        ("x", call.x_gradient, result.x_gradient),
        ("y", call.y_gradient, result.y_gradient),
    ):
        if name in wanted:
            if not computed:
                raise RuntimeError(
                    f"mmd: the gradient of {name} was not requested when the value was computed: compute the value "
                    "with rows that require gradients"
                )
            found[name] = _once(grad * gradient, grad, call.x, call.y)
    return found


def _matrix_gradients(
    call: KernelMatrix, _: None, wanted: Set[str], grad: Tensor
) -> dict[str, Tensor]:
    found = _kernel_matrix_backward(
        KernelMatrixBackward(
            grad=grad.detach(), x=call.x.detach(), y=call.y.detach(), scales=call.scales, median=call.median,
            x_gradient="x" in wanted, y_gradient="y" in wanted, backend=call.backend,
        )
    )  # fmt: skip
    return {
        name: _once(gradient, grad, call.x, call.y)
        for name, gradient in found._asdict().items()
        if name in wanted
    }


_mmd = register(
    "mmd",
    Mmd,
    Value,
    _forward,
    _fake_forward,
    Derivative(_gradients, saves=["x", "y"], saved_results=["x_gradient", "y_gradient"]),
)
_mmd_median = register(
    "mmd_median", Median, Tensor, _median, lambda call: call.x.new_empty((), dtype=torch.float64)
)
_kernel_matrix = register(
    "mmd_kernel_matrix",
    KernelMatrix,
    Tensor,
    _matrix,
    lambda call: call.x.new_empty((call.x.shape[0], call.y.shape[0])),
    Derivative(_matrix_gradients, saves=["x", "y", "median"]),
)
_kernel_matrix_backward = register(
    "mmd_kernel_matrix_backward", KernelMatrixBackward, Gradients, _matrix_backward, _fake_gradients
)
