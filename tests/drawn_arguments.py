"""Arguments that hypothesis draws: values in any memory layout, and the operations that take them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.ops.conditional_linear import conditional_linear
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.ops.mmd import kernel_matrix, mmd
from diffmic_fast.ops.noise_losses import noise_losses
from diffmic_fast.ops.noised_conditioning import noised_conditioning
from diffmic_fast.ops.rois import choose_windows, cut_crops, rois
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights

Tensors = Mapping[str, Tensor]

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
STATISTICS = ("running_mean", "running_var")
LAYER = ConditionalLayer._fields
PARAMETERS = tuple(name for name in LAYER if name not in STATISTICS)
STEPS = 6
SCHEDULE = make_schedule("linear", STEPS, 1e-3, 0.1)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One call of an operation.

    Attributes:
        operation: begins every message of its errors.
        tensors: its tensor arguments by name, floating ones in float64.
        run: calls it with the tensors and the name of a backend; its results.
        leaves: arguments whose gradients are compared.
        written: arguments that the operation updates in place.
        terms: size of the terms whose difference a result is.
    """

    operation: str
    tensors: dict[str, Tensor]
    run: Callable[[Tensors, str], Sequence[Tensor]]
    leaves: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    terms: float = 0.0


@dataclasses.dataclass(frozen=True)
class Placed:
    """A tensor in a buffer of other values, which nothing may read or write.

    Attributes:
        view: the tensor.
        buffer: all of its memory, one dimension.
    """

    view: Tensor
    buffer: Tensor


def place(data: st.DataObject, values: Tensor, *, writable: bool = False) -> Placed:
    """The values in a drawn layout: order of dimensions, steps, gaps, start, stride 0, negative bit.

    A dimension of stride 0 repeats the first entry there, so the values may change. The gaps are NaN, or -77.
    """
    rank = values.ndim
    order = data.draw(st.permutations(range(rank)))
    repeated = None
    if not writable and rank and data.draw(st.integers(0, 5)) == 0:
        repeated = data.draw(st.sampled_from(range(rank)))
    gap = float("nan") if values.is_floating_point() else 77
    steps = [data.draw(st.sampled_from([1, 1, 2, 3])) for _ in range(rank)]
    starts = [data.draw(st.integers(0, 2)) for _ in range(rank)]
    sizes = [1 if d == repeated else values.shape[d] for d in range(rank)]
    extents = [
        start + step * size + 1 for start, step, size in zip(starts, steps, sizes, strict=True)
    ]
    buffer = values.new_full([extents[d] for d in order], gap)
    inverse = [order.index(d) for d in range(rank)]
    view = buffer.permute(inverse)[
        tuple(slice(a, a + n * s, s) for a, n, s in zip(starts, sizes, steps, strict=True))
    ]
    source = (
        values if repeated is None else values.narrow(repeated, 0, min(1, values.shape[repeated]))
    )
    if source.numel():
        view.copy_(source)
    if repeated is not None:
        view = view.expand(values.shape) if values.shape[repeated] else view.narrow(repeated, 0, 0)
    if not writable and values.is_floating_point() and data.draw(st.integers(0, 7)) == 0:
        view = torch._neg_view(view.neg_() if repeated is None else view.neg())
    return Placed(view, buffer.flatten() if buffer.is_contiguous() else buffer.reshape(-1))


def _sizes(data: st.DataObject) -> Callable[[int, int], int]:
    return lambda low, high: data.draw(st.integers(low, high))


def _values(data: st.DataObject) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _layer(data: st.DataObject, width: int, features: int, table: int) -> dict[str, Tensor]:
    values = _values(data)
    return {
        "weight": values(features, width) / max(width, 1) ** 0.5,
        "bias": values(features),
        "gamma": values(table, features),
        "norm_weight": values(features),
        "norm_bias": values(features),
        "running_mean": values(features),
        "running_var": values(features).square() + 0.5,
    }


def _timesteps(data: st.DataObject, rows: int, table: int) -> Tensor:
    count = data.draw(st.sampled_from([rows, rows, 1]))
    return torch.tensor(
        [data.draw(st.integers(0, table - 1)) for _ in range(count)], dtype=torch.int64
    )


def _of_layer(tensors: Tensors) -> ConditionalLayer:
    return ConditionalLayer(*(tensors[name] for name in LAYER))


class _LayerSizes(NamedTuple):
    """Sizes of a call of a conditional layer: `table` rows of gamma, `branches` before the rows, or none."""

    training: bool
    rows: int
    width: int
    features: int
    table: int
    branches: tuple[int, ...]


def _layer_sizes(data: st.DataObject, widest: int) -> _LayerSizes:
    training = data.draw(st.booleans(), label="training")
    return _LayerSizes(
        training=training,
        rows=data.draw(st.sampled_from([2, 3, 5, 9, 17] if training else [0, 1, 2, 3, 9, 33])),
        width=data.draw(st.integers(1, widest)),
        features=data.draw(st.integers(1, 40)),
        table=data.draw(st.integers(1, 8)),
        branches=data.draw(st.sampled_from([(), (), (1,), (2,), (3,)])),
    )


def draw_conditioning(data: st.DataObject) -> Drawn:
    """A call of `conditioning`."""
    training, rows, classes, features, table, branches = _layer_sizes(data, 6)
    values = _values(data)
    tensors = {
        "x": values(rows, features),
        "y_t": values(*branches, rows, classes),
        "guidance": values(*branches, rows, classes),
        **_layer(data, 2 * classes, features, table),
        "timesteps": _timesteps(data, rows, table),
    }

    def run(t: Tensors, backend: str) -> list[Tensor]:
        h = conditioning(
            t["x"], t["y_t"], t["guidance"], _of_layer(t), t["timesteps"], training=training, momentum=0.3,
            eps=1e-4, backend=backend,
        )  # fmt: skip
        return [h]

    written = STATISTICS if training else ()
    return Drawn("conditioning", tensors, run, ("x", "y_t", "guidance", *PARAMETERS), written)


def draw_noised_conditioning(data: st.DataObject) -> Drawn:
    """A call of `noised_conditioning` with noise."""
    training, rows, classes, features, table, branches = _layer_sizes(data, 6)
    values = _values(data)
    tensors = {
        "x": values(rows, features),
        "y_0": values(rows, classes),
        "guidance": values(*branches, rows, classes),
        **_layer(data, 2 * classes, features, table + 1),
        "timesteps": _timesteps(data, rows, table),
        "sqrt_alpha_bar": values(table).sigmoid(),
        "sqrt_one_minus_alpha_bar": values(table).sigmoid(),
        "noise": values(rows, classes),
    }

    def run(t: Tensors, backend: str) -> list[Tensor]:
        found = noised_conditioning(
            t["x"], t["y_0"], t["guidance"], _of_layer(t), t["timesteps"], t["sqrt_alpha_bar"],
            t["sqrt_one_minus_alpha_bar"], noise=t["noise"], training=training, momentum=0.3, eps=1e-4, backend=backend,
        )  # fmt: skip
        return [found.h, found.y_t]

    leaves = ("x", "y_0", "guidance", "noise", *PARAMETERS)
    return Drawn("noised_conditioning", tensors, run, leaves, STATISTICS if training else ())


def draw_conditional_linear(data: st.DataObject) -> Drawn:
    """A call of `conditional_linear`."""
    training, rows, width, features, table, branches = _layer_sizes(data, 40)
    values = _values(data)
    tensors = {
        "h": values(*branches, rows, width),
        **_layer(data, width, features, table),
        "timesteps": _timesteps(data, rows, table),
    }

    def run(t: Tensors, backend: str) -> list[Tensor]:
        h = conditional_linear(
            t["h"],
            _of_layer(t),
            t["timesteps"],
            training=training,
            momentum=0.3,
            eps=1e-4,
            backend=backend,
        )
        return [h]

    return Drawn(
        "conditional_linear", tensors, run, ("h", *PARAMETERS), STATISTICS if training else ()
    )


BANDWIDTHS: list[Any] = [None, 0.8, 3, [0.5, 1.0, 3.0], "median"]


def draw_mmd(data: st.DataObject) -> Drawn:
    """A call of `mmd`."""
    integer, values = _sizes(data), _values(data)
    estimator = data.draw(st.sampled_from(["biased", "unbiased"]))
    bandwidth = data.draw(st.sampled_from(BANDWIDTHS))
    least = 2 if estimator == "unbiased" else 1
    n, m, width = integer(least, 40), integer(least, 40), integer(1, 9)
    tensors = {"x": values(n, width), "y": values(m, width)}
    for name, count in (("x_weights", n), ("y_weights", m)):
        if data.draw(st.booleans()):
            tensors[name] = values(count).square() + 0.1

    def run(t: Tensors, backend: str) -> list[Tensor]:
        found = mmd(
            t["x"], t["y"], bandwidth=bandwidth, estimator=estimator, x_weights=t.get("x_weights"),
            y_weights=t.get("y_weights"), backend=backend,
        )  # fmt: skip
        return [found]

    return Drawn("mmd", tensors, run, ("x", "y"), terms=1.0)


def draw_kernel_matrix(data: st.DataObject) -> Drawn:
    """A call of `kernel_matrix`."""
    integer, values = _sizes(data), _values(data)
    bandwidth = data.draw(st.sampled_from(BANDWIDTHS))
    width = integer(1, 9)
    tensors = {"x": values(integer(1, 40), width), "y": values(integer(1, 40), width)}

    def run(t: Tensors, backend: str) -> list[Tensor]:
        return [kernel_matrix(t["x"], t["y"], bandwidth=bandwidth, backend=backend)]

    return Drawn("mmd.kernel_matrix", tensors, run, ("x", "y"))


def draw_noise_losses(data: st.DataObject) -> Drawn:
    """A call of `noise_losses`."""
    integer, values = _sizes(data), _values(data)
    rows, classes = integer(1, 40), integer(1, 9)
    tensors = {"noise": values(rows, classes), "predictions": values(integer(1, 4), rows, classes)}

    def run(t: Tensors, backend: str) -> list[Tensor]:
        return [noise_losses(t["noise"], t["predictions"], backend=backend)]

    return Drawn("noise_losses", tensors, run, ("predictions",), terms=1.0)


def draw_choose_windows(data: st.DataObject) -> Drawn:
    """A call of `choose_windows`, of few distinct values, so that means tie."""
    integer, values = _sizes(data), _values(data)
    height, width = integer(1, 9), integer(1, 9)
    window, count = (integer(1, height), integer(1, width)), integer(1, 5)
    saliency = values(integer(0, 4), integer(1, 7), height, width)
    tensors = {"saliency": saliency.round() if data.draw(st.booleans()) else saliency}

    def run(t: Tensors, backend: str) -> list[Tensor]:
        return [choose_windows(t["saliency"], window, count, backend=backend)]

    return Drawn("rois.choose_windows", tensors, run)


def draw_cut_crops(data: st.DataObject) -> Drawn:
    """A call of `cut_crops`."""
    integer, values = _sizes(data), _values(data)
    images, count = integer(0, 3), integer(0, 4)
    height, width = integer(1, 12), integer(1, 12)
    size = integer(1, 14), integer(1, 14)
    channels = data.draw(st.sampled_from(["first", "all"]))
    origins = [[[integer(-20, 20), integer(-20, 20)] for _ in range(count)] for _ in range(images)]
    tensors = {
        "images": values(images, integer(1, 4), height, width),
        "origins": torch.tensor(origins, dtype=torch.int64).reshape(images, count, 2),
    }

    def run(t: Tensors, backend: str) -> list[Tensor]:
        return [cut_crops(t["images"], t["origins"], size, channels, backend=backend)]

    return Drawn("rois.cut_crops", tensors, run, ("images",))


def draw_rois(data: st.DataObject) -> Drawn:
    """A call of `rois`."""
    integer, values = _sizes(data), _values(data)
    images, rows, columns = integer(0, 3), integer(1, 6), integer(1, 6)
    height, width = rows * integer(1, 4), columns * integer(1, 4)
    crop, count = (integer(1, height), integer(1, width)), integer(1, 4)
    channels = data.draw(st.sampled_from(["first", "all"]))
    tensors = {
        "saliency": values(images, integer(1, 4), rows, columns),
        "images": values(images, integer(1, 4), height, width),
    }

    def run(t: Tensors, backend: str) -> list[Tensor]:
        found = rois(t["saliency"], t["images"], crop, count, channels, backend=backend)
        return [found.cells, found.origins, found.crops]

    return Drawn("rois", tensors, run, ("images",))


def draw_denoise(data: st.DataObject) -> Drawn:
    """A call of `denoise` with noise, in float32."""
    return draw_chain(data, {})


def draw_chain(data: st.DataObject, options: dict[str, Any]) -> Drawn:
    """A call of `denoise` with its options but for the backend."""
    integer, values = _sizes(data), _values(data)
    rows, classes, features = (
        data.draw(st.sampled_from([0, 1, 2, 5, 17, 70])),
        integer(1, 6),
        integer(1, 70),
    )
    sampler = data.draw(
        st.sampled_from([("ddpm", None, 0.0), ("ddim", 3, 0.5), ("ddpm_truncated", 2, 0.0)])
    )
    trajectory, watched = data.draw(st.booleans()), data.draw(st.booleans(), label="progress")
    steps = make_steps(SCHEDULE, *sampler)
    tensors = {
        "features": values(rows, features),
        "prior": values(rows, classes).softmax(dim=1),
        "guidance": values(rows, classes).softmax(dim=1),
        "noise": values(len(steps.timesteps), rows, classes),
        "output_weight": values(classes, features) / features**0.5,
        "output_bias": values(classes) / 10,
        "image_ids": torch.tensor([integer(0, 2**40) for _ in range(rows)], dtype=torch.int64),
        "sample_ids": torch.tensor([integer(0, 2**32 - 1) for _ in range(rows)], dtype=torch.int64),
    }
    for number, width in enumerate((2 * classes, features, features)):
        layer = _layer(data, width, features, STEPS + 1)
        layer["gamma"] = layer["gamma"].sigmoid()
        tensors |= {f"{name}.{number}": value for name, value in layer.items()}

    def run(t: Tensors, backend: str) -> list[Tensor]:
        layers = [ConditionalLayer(*(t[f"{name}.{i}"] for name in LAYER)) for i in range(3)]
        weights = DenoiserWeights(
            layers[0],
            (layers[1], layers[2]),
            t["output_weight"],
            t["output_bias"],
            (1e-5, 1e-4, 1e-3),
        )
        floats = [v for v in t.values() if isinstance(v, Tensor) and v.is_floating_point()]
        dtype = floats[0].dtype
        table = steps._replace(**{
            name: getattr(steps, name).to(dtype)
            for name in steps._fields
            if name not in ("timesteps", "start")
        })  # fmt: skip
        calls: list[int] = []
        with torch.no_grad():
            found = denoise(
                t["features"], t["prior"], t["guidance"], weights, table, noise=t["noise"], image_ids=t["image_ids"],
                sample_ids=t["sample_ids"], trajectory=trajectory, backend=backend,
                progress=(lambda done, _: calls.append(done)) if watched else None, **options,
            )  # fmt: skip
        return [found]

    return Drawn("denoise", tensors, run)


OPERATIONS: dict[str, Callable[[st.DataObject], Drawn]] = {
    "conditioning": draw_conditioning,
    "noised_conditioning": draw_noised_conditioning,
    "conditional_linear": draw_conditional_linear,
    "mmd": draw_mmd,
    "kernel_matrix": draw_kernel_matrix,
    "noise_losses": draw_noise_losses,
    "choose_windows": draw_choose_windows,
    "cut_crops": draw_cut_crops,
    "rois": draw_rois,
    "denoise": draw_denoise,
}
