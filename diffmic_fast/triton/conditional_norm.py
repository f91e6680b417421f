"""A conditional layer around its matrix product, forward and backward: gamma, BatchNorm of each branch, softplus.

    z = gamma[t_b] * (p + bias)          p = h W^T, a GEMM of PyTorch
    n = (z - mean_s) / sqrt(var_s + eps) * norm_weight + norm_bias
    h = softplus(n)                                                       (docs/algorithm.md, "Denoiser")

A program computes BLOCK_F columns for all branches and rows. Every sum over rows thus belongs to one program and has a
fixed order: there are no atomics, and the running statistics are updated branch after branch. Up to `WHOLE_ROWS` rows
of a branch are one tile in registers: p is read once and h written once. Larger batches are processed in tiles of that
many rows, whose means and squared deviations are merged (Chan); p is then read again, from the L2 cache if it fits.

The backward pass recomputes z and n from p, which is cheaper than to store them. The gradient of gamma adds the rows
of equal timestep: for one tile by a product with the [B, B] matrix of equal timesteps, in float32; for several by a
second kernel, in which the first row of a timestep adds all of its rows in order.

Bytes per row and branch in float32: 8 F forward, 12 F backward, and 4 F of gamma once for all branches; about ten
operations per element, so memory bandwidth bounds both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmic_fast.triton.scalar import device_of, rounded, sigmoid, softplus

WHOLE_ROWS = 64  # rows of a tile, at most: a thread's share of a larger one exceeds its registers


@triton.jit
def tile_mask(row, column, rows, features):
    return (row < rows)[:, None] & (column < features)[None, :]


@triton.jit
def load_rows(source_ptr, row, column, stride, rows, features):
    """A tile [BLOCK_B, BLOCK_F] of a matrix as float32; 0 beyond its edges."""
    mask = tile_mask(row, column, rows, features)
    ptr = source_ptr + row[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_columns(source_ptr, column, features):
    return tl.load(source_ptr + column, mask=column < features, other=0.0).to(tl.float32)


@triton.jit
def load_gamma(table, row, column, rows, features):
    """The rows of gamma for the timesteps of a tile, [BLOCK_B, BLOCK_F] float32."""
    gamma_ptr, timesteps_ptr, gamma_row, timestep_stride = table
    timestep = tl.load(timesteps_ptr + row.to(tl.int64) * timestep_stride, mask=row < rows, other=0)
    mask = tile_mask(row, column, rows, features)
    ptr = gamma_ptr + timestep[:, None] * gamma_row + column[None, :]
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(target_ptr, values, row, column, rows, features):
    """Stores a tile to a contiguous matrix in the dtype of the matrix."""
    mask = tile_mask(row, column, rows, features)
    offset = row[:, None].to(tl.int64) * features + column[None, :]
    tl.store(target_ptr + offset, rounded(values, target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def reciprocal_deviation(variance, eps):
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(variance + eps))


@triton.jit
def tile_statistics(z, row, rows):
    """The mean of a tile's rows and the sum of squared deviations from it, without rows beyond the batch."""
    mask = (row < rows)[:, None]
    count = tl.sum((row < rows).to(tl.float32), axis=0)
    mean = tl.sum(tl.where(mask, z, 0.0), axis=0) / count
    return mean, tl.sum(tl.where(mask, (z - mean[None, :]) * (z - mean[None, :]), 0.0), axis=0)


@triton.jit
def batch_statistics(
    source_ptr, table, linear_bias, column, product_row, rows, features, BLOCK_B: tl.constexpr
):
    """`tile_statistics` of a whole branch, merged over its tiles."""
    mean = tl.zeros(column.shape, tl.float32)
    squares = tl.zeros(column.shape, tl.float32)
    for start in range(0, rows, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        z = load_gamma(table, row, column, rows, features)
        z *= load_rows(source_ptr, row, column, product_row, rows, features) + linear_bias
        tile_mean, tile_squares = tile_statistics(z, row, rows)
        count = tl.minimum(rows - start, BLOCK_B).to(tl.float32)
        share = count / (start + count)
        delta = tile_mean - mean
        mean += delta * share
        squares += tile_squares + delta * delta * (start * share)
    return mean, squares


@triton.jit
def store_output(target_ptr, z, row, column, mean, scale, bias, rows, features):
    """h of a tile: softplus of the normalised rows."""
    n = (z - mean[None, :]) * scale[None, :] + bias[None, :]
    mask = tile_mask(row, column, rows, features)
    ptr = target_ptr + row[:, None].to(tl.int64) * features + column[None, :]
    tl.store(ptr, rounded(softplus(n), target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    product_ptr, timesteps_ptr, bias_ptr, gamma_ptr, norm_weight_ptr, norm_bias_ptr, running_mean_ptr, running_var_ptr,
    h_ptr, statistics_ptr, updated_mean_ptr, updated_var_ptr,
    branches, rows, features, product_branch, product_row, gamma_row, timestep_stride, momentum, eps,
    TRAINING: tl.constexpr, WHOLE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = column < features
    row = tl.arange(0, BLOCK_B)
    table = gamma_ptr, timesteps_ptr, gamma_row, timestep_stride
    linear_bias = load_columns(bias_ptr, column, features)[None, :]
    weight = load_columns(norm_weight_ptr, column, features)
    bias = load_columns(norm_bias_ptr, column, features)
    running_mean = load_columns(running_mean_ptr, column, features)
    running_var = load_columns(running_var_ptr, column, features)
    if WHOLE:
        gamma = load_gamma(table, row, column, rows, features)
    for branch in range(branches):
        source_ptr = product_ptr + tl.cast(branch, tl.int64) * product_branch
        target_ptr = h_ptr + tl.cast(branch, tl.int64) * rows * features
        mean = running_mean
        variance = running_var
        if WHOLE:
            z = gamma * (
                load_rows(source_ptr, row, column, product_row, rows, features) + linear_bias
            )
            if TRAINING:
                mean, squares = tile_statistics(z, row, rows)
        elif TRAINING:
            mean, squares = batch_statistics(
                source_ptr, table, linear_bias, column, product_row, rows, features, BLOCK_B
            )
        if TRAINING:
            variance = squares / rows
            running_mean += momentum * (mean - running_mean)
            running_var += momentum * (squares / (rows - 1) - running_var)
        tl.store(statistics_ptr + branch * features + column, mean, mask=mask)
        tl.store(statistics_ptr + (branches + branch) * features + column, variance, mask=mask)
        scale = weight * reciprocal_deviation(variance, eps)
        if WHOLE:
            store_output(target_ptr, z, row, column, mean, scale, bias, rows, features)
        else:
            for start in range(0, rows, BLOCK_B):
                tile = start + row
                z = load_gamma(table, tile, column, rows, features)
                z *= load_rows(source_ptr, tile, column, product_row, rows, features) + linear_bias
                store_output(target_ptr, z, tile, column, mean, scale, bias, rows, features)
    if TRAINING:
        tl.store(updated_mean_ptr + column, running_mean, mask=mask)
        tl.store(updated_var_ptr + column, running_var, mask=mask)


@triton.jit
def recompute(branch, layer, gamma, row, column, rows, features):
    """Of a tile: p + bias, the standardised z, and the gradient of n. Rows beyond the batch have gamma and gradient 0.

    Args:
        branch: pointers to p and to the gradient of h, their row strides, the branch's mean and 1 / deviation.
        layer: the linear bias [1, BLOCK_F], the norm's weight and bias [BLOCK_F].
        gamma: [BLOCK_B, BLOCK_F].
    """
    source_ptr, above_ptr, product_row, grad_row, mean, deviation = branch
    linear_bias, weight, bias = layer
    shifted = load_rows(source_ptr, row, column, product_row, rows, features) + linear_bias
    standardised = (gamma * shifted - mean[None, :]) * deviation[None, :]
    n = standardised * weight[None, :] + bias[None, :]
    grad = load_rows(above_ptr, row, column, grad_row, rows, features) * sigmoid(n)
    return shifted, standardised, grad


@triton.jit
def through_norm(grad, standardised, sums, scale, rows, TRAINING: tl.constexpr):
    """The gradient of z from that of n; in training the mean and the deviation depend on every row."""
    if TRAINING:
        sum_grad, sum_standardised = sums
        grad -= (sum_grad[None, :] + standardised * sum_standardised[None, :]) / rows
    return grad * scale[None, :]


@triton.jit
def sum_tiles(branch, layer, table, column, rows, features, BLOCK_B: tl.constexpr):
    """The sums over rows of the gradient of n, and of its product with the standardised z."""
    sum_grad = tl.zeros(column.shape, tl.float32)
    sum_standardised = tl.zeros(column.shape, tl.float32)
    for start in range(0, rows, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        gamma = load_gamma(table, row, column, rows, features)
        _, standardised, grad = recompute(branch, layer, gamma, row, column, rows, features)
        sum_grad += tl.sum(grad, axis=0)
        sum_standardised += tl.sum(grad * standardised, axis=0)
    return sum_grad, sum_standardised


@triton.jit
def store_gamma_gradient(
    grad_gamma_ptr, timesteps_ptr, timestep_stride, grad, column, rows, features
):
    """The gradient of gamma from that of a whole batch: the first row of a timestep stores the sum of its rows."""
    row = tl.arange(0, grad.shape[0])
    timestep = tl.load(timesteps_ptr + row * timestep_stride, mask=row < rows, other=-1)
    same = timestep[:, None] == timestep[None, :]
    earlier = tl.sum((same & (row[None, :] < row[:, None])).to(tl.int32), axis=1)
    total = tl.dot(same.to(tl.float32), grad, input_precision="ieee")
    mask = ((row < rows) & (earlier == 0))[:, None] & (column < features)[None, :]
    ptr = grad_gamma_ptr + timestep[:, None] * features + column[None, :]
    tl.store(ptr, total, mask=mask)


@triton.jit
def backward_kernel(
    grad_ptr, product_ptr, timesteps_ptr, bias_ptr, gamma_ptr, norm_weight_ptr, norm_bias_ptr, statistics_ptr,
    grad_product_ptr, grad_bias_ptr,
    grad_gamma_ptr,  # WHOLE: [rows of gamma, F], of which rows that occur are stored; else the shares [S, B, F]
    grad_norm_weight_ptr, grad_norm_bias_ptr,
    branches, rows, features, grad_branch, grad_row, product_branch, product_row, gamma_row, timestep_stride, eps,
    TRAINING: tl.constexpr, WHOLE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = column < features
    row = tl.arange(0, BLOCK_B)
    table = gamma_ptr, timesteps_ptr, gamma_row, timestep_stride
    linear_bias = load_columns(bias_ptr, column, features)[None, :]
    weight = load_columns(norm_weight_ptr, column, features)
    bias = load_columns(norm_bias_ptr, column, features)
    layer = linear_bias, weight, bias
    grad_bias = tl.zeros((BLOCK_F,), tl.float32)
    grad_norm_weight = tl.zeros((BLOCK_F,), tl.float32)
    grad_norm_bias = tl.zeros((BLOCK_F,), tl.float32)
    if WHOLE:
        gamma = load_gamma(table, row, column, rows, features)
        grad_gamma = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    for s in range(branches):
        source_ptr = product_ptr + tl.cast(s, tl.int64) * product_branch
        above_ptr = grad_ptr + tl.cast(s, tl.int64) * grad_branch
        below_ptr = grad_product_ptr + tl.cast(s, tl.int64) * rows * features
        mean = load_columns(statistics_ptr + s * features, column, features)
        variance = load_columns(statistics_ptr + (branches + s) * features, column, features)
        deviation = reciprocal_deviation(variance, eps)
        scale = weight * deviation
        branch = source_ptr, above_ptr, product_row, grad_row, mean, deviation
        if WHOLE:
            shifted, standardised, grad = recompute(
                branch, layer, gamma, row, column, rows, features
            )
            sums = tl.sum(grad, axis=0), tl.sum(grad * standardised, axis=0)
            grad = through_norm(grad, standardised, sums, scale, rows, TRAINING)
            grad_bias += tl.sum(grad * gamma, axis=0)
            grad_gamma += grad * shifted
            store_rows(below_ptr, grad * gamma, row, column, rows, features)
        else:
            sums = sum_tiles(branch, layer, table, column, rows, features, BLOCK_B)
            shares_ptr = grad_gamma_ptr + tl.cast(s, tl.int64) * rows * features
            for start in range(0, rows, BLOCK_B):
                tile = start + row
                gamma = load_gamma(table, tile, column, rows, features)
                shifted, standardised, grad = recompute(
                    branch, layer, gamma, tile, column, rows, features
                )
                grad = through_norm(grad, standardised, sums, scale, rows, TRAINING)
                grad_bias += tl.sum(grad * gamma, axis=0)
                store_rows(below_ptr, grad * gamma, tile, column, rows, features)
                store_rows(shares_ptr, grad * shifted, tile, column, rows, features)
        grad_norm_bias += sums[0]
        grad_norm_weight += sums[1]
    tl.store(grad_bias_ptr + column, grad_bias, mask=mask)
    tl.store(grad_norm_weight_ptr + column, grad_norm_weight, mask=mask)
    tl.store(grad_norm_bias_ptr + column, grad_norm_bias, mask=mask)
    if WHOLE:
        store_gamma_gradient(
            grad_gamma_ptr, timesteps_ptr, timestep_stride, grad_gamma, column, rows, features
        )


@triton.jit
def gamma_kernel(
    shares_ptr, timesteps_ptr, grad_gamma_ptr, branches, rows, features, timestep_stride,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The gradient of gamma from the shares [S, B, F]: the program of the first row of a timestep adds all its rows."""
    first = tl.program_id(1)
    timestep = tl.load(timesteps_ptr + tl.cast(first, tl.int64) * timestep_stride)
    earlier = 0
    for start in range(0, first, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        ptr = timesteps_ptr + row.to(tl.int64) * timestep_stride
        earlier += tl.sum(
            (tl.load(ptr, mask=row < first, other=-1) == timestep).to(tl.int32), axis=0
        )
    if earlier == 0:
        column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
        mask = column < features
        total = tl.zeros((BLOCK_F,), tl.float32)
        for row in range(first, rows):
            if tl.load(timesteps_ptr + tl.cast(row, tl.int64) * timestep_stride) == timestep:
                for branch in range(branches):
                    ptr = shares_ptr + (tl.cast(branch, tl.int64) * rows + row) * features + column
                    total += tl.load(ptr, mask=mask, other=0.0)
        tl.store(grad_gamma_ptr + timestep * features + column, total, mask=mask)


def blocks(rows: int, limit: int) -> tuple[int, int]:
    """Rows and columns of a tile: at most 1024 elements, 8 per thread, so that they stay in registers."""
    block_b = 32 if rows <= 32 and limit >= 32 else limit
    return block_b, min(1024 // block_b, 32)


def forward(
    product: Tensor,
    timesteps: Tensor,
    bias: Tensor,
    gamma: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    h: Tensor,
    statistics: Tensor,
    updated_mean: Tensor | None,
    updated_var: Tensor | None,
    *,
    momentum: float,
    eps: float,
    limit: int = WHOLE_ROWS,
) -> None:
    """softplus(BN(gamma_t * (product + bias))), with batch statistics if `updated_mean` is given.

    Args:
        product: [S, B, F] float32, bfloat16 or float16, with contiguous rows.
        timesteps: [B] or [1] int64.
        bias, norm_weight, norm_bias, running_mean, running_var: [F] floating, contiguous.
        gamma: [T + 1, F] floating, with contiguous rows.
        h: [S, B, F] floating, contiguous, written.
        statistics: [2, S, F] float32, written: the mean and the biased variance that were used.
        updated_mean, updated_var: [F] float32, written in training (B >= 2), else None.
        momentum, eps: as in BatchNorm.
        limit: rows of a tile, a power of two, at least 16.
    """
    branches, rows, features = product.shape
    if product.numel() == 0:
        return
    block_b, block_f = blocks(rows, limit)
    training = updated_mean is not None
    with device_of(product):
        forward_kernel[(triton.cdiv(features, block_f),)](
            product, timesteps, bias, gamma, norm_weight, norm_bias, running_mean, running_var, h, statistics,
            updated_mean if training else statistics, updated_var if training else statistics,
            branches, rows, features, product.stride(0), product.stride(1), gamma.stride(0),
            timesteps.stride(0) if timesteps.shape[0] > 1 else 0, momentum, eps,
            TRAINING=training, WHOLE=rows <= block_b, BLOCK_B=block_b, BLOCK_F=block_f, num_warps=4,
        )  # fmt: skip


def backward(
    grad: Tensor,
    product: Tensor,
    timesteps: Tensor,
    bias: Tensor,
    gamma: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    statistics: Tensor,
    gradients: Sequence[Tensor],
    *,
    training: bool,
    eps: float,
    limit: int = WHOLE_ROWS,
) -> None:
    """Gradients of `forward`.

    Args:
        grad: [S, B, F] floating, the gradient of h, with contiguous rows.
        product, timesteps, bias, gamma, norm_weight, norm_bias, eps, limit: as in `forward`.
        statistics: written by `forward`.
        gradients: written, contiguous: of product [S, B, F] floating, bias [F], gamma [T + 1, F] (zeros before),
            norm_weight [F] and norm_bias [F], float32.
        training: whether `forward` used batch statistics.
    """
    branches, rows, features = product.shape
    grad_product, grad_bias, grad_gamma, grad_norm_weight, grad_norm_bias = gradients
    if product.numel() == 0:
        for gradient in (grad_bias, grad_norm_weight, grad_norm_bias):
            gradient.zero_()
        return
    block_b, block_f = blocks(rows, limit)
    whole = rows <= block_b
    shares = grad_gamma if whole else torch.empty(
        (branches, rows, features), dtype=torch.float32, device=product.device
    )  # fmt: skip
    timestep_stride = timesteps.stride(0) if timesteps.shape[0] > 1 else 0
    with device_of(product):
        backward_kernel[(triton.cdiv(features, block_f),)](
            grad, product, timesteps, bias, gamma, norm_weight, norm_bias, statistics,
            grad_product, grad_bias, shares, grad_norm_weight, grad_norm_bias,
            branches, rows, features, grad.stride(0), grad.stride(1), product.stride(0), product.stride(1),
            gamma.stride(0), timestep_stride, eps,
            TRAINING=training, WHOLE=whole, BLOCK_B=block_b, BLOCK_F=block_f, num_warps=4,
        )  # fmt: skip
        if not whole:
            gamma_kernel[(triton.cdiv(features, 128), rows)](
                shares, timesteps, grad_gamma, branches, rows, features, timestep_stride,
                BLOCK_B=128, BLOCK_F=128, num_warps=4,
            )  # fmt: skip
