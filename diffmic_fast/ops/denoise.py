"""`denoise`: a whole reverse chain in one call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from diffmic_fast import _native
from diffmic_fast.checks import Arguments
from diffmic_fast.ops._backend import asked_by_name, resolve
from diffmic_fast.ops._layout import compact, with_unit_rows
from diffmic_fast.ops.conditional_linear import check_layer
from diffmic_fast.reference import denoise as reference
from diffmic_fast.reference.denoise import DenoiserWeights, StepTable

PRECISIONS = ("fp32", "bf16", "int8")

# More rows keep the processor busy by themselves; a shorter chain is over before its window has grown.
_FEW_ROWS, _MANY_STEPS = 4, 50
_LARGEST_WINDOW = 192
# About what two cores evaluate in the time of reading the weights.
_ROWS_AT_ONE_READING = 16

__all__ = ["PRECISIONS", "DenoiserWeights", "StepTable", "denoise"]


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

    The backend "cpu" keeps the two hidden weights a second time, packed (8 F^2 bytes, half of it as bfloat16, a quarter
    as int8), as long as the first hidden weight's tensor lives. Every call compares all weights with what was packed
    and packs anew what has changed, in whatever way.

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
            bfloat16, sums and everything else in float32; or "int8": they are whole numbers in [-127, 127] times a
            step, the 127th part of the largest of a unit's weights or of a row's activations, everything else in
            float32. What a rounding changes in labels and probabilities: `python -m benchmarks.precision_labels`.
            Backend "cpu" only, but for "fp32".
        backend: a backend's name, or "auto", which takes the reference where a gradient is wanted or a tensor is not
            float32.
        instructions: the instruction set of the backend "cpu" ("avx512_bf16", "avx512", "avx2", "portable"), or "auto"
            for the widest of this processor. Sums differ in their last bits between sets, never within one: a row's
            result does not depend on the other rows, on the number of threads (torch's), or on the run.
        window: the most steps of a chain that the backend "cpu" may take at once, in [1, 192]; fewer where that is
            faster. It changes the speed alone: the result has the sequential chain's bits. Default: 64 for long chains
            of few rows, which are bound by reading the weights, else 1.
        tolerance: how far a state of a chain may still move, from one reading of the weights to the next, when the
            steps of a window are taken as settled; backend "cpu" only. More than 0, it gives up the bits of the
            sequential chain, and that a row does not depend on the number of rows, for fewer readings: y_0 then
            differs from the sequential chain's by about the tolerance. The window is then taken as it is, up to 192
            rows of a reading (default: what makes 16 rows of the chains, if there are enough steps).
        progress: called with (steps done, steps in all) every tenth of a second or so; blocks of 192 rows go through
            the chain one after the other, and their steps are counted together. Backend "cpu" only. An exception
            there, as Ctrl-C anywhere, stops the chain.

    Returns:
        y_0 [M, C], or with `trajectory` [n + 1, M, C] from the beginning to y_0.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
        RuntimeError: the backend asked for cannot serve.
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
    window = _window(window, tolerance, len(features), len(steps.timesteps))
    name = _choose(backend, precision, instructions, (features, prior, guidance, noise), weights)
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
    run = _denoise if progress is None else partial(_run, progress=progress)
    states: Tensor = run(
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
        window,
        tolerance,
    )
    return states


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


def _window(window: int | None, tolerance: float, rows: int, steps: int) -> int:
    if not 0.0 <= tolerance < float("inf"):
        raise ValueError(f"denoise: tolerance must be finite and not negative, got {tolerance}")
    if window is None:
        if rows > _FEW_ROWS or steps < _MANY_STEPS:
            return 1
        return 64 if tolerance == 0.0 else _ROWS_AT_ONE_READING // max(rows, 1)
    if not 1 <= window <= _LARGEST_WINDOW:
        raise ValueError(f"denoise: window must be in [1, {_LARGEST_WINDOW}], got {window}")
    return window


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
    if name == "cpu":
        tensors = [t for t in (*inputs, *_flat(weights)) if t is not None]
        if any(t.dtype != torch.float32 for t in tensors):
            reason = "it takes float32 tensors"
        elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            reason = "it has no gradient (use torch.no_grad, or the reference)"
        if reason and asked_by_name("denoise", backend):
            raise RuntimeError(f"denoise: the backend cpu cannot serve: {reason}")
        if reason:
            name = "reference"
    if name == "reference" and (precision != "fp32" or instructions != "auto"):
        raise RuntimeError(
            f"denoise: precision={precision!r}, instructions={instructions!r} need the backend cpu, "
            f"and this call is served by the reference{': ' + reason if reason else ''}"
        )
    return name


def _flat(weights: DenoiserWeights) -> list[Tensor]:
    layers = (weights.conditioning, *weights.hidden)
    return [
        *(part for layer in layers for part in layer),
        weights.output_weight,
        weights.output_bias,
    ]


def _run(
    features: Tensor,
    prior: Tensor,
    guidance: Tensor,
    weights: Sequence[Tensor],
    eps: Sequence[float],
    steps: Sequence[Tensor],
    start: int,
    noise: Tensor | None,
    seed: int,
    image_ids: Tensor | None,
    sample_ids: Tensor | None,
    trajectory: bool,
    precision: str,
    instructions: str,
    window: int,
    tolerance: float,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    rows = features.shape[0]
    if image_ids is None:
        image_ids = torch.arange(rows)
    if sample_ids is None:
        sample_ids = torch.zeros(rows, dtype=torch.int64)
    out = prior.new_empty(prior.shape)
    states = prior.new_empty((len(steps[0]) + 1, *prior.shape)) if trajectory else None
    parts = [with_unit_rows(part) for part in weights]
    _native.extension().denoise(
        with_unit_rows(features),
        compact(prior),
        compact(guidance),
        [parts[i : i + 7] for i in (0, 7, 14)],
        eps,
        parts[21],
        parts[22],
        [compact(column) for column in steps],
        start,
        None if noise is None else compact(noise),
        seed,
        image_ids.contiguous(),
        sample_ids.contiguous(),
        out,
        states,
        precision,
        instructions,
        torch.get_num_threads(),
        progress,
        window,
        _cache(weights),
        tolerance,
    )
    return out if states is None else states


@torch.library.custom_op("diffmic_fast::denoise", mutates_args=())
def _denoise(
    features: Tensor,
    prior: Tensor,
    guidance: Tensor,
    weights: Sequence[Tensor],
    eps: Sequence[float],
    steps: Sequence[Tensor],
    start: int,
    noise: Tensor | None,
    seed: int,
    image_ids: Tensor | None,
    sample_ids: Tensor | None,
    trajectory: bool,
    precision: str,
    instructions: str,
    window: int,
    tolerance: float,
) -> Tensor:
    return _run(
        features, prior, guidance, weights, eps, steps, start, noise, seed, image_ids, sample_ids,
        trajectory, precision, instructions, window, tolerance,
    )  # fmt: skip


@_denoise.register_fake
def _(
    features: Tensor,
    prior: Tensor,
    guidance: Tensor,
    weights: Sequence[Tensor],
    eps: Sequence[float],
    steps: Sequence[Tensor],
    start: int,
    noise: Tensor | None,
    seed: int,
    image_ids: Tensor | None,
    sample_ids: Tensor | None,
    trajectory: bool,
    precision: str,
    instructions: str,
    window: int,
    tolerance: float,
) -> Tensor:
    shape = (steps[0].shape[0] + 1, *prior.shape) if trajectory else prior.shape
    return prior.new_empty(shape)


def _check_weights(args: Arguments, weights: DenoiserWeights, steps: StepTable) -> None:
    sizes = args.sizes
    layers = (weights.conditioning, *weights.hidden)
    for layer, width in zip(layers, (2 * sizes["C"], sizes["F"], sizes["F"]), strict=True):
        inner = Arguments("denoise")
        inner.sizes = {"out": sizes["F"], "in": width, "B": len(steps.timesteps)}
        check_layer(inner, layer, steps.timesteps.to(layer.weight.device), "in", training=False)
    args.floating("output_weight", weights.output_weight, "C F")
    args.floating("output_bias", weights.output_bias, "C")
