"""`denoise`: a whole reverse chain in one call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from diffmic_fast import _native
from diffmic_fast.checks import Arguments
from diffmic_fast.ops import _autocast as autocast
from diffmic_fast.ops._backend import BackendError, asked_by_name, resolve, stream_of
from diffmic_fast.ops._layout import compact, with_unit_rows
from diffmic_fast.ops.conditional_linear import check_layer
from diffmic_fast.reference import denoise as reference
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights, StepTable

PRECISIONS = ("fp32", "bf16", "fp8", "int8")
# What each backend has of them.
PRECISIONS_OF = {
    "reference": ("fp32",),
    "cpu": ("fp32", "bf16", "int8"),
    "cuda": ("fp32", "bf16", "fp8"),
    "triton": ("fp32", "bf16"),
    "cuda-emulated": ("fp32", "bf16", "fp8"),
}

# More rows keep the processor busy by themselves; a shorter chain is over before its window has grown.
_FEW_ROWS, _MANY_STEPS = 4, 50
_LARGEST_WINDOW = 192
# Rows per sweep of windows whose states may differ by a tolerance: those that minimise the total time, sweeps x time
# per sweep, on two cores (benchmarks.bench_denoise), and on a GPU. In bfloat16 the weights are read in half the time,
# and the tiles of AMX compute many rows in little more than that. The emulation takes AMX's, since results depend on
# the window.
_ROWS_PER_SWEEP = {"fp32": 16, "bf16": 8}
_BF16_ROWS_PER_SWEEP = {"avx512_bf16": 16, "amx": 32, "amx_emulated": 32}
_CUDA_ROWS_PER_SWEEP = 32
# Readings of the weights in one launch: a few milliseconds of a GPU.
_READINGS_A_LAUNCH = 64
_MOST_CUDA_FEATURES, _MOST_CUDA_CLASSES, _MOST_TRITON_CLASSES = 65536, 512, 128
_MOST_INT8_FEATURES = 133_144  # 127^2 F < 2^31
_MOST_SAMPLE = 2**32 - 1

__all__ = ["PRECISIONS", "PRECISIONS_OF", "DenoiserWeights", "StepTable", "denoise"]


def denoise(
    features: Tensor,
    prior: Tensor,
    guidance: Tensor,
    weights: DenoiserWeights,
    steps: StepTable,
    *,
    noise: Tensor | None = None,
    seed: int = 0,
    image_ids: Tensor | None = None,
    sample_ids: Tensor | None = None,
    trajectory: bool = False,
    precision: str = "fp32",
    backend: str = "auto",
    instructions: str = "auto",
    window: int | None = None,
    tolerance: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """From noise around the prior to the label vector, over M independent rows (spec, section 6).

    Under autocast in float32 (`ops._autocast`); `precision` is what chooses less.

    The backend "cpu" keeps the two hidden weights a second time, packed (8 F^2 bytes, half of it as bfloat16, a quarter
    as int8), as long as the first hidden weight's tensor lives. Every call compares all weights with what was packed
    and packs anew what has changed, in whatever way. The backend "cuda" packs them in every call, which costs the time
    of three steps; its memory is given back with the call.

    Args:
        features: [M, F] floating, image features after `norm`.
        prior: [M, C], mean of the chain's beginning.
        guidance: [M, C], what the denoiser is conditioned on.
        weights: the denoiser in eval mode.
        steps: the sampler, n steps (`diffusion.make_steps`).
        noise: [n, M, C] in the order drawn: noise[0] makes the beginning, noise[i] is z of step i - 1. Without it,
            Philox noise addressed by (seed, image, sample, timestep).
        seed: 64-bit key of that noise.
        image_ids, sample_ids: [M] int64, the row's image and sample (default 0 … M-1, and 0).
        trajectory: return every state instead of the last.
        precision: "fp32" (IEEE float32 throughout); "bf16": weights and activations of the two hidden layers in
            bfloat16, sums and everything else in float32; "fp8", backend "cuda": the same with weights in float8
            (e4m3) times a per-channel scale amax / 448; if a weight is not finite, the whole output channel becomes
            NaN; or "int8", backend "cpu", up to 133,144 features: weights and activations are
            integers in [-127, 127] times a scale, amax / 127 of an output channel's weights or of a row's activations;
            their products are summed in int32, everything else is float32. `PRECISIONS_OF` lists what each backend
            has. What a rounding changes in labels and probabilities: `python -m benchmarks.precision_labels`.
        backend: a backend's name, or "auto", which takes the reference where a gradient is wanted or a tensor is not
            float32, and on a GPU beyond 512 classes or 65536 features. There "auto" takes "triton", made for chains of
            many rows and for at most 128 classes, only where "cuda" is not built; it takes one step at a time, and a
            row's last bits depend on the number of rows, which chooses the tiles.
        instructions: the instruction set of the backend "cpu" ("amx", "avx512_bf16", "avx512", "avx2", "portable"), or
            "auto" for the widest of this processor and operating system. "amx_emulated" has the bits of "amx" on any
            processor with AVX2, and is slower. In "fp32" and "bf16" sums differ in their last bits between sets, in
            "int8" they do not. Within a set a row's result does not depend on the other rows, on the number of threads
            (torch's), or on the run. On a GPU it depends on the number of multiprocessors besides.
        window: the most steps of a chain that the backends "cpu" and "cuda" may take at once, in [1, 192]; fewer where
            that is faster, or where rows are more than a launch takes. It changes the speed alone: the result has the
            sequential chain's bits. Default: for long chains of few rows, which are bound by reading the weights, 64
            on the CPU and what makes 32 rows on a GPU, else 1.
        tolerance: how far a state of a chain may still move, from one sweep over the weights to the next, when the
            steps of a window are taken as settled; backends "cpu" and "cuda". More than 0, it gives up the bits of the
            sequential chain, and that a row does not depend on the number of rows, for fewer sweeps: y_0 then
            differs from the sequential chain's by about the tolerance in "fp32", and in "bf16" and "fp8", where a
            rounding may tip over, by up to 1e-4 (measured in "bf16": 9e-5 over 1000 steps at 1e-5); "int8" takes none.
            The window is then taken as it is, up to 192 rows of a sweep (default: 16 rows over all chains; in
            "bf16" 8, with AVX-512's bfloat16 instructions 16, with AMX 32; on a GPU 32; if there are enough steps).
        progress: called with (steps done, steps in all) every tenth of a second or so; blocks of up to 256 rows go
            through the chain one after the other (on a GPU, of up to 64), and their steps are counted together.
            "triton" calls it after every 64 steps of up to 4096 rows, the reference never. On a GPU a call without it
            returns before the chain is done, and one with it does not. An exception there, as Ctrl-C anywhere, stops
            the chain.

    Returns:
        y_0 [M, C], or with `trajectory` [n + 1, M, C] from the beginning to y_0.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
        BackendError: the backend or the precision asked for cannot serve; a RuntimeError.
    """
    args = Arguments("denoise")
    args.floating("features", features, "M F")
    args.floating("prior", prior, "M C")
    args.floating("guidance", guidance, "M C")
    args.sizes["n"] = len(steps.timesteps)
    if noise is not None:
        args.floating("noise", noise, "n M C")
    if image_ids is not None:
        args.integer("image_ids", image_ids, "M")
    if sample_ids is not None:
        args.integer("sample_ids", sample_ids, "M")
    _check_weights(args, weights, steps)
    if autocast.active(features):
        with autocast.off(features):
            return denoise(
                autocast.single(features), autocast.single(prior), autocast.single(guidance),
                autocast.single_weights(weights), steps,
                noise=None if noise is None else autocast.single(noise), seed=seed, image_ids=image_ids,
                sample_ids=sample_ids, trajectory=trajectory, precision=precision, backend=backend,
                instructions=instructions, window=window, tolerance=tolerance, progress=progress,
            )  # fmt: skip
    name = _choose(backend, precision, instructions, (features, prior, guidance, noise), weights)
    _check_window(window, tolerance, precision)
    if precision == "int8" and features.shape[1] > _MOST_INT8_FEATURES:
        raise ValueError(
            f"denoise: with precision='int8' there may be at most {_MOST_INT8_FEATURES} features, "
            f"got {features.shape[1]}"
        )
    if name == "reference":
        return reference.denoise(
            features,
            prior,
            guidance,
            weights,
            steps,
            noise=noise,
            seed=seed,
            image_ids=image_ids,
            sample_ids=sample_ids,
            trajectory=trajectory,
        )
    call = _Call(
        features,
        prior,
        guidance,
        _flat(weights),
        list(weights.eps),
        list(steps[:-1]),
        steps.start,
        noise,
        # The operator's schema has signed integers; the key is these 64 bits either way.
        (seed + 2**63) % 2**64 - 2**63,
        image_ids,
        sample_ids,
        trajectory,
        precision,
        instructions,
        0 if window is None else window,
        tolerance,
        name,
    )
    return _denoise(*call) if progress is None else _run(call, progress)


# The packed weights of a model live and die with its first hidden weight.
_caches: WeakIdKeyDictionary = WeakIdKeyDictionary()
_caches_lock = threading.Lock()


def _forget_caches() -> None:
    """In a forked child, whose locks may be held by threads that it does not have."""
    global _caches, _caches_lock
    _caches, _caches_lock = WeakIdKeyDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_caches)


def _cache(weights: Sequence[Tensor]) -> object:
    weight = weights[7]
    with _caches_lock:
        if weight not in _caches:
            _caches[weight] = _native.extension().WeightCache()
        return _caches[weight]


def _check_window(window: int | None, tolerance: float, precision: str) -> None:
    if not 0.0 <= tolerance < float("inf"):
        raise ValueError(f"denoise: tolerance must be finite and not negative, got {tolerance}")
    if tolerance > 0.0 and precision == "int8":
        raise ValueError(
            "denoise: tolerance must be 0 with precision='int8', whose roundings turn a difference of the last bits "
            "into one of 1e-3"
        )
    if window is not None and not 1 <= window <= _LARGEST_WINDOW:
        raise ValueError(f"denoise: window must be in [1, {_LARGEST_WINDOW}], got {window}")


def _window(call: _Call) -> int:
    """The call's window, or the default for its rows, which a traced graph does not know."""
    rows, steps = call.features.shape[0], len(call.steps[0])
    if call.window > 0:
        return call.window
    if rows > _FEW_ROWS or steps < _MANY_STEPS:
        return 1
    if call.backend == "cpu" and call.tolerance == 0.0:
        return 64
    wanted = _CUDA_ROWS_PER_SWEEP
    if call.backend == "cpu":
        wanted = _ROWS_PER_SWEEP[call.precision]
        if call.precision == "bf16":
            instructions = call.instructions
            if instructions == "auto":
                instructions = _native.extension().denoise_instructions()[0]
            wanted = _BF16_ROWS_PER_SWEEP.get(instructions, wanted)
    return max(wanted // max(rows, 1), 1)


def _choose(
    backend: str,
    precision: str,
    instructions: str,
    inputs: tuple[Tensor | None, ...],
    weights: DenoiserWeights,
) -> str:
    """The backend of a call: where "auto" would take one that cannot serve these tensors, the reference."""
    device = inputs[0].device if inputs[0] is not None else torch.device("cpu")
    if precision not in PRECISIONS:
        raise ValueError(
            f"denoise: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
        )
    name = resolve("denoise", backend, device)
    reason = ""
    if name != "reference":
        reason = _unserved(name, [t for t in (*inputs, *_flat(weights)) if t is not None])
        if reason and asked_by_name("denoise", backend):
            raise BackendError(f"denoise: the backend {name} cannot serve: {reason}")
        if reason:
            name = "reference"
    served_by = f"this call is served by {name}{': ' + reason if reason else ''}"
    if precision not in PRECISIONS_OF[name]:
        having = ", ".join(each for each, some in PRECISIONS_OF.items() if precision in some)
        raise BackendError(
            f"denoise: precision={precision!r} needs a backend that has it ({having}), and {served_by}"
        )
    if instructions != "auto" and name != "cpu":
        raise BackendError(
            f"denoise: instructions={instructions!r} need the backend cpu, and {served_by}"
        )
    return name


def _unserved(backend: str, tensors: list[Tensor]) -> str:
    """Why the kernels of a backend do not take these tensors: features, prior, …; empty when they do."""
    if any(t.dtype != torch.float32 for t in tensors):
        return "it takes float32 tensors"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "it has no gradient (use torch.no_grad, or the reference)"
    if backend == "cpu":
        return ""
    most_classes = _MOST_TRITON_CLASSES if backend == "triton" else _MOST_CUDA_CLASSES
    if any(t.device != tensors[0].device for t in tensors):
        return "it takes tensors of one device"
    features, classes = tensors[0].shape[1], tensors[1].shape[1]
    if features > _MOST_CUDA_FEATURES or classes > most_classes:
        return (
            f"it takes {_MOST_CUDA_FEATURES} features and {most_classes} classes at most, "
            f"these are {features} and {classes}"
        )
    return ""


def _flat(weights: DenoiserWeights) -> list[Tensor]:
    layers = (weights.conditioning, *weights.hidden)
    return [
        *(part for layer in layers for part in layer),
        weights.output_weight,
        weights.output_bias,
    ]


class _Call(NamedTuple):
    """The operator's arguments."""

    features: Tensor
    prior: Tensor
    guidance: Tensor
    weights: Sequence[Tensor]
    eps: Sequence[float]
    steps: Sequence[Tensor]
    start: int
    noise: Tensor | None
    seed: int
    image_ids: Tensor | None
    sample_ids: Tensor | None
    trajectory: bool
    precision: str
    instructions: str
    window: int  # 0: the default
    tolerance: float
    backend: str


def _run(call: _Call, progress: Callable[[int, int], None] | None = None) -> Tensor:
    rows = call.features.shape[0]
    images = torch.arange(rows) if call.image_ids is None else call.image_ids
    samples = torch.zeros(rows, dtype=torch.int64) if call.sample_ids is None else call.sample_ids
    out = call.prior.new_empty(call.prior.shape)
    states = None
    if call.trajectory:
        states = call.prior.new_empty((len(call.steps[0]) + 1, *call.prior.shape))
    parts = [with_unit_rows(part) for part in call.weights]
    inputs = (
        with_unit_rows(call.features),
        compact(call.prior),
        compact(call.guidance),
        [parts[i : i + 7] for i in (0, 7, 14)],
        call.eps,
        parts[21],
        parts[22],
    )
    noise = None if call.noise is None else compact(call.noise)
    if call.backend != "cpu":
        _launch(call, inputs, noise, images, samples, out, states, progress)
        return out if states is None else states
    _native.extension().denoise(
        *inputs,
        [compact(column) for column in call.steps],
        call.start,
        noise,
        call.seed,
        images.contiguous(),
        samples.contiguous(),
        out,
        states,
        call.precision,
        call.instructions,
        torch.get_num_threads(),
        progress,
        _window(call),
        _cache(call.weights),
        call.tolerance,
    )
    return out if states is None else states


def _unit_rows(tensor: Tensor) -> Tensor:
    return compact(tensor) if tensor.ndim == 1 else with_unit_rows(tensor)


def _launch(
    call: _Call,
    inputs: tuple[Any, ...],
    noise: Tensor | None,
    images: Tensor,
    samples: Tensor,
    out: Tensor,
    states: Tensor | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """`_run` on a GPU. What the kernels cannot say of numbers in its memory is said here."""
    if noise is None:
        if len(samples) and not 0 <= int(samples.min()) <= int(samples.max()) <= _MOST_SAMPLE:
            raise ValueError(f"denoise: sample_ids must be in [0, {_MOST_SAMPLE}]")
    elif len(call.steps[0]) and float(call.steps[-1][-1]) != 0.0:
        # noise[0] makes the beginning and noise[i] is z of step i - 1: there is none for the last.
        raise ValueError(
            "denoise: with noise, the last step must take none: its sigma is "
            f"{float(call.steps[-1][-1])}"
        )
    device = call.features.device
    table = torch.stack(list(call.steps[1:])).to(device)
    timesteps = call.steps[0].to(device).contiguous()
    images, samples = images.to(device).contiguous(), samples.to(device).contiguous()
    if call.backend == "triton":
        from diffmic_fast.triton.denoise import denoise as kernel

        features, prior, guidance, layers, eps, weight, bias = inputs
        kernel(
            features, prior, guidance, [ConditionalLayer(*map(_unit_rows, layer)) for layer in layers], eps,
            (weight, compact(bias)), timesteps, table.T.contiguous(), call.start, noise, call.seed % 2**64,
            images, samples, out, states, precision=call.precision, progress=progress,
        )  # fmt: skip
        return
    module, window = _native.cuda(call.backend), _window(call)
    scratch = module.denoise_workspace(
        call.features.shape[1],
        call.prior.shape[1],
        call.features.shape[0],
        len(call.steps[0]),
        window,
        call.precision,
        device.index or 0,
    )
    module.denoise(
        *inputs,
        timesteps,
        table,
        call.start,
        noise,
        call.seed % 2**64,
        images,
        samples,
        out,
        states,
        call.precision,
        window,
        call.tolerance,
        _READINGS_A_LAUNCH,
        torch.empty(scratch, dtype=torch.uint8, device=device),
        progress,
        stream_of(call.features),
    )


# The fields of _Call, in their order.
@torch.library.custom_op(
    "diffmic_fast::denoise",
    mutates_args=(),
    schema="(Tensor features, Tensor prior, Tensor guidance, Tensor[] weights, float[] eps, Tensor[] steps, "
    "SymInt start, Tensor? noise, SymInt seed, Tensor? image_ids, Tensor? sample_ids, bool trajectory, "
    "str precision, str instructions, SymInt window, float tolerance, str backend) -> Tensor",
)
def _denoise(*call: Any) -> Tensor:
    return _run(_Call(*call))


@_denoise.register_fake
def _(*arguments: Any) -> Tensor:
    call = _Call(*arguments)
    shape = call.prior.shape
    return call.prior.new_empty((len(call.steps[0]) + 1, *shape) if call.trajectory else shape)


def _check_weights(args: Arguments, weights: DenoiserWeights, steps: StepTable) -> None:
    sizes = args.sizes
    layers = (weights.conditioning, *weights.hidden)
    for layer, width in zip(layers, (2 * sizes["C"], sizes["F"], sizes["F"]), strict=True):
        inner = Arguments("denoise")
        inner.sizes = {"out": sizes["F"], "in": width, "B": len(steps.timesteps)}
        check_layer(inner, layer, steps.timesteps.to(layer.weight.device), "in", training=False)
    args.floating("output_weight", weights.output_weight, "C F")
    args.floating("output_bias", weights.output_bias, "C")
