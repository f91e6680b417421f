"""A whole conditional layer in evaluation mode: a matrix product with gamma, BatchNorm and softplus in its epilogue.

    out[m, n] = softplus(BN_n(gamma[t_m, n] * (sum_k h[m, k] W[n, k] + b_n)))      (docs/algorithm.md, "Denoiser")

A program computes a tile of `out`, BLOCK_M x BLOCK_N, over the whole width. Programs are ordered in groups of GROUP row
tiles by all column tiles, so that those which run at the same time share their tiles of h and W in the L2 cache.

2 M N K operations over (M K + N K + M N) elements: for N = K = 6144 in bfloat16 an H100 is bound by the 75 MB of
weights below about 300 rows and by its tensor cores above. The epilogue processes a large tile in PARTS parts, since
the registers do not hold its rows of gamma beside its sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.triton.scalar import device_of, factor, rounded, softplus


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def epilogue(total, row, first, timestep, pointers, rows, features, eps, gamma_row):
    """Applies the rest of the layer to the columns of `total`, from column `first` on, and stores them."""
    gamma_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, variance_ptr, out_ptr = pointers
    column = first + tl.arange(0, total.shape[1])
    column_mask = column < features
    mask = (row < rows)[:, None] & column_mask[None, :]
    gamma = tl.load(
        gamma_ptr + timestep[:, None] * gamma_row + column[None, :], mask=mask, other=0.0
    )
    linear_bias = tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    variance = tl.load(variance_ptr + column, mask=column_mask, other=1.0).to(tl.float32)
    weight = tl.load(norm_weight_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    scale = tl.math.div_rn(weight, tl.math.sqrt_rn(variance + eps))
    z = gamma.to(tl.float32) * (total + linear_bias[None, :])
    n = (z - mean[None, :]) * scale[None, :] + bias[None, :]
    ptr = out_ptr + row[:, None].to(tl.int64) * features + column[None, :]
    tl.store(ptr, rounded(softplus(n), out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_kernel(
    h_ptr, weight_ptr, bias_ptr, gamma_ptr, timesteps_ptr, norm_weight_ptr, norm_bias_ptr, running_mean_ptr,
    running_var_ptr, out_ptr, rows, batch, features, width, eps,
    h_row, h_column, weight_row, weight_column, gamma_row, timestep_stride,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(features, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    group_rows = min(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    row = (group * GROUP + within % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = within // group_rows * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    column_mask = column < features

    k = tl.arange(0, BLOCK_K)
    a_ptr = h_ptr + row[:, None].to(tl.int64) * h_row + k[None, :].to(tl.int64) * h_column
    b_ptr = (
        weight_ptr
        + column[None, :].to(tl.int64) * weight_row
        + k[:, None].to(tl.int64) * weight_column
    )
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        k_mask = k < width - start
        a = tl.load(a_ptr, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        b = tl.load(b_ptr, mask=column_mask[None, :] & k_mask[:, None], other=0.0)
        total = tl.dot(factor(a), factor(b), total, input_precision=PRECISION)
        a_ptr += BLOCK_K * h_column
        b_ptr += BLOCK_K * weight_column

    timestep = tl.load(
        timesteps_ptr + (row % batch).to(tl.int64) * timestep_stride, mask=row_mask, other=0
    )
    pointers = (
        gamma_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, running_mean_ptr, running_var_ptr, out_ptr
    )  # fmt: skip
    first = within // group_rows * BLOCK_N
    if PARTS == 1:
        epilogue(total, row, first, timestep, pointers, rows, features, eps, gamma_row)
    else:
        left, right = halves(total)
        for half in tl.static_range(2):
            part = left if half == 0 else right
            begin = first + half * (BLOCK_N // 2)
            if PARTS == 2:
                epilogue(part, row, begin, timestep, pointers, rows, features, eps, gamma_row)
            else:
                one, two = halves(part)
                epilogue(one, row, begin, timestep, pointers, rows, features, eps, gamma_row)
                begin += BLOCK_N // 4
                epilogue(two, row, begin, timestep, pointers, rows, features, eps, gamma_row)


def _config(m: int, n: int, k: int, warps: int, stages: int, parts: int = 1) -> triton.Config:
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, "PARTS": parts}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


# The tiles of each kind of product, from few rows to many. From sm_90 on, 16-bit tiles of at least 64 rows use
# warp-group matrix instructions (wgmma).
CONFIGS = {
    "half": [
        _config(16, 64, 128, 4, 5),
        _config(32, 64, 128, 4, 4),
        _config(64, 64, 64, 4, 4),
        _config(64, 128, 64, 4, 4, 2),
        _config(128, 128, 64, 8, 3, 2),
        _config(128, 256, 32, 8, 4, 4),
    ],
    "tf32": [
        _config(16, 64, 64, 4, 4),
        _config(64, 64, 32, 4, 4),
        _config(64, 128, 32, 4, 4, 2),
        _config(128, 128, 32, 8, 3, 2),
    ],
    "ieee": [
        _config(16, 64, 32, 4, 3),
        _config(32, 64, 32, 4, 3),
        _config(64, 64, 16, 4, 3),
        _config(128, 64, 16, 8, 3),
    ],
}
# Programs that occupy a GPU: an A100 has 108 multiprocessors, an H100 132.
_MANY_PROGRAMS = 128


def configuration(kind: str, rows: int, features: int) -> triton.Config:
    """The tile of a product: a function of its sizes alone, so that its bits are the same in every run.

    The tile determines the order of a sum, and a choice by timing, as `triton.autotune` makes it, differs between runs.
    `python -m benchmarks engines` times every configuration beside the one chosen here.

    Args:
        kind: a key of `CONFIGS`.
        rows, features: of the output.

    Returns:
        The largest tile of which there are enough to occupy a GPU, of those with no more rows than the product (rounded
        up to a power of two); if there are never enough, the one with the most programs, and of these the largest.
    """
    fitting = [
        config
        for i, config in enumerate(CONFIGS[kind])
        if i == 0 or config.kwargs["BLOCK_M"] <= triton.next_power_of_2(rows)
    ]

    def programs(config: triton.Config) -> int:
        return min(_programs(config.kwargs, rows, features), _MANY_PROGRAMS)

    return max(reversed(fitting), key=programs)  # the first of equals, the largest tile


def _programs(sizes: dict[str, int], rows: int, features: int) -> int:
    return triton.cdiv(rows, sizes["BLOCK_M"]) * triton.cdiv(features, sizes["BLOCK_N"])


def conditional_linear(
    h: Tensor,
    layer: ConditionalLayer,
    timesteps: Tensor,
    *,
    eps: float,
    tf32: bool,
    config: triton.Config | None = None,
) -> Tensor:
    """softplus(BN(gamma_t * (W h + b))) with the running statistics.

    Args:
        h: [..., B, K] float32, bfloat16 or float16, any strides.
        layer: weight [N, K] in the dtype of `h`, any strides; gamma with contiguous rows; vectors contiguous.
        timesteps: [B] or [1] int64.
        eps: of BatchNorm.
        tf32: whether float32 is multiplied as TF32.
        config: one of `CONFIGS`; by default that of `configuration`.

    Returns:
        [..., B, N] in the dtype of `h`.
    """
    out = h.new_empty((*h.shape[:-1], layer.weight.shape[0]))
    launch(h, layer, timesteps, out, eps, tf32=tf32, config=config)
    return out


def launch(
    h: Tensor,
    layer: ConditionalLayer,
    timesteps: Tensor,
    out: Tensor,
    eps: float,
    *,
    tf32: bool = False,
    config: triton.Config | None = None,
) -> None:
    """Compute `conditional_linear` into `out`, [..., B, N] contiguous, float32 or the dtype of `h`."""
    if out.numel() == 0:
        return
    batch, width, features = h.shape[-2], h.shape[-1], layer.weight.shape[0]
    flat = h.reshape(-1, width)
    rows = flat.shape[0]
    kind = "half" if h.dtype != torch.float32 else "tf32" if tf32 else "ieee"
    precision = "tf32" if kind == "tf32" else "ieee"
    shared = timesteps.shape[0] == 1
    arguments = (
        flat, layer.weight, layer.bias, layer.gamma, timesteps, layer.norm_weight, layer.norm_bias,
        layer.running_mean, layer.running_var, out, rows, batch, features, width, eps,
        *flat.stride(), *layer.weight.stride(), layer.gamma.stride(0), 0 if shared else timesteps.stride(0),
        precision,
    )  # fmt: skip
    if config is None:
        config = configuration(kind, rows, features)
    with device_of(h):
        layer_kernel[(_programs(config.kwargs, rows, features),)](
            *arguments, **config.kwargs, num_warps=config.num_warps, num_stages=config.num_stages
        )
