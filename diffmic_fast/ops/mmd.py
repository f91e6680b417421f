"""`mmd`: maximum mean discrepancy of two row sets, for the training loss."""

from __future__ import annotations

from torch import Tensor

from diffmic_fast.checks import Arguments
from diffmic_fast.ops._backend import resolve
from diffmic_fast.reference import mmd as reference


def mmd(x: Tensor, y: Tensor, *, backend: str = "auto") -> Tensor:
    """mean k(x, x) + mean k(y, y) - 2 mean k(x, y), k(u, v) = exp(-|u - v|^2 / d^2) (spec, section 5).

    Args:
        x: [n, d] floating, n >= 1.
        y: [m, d], m >= 1, dtype and device of `x`.
        backend: a backend's name, or "auto".

    Returns:
        Scalar of that dtype, differentiable in both.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
        RuntimeError: the backend asked for cannot serve.
    """
    _check(x, y)
    resolve("mmd", backend, x.device)
    return reference.mmd(x, y)


def kernel_matrix(x: Tensor, y: Tensor, *, backend: str = "auto") -> Tensor:
    """k(x_i, y_j) = exp(-|x_i - y_j|^2 / d^2), [n, m]; arguments and errors as in `mmd`."""
    _check(x, y)
    resolve("mmd", backend, x.device)
    return reference.kernel_matrix(x, y)


def _check(x: Tensor, y: Tensor) -> None:
    args = Arguments("mmd")
    args.floating("x", x, "n d")
    args.floating("y", y, "m d")
    for letter, name in (("n", "x"), ("m", "y"), ("d", "a row")):
        if args.sizes[letter] == 0:
            raise ValueError(
                f"mmd: {name} must not be empty, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
