"""How the kernels of `conditioning` and `noised_conditioning` are called, forward and backward.

The operators change nothing in place, for `torch.library` derives only such: they return the running statistics behind
the call, and the public calls write them where they belong (`update`). Backward passes of which a graph is wanted
(second derivatives) are taken through the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.ops._backend import stream_of
from diffmic_fast.ops._layout import compact, with_unit_rows
from diffmic_fast.ops._operators import register
from diffmic_fast.reference import conditioning as reference
from diffmic_fast.reference.conditional_linear import ConditionalLayer


class Call(NamedTuple):
    """The arguments of `conditioning`'s operator; `FORWARD` is their schema."""

    x: Tensor
    y_t: Tensor
    guidance: Tensor
    timesteps: Tensor
    weight: Tensor
    bias: Tensor
    gamma: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    training: bool
    momentum: float
    eps: float
    backend: str


_LAYER = "Tensor weight, Tensor bias, Tensor gamma, Tensor norm_weight, Tensor norm_bias"
FORWARD = (
    "Tensor x, Tensor {labels}, Tensor guidance, Tensor timesteps, "
    + _LAYER
    + ", Tensor running_mean, "
    "Tensor running_var, bool training, float momentum, float eps, str backend"
)
_DIFFERENTIABLE = 8  # x, y_t, guidance and the layer's first five


def update(layer: ConditionalLayer, mean: Tensor, variance: Tensor) -> None:
    """The layer's running statistics behind a call in training."""
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)


def given(output: Tensor | None, like: Tensor) -> Tensor:
    """An operator's output, which must be a tensor: an empty one where there is none."""
    return like.new_empty(0) if output is None else output


def _kernels(backend: str, x: Tensor) -> tuple[ModuleType, int]:
    """The backend's module, and the last argument of its functions: threads, or the stream."""
    if backend == "cpu":
        return _native.extension(), torch.get_num_threads()
    return _native.cuda(backend), stream_of(x)


def _inputs(
    x: Tensor, y_t: Tensor, guidance: Tensor, timesteps: Tensor, *layer: Tensor
) -> tuple[Any, ...]:
    weight, bias, gamma, norm_weight, norm_bias = layer
    return (
        with_unit_rows(x),
        y_t.detach().resolve_neg(),
        guidance.detach().resolve_neg(),
        timesteps,
        [
            weight.detach().resolve_neg(),
            compact(bias),
            with_unit_rows(gamma),
            compact(norm_weight),
            compact(norm_bias),
        ],
    )


# ---- forward ---------------------------------------------------------------------------------


def outputs(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory of h, of the statistics, and in training of the updated running mean and variance, else empty."""
    features = call.x.shape[1]
    streams = (call.y_t.shape[0] if call.y_t.ndim == 3 else 1) if call.training else 1
    return (
        call.x.new_empty((*call.y_t.shape[:-1], features)),
        call.x.new_empty((2, streams, features)),
        call.x.new_empty(features if call.training else 0),
        call.x.new_empty(features if call.training else 0),
    )


def forward(call: Call, noising: tuple[Any, ...] | None = None) -> tuple[Tensor, ...]:
    """`outputs`, filled in; with a noising (csrc/bindings/noising_arrays.h) y_t too."""
    h, statistics, mean, variance = found = outputs(call)
    kernels, how = _kernels(call.backend, call.x)
    kernels.conditioning(
        *_inputs(*call[:9]),
        compact(call.running_mean),
        compact(call.running_var),
        call.training,
        call.momentum,
        call.eps,
        statistics,
        mean if call.training else None,
        variance if call.training else None,
        h,
        noising,
        how,
    )
    return found


# ---- backward --------------------------------------------------------------------------------


class _BackwardCall(NamedTuple):
    grad: Tensor
    x: Tensor
    y_t: Tensor
    guidance: Tensor
    timesteps: Tensor
    weight: Tensor
    bias: Tensor
    gamma: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    statistics: Tensor
    training: bool
    eps: float
    wanted: Sequence[bool]
    backend: str


def _gradient_outputs(call: _BackwardCall) -> list[Tensor | None]:
    like = (*call[1:4], *call[5:10])
    # Of gamma's rows only those of a timestep are written, by adding to them.
    return [
        (tensor.new_zeros if i == 5 else tensor.new_empty)(tensor.shape) if want else None
        for i, (tensor, want) in enumerate(zip(like, call.wanted, strict=True))
    ]


def _conditioning_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = _BackwardCall(*arguments)
    x, y_t = call.x, call.y_t
    found = _gradient_outputs(call)
    kernels, how = _kernels(call.backend, x)
    scratch: tuple[Tensor | None, ...] = ()
    if call.backend != "cpu":
        sizes = x.shape[1], y_t.shape[0] if y_t.ndim == 3 else 1, *y_t.shape[-2:]
        labels = call.wanted[1] or call.wanted[2]
        scratch = (x.new_empty(kernels.conditioning_workspace(*sizes)) if labels else None,)
    kernels.conditioning_backward(
        with_unit_rows(call.grad),
        *_inputs(*call[1:10]),
        compact(call.statistics),
        call.training,
        call.eps,
        found,
        *scratch,
        how,
    )
    return tuple(given(gradient, x) for gradient in found)


def _fake_conditioning_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = _BackwardCall(*arguments)
    return tuple(given(gradient, call.x) for gradient in _gradient_outputs(call))


register(
    "conditioning_backward",
    f"(Tensor grad, Tensor x, Tensor y_t, Tensor guidance, Tensor timesteps, {_LAYER}, Tensor statistics, "
    f"bool training, float eps, bool[] wanted, str backend) -> ({', '.join(['Tensor'] * _DIFFERENTIABLE)})",
    _conditioning_backward,
    _fake_conditioning_backward,
)


def gradients(
    ctx: Any, grad: Tensor, inputs: Sequence[Tensor], statistics: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Those of x, y_t, guidance and the layer's first five that are wanted.

    Args:
        ctx: has the call's `training`, `eps` and `backend`.
        grad: that of h.
        inputs: the first nine of `Call`.
        statistics: the second of `outputs`.
        wanted: eight flags.
    """
    if torch.is_grad_enabled():
        return _through_the_reference(ctx, grad, inputs, statistics, wanted)
    found = torch.ops.diffmic_fast.conditioning_backward.default(
        grad, *inputs, statistics, ctx.training, ctx.eps, wanted, ctx.backend
    )
    return [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]


def _through_the_reference(
    ctx: Any, grad: Tensor, inputs: Sequence[Tensor], statistics: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients as functions that can be derived again."""
    # Views, so that an argument made from another one is not followed back to it.
    x, y_t, guidance, timesteps, *parameters = (tensor.view_as(tensor) for tensor in inputs)
    layer = ConditionalLayer(*parameters, *(part[0].clone() for part in statistics))
    h = reference.conditioning(
        x, y_t, guidance, layer, timesteps, training=ctx.training, eps=ctx.eps
    )
    differentiable = (x, y_t, guidance, *parameters)
    leaves = [tensor for tensor, want in zip(differentiable, wanted, strict=True) if want]
    gradients = iter(torch.autograd.grad(h, leaves, grad, create_graph=True))
    return [next(gradients) if want else None for want in wanted]
