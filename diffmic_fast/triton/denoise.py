"""A reverse chain over many rows: products of tensor cores, and one small kernel for each of what stands around them.

A step is five launches (spec, sections 4 and 6):

    first_kernel     h1 = x * softplus(BN1(gamma1_t * (W1 [y ; guidance] + b1)))   a tile of rows and columns a program
    layer_kernel     h2, and again h3                                              see conditional_linear.py
    step_kernel      eps = W4 h3 + b4, then the sampler's step                     a block of rows a program
    advance_kernel   the next timestep                                             one program

The two products are 4 M F^2 operations over 2 F^2 weights: from some hundred rows on the matrix units bound a step.
Below them `csrc/cuda/denoise*` is the kernel to take, which reads the weights once a step for up to 64 rows and is
launched once in 64 steps. On a GPU a step is captured as a CUDA graph and replayed: the position in the chain lies
in the GPU's memory, so that every step is the same graph. Buffers are allocated once a call.
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
from diffmic_fast.triton.conditional_norm import load_columns, load_rows
from diffmic_fast.triton.scalar import device_of, rounded, softplus

if TYPE_CHECKING:
    from diffmic_fast.ops.denoise import Call

# Rows of a chain at a time: beyond, the matrix units are busy, and activations of 6144 features take 100 MB each.
MOST_ROWS = 4096
MOST_CLASSES = 128  # a tile of the last product holds all of them
# Noise of this many steps is drawn at a time.
_NOISE_BLOCK = 64
# A graph of fewer steps would take longer to capture than to launch.
_FEWEST_REPLAYS = 8


@triton.jit
def first_kernel(
    x,
    y,
    guidance,
    weight,
    bias,
    gamma,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    timestep,
    h,
    rows,
    features,
    classes,
    x_row,
    weight_row,
    gamma_row,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_there = row < rows
    column_there = column < features
    labels = row.to(tl.int64) * classes
    units = weight + column.to(tl.int64) * weight_row
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(classes):
        label = tl.load(y + labels + c, mask=row_there, other=0.0)
        total += label[:, None] * tl.load(units + c, mask=column_there, other=0.0)[None, :]
    for c in range(classes):
        label = tl.load(guidance + labels + c, mask=row_there, other=0.0)
        total += (
            label[:, None] * tl.load(units + classes + c, mask=column_there, other=0.0)[None, :]
        )
    moment = tl.load(timestep)
    scale = load_columns(gamma + moment * gamma_row, column, features)
    mean = load_columns(running_mean, column, features)
    variance = tl.load(running_var + column, mask=column_there, other=1.0).to(tl.float32)
    slope = tl.math.div_rn(
        load_columns(norm_weight, column, features), tl.math.sqrt_rn(variance + eps)
    )
    n = scale[None, :] * (total + load_columns(bias, column, features)[None, :]) - mean[None, :]
    n = n * slope[None, :] + load_columns(norm_bias, column, features)[None, :]
    value = load_rows(x, row, column, x_row, rows, features) * softplus(n)
    place = h + row[:, None].to(tl.int64) * features + column[None, :]
    tl.store(
        place, rounded(value, h.dtype.element_ty), mask=row_there[:, None] & column_there[None, :]
    )


@triton.jit
def step_kernel(
    h,
    weight,
    bias,
    prior,
    y,
    noise,
    coefficients,
    position,
    states,
    rows,
    features,
    classes,
    weight_row,
    noise_steps,
    TRAJECTORY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    label = tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    row_there = row < rows
    label_there = label < classes
    left = h + row[:, None].to(tl.int64) * features + k[None, :]
    right = weight + label[None, :].to(tl.int64) * weight_row + k[:, None]
    noise_found = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, features, BLOCK_K):
        k_there = k < features - start
        a = tl.load(left + start, mask=row_there[:, None] & k_there[None, :], other=0.0)
        b = tl.load(right + start, mask=label_there[None, :] & k_there[:, None], other=0.0)
        noise_found = tl.dot(a, b, noise_found, input_precision="ieee")
    noise_found += tl.load(bias + label, mask=label_there, other=0.0)[None, :]

    step = tl.load(position)
    table = coefficients + step * 7
    s = tl.load(table)
    q = tl.load(table + 1)
    sigma = tl.load(table + 6)
    there = row_there[:, None] & label_there[None, :]
    place = row[:, None].to(tl.int64) * classes + label[None, :]
    mean = tl.load(prior + place, mask=there, other=0.0)
    state = tl.load(y + place, mask=there, other=0.0)
    y_0 = tl.math.div_rn(1.0, s) * (state - (1.0 - s) * mean - noise_found * q)
    state = tl.load(table + 2) * y_0 + tl.load(table + 3) * state + tl.load(table + 4) * mean
    state += tl.load(table + 5) * noise_found
    size = tl.cast(rows, tl.int64) * classes
    # The step before a sigma of 0 may be the noise's last: nothing is read then.
    noisy = there & (label < tl.where(sigma > 0.0, classes, 0))[None, :]
    drawn = tl.load(noise + (step + 1) % noise_steps * size + place, mask=noisy, other=0.0)
    state += tl.where(noisy, sigma * drawn, 0.0)
    tl.store(y + place, state, mask=there)
    if TRAJECTORY:
        tl.store(states + (step + 1) * size + place, state, mask=there)


@triton.jit
def advance_kernel(position, timestep, timesteps, steps):
    following = tl.load(position) + 1
    tl.store(position, following)
    tl.store(timestep, tl.load(timesteps + tl.minimum(following, steps - 1)))


def step_blocks(classes: int) -> dict[str, int]:
    """The tile of `step_kernel`: all classes, and as much of the width as leaves it in registers."""
    if classes > 32:
        return {"BLOCK_M": 16, "BLOCK_C": MOST_CLASSES, "BLOCK_K": 32}
    return {"BLOCK_M": 16, "BLOCK_C": 16 if classes <= 16 else 32, "BLOCK_K": 64}


class _Chain:
    """Buffers of a chain over some rows, and its step.

    x, prior, guidance: the rows' features and labels.
    layers: the three layers, the hidden ones' weights in their precision.
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
        """Stand at the beginning: noise around the prior."""
        self.position.zero_()
        self.timestep.copy_(self.timesteps[:1])
        torch.add(self.prior, self.noise[0], out=self.y)

    def step(self) -> None:
        """From one state to the next."""
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
        """`step`, captured in a graph where that pays; the chain stands anywhere after it."""
        if not self.x.is_cuda or steps < _FEWEST_REPLAYS:
            return self.step
        if torch.cuda.is_current_stream_capturing():
            return self.step
        with torch.cuda.device(self.x.device):
            self.step()  # compiles, and finds the fastest configurations: neither can be captured
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
    total = -(-rows // MOST_ROWS) * steps
    for number, begin in enumerate(range(0, rows, MOST_ROWS)):
        block = slice(begin, min(begin + MOST_ROWS, rows))
        part = None
        if states is not None:
            part = (
                states if rows <= MOST_ROWS else states.new_empty((steps + 1, *prior[block].shape))
            )
        chain = _Chain(
            features[block], prior[block], guidance[block], layers, eps, output, timesteps, coefficients,
            _NOISE_BLOCK if noise is None else max(len(noise), 1), part,
        )  # fmt: skip
        if noise is not None:
            chain.noise[: len(noise)].copy_(noise[:, block])

        def draw(i: int, chain: _Chain = chain, block: slice = block) -> None:
            """Noise of the steps from the i-th on, where none was given."""
            if noise is None:
                some = moments[i : i + _NOISE_BLOCK]
                drawn = philox.normal(
                    seed, image_ids[block], sample_ids[block], some, prior.shape[1]
                )
                chain.noise[: len(some)].copy_(drawn)

        draw(0)
        chain.begin()
        step = chain.replay(steps)
        chain.begin()
        if part is not None:
            part[0].copy_(chain.y)
        for i in range(steps):
            if (i + 1) % _NOISE_BLOCK == 0:
                draw(i + 1)
                if progress is not None:
                    if features.is_cuda:
                        torch.cuda.current_stream(features.device).synchronize()
                    progress(number * steps + i, total)
            step()
        out[block].copy_(chain.y)
        if states is not None and part is not states and part is not None:
            states[:, block].copy_(part)
    if progress is not None:
        if features.is_cuda:
            torch.cuda.current_stream(features.device).synchronize()
        progress(total, total)
