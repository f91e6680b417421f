"""`denoise`: a whole reverse chain in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.checks import Arguments
from diffmic_fast.ops import _autocast as autocast
from diffmic_fast.ops import _engine as engine
from diffmic_fast.ops._backend import BackendError, asked_by_name, resolve, stream_of
from diffmic_fast.ops._layout import compact, with_unit_rows
from diffmic_fast.ops._operators import register
from diffmic_fast.ops._transfer import to_device
from diffmic_fast.ops._weight_cache import cache_of
from diffmic_fast.ops.conditional_linear import check_parameters
from diffmic_fast.reference import denoise as reference
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import COEFFICIENTS, DenoiserWeights, StepTable

# Precisions of each backend; csrc/include/precision.h has those of the kernels.
PRECISIONS_OF = {
    "reference": ("fp32",),
    "cpu": ("fp32", "bf16", "int8"),
    "cuda": ("fp32", "bf16", "fp8"),
    "triton": ("fp32", "bf16"),
    "cuda-emulated": ("fp32", "bf16", "fp8"),
}
PRECISIONS = ("fp32", "bf16", "fp8", "int8")

# More rows use the whole processor by themselves; a shorter chain ends before its window has grown.
_WINDOW_MAX_ROWS, _WINDOW_MIN_STEPS = 4, 50
_MAX_WINDOW = 192
# Rows per sweep of windows with a tolerance: those that minimise the total time, sweeps x time per sweep, on two cores
# (benchmarks.bench_denoise), and on a GPU. In bfloat16 the weights are read in half the time, and the tiles of AMX
# compute many rows in little more than that. "amx_emulated" uses AMX's, since results depend on the window.
_ROWS_PER_SWEEP = {"fp32": 16, "bf16": 8}
_BF16_ROWS_PER_SWEEP = {"avx512_bf16": 16, "amx": 32, "amx_emulated": 32}
_CUDA_ROWS_PER_SWEEP = 32
_SWEEPS_PER_LAUNCH = 64  # a few milliseconds of a GPU
_MAX_GPU_FEATURES, _MAX_CUDA_CLASSES, _MAX_TRITON_CLASSES = 65536, 512, 128
_MAX_INT8_FEATURES = 133_144  # 127^2 F < 2^31
_MAX_SAMPLE = 2**32 - 1

__all__ = ["PRECISIONS", "PRECISIONS_OF", "DenoiserWeights", "StepTable", "denoise"]


class Call(NamedTuple):
    """The arguments of the operator `diffmic_fast::denoise`, as every backend takes them.

    csrc/bindings/denoise.cpp reads these fields by name into the struct DenoiseCall. Attributes that are not explained
    here are those of `denoise`.

    Attributes:
        conditioning, hidden_1, hidden_2: the tensors of a `ConditionalLayer` each.
        eps: BatchNorm's, of the three layers.
        coefficients: [7, n], the columns of the `StepTable` after its timesteps.
        window: 0 selects the default.
        backend: the one that serves the call, or "auto" for "cuda" or "triton", by the number of rows: a traced graph
            does not know it.
    """

    features: Tensor
    prior: Tensor
    guidance: Tensor
    conditioning: Sequence[Tensor]
    hidden_1: Sequence[Tensor]
    hidden_2: Sequence[Tensor]
    output_weight: Tensor
    output_bias: Tensor
    eps: Sequence[float]
    timesteps: Tensor
    coefficients: Tensor
    start: int
    noise: Tensor | None
    seed: int
    image_ids: Tensor | None
    sample_ids: Tensor | None
    trajectory: bool
    precision: str
    instructions: str
    window: int
    tolerance: float
    backend: str

    def layers(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """The tensors of the three conditional layers."""
        return self.conditioning, self.hidden_1, self.hidden_2

    def kernel_inputs(self) -> list[Tensor]:
        """The floating-point tensors of the rows and the weights."""
        rows = [self.features, self.prior, self.guidance]
        layers = [tensor for layer in self.layers() for tensor in layer]
        noise = [] if self.noise is None else [self.noise]
        return [*rows, *noise, *layers, self.output_weight, self.output_bias]


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
    """Run a reverse chain over M independent rows, from noise around the prior to the label vector.

    Computes in float32 under autocast (`ops._autocast`); `precision` selects a lower precision. The mathematics is in
    docs/algorithm.md, "Sampling".

    The backend "cpu" caches the two hidden weights in packed form (8 F^2 bytes in fp32, half of that in bf16, a quarter
    in int8) for as long as the tensor of the first hidden weight lives. Every call hashes the weights and packs them
    again if any bit has changed. The backend "cuda" packs them in every call, which takes as long as three steps, and
    frees that memory with the call. On a GPU the call does not wait for the device unless `progress` is given, and with
    the backend "cuda" a CUDA graph can capture it; the graph holds the steps, and ids that are on the CPU.

    Args:
        features: [M, F] floating, image features after `norm`.
        prior: [M, C] floating, mean of the initial state.
        guidance: [M, C] floating, label distribution that conditions the denoiser.
        weights: the denoiser in evaluation mode.
        steps: the sampler, n steps (`diffusion.make_steps`); on the CPU, wherever the other tensors are.
        noise: [n, M, C] floating, in the order of use: noise[0] is added to the prior, noise[i] is z of step i - 1.
            None: Philox noise addressed by (seed, image, sample, timestep) (docs/algorithm.md, "Philox noise").
        seed: 64-bit key of the Philox noise.
        image_ids, sample_ids: [M] int64, image and sample of each row, on the device of `features` or on the CPU;
            samples in [0, 2**32). Those on a GPU are not checked: a sample out of range makes the row NaN. None:
            0 … M-1, and 0.
        trajectory: return all states instead of the last one.
        precision: of the two hidden matrix products; everything else is float32. `PRECISIONS_OF` lists what each
            backend has, docs/algorithm.md, "Quantisation", the definitions, and `python -m
            benchmarks.precision_labels` measures the effect on labels and probabilities.
            "fp32": IEEE float32. "bf16": weights and activations in bfloat16, float32 sums.
            "fp8" (backend "cuda"): weights in float8 e4m3 with a scale amax / 448 per output channel, activations in
            bfloat16; if a weight is not finite, the whole output channel becomes NaN.
            "int8" (backend "cpu", up to 133,144 features): weights in int8 with a scale amax / 127 per output channel,
            activations in int8 with a scale per row, int32 sums.
        backend: name of a backend, or "auto". "auto" uses the reference if a gradient is required or a tensor is not
            float32, and on a GPU for more than 512 classes or 65,536 features. On a GPU it uses "triton" (at most 128
            classes, "fp32" and "bf16", no tolerance; the last bits of a row depend on the number of rows) if "cuda" is
            not built, and for as many rows as make it faster by the estimate of `ops._engine`, more than 32 in "fp32"
            and 64 in "bf16". Name the backend for results that do not depend on the number of rows.
        instructions: instruction set of the backend "cpu": "amx", "avx512_bf16", "avx512", "avx2", "portable", or
            "auto" for the first of these that the processor and operating system support. "amx_emulated" gives the
            bits of "amx" on any processor with AVX2, slowly. In "fp32" and "bf16" instruction sets differ in the last
            bits, in "int8" they do not. For one instruction set the result of a row is batch-invariant, and
            independent of the number of threads (`torch.get_num_threads()`) and of the run. On a GPU it also depends
            on the number of multiprocessors.
        window: the most steps of a chain that one sweep may evaluate ("cpu" and "cuda"), in [1, 192]; the kernels
            reduce it where that is faster or a launch takes fewer rows. It affects speed only: the result has the bits
            of one step per sweep (docs/algorithm.md, "Windows of steps"). None: 64 on the CPU, and on a GPU what gives
            32 rows, for at least 50 steps of at most 4 rows; else 1.
        tolerance: largest change of a state between two sweeps at which a step of a window counts as converged ("cpu"
            and "cuda", not "int8"). A value above 0 needs fewer sweeps, and gives up batch invariance and the bits of
            one step per sweep: y_0 then differs by about the tolerance in "fp32", and by up to 1e-4 in "bf16" and
            "fp8" (measured in "bf16": 9e-5 over 1000 steps at 1e-5). The window is then not reduced, up to 192 rows
            per sweep; None gives 16 rows per sweep in "fp32"; in "bf16" 8, with AVX-512 bfloat16 16, with AMX 32; and
            32 on a GPU.
        progress: called as progress(steps done, steps in total) about every 0.1 s; the steps of blocks of up to 256
            rows (64 on a GPU), which run one after the other, are added up. "triton" calls it after every 64 steps of
            up to 4096 rows, the reference never. On a GPU the call synchronises if and only if `progress` is given.
            An exception raised in it, like Ctrl-C at any time, stops the chain.

    Returns:
        y_0 [M, C], or with `trajectory` all states [n + 1, M, C], y_0 last.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value. All tensors but `steps` and the
            ids must be on one device.
        BackendError: the requested backend, precision or instruction set is not available (a RuntimeError).
    """
    args = Arguments("denoise")
    args.floating("features", features, "M F")
    args.floating("prior", prior, "M C")
    args.floating("guidance", guidance, "M C")
    args.sizes["n"] = len(steps.timesteps)
    if noise is not None:
        args.floating("noise", noise, "n M C")
    if image_ids is not None:
        args.integer("image_ids", image_ids, "M", host=True)
    if sample_ids is not None:
        args.integer("sample_ids", sample_ids, "M", host=True)
    _check_steps(steps, noise)
    _check_weights(args, weights, steps, features.device)
    _check_window(window, tolerance, precision)
    if autocast.active(features):
        features, prior, guidance = map(autocast.single, (features, prior, guidance))
        noise = None if noise is None else autocast.single(noise)
        weights = autocast.single(weights)
    call = Call(
        features, prior, guidance, weights.conditioning, *weights.hidden, weights.output_weight, weights.output_bias,
        weights.eps, steps.timesteps, steps.coefficients(), steps.start, noise,
        # The schema has signed integers; the key is these 64 bits either way.
        (seed + 2**63) % 2**64 - 2**63,
        image_ids, sample_ids, trajectory, precision, instructions, window or 0, tolerance, backend,
    )  # fmt: skip
    arguments: list[Any] = [*call]  # older versions of torch.compile do not trace call._replace
    arguments[-1] = _backend_of(call)
    call = Call(*arguments)
    if call.backend == "reference":
        with autocast.off(features):
            return reference.denoise(
                features, prior, guidance, weights, steps, noise=noise, seed=seed, image_ids=image_ids,
                sample_ids=sample_ids, trajectory=trajectory,
            )  # fmt: skip
    if progress is not None:
        return _run(call, progress)
    states: Tensor = torch.ops.diffmic_fast.denoise.default(*call)
    return states


def _check_steps(steps: StepTable, noise: Tensor | None) -> None:
    args = Arguments("denoise", torch.device("cpu"))
    args.integer("steps.timesteps", steps.timesteps, "n")
    for name in COEFFICIENTS:
        args.floating(f"steps.{name}", getattr(steps, name), "n")
    if noise is not None and args.sizes["n"] == 0:
        raise ValueError("denoise: steps must have at least one step if noise is given, got none")


def _check_weights(
    args: Arguments, weights: DenoiserWeights, steps: StepTable, device: torch.device
) -> None:
    sizes = args.sizes
    layers = (weights.conditioning, *weights.hidden)
    for layer, width in zip(layers, (2 * sizes["C"], sizes["F"], sizes["F"]), strict=True):
        # Of the device of the rows, but of any dtype: the reference converts.
        inner = Arguments("denoise", device)
        inner.sizes = {"out": sizes["F"], "in": width, "rows": len(weights.conditioning.gamma)}
        check_parameters(inner, layer, "in")
        inner.within("steps.timesteps", steps.timesteps, 0, inner.sizes["rows"] - 1)
    args.floating("output_weight", weights.output_weight, "C F")
    args.floating("output_bias", weights.output_bias, "C")


def _check_window(window: int | None, tolerance: float, precision: str) -> None:
    if not 0.0 <= tolerance < float("inf"):
        raise ValueError(f"denoise: tolerance must be finite and at least 0, got {tolerance}")
    if tolerance > 0.0 and precision == "int8":
        raise ValueError(
            "denoise: tolerance must be 0 with precision='int8', whose quantisation turns a difference of the last "
            f"bits into one of 1e-3, got {tolerance}"
        )
    if window is not None and not 1 <= window <= _MAX_WINDOW:
        raise ValueError(f"denoise: window must be in [1, {_MAX_WINDOW}], got {window}")


def _backend_of(call: Call) -> str:
    """The backend that serves a call: the reference where "auto" would select one that cannot take these tensors.

    Raises:
        BackendError: the requested backend, precision or instruction set cannot serve the call.
        ValueError: there is no such precision, or too many features for it.
    """
    if call.precision not in PRECISIONS:
        raise ValueError(
            f"denoise: precision must be one of {', '.join(PRECISIONS)}, got {call.precision!r}"
        )
    name, reason = resolve("denoise", call.backend, call.features.device), ""
    if name != "reference":
        reason = _obstacle(name, call)
        if reason and asked_by_name("denoise", call.backend):
            raise BackendError(f"denoise: the backend {name} cannot serve: {reason}")
        if reason:
            name = "reference"
    served_by = f"this call is served by {name}{': ' + reason if reason else ''}"
    if call.precision not in PRECISIONS_OF[name]:
        having = ", ".join(each for each, some in PRECISIONS_OF.items() if call.precision in some)
        raise BackendError(
            f"denoise: precision={call.precision!r} needs a backend that has it ({having}), and {served_by}"
        )
    if call.instructions != "auto" and name != "cpu":
        raise BackendError(
            f"denoise: instructions={call.instructions!r} needs the backend cpu, and {served_by}"
        )
    features = call.features.shape[1]
    if call.precision == "int8" and features > _MAX_INT8_FEATURES:
        raise ValueError(
            f"denoise: features must have at most {_MAX_INT8_FEATURES} columns with precision='int8', got {features}"
        )
    if (
        name == "cuda"
        and call.precision in engine.PRECISIONS
        and call.tolerance == 0.0
        and engine.selectable(call.backend, call.features.device)
        and not _obstacle("triton", call)
    ):
        return "auto"
    return name


def _obstacle(backend: str, call: Call) -> str:
    """Why the kernels of a backend cannot take the tensors of a call; "" if they can."""
    tensors = call.kernel_inputs()
    if any(t.dtype != torch.float32 for t in tensors):
        return "it takes float32 tensors"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "it has no gradient (use torch.no_grad, or the reference)"
    if backend == "cpu":
        return ""
    if any(t.device != tensors[0].device for t in tensors):
        return "it takes tensors of one device"
    max_classes = _MAX_TRITON_CLASSES if backend == "triton" else _MAX_CUDA_CLASSES
    features, classes = call.features.shape[1], call.prior.shape[1]
    if features > _MAX_GPU_FEATURES or classes > max_classes:
        return f"it takes at most {_MAX_GPU_FEATURES} features and {max_classes} classes, got {features} and {classes}"
    return ""


def _run(call: Call, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Run the kernels of a call's backend, which is not the reference."""
    if call.backend == "auto":
        (rows, width), card = call.features.shape, engine.card_of(call.features.device.index)
        call = call._replace(backend=engine.choose(rows, width, call.precision, card))
    steps = call.timesteps.shape[0]
    out = call.prior.new_empty(call.prior.shape)
    states = call.prior.new_empty((steps + 1, *call.prior.shape)) if call.trajectory else None
    inputs = _prepare(call)
    if call.backend == "cpu":
        cache = cache_of(ConditionalLayer(*call.hidden_1).weight)
        _native.extension().denoise(inputs, out, states, torch.get_num_threads(), progress, cache)
    elif call.backend == "triton":
        from diffmic_fast.triton.denoise import denoise as kernel

        kernel(inputs, out, states, progress)
    else:
        module, device = _native.cuda(call.backend), call.features.device
        rows, features = call.features.shape
        workspace = module.denoise_workspace(
            features,
            call.prior.shape[1],
            rows,
            steps,
            inputs.window,
            call.precision,
            device.index or 0,
        )
        module.denoise(
            inputs, out, states, _SWEEPS_PER_LAUNCH, torch.empty(workspace, dtype=torch.uint8, device=device), progress,
            stream_of(call.features),
        )  # fmt: skip
    return out if states is None else states


def _prepare(call: Call) -> Call:
    """The call with its defaults filled in, and arrays in the layout and on the device of the kernels."""
    device, rows = call.features.device, call.features.shape[0]
    if call.backend != "cpu":
        _check_gpu_values(call)
    images, samples = call.image_ids, call.sample_ids
    if images is None:
        images = torch.arange(rows, device=device)
    if samples is None:
        samples = torch.zeros(rows, dtype=torch.int64, device=device)
    return call._replace(
        features=with_unit_rows(call.features),
        prior=compact(call.prior),
        guidance=compact(call.guidance),
        conditioning=ConditionalLayer(*map(with_unit_rows, call.conditioning)),
        hidden_1=ConditionalLayer(*map(with_unit_rows, call.hidden_1)),
        hidden_2=ConditionalLayer(*map(with_unit_rows, call.hidden_2)),
        output_weight=with_unit_rows(call.output_weight),
        output_bias=compact(call.output_bias),
        timesteps=to_device(call.timesteps, device).contiguous(),
        coefficients=compact(to_device(call.coefficients, device)),
        noise=None if call.noise is None else compact(call.noise),
        image_ids=to_device(images, device).contiguous(),
        sample_ids=to_device(samples, device).contiguous(),
        window=call.window or _default_window(call),
    )


def _check_gpu_values(call: Call) -> None:
    """Raise for values on the CPU that kernels on a GPU cannot report; those on the CPU check them themselves.

    A traced call gets here unchecked. Sample ids on a GPU are not read: the kernels give NaN for one out of range.
    """
    args = Arguments("denoise", torch.device("cpu"))
    args.integer("steps.timesteps", call.timesteps, "n")
    args.floating("steps", call.coefficients, "7 n")
    rows = min(ConditionalLayer(*each).gamma.shape[0] for each in call.layers())
    args.within("steps.timesteps", call.timesteps, 0, rows - 1)
    if call.noise is None:
        if call.sample_ids is not None:
            args.within("sample_ids", call.sample_ids, 0, _MAX_SAMPLE)
    elif call.coefficients.shape[1] and float(call.coefficients[-1, -1]) != 0.0:
        # noise[0] makes the initial state and noise[i] is z of step i - 1: there is none for the last step.
        raise ValueError(
            f"denoise: with noise, sigma of the last step must be 0, got {float(call.coefficients[-1, -1])}"
        )


def _default_window(call: Call) -> int:
    """The window for the rows of a call, whose number a traced graph does not know."""
    rows = call.features.shape[0]
    if rows > _WINDOW_MAX_ROWS or call.timesteps.shape[0] < _WINDOW_MIN_STEPS:
        return 1
    if call.backend != "cpu":
        return max(_CUDA_ROWS_PER_SWEEP // max(rows, 1), 1)
    if call.tolerance == 0.0:
        return 64
    wanted = _ROWS_PER_SWEEP[call.precision]
    if call.precision == "bf16":
        instructions = call.instructions
        if instructions == "auto":
            instructions = _native.extension().denoise_instructions()[0]
        wanted = _BF16_ROWS_PER_SWEEP.get(instructions, wanted)
    return max(wanted // max(rows, 1), 1)


def _fake(call: Call) -> Tensor:
    shape = call.prior.shape
    states = (call.timesteps.shape[0] + 1, *shape) if call.trajectory else shape
    return call.prior.new_empty(states)


register("denoise", Call, Tensor, _run, _fake)
