"""Calls of every operation at the sizes of a real model, each with its definition in float64, for `gpu_check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_chain import (
    ROUNDINGS,
    SCHEDULE,
    T,
    device_of,
    make_inputs,
    make_weights,
    rounded_denoise,
)
from diffmic_fast.diffusion import make_steps
from diffmic_fast.ops.conditional_linear import conditional_linear
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.ops.denoise import PRECISIONS_OF, denoise
from diffmic_fast.ops.mmd import kernel_matrix, mmd
from diffmic_fast.ops.noise_losses import noise_losses
from diffmic_fast.ops.noised_conditioning import noised_conditioning
from diffmic_fast.ops.rois import cut_crops, rois
from diffmic_fast.reference.conditional_linear import ConditionalLayer

BRANCHES = 3
_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "uint8",
}
# Over fewer rows a variance can be nearly 0, where a multiple of one arithmetic's error does not bound another's. The
# tests of the operations bound these by the condition of each result.
_TRAINING_ROWS = 8
# Four means of kernels in [0, 1] are added, and an exponential may err by 1.5 units in the last place.
_MMD_UNIT = 5.0

Results = list[Tensor]
# (dtype, backend) -> results of an operation on values that do not depend on these.
Run = Callable[[torch.dtype, str], Results]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the calls.

    Attributes:
        features: values of F.
        rows: numbers of rows, of a batch in training.
        classes: C.
        side: height and width of the images of `rois`.
    """

    features: tuple[int, ...] = (3001, 6144)
    rows: tuple[int, ...] = (1, 2, 8, 9, 17, 32, 33, 64, 65)
    classes: int = 5
    side: int = 224


@dataclass(frozen=True)
class Case:
    """One call, and what its results are compared with.

    Attributes:
        sizes, precision: what distinguishes the call.
        dtype: whose roundings explain an error.
        found: the results by the kernels.
        exact: the results by the definition in float64, with the roundings that the precision prescribes.
        deviations: the largest error of each result by PyTorch's arithmetic in `dtype`. None: the kernels have the bits
            of the definition.
        units: for each result, the magnitude of what is added to it, where that can be more than its largest element.
        alone: the first row of the first result, computed without the others; None where it may have other bits.
    """

    sizes: str
    precision: str
    dtype: torch.dtype
    found: Callable[[], Results]
    exact: Callable[[], Results]
    deviations: Callable[[], Sequence[float]] | None
    units: tuple[float, ...] = ()
    alone: Callable[[], Tensor] | None = None


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The largest absolute error of each result: NaN if one of either is NaN, infinite for another shape."""
    return [
        float("inf")
        if a.shape != b.shape
        else float((a.double() - b.to(a.device).double()).abs().max())
        for a, b in zip(found, exact, strict=True)
    ]


def _case(
    sizes: str, backend: str, dtype: torch.dtype, run: Run, units: tuple[float, ...] = ()
) -> Case:
    exact = cache(partial(run, torch.float64, "reference"))

    def deviations() -> list[float]:
        return errors(run(dtype, "reference"), exact())

    return Case(sizes, _NAMES[dtype], dtype, partial(run, dtype, backend), exact, deviations, units)


# ---- denoise ----------------------------------------------------------------------------------


def _denoise(backend: str, sizes: Sizes) -> Iterator[Case]:
    for features in sizes.features:
        for precision in PRECISIONS_OF[backend]:
            if precision in ROUNDINGS:
                yield from _chains(backend, sizes, features, precision)


def _chains(backend: str, sizes: Sizes, features: int, precision: str) -> Iterator[Case]:
    device, most = device_of(backend), max(sizes.rows)
    weights = _weights(features, sizes.classes, device)
    inputs = make_inputs(most, features, sizes.classes, device)
    steps = make_steps(SCHEDULE, "ddim", 3, 0.3)
    images = (torch.arange(most) * 10**13).to(device)
    samples = (torch.arange(most) % 7).to(device)

    def found(rows: int) -> Results:
        x, prior, guidance = (t[:rows] for t in inputs)
        return [
            denoise(
                x, prior, guidance, weights, steps, seed=3, image_ids=images[:rows], sample_ids=samples[:rows],
                precision=precision, backend=backend,
            )
        ]  # fmt: skip

    @cache
    def definition(dtype: torch.dtype) -> Tensor:
        return rounded_denoise(
            inputs, weights, steps, precision, dtype, seed=3, image_ids=images, sample_ids=samples
        )

    def deviations() -> list[float]:  # of all rows: few elements may be right by chance
        return errors([definition(torch.float32)], [definition(torch.float64)])

    def exact(rows: int) -> Results:
        return [definition(torch.float64)[:rows]]

    # The tiles of Triton depend on the number of rows.
    alone = None if backend == "triton" else lambda: found(1)[0][0]
    for rows in sizes.rows:
        yield Case(
            f"F {features}, {rows} rows", precision, torch.float32, partial(found, rows),
            partial(exact, rows), deviations, alone=alone,
        )  # fmt: skip


_weights = lru_cache(maxsize=1)(make_weights)


# ---- conditional layers -----------------------------------------------------------------------


def _draw(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random numbers in float64 that `dtype` holds."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g).to(dtype).double() for shape in shapes]


@lru_cache(maxsize=1)
def _layer(width: int, features: int, dtype: torch.dtype) -> ConditionalLayer:
    vector = (features,)
    weight, bias, gamma, *norm, mean, variance = _draw(
        features, dtype, (features, width), vector, (T + 1, features), vector, vector, vector, vector
    )  # fmt: skip
    scaled = [(weight / width**0.5).to(dtype).double(), bias / 2]
    return ConditionalLayer(
        *scaled, gamma, *norm, mean, (variance.square() + 0.5).to(dtype).double()
    )


def _layer_results(
    call: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    layer: ConditionalLayer,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
) -> Results:
    """The output h of a layer; in training also its running statistics and all gradients.

    Args:
        call: (inputs, layer, timesteps, training=...) -> h [BRANCHES, B, F].
        inputs: float64, the first with B in its last dimension but one.
        layer: float64.
        device, dtype: what is computed with.
        training: as in the operation.
    """
    rows, features = inputs[0].shape[-2], layer.bias.shape[0]
    leaves = [
        v.to(device, dtype, copy=True).requires_grad_(training) for v in (*inputs, *layer[:5])
    ]
    running = [v.to(device, dtype, copy=True) for v in layer[5:]]
    there = ConditionalLayer(*leaves[len(inputs) :], *running)
    timesteps = torch.arange(rows) * 7 % T
    h = call(*leaves[: len(inputs)], there, timesteps.to(device), training=training)
    if not training:
        return [h]
    (grad,) = _draw(rows, dtype, (BRANCHES, rows, features))
    return [h.detach(), *running, *torch.autograd.grad(h, leaves, grad.to(device, dtype))]


def _over_layers(
    backend: str, sizes: Sizes, dtypes: Sequence[torch.dtype], make: Callable[..., Case]
) -> Iterator[Case]:
    for features in sizes.features:
        for dtype in dtypes:
            for rows in sizes.rows:
                for training in (False, True) if rows >= _TRAINING_ROWS else (False,):
                    kind = "training" if training else "evaluation"
                    title = f"F {features}, {rows} rows, {kind}"
                    yield make(backend, title, features, rows, dtype, training)


def _conditioning(backend: str, sizes: Sizes) -> Iterator[Case]:
    def make(
        backend: str, title: str, features: int, rows: int, dtype: torch.dtype, training: bool
    ) -> Case:
        labels = (BRANCHES, rows, sizes.classes)
        inputs = _draw(rows, dtype, (rows, features), labels, labels)
        layer = _layer(2 * sizes.classes, features, dtype)
        device = device_of(backend)

        def run(dtype: torch.dtype, backend: str) -> Results:
            call = partial(conditioning, backend=backend)
            return _layer_results(call, inputs, layer, device, dtype, training)

        return _case(title, backend, dtype, run)

    return _over_layers(backend, sizes, (torch.float32,), make)


def _noised_conditioning(backend: str, sizes: Sizes) -> Iterator[Case]:
    def make(
        backend: str, title: str, features: int, rows: int, dtype: torch.dtype, training: bool
    ) -> Case:
        labels = (rows, sizes.classes)
        inputs = _draw(rows, dtype, (rows, features), labels, (BRANCHES, *labels))
        layer = _layer(2 * sizes.classes, features, dtype)
        device = device_of(backend)

        def run(dtype: torch.dtype, backend: str) -> Results:
            tables = [
                part.sqrt().to(device, dtype)
                for part in (SCHEDULE.alpha_bar, 1.0 - SCHEDULE.alpha_bar)
            ]
            drawn: Results = []

            def call(*arguments: Any, training: bool) -> Tensor:
                found = noised_conditioning(
                    *arguments, *tables, seed=5, training=training, backend=backend
                )
                drawn.extend((found.y_t.detach(), found.noise.detach()))
                return found.h

            h = _layer_results(call, inputs, layer, device, dtype, training)
            return [*h, *drawn]

        return _case(title, backend, dtype, run)

    return _over_layers(backend, sizes, (torch.float32,), make)


def _conditional_linear(backend: str, sizes: Sizes) -> Iterator[Case]:
    def make(
        backend: str, title: str, features: int, rows: int, dtype: torch.dtype, training: bool
    ) -> Case:
        inputs = _draw(rows, dtype, (BRANCHES, rows, features))
        layer = _layer(features, features, dtype)
        device = device_of(backend)

        def run(dtype: torch.dtype, backend: str) -> Results:
            call = partial(conditional_linear, backend=backend)
            return _layer_results(call, inputs, layer, device, dtype, training)

        return _case(title, backend, dtype, run)

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    # Triton compiles for every range of rows.
    few = replace(sizes, rows=sizes.rows[:: max(len(sizes.rows) // 2, 1)])
    return _over_layers(backend, few, dtypes, make)


# ---- losses -----------------------------------------------------------------------------------


def _mmd(backend: str, sizes: Sizes) -> Iterator[Case]:
    for dtype in (torch.float32, torch.float64):
        for rows in sizes.rows:
            for width in (sizes.classes, 133):
                for bandwidth, steepest in ((None, 1.0), ((0.5, 2.0), 2.0)):
                    yield _mmd_case(backend, dtype, rows, width, bandwidth, steepest)


def _mmd_case(
    backend: str,
    dtype: torch.dtype,
    rows: int,
    width: int,
    bandwidth: tuple[float, ...] | None,
    steepest: float,
) -> Case:
    values = _draw(rows, dtype, (rows, width), (rows + 3, width))
    device = device_of(backend)

    def run(dtype: torch.dtype, backend: str) -> Results:
        x, y = (v.to(device, dtype, copy=True).requires_grad_() for v in values)
        value = mmd(x, y, bandwidth=bandwidth, backend=backend)
        kernel = kernel_matrix(x, y, bandwidth=bandwidth, backend=backend)
        of_value, of_kernel = (torch.autograd.grad(v.sum(), (x, y)) for v in (value, kernel))
        return [value.detach(), *of_value, kernel.detach(), *of_kernel]

    units = [_MMD_UNIT, *(steepest * _MMD_UNIT / n for n in (rows, rows + 3))]
    units += [_MMD_UNIT, *(steepest * _MMD_UNIT * n for n in (rows + 3, rows))]
    sizes = f"{rows} and {rows + 3} rows, d = {width}, bandwidth {bandwidth or 'default'}"
    return _case(sizes, backend, dtype, run, tuple(units))


def _noise_losses(backend: str, sizes: Sizes) -> Iterator[Case]:
    for dtype in (torch.float32, torch.float64):
        for rows in sizes.rows:
            yield _losses_case(backend, dtype, rows, sizes.classes)


def _losses_case(backend: str, dtype: torch.dtype, rows: int, classes: int) -> Case:
    shape = (rows, classes)
    noise, predictions = _draw(rows, dtype, shape, (BRANCHES, *shape))
    device = device_of(backend)

    def run(dtype: torch.dtype, backend: str) -> Results:
        leaf = predictions.to(device, dtype, copy=True).requires_grad_()
        losses = noise_losses(noise.to(device, dtype), leaf, backend=backend)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaf)]

    return _case(f"{rows} rows", backend, dtype, run, (_MMD_UNIT, _MMD_UNIT / rows))


# ---- rois -------------------------------------------------------------------------------------


def _rois(backend: str, sizes: Sizes) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8):
        for rows in sizes.rows:
            yield _rois_case(backend, sizes, dtype, rows)
    for rows in sizes.rows:
        yield _crops_gradient_case(backend, sizes, rows)


def _rois_case(backend: str, sizes: Sizes, dtype: torch.dtype, rows: int) -> Case:
    side, crop = sizes.side, max(sizes.side // 7, 1)
    (saliency,) = _draw(rows, torch.float32, (rows, sizes.classes, 14, 14))
    g = torch.Generator().manual_seed(rows)
    images = torch.randint(0, 256, (rows, 3, side, side), generator=g).to(dtype)

    def run(device: torch.device, backend: str) -> Results:
        there = saliency.float().to(device), images.to(device)
        return list(rois(*there, (crop, crop), 6, "all", backend=backend))

    device, host = device_of(backend), torch.device("cpu")
    return Case(
        f"{rows} images of {side} pixels", _NAMES[dtype], dtype, partial(run, device, backend),
        partial(run, host, "reference"), None,
    )  # fmt: skip


def _crops_gradient_case(backend: str, sizes: Sizes, rows: int) -> Case:
    side, crop = sizes.side, max(sizes.side // 7, 1)
    g = torch.Generator().manual_seed(rows)
    images = torch.randint(0, 4, (rows, 3, side, side), generator=g).double()
    origins = torch.randint(-crop, side + crop, (rows, 6, 2), generator=g)
    (grad,) = _draw(rows, torch.float32, (rows, 6, 3, crop, crop))
    device = device_of(backend)

    def run(dtype: torch.dtype, backend: str) -> Results:
        leaf = images.to(device, dtype, copy=True).requires_grad_()
        crops = cut_crops(leaf, origins.to(device), (crop, crop), "all", backend=backend)
        return [crops.detach(), *torch.autograd.grad(crops, leaf, grad.to(device, dtype))]

    return _case(f"{rows} images of {side} pixels, gradient", backend, torch.float32, run)


OPERATIONS: dict[str, Callable[[str, Sizes], Iterator[Case]]] = {
    "denoise": _denoise,
    "conditioning": _conditioning,
    "noised_conditioning": _noised_conditioning,
    "conditional_linear": _conditional_linear,
    "mmd": _mmd,
    "noise_losses": _noise_losses,
    "rois": _rois,
}
# The operation that has the backends of a call.
IMPLEMENTED_AS = {"noised_conditioning": "conditioning", "noise_losses": "mmd"}
