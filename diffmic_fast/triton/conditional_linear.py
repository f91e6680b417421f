"""A conditional layer in eval mode, whole: the product, and in its epilogue gamma, BatchNorm and softplus.

    out[m, n] = softplus(BN_n(gamma[t_m, n] * (sum_k h[m, k] W[n, k] + b_n)))            (spec, section 4)

A program makes one tile of `out`, BLOCK_M x BLOCK_N, over the whole width. Programs go down GROUP tiles of rows before
they step to the next columns, so that those that run at one time share what they read of h and W in the cache.

2 M N K operations over (M K + N K + M N) elements: at N = K = 6144 in bfloat16 the weights' 75 MB bound it below some
300 rows of an H100, the matrix units above. The epilogue goes over the tile in PARTS parts, for the rows of gamma of a
whole large tile would not fit into the registers beside its sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.triton.scalar import INTERPRETED, device_of, factor, rounded, softplus


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    height: tl.constexpr = tile.shape[0]
    across: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (height, 2, across // 2)), (0, 2, 1)))


@triton.jit
def finish(total, row, first, timestep, pointers, rows, features, eps, gamma_row):
    """Epilogue of the columns of `total`, the first of which is `first`."""
    gamma, bias, norm_weight, norm_bias, running_mean, running_var, out = pointers
    column = first + tl.arange(0, total.shape[1])
    column_there = column < features
    there = (row < rows)[:, None] & column_there[None, :]
    scale = tl.load(gamma + timestep[:, None] * gamma_row + column[None, :], mask=there, other=0.0)
    offset = tl.load(bias + column, mask=column_there, other=0.0).to(tl.float32)
    mean = tl.load(running_mean + column, mask=column_there, other=0.0).to(tl.float32)
    variance = tl.load(running_var + column, mask=column_there, other=1.0).to(tl.float32)
    slope = tl.load(norm_weight + column, mask=column_there, other=0.0).to(tl.float32)
    height = tl.load(norm_bias + column, mask=column_there, other=0.0).to(tl.float32)
    steep = tl.math.div_rn(slope, tl.math.sqrt_rn(variance + eps))
    z = scale.to(tl.float32) * (total + offset[None, :])
    n = (z - mean[None, :]) * steep[None, :] + height[None, :]
    place = out + row[:, None].to(tl.int64) * features + column[None, :]
    tl.store(place, rounded(softplus(n), out.dtype.element_ty), mask=there)


@triton.jit
def layer_kernel(
    h,
    weight,
    bias,
    gamma,
    timesteps,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    out,
    rows,
    batch,
    features,
    width,
    eps,
    h_row,
    h_column,
    weight_row,
    weight_column,
    gamma_row,
    timestep_stride,
    rows_class,  # decides with the sizes which configuration is fastest
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    tiles_down = tl.cdiv(rows, BLOCK_M)
    tiles_across = tl.cdiv(features, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_across)
    group_height = min(tiles_down - group * GROUP, GROUP)
    within = program % (GROUP * tiles_across)
    row = (group * GROUP + within % group_height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = within // group_height * BLOCK_N + tl.arange(0, BLOCK_N)
    row_there = row < rows
    column_there = column < features

    k = tl.arange(0, BLOCK_K)
    left = h + row[:, None].to(tl.int64) * h_row + k[None, :].to(tl.int64) * h_column
    right = (
        weight + column[None, :].to(tl.int64) * weight_row + k[:, None].to(tl.int64) * weight_column
    )
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        k_there = k < width - start
        a = tl.load(left, mask=row_there[:, None] & k_there[None, :], other=0.0)
        b = tl.load(right, mask=column_there[None, :] & k_there[:, None], other=0.0)
        total = tl.dot(factor(a), factor(b), total, input_precision=PRECISION)
        left += BLOCK_K * h_column
        right += BLOCK_K * weight_column

    timestep = tl.load(
        timesteps + (row % batch).to(tl.int64) * timestep_stride, mask=row_there, other=0
    )
    pointers = gamma, bias, norm_weight, norm_bias, running_mean, running_var, out
    first = within // group_height * BLOCK_N
    if PARTS == 1:
        finish(total, row, first, timestep, pointers, rows, features, eps, gamma_row)
    else:
        left_part, right_part = halves(total)
        if PARTS == 2:
            finish(left_part, row, first, timestep, pointers, rows, features, eps, gamma_row)
            finish(
                right_part,
                row,
                first + BLOCK_N // 2,
                timestep,
                pointers,
                rows,
                features,
                eps,
                gamma_row,
            )
        else:
            for half in tl.static_range(2):
                one, two = halves(left_part if half == 0 else right_part)
                begin = first + half * (BLOCK_N // 2)
                finish(one, row, begin, timestep, pointers, rows, features, eps, gamma_row)
                finish(
                    two,
                    row,
                    begin + BLOCK_N // 4,
                    timestep,
                    pointers,
                    rows,
                    features,
                    eps,
                    gamma_row,
                )


def _config(m: int, n: int, k: int, warps: int, stages: int, parts: int = 1) -> triton.Config:
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, "PARTS": parts}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


# What is tried on a GPU, once for each kind of product and size: from few rows to many. Sixteen-bit tiles of 64 rows
# and more become the matrix instructions of whole warp groups from sm_90 on.
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
_KEY = ["rows_class", "features", "width"]
_tuned: dict[str, Any] = (
    {}
    if INTERPRETED.value
    else {
        kind: triton.autotune(configs, key=_KEY)(layer_kernel) for kind, configs in CONFIGS.items()
    }
)


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
        h: [..., B, K] float32, bfloat16 or float16, of any strides.
        layer: weight [N, K] in the dtype of `h`, of any strides; gamma with unit rows; vectors contiguous.
        timesteps: [B] or [1] int64.
        eps: BatchNorm's.
        tf32: multiply float32 as TF32.
        config: one of `CONFIGS` (default: the fastest here, tried at the first call of a size).

    Returns:
        [..., B, N], dtype of `h`.
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
    """`conditional_linear` into `out`, [..., B, N] contiguous, float32 or of the dtype of `h`."""
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
        triton.next_power_of_2(rows), precision,
    )  # fmt: skip

    def grid(sizes: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, sizes["BLOCK_M"]) * triton.cdiv(features, sizes["BLOCK_N"]),)

    if config is None and INTERPRETED.value:
        config = CONFIGS[kind][0]
    with device_of(h):
        if config is None:
            _tuned[kind][grid](*arguments)
        else:
            layer_kernel[grid](
                *arguments,
                **config.kwargs,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
