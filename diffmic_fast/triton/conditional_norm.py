"""What stands around a conditional layer's product, forward and backward: gamma, BatchNorm of each stream, softplus.

    z = gamma[t_b] * (p + bias)          p = h W^T, from the vendor's library
    n = (z - mean_s) / sqrt(var_s + eps) * norm_weight + norm_bias
    h = softplus(n)                                                                     (spec, section 4)

A program has BLOCK_F columns of all streams and rows, so every sum over rows is its own, in a fixed order: nothing is
added atomically, and the running statistics are updated stream after stream. Up to `WHOLE_ROWS` rows a batch is one
tile, kept in registers: p is read once and h written once. A larger one goes through in tiles of as many rows, whose
means and squares are merged (Chan), and p is read again, from the level-2 cache where it fits.

Backward computes z and n again from p, which costs less than keeping them. gamma's gradient needs the rows of equal
timestep added: for one tile a product with the matrix of equal timesteps, [B, B], in float32; for more a second kernel,
in which the first row of a timestep adds up all of its rows in order.

Bytes a row and stream in float32: 8 F forward, 12 F backward, and 4 F of gamma once for all streams; some ten
operations an element, so memory bounds both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmic_fast.triton.scalar import device_of, rounded, sigmoid, softplus

WHOLE_ROWS = (
    64  # rows of one tile; with more, a thread's share of a tile does not fit into its registers
)


@triton.jit
def load_rows(source, row, column, stride, rows, features):
    """[BLOCK_B, BLOCK_F] of a matrix as float32, 0 beyond its edges."""
    there = (row < rows)[:, None] & (column < features)[None, :]
    place = source + row[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(place, mask=there, other=0.0).to(tl.float32)


@triton.jit
def load_columns(source, column, features):
    return tl.load(source + column, mask=column < features, other=0.0).to(tl.float32)


@triton.jit
def load_gamma(gamma, timesteps, row, column, gamma_row, timestep_stride, rows, features):
    """gamma's rows of a tile's timesteps, [BLOCK_B, BLOCK_F] float32."""
    timestep = tl.load(timesteps + row.to(tl.int64) * timestep_stride, mask=row < rows, other=0)
    there = (row < rows)[:, None] & (column < features)[None, :]
    place = gamma + timestep[:, None] * gamma_row + column[None, :]
    return tl.load(place, mask=there, other=0.0).to(tl.float32)


@triton.jit
def reciprocal_deviation(variance, eps):
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(variance + eps))


@triton.jit
def tile_statistics(z, row, rows):
    """Mean of a tile's rows, and the sum of squares around it; rows beyond the batch do not count."""
    there = (row < rows)[:, None]
    count = tl.sum((row < rows).to(tl.float32), axis=0)
    mean = tl.sum(tl.where(there, z, 0.0), axis=0) / count
    return mean, tl.sum(tl.where(there, (z - mean[None, :]) * (z - mean[None, :]), 0.0), axis=0)


@triton.jit
def write(target, z, row, column, mean, steep, height, rows, features):
    """softplus of the normed rows of a tile."""
    n = (z - mean[None, :]) * steep[None, :] + height[None, :]
    there = (row < rows)[:, None] & (column < features)[None, :]
    place = target + row[:, None].to(tl.int64) * features + column[None, :]
    tl.store(place, rounded(softplus(n), target.dtype.element_ty), mask=there)


@triton.jit
def forward_kernel(
    product,
    timesteps,
    bias,
    gamma,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    h,
    statistics,
    updated_mean,
    updated_var,
    streams,
    rows,
    features,
    product_stream,
    product_row,
    gamma_row,
    timestep_stride,
    momentum,
    eps,
    TRAINING: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < features
    row = tl.arange(0, BLOCK_B)
    offset = load_columns(bias, column, features)[None, :]
    slope = load_columns(norm_weight, column, features)
    height = load_columns(norm_bias, column, features)
    kept_mean = load_columns(running_mean, column, features)
    kept_var = load_columns(running_var, column, features)
    if WHOLE:
        scale = load_gamma(
            gamma, timesteps, row, column, gamma_row, timestep_stride, rows, features
        )
    for stream in range(streams):
        source = product + tl.cast(stream, tl.int64) * product_stream
        target = h + tl.cast(stream, tl.int64) * rows * features
        mean = kept_mean
        variance = kept_var
        if WHOLE:
            z = scale * (load_rows(source, row, column, product_row, rows, features) + offset)
            if TRAINING:
                mean, squares = tile_statistics(z, row, rows)
        elif TRAINING:
            mean = tl.zeros((BLOCK_F,), tl.float32)
            squares = tl.zeros((BLOCK_F,), tl.float32)
            for start in range(0, rows, BLOCK_B):
                tile = start + row
                part = load_gamma(
                    gamma, timesteps, tile, column, gamma_row, timestep_stride, rows, features
                )
                part *= load_rows(source, tile, column, product_row, rows, features) + offset
                part_mean, part_squares = tile_statistics(part, tile, rows)
                count = tl.minimum(rows - start, BLOCK_B).to(tl.float32)
                share = count / (start + count)
                apart = part_mean - mean
                mean += apart * share
                squares += part_squares + apart * apart * (start * share)
        if TRAINING:
            variance = squares / rows
            kept_mean += momentum * (mean - kept_mean)
            kept_var += momentum * (squares / (rows - 1) - kept_var)
        tl.store(statistics + stream * features + column, mean, mask=inside)
        tl.store(statistics + (streams + stream) * features + column, variance, mask=inside)
        steep = slope * reciprocal_deviation(variance, eps)
        if WHOLE:
            write(target, z, row, column, mean, steep, height, rows, features)
        else:
            for start in range(0, rows, BLOCK_B):
                tile = start + row
                z = load_gamma(
                    gamma, timesteps, tile, column, gamma_row, timestep_stride, rows, features
                )
                z *= load_rows(source, tile, column, product_row, rows, features) + offset
                write(target, z, tile, column, mean, steep, height, rows, features)
    if TRAINING:
        tl.store(updated_mean + column, kept_mean, mask=inside)
        tl.store(updated_var + column, kept_var, mask=inside)


@triton.jit
def slopes(
    source,
    above,
    scale,
    offset,
    mean,
    deviation,
    slope,
    height,
    row,
    column,
    product_row,
    grad_row,
    rows,
    features,
):
    """Of a tile: p + bias, z centred and scaled, the gradient of n. Rows beyond the batch have gamma and gradient 0."""
    shifted = load_rows(source, row, column, product_row, rows, features) + offset
    centred = (scale * shifted - mean[None, :]) * deviation[None, :]
    n = centred * slope[None, :] + height[None, :]
    grad = load_rows(above, row, column, grad_row, rows, features) * sigmoid(n)
    return shifted, centred, grad


@triton.jit
def through_norm(grad, centred, sum_grad, sum_centred, steep, rows, TRAINING: tl.constexpr):
    """The gradient of z, from that of n: in training the mean and the deviation are functions of every row."""
    if TRAINING:
        grad -= (sum_grad[None, :] + centred * sum_centred[None, :]) / rows
    return grad * steep[None, :]


@triton.jit
def backward_kernel(
    grad,
    product,
    timesteps,
    bias,
    gamma,
    norm_weight,
    norm_bias,
    statistics,
    grad_product,
    grad_bias,
    grad_gamma,  # WHOLE: the table, of which rows that occur are written; else each stream's and row's share
    grad_norm_weight,
    grad_norm_bias,
    streams,
    rows,
    features,
    grad_stream,
    grad_row,
    product_stream,
    product_row,
    gamma_row,
    timestep_stride,
    eps,
    TRAINING: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < features
    row = tl.arange(0, BLOCK_B)
    offset = load_columns(bias, column, features)[None, :]
    slope = load_columns(norm_weight, column, features)
    height = load_columns(norm_bias, column, features)
    of_bias = tl.zeros((BLOCK_F,), tl.float32)
    of_slope = tl.zeros((BLOCK_F,), tl.float32)
    of_height = tl.zeros((BLOCK_F,), tl.float32)
    if WHOLE:
        scale = load_gamma(
            gamma, timesteps, row, column, gamma_row, timestep_stride, rows, features
        )
        of_scale = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    for stream in range(streams):
        source = product + tl.cast(stream, tl.int64) * product_stream
        above = grad + tl.cast(stream, tl.int64) * grad_stream
        below = grad_product + tl.cast(stream, tl.int64) * rows * features
        mean = load_columns(statistics + stream * features, column, features)
        variance = load_columns(statistics + (streams + stream) * features, column, features)
        deviation = reciprocal_deviation(variance, eps)
        steep = slope * deviation
        if WHOLE:
            shifted, centred, g = slopes(
                source, above, scale, offset, mean, deviation, slope, height, row, column, product_row, grad_row, rows,
                features,
            )  # fmt: skip
            sum_grad = tl.sum(g, axis=0)
            sum_centred = tl.sum(g * centred, axis=0)
            g = through_norm(g, centred, sum_grad, sum_centred, steep, rows, TRAINING)
            of_bias += tl.sum(g * scale, axis=0)
            of_scale += g * shifted
            place = row[:, None].to(tl.int64) * features + column[None, :]
            there = (row < rows)[:, None] & inside[None, :]
            tl.store(below + place, rounded(g * scale, grad_product.dtype.element_ty), mask=there)
        else:
            sum_grad = tl.zeros((BLOCK_F,), tl.float32)
            sum_centred = tl.zeros((BLOCK_F,), tl.float32)
            for start in range(0, rows, BLOCK_B):
                tile = start + row
                its = load_gamma(
                    gamma, timesteps, tile, column, gamma_row, timestep_stride, rows, features
                )
                _, centred, g = slopes(
                    source, above, its, offset, mean, deviation, slope, height, tile, column, product_row, grad_row,
                    rows, features,
                )  # fmt: skip
                sum_grad += tl.sum(g, axis=0)
                sum_centred += tl.sum(g * centred, axis=0)
            for start in range(0, rows, BLOCK_B):
                tile = start + row
                its = load_gamma(
                    gamma, timesteps, tile, column, gamma_row, timestep_stride, rows, features
                )
                shifted, centred, g = slopes(
                    source, above, its, offset, mean, deviation, slope, height, tile, column, product_row, grad_row,
                    rows, features,
                )  # fmt: skip
                g = through_norm(g, centred, sum_grad, sum_centred, steep, rows, TRAINING)
                of_bias += tl.sum(g * its, axis=0)
                place = tile[:, None].to(tl.int64) * features + column[None, :]
                there = (tile < rows)[:, None] & inside[None, :]
                tl.store(below + place, rounded(g * its, grad_product.dtype.element_ty), mask=there)
                share = grad_gamma + tl.cast(stream, tl.int64) * rows * features
                tl.store(share + place, g * shifted, mask=there)
        of_height += sum_grad
        of_slope += sum_centred
    tl.store(grad_bias + column, of_bias, mask=inside)
    tl.store(grad_norm_weight + column, of_slope, mask=inside)
    tl.store(grad_norm_bias + column, of_height, mask=inside)
    if WHOLE:
        # Every row of a timestep gets the sum over all of its rows, and the first of them writes it.
        other = tl.arange(0, BLOCK_B)
        timestep = tl.load(timesteps + row * timestep_stride, mask=row < rows, other=-1)
        its = tl.load(timesteps + other * timestep_stride, mask=other < rows, other=-1)
        same = timestep[:, None] == its[None, :]
        before = tl.sum((same & (other[None, :] < row[:, None])).to(tl.int32), axis=1)
        total = tl.dot(same.to(tl.float32), of_scale, input_precision="ieee")
        there = ((row < rows) & (before == 0))[:, None] & inside[None, :]
        place = grad_gamma + timestep[:, None] * features + column[None, :]
        tl.store(place, total, mask=there)


@triton.jit
def gamma_kernel(
    shares,
    timesteps,
    grad_gamma,
    streams,
    rows,
    features,
    timestep_stride,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """gamma's gradient from each stream's and row's share: the first row of a timestep adds up all rows of it."""
    first = tl.program_id(1)
    timestep = tl.load(timesteps + tl.cast(first, tl.int64) * timestep_stride)
    before = 0
    for start in range(0, first, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        its = tl.load(timesteps + row.to(tl.int64) * timestep_stride, mask=row < first, other=-1)
        before += tl.sum((its == timestep).to(tl.int32), axis=0)
    if before == 0:
        column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = column < features
        total = tl.zeros((BLOCK_F,), tl.float32)
        for row in range(first, rows):
            if tl.load(timesteps + tl.cast(row, tl.int64) * timestep_stride) == timestep:
                for stream in range(streams):
                    place = (tl.cast(stream, tl.int64) * rows + row) * features + column
                    total += tl.load(shares + place, mask=inside, other=0.0)
        tl.store(grad_gamma + timestep * features + column, total, mask=inside)


def blocks(rows: int, limit: int) -> tuple[int, int]:
    """Rows and columns of a tile: 1024 elements at most, 8 a thread, so that they stay in registers."""
    down = 32 if rows <= 32 and limit >= 32 else limit
    return down, min(1024 // down, 32)


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
    """softplus(BN(gamma_t * (product + bias))), with the batch's statistics where running ones are to be updated.

    Args:
        product: [S, B, F] float32, bfloat16 or float16, columns with unit stride.
        timesteps: [B] or [1] int64.
        bias, norm_weight, norm_bias, running_mean, running_var: [F] floating, contiguous.
        gamma: [rows, F] floating, columns with unit stride.
        h: [S, B, F] floating, contiguous, written.
        statistics: [2, S, F] float32, written: the mean and the biased variance used.
        updated_mean, updated_var: [F] float32, written in training (B >= 2), else None.
        momentum, eps: BatchNorm's.
        limit: rows of a tile, a power of two, at least 16.
    """
    streams, rows, features = product.shape
    if product.numel() == 0:
        return
    down, across = blocks(rows, limit)
    training = updated_mean is not None
    with device_of(product):
        forward_kernel[(triton.cdiv(features, across),)](
            product, timesteps, bias, gamma, norm_weight, norm_bias, running_mean, running_var, h, statistics,
            updated_mean if training else statistics, updated_var if training else statistics,
            streams, rows, features, product.stride(0), product.stride(1), gamma.stride(0),
            timesteps.stride(0) if timesteps.shape[0] > 1 else 0, momentum, eps,
            TRAINING=training, WHOLE=rows <= down, BLOCK_B=down, BLOCK_F=across, num_warps=4,
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
        grad: [S, B, F] floating, that of h, columns with unit stride.
        product … norm_bias, eps, limit: as in `forward`.
        statistics: those that `forward` wrote.
        gradients: written, contiguous: those of product [S, B, F] floating, bias [F], gamma [rows, F] zeros before,
            norm_weight [F] and norm_bias [F], float32.
        training: whether the statistics are those of the batch.
    """
    streams, rows, features = product.shape
    of_product, of_bias, of_gamma, of_norm_weight, of_norm_bias = gradients
    if product.numel() == 0:
        for gradient in (of_bias, of_norm_weight, of_norm_bias):
            gradient.zero_()
        return
    down, across = blocks(rows, limit)
    whole = rows <= down
    shares = of_gamma if whole else torch.empty(
        (streams, rows, features), dtype=torch.float32, device=product.device
    )  # fmt: skip
    timestep_stride = timesteps.stride(0) if timesteps.shape[0] > 1 else 0
    with device_of(product):
        backward_kernel[(triton.cdiv(features, across),)](
            grad, product, timesteps, bias, gamma, norm_weight, norm_bias, statistics,
            of_product, of_bias, shares, of_norm_weight, of_norm_bias,
            streams, rows, features, grad.stride(0), grad.stride(1), product.stride(0), product.stride(1),
            gamma.stride(0), timestep_stride, eps,
            TRAINING=training, WHOLE=whole, BLOCK_B=down, BLOCK_F=across, num_warps=4,
        )  # fmt: skip
        if not whole:
            gamma_kernel[(triton.cdiv(features, 128), rows)](
                shares, timesteps, of_gamma, streams, rows, features, timestep_stride,
                BLOCK_B=128, BLOCK_F=128, num_warps=4,
            )  # fmt: skip
