"""Maximum mean discrepancy of two row sets (spec, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor


def kernel_matrix(x: Tensor, y: Tensor) -> Tensor:
    """k(x_i, y_j) = exp(-|x_i - y_j|^2 / d^2), d the row length.

    Args:
        x: [n, d] floating.
        y: [m, d], dtype and device of `x`.

    Returns:
        [n, m].
    """
    dimension = x.shape[1]
    mean_square = (x[:, None, :] - y[None, :, :]).square().mean(dim=2)
    return torch.exp(-mean_square / dimension)


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """mean k(x, x) + mean k(y, y) - 2 mean k(x, y), means over all pairs (the biased estimator).

    Args:
        x: [n, d] floating, n >= 1.
        y: [m, d], m >= 1, dtype and device of `x`.

    Returns:
        Scalar.
    """
    within = kernel_matrix(x, x).mean() + kernel_matrix(y, y).mean()
    return within - 2.0 * kernel_matrix(x, y).mean()
