"""The operators behind `conditioning` and `noised_conditioning`: arguments, kernels and gradients.

csrc/bindings/conditioning.cpp reads the records by name. Gradients of gradients are taken through the reference.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmic_fast.ops._layout import compact, detached, empty_like, with_unit_rows, zeros_like
from diffmic_fast.ops._operators import kernels_of, register
from diffmic_fast.reference import conditioning as reference
from diffmic_fast.reference.conditional_linear import ConditionalLayer


class Conditioning(NamedTuple):
    """Arguments of the operator `conditioning`, as in `ops.conditioning`."""

    x: Tensor
    y_t: Tensor
    guidance: Tensor
    timesteps: Tensor
    layer: ConditionalLayer
    training: bool
    momentum: float
    eps: float
    backend: str


class Outputs(NamedTuple):
    """Results of the operator `conditioning`.

    Attributes:
        h: [B, F] or [S, B, F].
        statistics: [2, S, F] mean and biased variance of each branch in training, [2, 1, F] copies of the running
            statistics in eval mode.
        updated_mean, updated_var: [F], the running statistics after the call; empty in eval mode.
    """

    h: Tensor
    statistics: Tensor
    updated_mean: Tensor
    updated_var: Tensor


class Noising(NamedTuple):
    """How the kernels make noisy labels.

    Attributes:
        y_0, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, noise, seed, image_ids, sample_ids: as in
            `ops.noised_conditioning`; the seed in [0, 2**64).
        drawn: [B, C], where the noise is written if it is drawn, otherwise None.
    """

    y_0: Tensor
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    noise: Tensor | None
    seed: int
    image_ids: Tensor | None
    sample_ids: Tensor | None
    drawn: Tensor | None


class Parameters(NamedTuple):
    """The parameters of a `ConditionalLayer` that have gradients."""

    weight: Tensor
    bias: Tensor
    gamma: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


class ConditioningBackward(NamedTuple):
    """Arguments of the operator `conditioning_backward`.

    Attributes:
        grad: gradient of `Outputs.h`.
        wanted: for each field of `Gradients`, whether it is computed.
        x, y_t, guidance, timesteps, layer, statistics, training, eps, backend: those of the forward pass.
    """

    grad: Tensor
    x: Tensor
    y_t: Tensor
    guidance: Tensor
    timesteps: Tensor
    layer: Parameters
    statistics: Tensor
    training: bool
    eps: float
    wanted: Sequence[bool]
    backend: str


class Gradients(NamedTuple):
    """Results of the operator `conditioning_backward`, each of its argument's shape, or empty if not wanted."""

    x: Tensor
    y_t: Tensor
    guidance: Tensor
    weight: Tensor
    bias: Tensor
    gamma: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def update(layer: ConditionalLayer, mean: Tensor, variance: Tensor) -> None:
    """Updates the running statistics of a layer after a call in training."""
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)


def or_empty(output: Tensor | None, like: Tensor) -> Tensor:
    """The output of an operator, which must be a tensor: an empty one in place of None."""
    return like.new_empty(0) if output is None else output


def _prepared(layer: Any) -> Any:
    """A layer, or its parameters, in the layout of the kernels."""
    weight, bias, gamma, *vectors = layer
    return type(layer)(
        detached(weight), compact(bias), with_unit_rows(gamma), *map(compact, vectors)
    )


# ---- forward ---------------------------------------------------------------------------------


def allocate(call: Conditioning) -> Outputs:
    """Memory for the results."""
    features = call.x.shape[1]
    branches = call.y_t.shape[0] if call.training and call.y_t.ndim == 3 else 1
    updated = features if call.training else 0
    return Outputs(
        h=call.x.new_empty(*call.y_t.shape[:-1], features),
        statistics=call.x.new_empty(2, branches, features),
        updated_mean=call.x.new_empty(updated),
        updated_var=call.x.new_empty(updated),
    )


def forward(call: Conditioning, noising: Noising | None = None) -> Outputs:
    """Runs the kernel; with a noising, it writes `call.y_t` before it reads it."""
    outputs = allocate(call)
    kernels, launch = kernels_of(call.backend, call.x)
    prepared = Conditioning(
        x=with_unit_rows(call.x), y_t=detached(call.y_t), guidance=detached(call.guidance), timesteps=call.timesteps,
        layer=_prepared(call.layer), training=call.training, momentum=call.momentum, eps=call.eps,
        backend=call.backend,
    )  # fmt: skip
    kernels.conditioning(prepared, outputs, noising, launch)
    return outputs


# Saved for the backward pass. The running statistics are not: later calls in training may have changed the layer's, and
# the statistics among the outputs are those of the call.
SAVED = ("x", "y_t", "guidance", "timesteps", *Parameters._fields)

# ---- backward --------------------------------------------------------------------------------


def _allocate_gradients(call: ConditioningBackward) -> list[Tensor | None]:
    arguments = (call.x, call.y_t, call.guidance, *call.layer)
    # Of gamma's gradient the kernels write only the rows of a timestep, by adding to them.
    return [
        (zeros_like if tensor is call.layer.gamma else empty_like)(tensor) if wanted else None
        for tensor, wanted in zip(arguments, call.wanted, strict=True)
    ]


def _backward(call: ConditioningBackward) -> Gradients:
    _, y_t, guidance, *_ = found = _allocate_gradients(call)
    kernels, launch = kernels_of(call.backend, call.x)
    workspace: tuple[Tensor | None, ...] = ()
    if call.backend != "cpu":
        *branches, rows, classes = call.y_t.shape
        size = kernels.conditioning_workspace(call.x.shape[1], *(branches or [1]), rows, classes)
        needed = y_t is not None or guidance is not None
        workspace = (call.x.new_empty(size) if needed else None,)
    prepared = ConditioningBackward(
        grad=with_unit_rows(call.grad), x=with_unit_rows(call.x), y_t=detached(call.y_t),
        guidance=detached(call.guidance), timesteps=call.timesteps, layer=_prepared(call.layer),
        statistics=compact(call.statistics), training=call.training, eps=call.eps, wanted=call.wanted,
        backend=call.backend,
    )  # fmt: skip
    gradients = Gradients(*found)  # type: ignore[arg-type]
    kernels.conditioning_backward(prepared, gradients, *workspace, launch)
    return Gradients(*(or_empty(gradient, call.x) for gradient in found))


def _fake_backward(call: ConditioningBackward) -> Gradients:
    return Gradients(*(or_empty(gradient, call.x) for gradient in _allocate_gradients(call)))


_conditioning_backward = register(
    "conditioning_backward", ConditioningBackward, Gradients, _backward, _fake_backward
)


def gradients(
    call: Conditioning, statistics: Tensor, wanted: Set[str], grad: Tensor
) -> dict[str, Tensor | None]:
    """The gradients of `h` in the arguments, by the names of `Gradients`.

    Args:
        call: the forward pass; its running statistics are not read.
        statistics: those of its outputs.
        wanted: names of those that are computed.
        grad: gradient of h.
    """
    *parameters, _, _ = call.layer
    flags = tuple(map(wanted.__contains__, Gradients._fields))
    backward = ConditioningBackward(
        grad=grad, x=call.x, y_t=call.y_t, guidance=call.guidance, timesteps=call.timesteps,
        layer=Parameters(*parameters), statistics=statistics, training=call.training, eps=call.eps,
        wanted=flags, backend=call.backend,
    )  # fmt: skip
    if torch.is_grad_enabled():
        return _through_the_reference(backward, list(compress(Gradients._fields, flags)))
    found = zip(Gradients._fields, _conditioning_backward(backward), strict=True)
    return dict(compress(found, flags))


def _through_the_reference(
    call: ConditioningBackward, names: Sequence[str]
) -> dict[str, Tensor | None]:
    """The same gradients as differentiable functions."""
    # Views, so that the graph of an argument that is computed from another one is not followed.
    view = Gradients(
        *(tensor.view_as(tensor) for tensor in (call.x, call.y_t, call.guidance, *call.layer))
    )
    x, y_t, guidance, *parameters = view
    layer = ConditionalLayer(*parameters, *(part[0].clone() for part in call.statistics))
    h = reference.conditioning(
        x, y_t, guidance, layer, call.timesteps, training=call.training, eps=call.eps
    )
    leaves = [getattr(view, name) for name in names]
    found = torch.autograd.grad(h, leaves, call.grad, create_graph=True)
    return dict(zip(names, found, strict=True))
