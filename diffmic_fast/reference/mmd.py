"""Maximum mean discrepancy of two sets of rows (docs/algorithm.md, "Maximum mean discrepancy")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Bandwidth = float | Sequence[float] | Literal["median"] | None
Estimator = Literal["biased", "unbiased"]


def median_squared_distance(x: Tensor, y: Tensor) -> float:
    """The median of |z_i - z_j|^2 over all i < j, z the rows of x and y together.

    The lower of the two middle values if their number is even; NaN if one of them is NaN.

    Args:
        x: [n, d] floating.
        y: [m, d].
    """
    rows = torch.cat([_widened(x), _widened(y)]).detach()
    squares = (rows[:, None, :] - rows[None, :, :]).square().sum(dim=2)
    above = torch.ones_like(squares, dtype=torch.bool).triu(diagonal=1)
    return float(squares[above].median())


def kernel_matrix(x: Tensor, y: Tensor, *, bandwidth: Bandwidth = None) -> Tensor:
    """k(x_i, y_j) = exp(-|x_i - y_j|^2 / d^2), d the row length, or a Gaussian of `bandwidth`.

    Args:
        x: [n, d] floating; half types are computed in float32.
        y: [m, d], dtype and device of `x`.
        bandwidth: b of exp(-|x_i - y_j|^2 / (2 b^2)); of several, the mean of the kernels; "median" is the median
            distance between the rows of x and y together, as a constant.

    Returns:
        [n, m], dtype of `x`.

    Raises:
        ValueError: at least half of all pairs of rows are equal with bandwidth="median".
    """
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = _widened(x), _widened(y)
    dimension = x.shape[1]
    mean_square = (x[:, None, :] - y[None, :, :]).square().mean(dim=2)
    if bandwidth is None:
        return torch.exp(-mean_square / dimension).to(dtype)
    squares = mean_square * dimension
    if isinstance(bandwidth, str):
        scales = [median_scale(median_squared_distance(x, y))]
    else:
        values = [bandwidth] if isinstance(bandwidth, (int, float)) else bandwidth
        scales = [1 / (2 * value**2) for value in values]
    return torch.stack([torch.exp(-squares * scale) for scale in scales]).mean(dim=0).to(dtype)


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: Bandwidth = None,
    estimator: Estimator = "biased",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
) -> Tensor:
    """mean k(x, x) + mean k(y, y) - 2 mean k(x, y).

    Args:
        x: [n, d] floating, n >= 1 (unbiased: 2); half types are computed in float32.
        y: [m, d], m >= 1 (unbiased: 2), dtype and device of `x`.
        bandwidth: as in `kernel_matrix`.
        estimator: "biased" takes means over all pairs, "unbiased" excludes the pairs of a row with itself from the
            first two.
        x_weights, y_weights: [n], [m], a weight per row: a pair has the product of its two weights. Only their ratios
            matter. Not differentiable.

    Returns:
        Scalar, dtype of `x`.

    Raises:
        ValueError: weights are negative or leave no pair; as `kernel_matrix`.
    """
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = _widened(x), _widened(y)
    if isinstance(bandwidth, str):
        bandwidth = (median_scale(median_squared_distance(x, y)) * 2) ** -0.5
    unbiased = estimator == "unbiased"
    p = _weights("x_weights", x, x_weights, unbiased)
    q = _weights("y_weights", y, y_weights, unbiased)

    def within(rows: Tensor, weights: Tensor) -> Tensor:
        pairs = weights[:, None] * weights
        if unbiased:
            pairs = pairs - pairs.diag().diag()
        return (pairs * kernel_matrix(rows, rows, bandwidth=bandwidth)).sum() / pairs.sum()

    between = (p[:, None] * q * kernel_matrix(x, y, bandwidth=bandwidth)).sum()
    return (within(x, p) + within(y, q) - 2.0 * between / (p.sum() * q.sum())).to(dtype)


def median_scale(median: float) -> float:
    """c of exp(-c |u - v|^2) for the bandwidth sqrt(median)."""
    if median == 0:
        raise ValueError(
            "mmd: bandwidth='median' needs rows that differ, at least half of all pairs of rows are equal: "
            "pass a bandwidth"
        )
    return 1 / (2 * median)


def _weights(name: str, rows: Tensor, weights: Tensor | None, unbiased: bool) -> Tensor:
    if weights is None:
        return rows.new_ones(len(rows))
    if bool((weights < 0).any()) or int((weights != 0).sum()) < (2 if unbiased else 1):
        raise ValueError(
            f"mmd: {name} must not be negative, and {'two' if unbiased else 'one'} of them must be more than 0"
        )
    return weights.detach().to(rows.dtype)


def _widened(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
