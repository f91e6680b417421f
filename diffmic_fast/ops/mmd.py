"""`mmd`: maximum mean discrepancy of two row sets, for the training loss (spec, section 5).

The signatures are those of `diffmic_fast.reference.mmd` and a choice of backend: "reference",
"cpu", "cuda" or, for tests, "cuda-emulated". The kernel gives the value and both gradients in one
pass, so the operator returns all three, and its backward pass is a product with a number.

The CUDA kernels never wait for the GPU, not even for a median, so they cannot raise for what only
the GPU has seen: weights that are negative or leave no pair, and rows of which half of all pairs or
more are equal under bandwidth="median". All results of such a call are not-a-number instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from diffmic_fast import _native
from diffmic_fast.checks import Arguments
from diffmic_fast.ops import _autocast as autocast
from diffmic_fast.ops._backend import resolve, stream_of
from diffmic_fast.ops._layout import READABLE, readable
from diffmic_fast.ops._operators import register, register_autograd
from diffmic_fast.reference import mmd as reference
from diffmic_fast.reference.mmd import Bandwidth, Estimator

__all__ = ["Bandwidth", "Estimator", "kernel_matrix", "mmd"]


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
    """mean k(x, x) + mean k(y, y) - 2 mean k(x, y), k(u, v) = exp(-|u - v|^2 / d^2) (spec, section 5).

    Memory is O((n + m) d): neither differences nor kernel matrices are kept. Under autocast in float32
    (`ops._autocast`).

    Args:
        x: [n, d] float32, float64, float16 or bfloat16 (computed in float32), n >= 1 (unbiased: 2);
            any strides.
        y: [m, d], m >= 1 (unbiased: 2), dtype and device of `x`.
        bandwidth: b of a Gaussian kernel exp(-|u - v|^2 / (2 b^2)) in place of the default; of
            several (at most 256 by the CUDA kernels), the kernels' mean; "median" takes the median
            distance between the rows of x and y together, as a constant.
        estimator: "biased" takes means over all pairs, "unbiased" leaves the pairs of a row with
            itself out of the first two.
        x_weights, y_weights: [n], [m], a weight >= 0 a row: a pair weighs the product of its two.
            Only their ratios matter. Not differentiable.
        backend: a backend's name, or "auto".

    Returns:
        Scalar of that dtype, differentiable in x and y; twice only by the reference. Not-a-number
        anywhere in the arguments makes it not-a-number.

    Raises:
        ValueError, TypeError: arguments that do not fit, named; bandwidth="median" where half of all
            pairs of rows or more are equal, and weights that leave no pair (both make the result of
            the CUDA kernels not-a-number instead).
        BackendError: the backend asked for cannot serve; a RuntimeError.
    """
    _check("mmd", x, y)
    if autocast.active(x):
        with autocast.off(x):
            return mmd(
                autocast.single(x), autocast.single(y), bandwidth=bandwidth, estimator=estimator,
                x_weights=x_weights, y_weights=y_weights, backend=backend,
            )  # fmt: skip
    scales = _scales("mmd", x, bandwidth)
    unbiased = estimator == "unbiased"
    if not unbiased and estimator != "biased":
        raise ValueError(f"mmd: estimator must be 'biased' or 'unbiased', got {estimator!r}")
    if unbiased and (x.shape[0] < 2 or y.shape[0] < 2):
        raise ValueError(
            "mmd: the unbiased estimator needs two rows of x and two of y at least, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x_weights is not None:
        _check_weights("x_weights", x_weights, "x", x)
    if y_weights is not None:
        _check_weights("y_weights", y_weights, "y", y)
    backend = resolve("mmd", backend, x.device)
    if backend == "reference":
        return reference.mmd(
            x,
            y,
            bandwidth=bandwidth,
            estimator=estimator,
            x_weights=x_weights,
            y_weights=y_weights,
        )
    learns = torch.is_grad_enabled()
    return torch.ops.diffmic_fast.mmd.default(
        x,
        y,
        x_weights,
        y_weights,
        scales,
        _median(x, y, backend) if bandwidth == "median" else None,
        unbiased,
        learns and x.requires_grad,
        learns and y.requires_grad,
        backend,
    )[0]


def kernel_matrix(
    x: Tensor, y: Tensor, *, bandwidth: Bandwidth = None, backend: str = "auto"
) -> Tensor:
    """k(x_i, y_j) = exp(-|x_i - y_j|^2 / d^2), or as `bandwidth` says.

    Args:
        x, y, bandwidth, backend: as in `mmd`.

    Returns:
        [n, m] of that dtype, differentiable in both; twice only by the reference.

    Raises:
        ValueError, TypeError, BackendError: as in `mmd`.
    """
    operation = "mmd.kernel_matrix"
    _check(operation, x, y)
    if autocast.active(x):
        with autocast.off(x):
            x, y = autocast.single(x), autocast.single(y)
            return kernel_matrix(x, y, bandwidth=bandwidth, backend=backend)
    scales = _scales(operation, x, bandwidth)
    backend = resolve("mmd", backend, x.device)
    if backend == "reference":
        return reference.kernel_matrix(x, y, bandwidth=bandwidth)
    median = _median(x, y, backend) if bandwidth == "median" else None
    return torch.ops.diffmic_fast.mmd_kernel_matrix.default(x, y, scales, median, backend)


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
        return  # the words below take as long as a kernel over 32 rows
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
            f"mmd: {name} must be [{rows.shape[0]}], one for each row of {rows_name}, got "
            f"{tuple(weights.shape)}"
        )
    if weights.dtype not in READABLE or weights.device != rows.device:
        raise TypeError(
            f"mmd: {name} must be floating-point on {rows.device}, got {weights.dtype} on "
            f"{weights.device}"
        )
    if weights.requires_grad:
        raise ValueError(f"mmd: {name} must not require gradients, there are none: detach() it")


def _scales(operation: str, x: Tensor, bandwidth: Bandwidth) -> list[float]:
    """c of each exp(-c |u - v|^2); none for the median, which is in the data."""
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


def _median(x: Tensor, y: Tensor, backend: str) -> Tensor:
    return torch.ops.diffmic_fast.mmd_median.default(x.detach(), y.detach(), backend)


# ---- operators -------------------------------------------------------------------------------


def _weights_of(weights: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if weights is None else readable(weights).to(rows.dtype)


def _all_scales(scales: Sequence[float], median: Tensor | None) -> Sequence[float]:
    return scales if median is None else [reference.median_scale(float(median))]


def _sizes(x: Tensor, y: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], y.shape[0], x.shape[1], x.element_size()


def _scratch(rows: Tensor, needed: int) -> Tensor:
    return rows.new_empty(needed, dtype=torch.float64)


def _empty_gradient(rows: Tensor, wanted: bool) -> Tensor | None:
    return rows.new_empty(rows.shape) if wanted else None


def _given(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty((0, like.shape[1])) if gradient is None else gradient.to(like.dtype)


def _mmd(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    scales: Sequence[float],
    median: Tensor | None,
    unbiased: bool,
    x_gradient: bool,
    y_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    u, v = readable(x), readable(y)
    u_weights, v_weights = _weights_of(x_weights, u), _weights_of(y_weights, v)
    value = u.new_empty(())
    u_gradient, v_gradient = _empty_gradient(u, x_gradient), _empty_gradient(v, y_gradient)
    outputs = value, u_gradient, v_gradient
    if backend == "cpu":
        scales = _all_scales(scales, median)
        threads = torch.get_num_threads()
        _native.extension().mmd(u, v, u_weights, v_weights, scales, unbiased, *outputs, threads)
    else:
        kernels = _native.cuda(backend)
        scratch = _scratch(u, kernels.mmd_scratch(*_sizes(u, v), x_gradient or y_gradient))
        kernels.mmd(
            *(u, v, u_weights, v_weights, scales, median, unbiased),
            *(*outputs, scratch, stream_of(u)),
        )
    return value.to(x.dtype), _given(u_gradient, x), _given(v_gradient, y)


def _fake_mmd(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    scales: Sequence[float],
    median: Tensor | None,
    unbiased: bool,
    x_gradient: bool,
    y_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(()),
        x.new_empty(x.shape if x_gradient else (0, x.shape[1])),
        y.new_empty(y.shape if y_gradient else (0, y.shape[1])),
    )


class _Once(Function):
    """gradient -> gradient; the derivative, which the kernel does not have, is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "mmd: the kernel has no second derivatives: use backend='reference' for them"
        )


def _once(gradient: Tensor, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    # Gradients are recorded in a backward pass that is asked for a graph, and only there.
    return _Once.apply(gradient, grad, x, y) if torch.is_grad_enabled() else gradient


def _save_mmd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # no zeros in the place of gradients of the gradients
    ctx.save_for_backward(inputs[0], inputs[1], output[1], output[2])
    ctx.has = inputs[7], inputs[8]


def _mmd_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    x, y, *gradients = ctx.saved_tensors
    found: list[Tensor | None] = []
    for needed, has, gradient in zip(ctx.needs_input_grad, ctx.has, gradients, strict=False):
        if needed and not has:
            raise RuntimeError(
                "mmd: a gradient is asked for that was not when the value was computed: compute "
                "the value with rows that require gradients"
            )
        found.append(_once(grad * gradient, grad, x, y) if needed else None)
    return (*found, None, None, None, None, None, None, None, None)


def _mmd_median(x: Tensor, y: Tensor, backend: str) -> Tensor:
    u, v = readable(x), readable(y)
    if backend == "cpu":
        found = _native.extension().mmd_median_squared_distance(u, v, torch.get_num_threads())
        return torch.tensor(found, dtype=torch.float64)
    kernels = _native.cuda(backend)
    median = u.new_empty((), dtype=torch.float64)
    needed = kernels.mmd_median_scratch(u.shape[0], v.shape[0], u.element_size())
    scratch = u.new_empty(needed, dtype=torch.int64)
    kernels.mmd_median_squared_distance(u, v, median, scratch, stream_of(u))
    return median


def _fake_mmd_median(x: Tensor, y: Tensor, backend: str) -> Tensor:
    return x.new_empty((), dtype=torch.float64)


def _kernel_matrix(
    x: Tensor, y: Tensor, scales: Sequence[float], median: Tensor | None, backend: str
) -> Tensor:
    u, v = readable(x), readable(y)
    kernel = u.new_empty((u.shape[0], v.shape[0]))
    if backend == "cpu":
        scales = _all_scales(scales, median)
        _native.extension().mmd_kernel_matrix(u, v, scales, kernel, torch.get_num_threads())
    else:
        _native.cuda(backend).mmd_kernel_matrix(u, v, scales, median, kernel, stream_of(u))
    return kernel.to(x.dtype)


def _fake_kernel_matrix(
    x: Tensor, y: Tensor, scales: Sequence[float], median: Tensor | None, backend: str
) -> Tensor:
    return x.new_empty((x.shape[0], y.shape[0]))


def _kernel_matrix_gradients(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    scales: Sequence[float],
    median: Tensor | None,
    x_gradient: bool,
    y_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    u, v = readable(x), readable(y)
    u_gradient, v_gradient = _empty_gradient(u, x_gradient), _empty_gradient(v, y_gradient)
    outputs = u_gradient, v_gradient
    if backend == "cpu":
        scales = _all_scales(scales, median)
        threads = torch.get_num_threads()
        _native.extension().mmd_kernel_matrix_backward(
            readable(grad), u, v, scales, *outputs, threads
        )
    else:
        kernels = _native.cuda(backend)
        scratch = _scratch(u, kernels.mmd_kernel_matrix_scratch(*_sizes(u, v)))
        kernels.mmd_kernel_matrix_backward(
            readable(grad), u, v, scales, median, *outputs, scratch, stream_of(u)
        )
    return _given(u_gradient, x), _given(v_gradient, y)


def _fake_kernel_matrix_gradients(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    scales: Sequence[float],
    median: Tensor | None,
    x_gradient: bool,
    y_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if x_gradient else (0, x.shape[1])),
        y.new_empty(y.shape if y_gradient else (0, y.shape[1])),
    )


def _save_kernel_matrix(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, scales, median, backend = inputs
    ctx.save_for_backward(x, y, median)
    ctx.scales, ctx.backend = scales, backend


def _kernel_matrix_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y, median = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    gradients = torch.ops.diffmic_fast.mmd_kernel_matrix_backward.default(
        grad.detach(), x.detach(), y.detach(), ctx.scales, median, *needed, ctx.backend
    )
    found = [
        _once(gradient, grad, x, y) if need else None
        for need, gradient in zip(needed, gradients, strict=True)
    ]
    return (*found, None, None, None)


register(
    "mmd",
    "(Tensor x, Tensor y, Tensor? x_weights, Tensor? y_weights, float[] scales, Tensor? median, bool unbiased, "
    "bool x_gradient, bool y_gradient, str backend) -> (Tensor, Tensor, Tensor)",
    _mmd,
    _fake_mmd,
)
register("mmd_median", "(Tensor x, Tensor y, str backend) -> Tensor", _mmd_median, _fake_mmd_median)
register(
    "mmd_kernel_matrix",
    "(Tensor x, Tensor y, float[] scales, Tensor? median, str backend) -> Tensor",
    _kernel_matrix,
    _fake_kernel_matrix,
)
register(
    "mmd_kernel_matrix_backward",
    "(Tensor grad, Tensor x, Tensor y, float[] scales, Tensor? median, bool x_gradient, bool y_gradient, str backend) "
    "-> (Tensor, Tensor)",
    _kernel_matrix_gradients,
    _fake_kernel_matrix_gradients,
)
register_autograd("mmd", _save_mmd, _mmd_backward)
register_autograd("mmd_kernel_matrix", _save_kernel_matrix, _kernel_matrix_backward)
