"""The reverse chain for many rows: matrix products on tensor cores, and one small kernel for each of the other parts.

A step is five launches (docs/algorithm.md, "Denoiser" and "Sampling"):

    first_kernel     h1 = x * softplus(BN1(gamma1_t * (W1 [y ; guidance] + b1)))   a program per tile of h1
    layer_kernel     h2, then h3                                                   see conditional_linear.py
    step_kernel      eps = W4 h3 + b4, then the sampler's step                     a program per block of rows
    advance_kernel   the next timestep                                             one program

The two products are 4 M F^2 operations over 2 F^2 weights: from a few hundred rows on, the tensor cores bound a step.
`csrc/cuda/denoise` is made for fewer rows: it reads the weights once per step for up to 64 rows, in one launch for 64
steps. On a GPU a step is captured as a CUDA graph and replayed; the position in the chain is in device memory, so that
every step is the same graph. Buffers are allocated once per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmic_fast.reference import philox
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.triton.conditional_linear import launch
from diffmic_fast.triton.conditional_norm import load_columns, load_rows, store_rows
from diffmic_fast.triton.scalar import device_of, softplus

if TYPE_CHECKING:
    from diffmic_fast.ops.denoise import Call

# Rows per chain: more do not use the tensor cores better, and activations of 6144 features take 100 MB each.
MOST_ROWS = 4096
MOST_CLASSES = 128  # a tile of the last product holds all of them
# Steps whose noise is drawn at a time.
_NOISE_BLOCK = 64
# The capture of a graph takes longer than the launches of fewer steps.
_FEWEST_REPLAYS = 8


@triton.jit
def add_labels(total, labels_ptr, weight_ptr, row, column, weight_row, rows, features, classes):
    """total += labels W^T for contiguous labels [rows, classes] and the weights from `weight_ptr` on."""
    labels_ptr += row.to(tl.int64) * classes
    weight_ptr += column.to(tl.int64) * weight_row
    for c in range(classes):
        label = tl.load(labels_ptr + c, mask=row < rows, other=0.0)
        weight = tl.load(weight_ptr + c, mask=column < features, other=0.0)
        total += label[:, None] * weight[None, :]
    return total


@triton.jit
def first_kernel(
    x_ptr, y_ptr, guidance_ptr, weight_ptr, bias_ptr, gamma_ptr, norm_weight_ptr, norm_bias_ptr, running_mean_ptr,
    running_var_ptr, timestep_ptr, h_ptr, rows, features, classes, x_row, weight_row, gamma_row, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = add_labels(total, y_ptr, weight_ptr, row, column, weight_row, rows, features, classes)
    total = add_labels(
        total, guidance_ptr, weight_ptr + classes, row, column, weight_row, rows, features, classes
    )
    timestep = tl.load(timestep_ptr)
    gamma = load_columns(gamma_ptr + timestep * gamma_row, column, features)
    mean = load_columns(running_mean_ptr, column, features)
    variance = tl.load(running_var_ptr + column, mask=column < features, other=1.0).to(tl.float32)
    weight = load_columns(norm_weight_ptr, column, features)
    scale = tl.math.div_rn(weight, tl.math.sqrt_rn(variance + eps))
    n = gamma[None, :] * (total + load_columns(bias_ptr, column, features)[None, :]) - mean[None, :]
    n = n * scale[None, :] + load_columns(norm_bias_ptr, column, features)[None, :]
    h = load_rows(x_ptr, row, column, x_row, rows, features) * softplus(n)
    store_rows(h_ptr, h, row, column, rows, features)


@triton.jit
def step_kernel(
    h_ptr, weight_ptr, bias_ptr, prior_ptr, y_ptr, noise_ptr, coefficients_ptr, position_ptr, states_ptr,
    rows, features, classes, weight_row, noise_steps,
    TRAJECTORY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    label = tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    row_mask = row < rows
    label_mask = label < classes
    a_ptr = h_ptr + row[:, None].to(tl.int64) * features + k[None, :]
    b_ptr = weight_ptr + label[None, :].to(tl.int64) * weight_row + k[:, None]
    eps = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, features, BLOCK_K):
        k_mask = k < features - start
        a = tl.load(a_ptr + start, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        b = tl.load(b_ptr + start, mask=label_mask[None, :] & k_mask[:, None], other=0.0)
        eps = tl.dot(a, b, eps, input_precision="ieee")
    eps += tl.load(bias_ptr + label, mask=label_mask, other=0.0)[None, :]

    step = tl.load(position_ptr)
    table_ptr = coefficients_ptr + step * 7
    s = tl.load(table_ptr)
    q = tl.load(table_ptr + 1)
    sigma = tl.load(table_ptr + 6)
    mask = row_mask[:, None] & label_mask[None, :]
    offset = row[:, None].to(tl.int64) * classes + label[None, :]
    prior = tl.load(prior_ptr + offset, mask=mask, other=0.0)
    y = tl.load(y_ptr + offset, mask=mask, other=0.0)
    y_0 = tl.math.div_rn(1.0, s) * (y - (1.0 - s) * prior - eps * q)
    y = tl.load(table_ptr + 2) * y_0 + tl.load(table_ptr + 3) * y + tl.load(table_ptr + 4) * prior
    y += tl.load(table_ptr + 5) * eps
    size = tl.cast(rows, tl.int64) * classes
    # If sigma is 0 nothing is loaded: the noise may end before this step.
    noise_mask = mask & (label < tl.where(sigma > 0.0, classes, 0))[None, :]
    z = tl.load(noise_ptr + (step + 1) % noise_steps * size + offset, mask=noise_mask, other=0.0)
    y += tl.where(noise_mask, sigma * z, 0.0)
    tl.store(y_ptr + offset, y, mask=mask)
    if TRAJECTORY:
        tl.store(states_ptr + (step + 1) * size + offset, y, mask=mask)


@triton.jit
def advance_kernel(position_ptr, timestep_ptr, timesteps_ptr, steps):
    following = tl.load(position_ptr) + 1
    tl.store(position_ptr, following)
    tl.store(timestep_ptr, tl.load(timesteps_ptr + tl.minimum(following, steps - 1)))


def step_blocks(classes: int) -> dict[str, int]:
    """The tile of `step_kernel`: all classes, and a block of the width that leaves it in registers."""
    if classes > 32:
        return {"BLOCK_M": 16, "BLOCK_C": MOST_CLASSES, "BLOCK_K": 32}
    return {"BLOCK_M": 16, "BLOCK_C": 16 if classes <= 16 else 32, "BLOCK_K": 64}


class Chain:
    """The buffers of a reverse chain over a block of rows, and its step.

    Args:
        x: [M, F] features.
        prior, guidance: [M, C].
        layers: the three conditional layers; weights of the hidden ones in the dtype of the products.
        eps: of each layer's BatchNorm.
        output: weight [C, F] and bias [C].
        timesteps: [n] int64.
        coefficients: [n, 7], a row per step in the order of `StepTable`.
        noise_steps: length of the ring of noise.
        states: [n + 1, M, C], written, or None.

    Attributes:
        y: [M, C], the current state.
        noise: [noise_steps, M, C]. Entry 0 is that of the initial state; step i adds entry (i + 1) % noise_steps.
    """

    def __init__(
        self,
        x: Tensor,
        prior: Tensor,
        guidance: Tensor,
        layers: Sequence[ConditionalLayer],
        eps: Sequence[float],
        output: tuple[Tensor, Tensor],
        timesteps: Tensor,
        coefficients: Tensor,
        noise_steps: int,
        states: Tensor | None,
    ) -> None:
        rows, features = x.shape
        self.x, self.prior, self.guidance = x, prior, guidance
        self.layers, self.eps, self.output = layers, eps, output
        self.timesteps, self.coefficients, self.states = timesteps, coefficients, states
        hidden = layers[1].weight.dtype
        self.activations = [
            torch.empty((rows, features), dtype=dtype, device=x.device)
            for dtype in (hidden, hidden, torch.float32)
        ]
        self.y = torch.empty_like(prior)
        self.noise = prior.new_empty((noise_steps, *prior.shape))
        self.position = torch.zeros(1, dtype=torch.int64, device=x.device)
        self.timestep = torch.zeros_like(self.position)

    def begin(self) -> None:
        """Set the initial state, the prior plus noise."""
        self.position.zero_()
        self.timestep.copy_(self.timesteps[:1])
        torch.add(self.prior, self.noise[0], out=self.y)

    def step(self) -> None:
        """Take one step."""
        rows, features = self.x.shape
        classes = self.prior.shape[1]
        first, *hidden = self.layers
        h = self.activations
        with device_of(self.x):
            first_kernel[(triton.cdiv(rows, 16), triton.cdiv(features, 128))](
                self.x, self.y, self.guidance, *first, self.timestep, h[0], rows, features, classes,
                self.x.stride(0), first.weight.stride(0), first.gamma.stride(0), self.eps[0],
                BLOCK_M=16, BLOCK_N=128, num_warps=4,
            )  # fmt: skip
            for i, layer in enumerate(hidden):
                launch(h[i], layer, self.timestep, h[i + 1], self.eps[i + 1])
            step_kernel[(triton.cdiv(rows, 16),)](
                h[2], *self.output, self.prior, self.y, self.noise, self.coefficients, self.position,
                self.y if self.states is None else self.states, rows, features, classes,
                self.output[0].stride(0), len(self.noise), TRAJECTORY=self.states is not None,
                **step_blocks(classes), num_warps=4,
            )  # fmt: skip
            advance_kernel[(1,)](
                self.position, self.timestep, self.timesteps, len(self.timesteps), num_warps=1
            )

    def replay(self, steps: int) -> Callable[[], Any]:
        """`step`, captured as a CUDA graph if that is faster for so many; leaves the chain in an arbitrary state."""
        if not self.x.is_cuda or steps < _FEWEST_REPLAYS:
            return self.step
        if torch.cuda.is_current_stream_capturing():
            return self.step
        with torch.cuda.device(self.x.device):
            self.step()  # compiles and tunes the kernels, which cannot be captured
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
        return graph.replay


def denoise(
    call: Call, out: Tensor, states: Tensor | None, progress: Callable[[int, int], None] | None
) -> None:
    """Run a reverse chain, as `ops.denoise` describes it.

    Args:
        call: the prepared arguments of `ops.denoise`; at most MOST_CLASSES classes.
        out: [M, C] float32, contiguous, written.
        states: [n + 1, M, C] float32, contiguous, written; or None.
        progress: as in `ops.denoise`; called after each block of noise.
    """
    features, prior, guidance, eps = call.features, call.prior, call.guidance, call.eps
    layers = [ConditionalLayer(*each) for each in (call.conditioning, call.hidden_1, call.hidden_2)]
    output = call.output_weight, call.output_bias
    timesteps, coefficients = call.timesteps, call.coefficients.T.contiguous()
    noise, seed, image_ids, sample_ids = (
        call.noise,
        call.seed % 2**64,
        call.image_ids,
        call.sample_ids,
    )
    assert image_ids is not None and sample_ids is not None  # filled in by `ops.denoise`
    rows, steps = features.shape[0], len(timesteps)
    if call.precision == "bf16":
        layers = [layers[0], *(part._replace(weight=part.weight.bfloat16()) for part in layers[1:])]
    moments = torch.cat((timesteps.new_tensor([call.start]), timesteps)).cpu()

    def report(done: int) -> None:
        if progress is not None:
            if features.is_cuda:
                torch.cuda.current_stream(features.device).synchronize()
            progress(done, -(-rows // MOST_ROWS) * steps)

    for number, begin in enumerate(range(0, rows, MOST_ROWS)):
        block = slice(begin, min(begin + MOST_ROWS, rows))
        part = states
        if states is not None and rows > MOST_ROWS:
            part = states.new_empty((steps + 1, *prior[block].shape))
        chain = Chain(
            features[block], prior[block], guidance[block], layers, eps, output, timesteps, coefficients,
            _NOISE_BLOCK if noise is None else max(len(noise), 1), part,
        )  # fmt: skip
        if noise is not None:
            chain.noise[: len(noise)].copy_(noise[:, block])

        def draw(i: int, chain: Chain = chain, block: slice = block) -> None:
            """Draw the noise of a block of steps from the i-th on, unless it was given."""
            if noise is None:
                some = moments[i : i + _NOISE_BLOCK]
                z = philox.normal(seed, image_ids[block], sample_ids[block], some, prior.shape[1])
                chain.noise[: len(some)].copy_(z)

        draw(0)
        chain.begin()
        step = chain.replay(steps)
        chain.begin()
        if part is not None:
            part[0].copy_(chain.y)
        for i in range(steps):
            if (i + 1) % _NOISE_BLOCK == 0:
                draw(i + 1)
                report(number * steps + i)
            step()
        out[block].copy_(chain.y)
        if states is not None and part is not None and part is not states:
            states[:, block].copy_(part)
    report(-(-rows // MOST_ROWS) * steps)
