"""The reverse chain for many rows: matrix products on tensor cores, and one small kernel for each of the other parts.

A step is five launches (docs/algorithm.md, "Denoiser" and "Sampling"):

    first_kernel     h1 = x * softplus(BN1(gamma1_t * (W1 [y ; guidance] + b1)))   a program per tile of h1
    layer_kernel     h2, then h3                                                   see conditional_linear.py
    step_kernel      eps = W4 h3 + b4, then the sampler's step                     a program per block of rows
    advance_kernel   the next timestep                                             one program

The two products are 4 M F^2 operations over 2 F^2 weights: from a few hundred rows on, the tensor cores bound a step.
`csrc/cuda/denoise` is made for fewer rows: it reads the weights once per step for up to 64 rows, in one launch for 64
steps. On a GPU a step is captured as a CUDA graph and replayed; the position in the chain is in device memory, so that
every step is the same graph. A graph and the buffers that it uses are kept for later calls (`KEPT`). Arguments of a
call are copied into them, except weights: a graph serves calls whose weights have the same addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmic_fast.reference import philox
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.triton import graphs
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
# Chains kept between calls. Of 4096 rows at F = 6144 one takes 450 MB in bfloat16, of 256 rows 175 MB.
_MOST_KEPT, _MOST_KEPT_BYTES = 4, 2**30


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


class Weights(NamedTuple):
    """The denoiser of a call.

    Attributes:
        layers: the three conditional layers, in float32.
        output: weight [C, F] and bias [C].
        eps: of each layer's BatchNorm.
    """

    layers: tuple[ConditionalLayer, ...]
    output: tuple[Tensor, Tensor]
    eps: tuple[float, ...]


class Sizes(NamedTuple):
    """What determines the buffers of a chain.

    Attributes:
        rows, features, classes, steps: M, F, C, n.
        noise_steps: length of the ring of noise.
        trajectory: whether all states are kept.
        hidden: dtype of the two products.
    """

    rows: int
    features: int
    classes: int
    steps: int
    noise_steps: int
    trajectory: bool
    hidden: torch.dtype


class Chain:
    """The buffers of a reverse chain over a block of rows, and its step.

    Args:
        sizes: those of the buffers.
        device: where they are.

    Attributes:
        x, prior, guidance, timesteps, coefficients: arguments, written by `load`: [M, F], [M, C], [M, C], [n] int64,
            [n, 7] with a row per step in the order of `StepTable`.
        y: [M, C], the current state.
        noise: [noise_steps, M, C]. Entry 0 is that of the initial state; step i adds entry (i + 1) % noise_steps.
        states: [n + 1, M, C], the states of a trajectory, or None.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        rows, features, classes, steps, noise_steps, trajectory, hidden = sizes
        self.x = new(rows, features)
        self.prior, self.guidance, self.y = (new(rows, classes) for _ in range(3))
        self.timesteps = new(steps, dtype=torch.int64)
        self.coefficients = new(steps, 7)
        self.noise = new(noise_steps, rows, classes)
        self.states = new(steps + 1, rows, classes) if trajectory else None
        self.position, self.timestep = (new(1, dtype=torch.int64) for _ in range(2))
        self._activations = [
            new(rows, features, dtype=dtype) for dtype in (hidden, hidden, torch.float32)
        ]
        # The hidden weights in another precision than the model's.
        self._rounded = (
            []
            if hidden == torch.float32
            else [new(features, features, dtype=hidden) for _ in range(2)]
        )
        self._weights: Weights | None = None
        self._replay: Callable[[], None] | None = None
        self._taken = 0  # steps since the buffers were made

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        tensors = [*self._activations, *self._rounded]
        tensors += [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def load(
        self,
        x: Tensor,
        prior: Tensor,
        guidance: Tensor,
        weights: Weights,
        timesteps: Tensor,
        coefficients: Tensor,
    ) -> None:
        """Copy the arguments of a call into the buffers; weights are referred to until `release`."""
        self.x.copy_(x)
        self.prior.copy_(prior)
        self.guidance.copy_(guidance)
        self.timesteps.copy_(timesteps)
        self.coefficients.copy_(coefficients)
        layers = list(weights.layers)
        for i, rounded in enumerate(self._rounded, 1):
            rounded.copy_(layers[i].weight)
            layers[i] = layers[i]._replace(weight=rounded)
        self._weights = weights._replace(layers=tuple(layers))

    def release(self) -> None:
        """Drop the references to the weights."""
        self._weights = None

    def begin(self) -> None:
        """Set the initial state, the prior plus noise."""
        self.position.zero_()
        self.timestep.copy_(self.timesteps[:1])
        torch.add(self.prior, self.noise[0], out=self.y)

    def step(self) -> None:
        """Take one step."""
        assert self._weights is not None  # loaded
        (first, *hidden), output, eps = self._weights
        rows, features = self.x.shape
        classes = self.prior.shape[1]
        h = self._activations
        with device_of(self.x):
            first_kernel[(triton.cdiv(rows, 16), triton.cdiv(features, 128))](
                self.x, self.y, self.guidance, *first, self.timestep, h[0], rows, features, classes,
                self.x.stride(0), first.weight.stride(0), first.gamma.stride(0), eps[0],
                BLOCK_M=16, BLOCK_N=128, num_warps=4,
            )  # fmt: skip
            for i, layer in enumerate(hidden):
                launch(h[i], layer, self.timestep, h[i + 1], eps[i + 1])
            step_kernel[(triton.cdiv(rows, 16),)](
                h[2], *output, self.prior, self.y, self.noise, self.coefficients, self.position,
                self.y if self.states is None else self.states, rows, features, classes,
                output[0].stride(0), len(self.noise), TRAJECTORY=self.states is not None,
                **step_blocks(classes), num_warps=4,
            )  # fmt: skip
            advance_kernel[(1,)](
                self.position, self.timestep, self.timesteps, len(self.timesteps), num_warps=1
            )
        self._taken += 1

    def stepper(self) -> Callable[[], None]:
        """`step`, as a CUDA graph once that is faster; leaves the chain in an arbitrary state."""
        if not graphs.usable(self.x.device):
            return self.step
        if self._replay is None:
            if self._taken + len(self.timesteps) < _FEWEST_REPLAYS:
                return self.step
            self.step()  # compiles the kernels, which cannot be captured
            self._replay = graphs.capture(self.step, self.x.device)
        return self._replay


KEPT: graphs.Store[Chain] = graphs.Store(_MOST_KEPT, _MOST_KEPT_BYTES)


def _key(sizes: Sizes, weights: Weights, device: torch.device) -> Hashable:
    """What a graph depends on: sizes, device, stream, and what its launches have of the weights."""
    tensors = [tensor for layer in weights.layers for tensor in layer] + [*weights.output]
    if sizes.hidden != torch.float32:  # the products read copies in the chain's own buffers
        hidden = [layer.weight for layer in weights.layers[1:]]
        tensors = [tensor for tensor in tensors if all(tensor is not each for each in hidden)]
    places = tuple((tensor.data_ptr(), tensor.stride()) for tensor in tensors)
    return sizes, device, graphs.current_stream(device), weights.eps, places


@contextmanager
def _lent(sizes: Sizes, weights: Weights, device: torch.device) -> Iterator[Chain]:
    """A chain of these sizes: on a GPU one that an earlier call has left, if there is one.

    The work of a call is still running when its chain is lent to the next one. Both are on one stream, which orders
    them. While the caller captures a graph, the chain belongs to that graph and is not kept.
    """
    if not graphs.usable(device):
        yield Chain(sizes, device)
        return
    key = _key(sizes, weights, device)
    chain = KEPT.take(key) or Chain(sizes, device)
    yield chain  # after an exception it is not kept
    chain.release()
    KEPT.give(key, chain, chain.nbytes())


def denoise(
    call: Call, out: Tensor, states: Tensor | None, progress: Callable[[int, int], None] | None
) -> None:
    """Run a reverse chain, as `ops.denoise` describes it.

    On a GPU the call does not synchronise unless `progress` is given, so that a caller may capture it in a CUDA graph,
    after a first call that compiles the kernels.

    Args:
        call: the prepared arguments of `ops.denoise`; at most MOST_CLASSES classes.
        out: [M, C] float32, contiguous, written.
        states: [n + 1, M, C] float32, contiguous, written; or None.
        progress: as in `ops.denoise`; called after each block of noise.
    """
    weights = Weights(
        tuple(
            ConditionalLayer(*each) for each in (call.conditioning, call.hidden_1, call.hidden_2)
        ),
        (call.output_weight, call.output_bias),
        tuple(call.eps),
    )
    device, noise = call.features.device, call.noise
    (rows, features), classes, steps = call.features.shape, call.prior.shape[1], len(call.timesteps)
    blocks = [slice(i, min(i + MOST_ROWS, rows)) for i in range(0, rows, MOST_ROWS)]
    coefficients = call.coefficients.T
    moments = torch.cat((call.timesteps.new_full((1,), call.start), call.timesteps))
    hidden = torch.bfloat16 if call.precision == "bf16" else torch.float32
    # Timesteps are rows of gamma, so that their values need not be read back from the GPU.
    last = max(call.start, weights.layers[0].gamma.shape[0] - 1)
    if noise is None and not 0 <= call.start <= last <= philox.MAX_TIMESTEP:
        raise ValueError(
            f"denoise: timesteps of Philox noise must be in [0, {philox.MAX_TIMESTEP}], got a start of {call.start} "
            f"and {weights.layers[0].gamma.shape[0]} rows of gamma"
        )

    def report(done: int) -> None:
        if progress is not None:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            progress(done, len(blocks) * steps)

    for number, block in enumerate(blocks):
        sizes = Sizes(
            block.stop - block.start, features, classes, steps,
            _NOISE_BLOCK if noise is None else max(len(noise), 1), states is not None, hidden,
        )  # fmt: skip
        with _lent(sizes, weights, device) as chain:
            chain.load(
                call.features[block], call.prior[block], call.guidance[block], weights, call.timesteps, coefficients
            )  # fmt: skip
            if noise is not None:
                chain.noise[: len(noise)].copy_(noise[:, block])
            _draw(call, block, moments, 0, chain)
            chain.begin()
            step = chain.stepper()
            chain.begin()
            if chain.states is not None:
                chain.states[0].copy_(chain.y)
            for i in range(steps):
                if (i + 1) % _NOISE_BLOCK == 0:
                    _draw(call, block, moments, i + 1, chain)
                    report(number * steps + i)
                step()
            out[block].copy_(chain.y)
            if states is not None and chain.states is not None:
                states[:, block].copy_(chain.states)
    report(len(blocks) * steps)


def _draw(call: Call, rows: slice, moments: Tensor, first: int, chain: Chain) -> None:
    """Draw the noise of a block of steps from the one numbered `first` on, unless it was given."""
    assert call.image_ids is not None and call.sample_ids is not None  # filled in by `ops.denoise`
    if call.noise is None:
        some = moments[first : first + _NOISE_BLOCK]
        z = philox.unchecked_normal(
            call.seed % 2**64, call.image_ids[rows], call.sample_ids[rows], some, chain.y.shape[1]
        )
        chain.noise[: len(some)].copy_(z)
