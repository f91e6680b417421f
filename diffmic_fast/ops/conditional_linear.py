"""`conditional_linear`: gamma, BatchNorm and softplus around a product of the denoiser.

Two operators: `conditional_linear` is the whole layer in eval mode, one kernel; `conditional_norm` is what stands
around the product, for training and wherever a gradient is wanted, while PyTorch's own `linear` makes the product and
its gradients. As the other operators they change nothing in place (see `ops/_conditioning.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmic_fast.checks import Arguments
from diffmic_fast.ops._backend import choose
from diffmic_fast.ops._conditioning import update
from diffmic_fast.ops._layout import compact, with_unit_rows
from diffmic_fast.ops._operators import register, register_autograd
from diffmic_fast.reference import conditional_linear as reference
from diffmic_fast.reference.conditional_linear import ConditionalLayer

__all__ = ["ConditionalLayer", "conditional_linear"]

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def conditional_linear(
    h: Tensor,
    layer: ConditionalLayer,
    timesteps: Tensor,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """softplus(BN(gamma_t * (W h + b))) (spec, section 4).

    Under autocast the product is in autocast's dtype, and gamma, BatchNorm, its statistics and softplus in float32
    whatever the dtype.

    Args:
        h: [B, in], or [S, B, in] for S streams, floating.
        layer: parameters; the running statistics are updated in place in training.
        timesteps: [B] or [1] int64 in [0, T], shared by the streams.
        training: normalise with the statistics of the batch, taken for each stream on its own.
        momentum: weight of a batch in the running statistics.
        eps: BatchNorm's.
        backend: a backend's name, or "auto", which on a GPU takes "triton" for float32, bfloat16 and float16 tensors.
            That one multiplies float32 as `torch.set_float32_matmul_precision` says, and gives the same bits in every
            run but for the library's product.

    Returns:
        [B, out] or [S, B, out], differentiable in `h` and the parameters. Under autocast "triton" gives autocast's
        dtype, the reference what PyTorch's own rules make of it.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
        BackendError: the backend asked for cannot serve; a RuntimeError.
    """
    args = Arguments("conditional_linear")
    if _fits(h, layer, timesteps, training):
        args.within("timesteps", timesteps, 0, layer.gamma.shape[0] - 1)
    else:
        _check(args, h, layer, timesteps, training)
    name = choose("conditional_linear", backend, (h, *layer), _TRITON_DTYPES)
    if name == "reference":
        return reference.conditional_linear(
            h, layer, timesteps, training=training, momentum=momentum, eps=eps
        )
    weight, device = layer.weight, h.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        h, weight = h.to(dtype), weight.to(dtype)
    if not training and not _wants_gradient(h, layer):
        tf32 = torch.get_float32_matmul_precision() != "highest"
        whole: Tensor = torch.ops.diffmic_fast.conditional_linear.default(
            h, timesteps, weight, *layer[1:], eps, tf32
        )
        return whole
    out, _, mean, variance = torch.ops.diffmic_fast.conditional_norm.default(
        F.linear(h, weight), timesteps, *layer[1:], training, momentum, eps
    )
    if training:
        update(layer, mean, variance)
    return out


def _fits(h: Tensor, layer: ConditionalLayer, timesteps: Tensor, training: bool) -> bool:
    """Whether `_check` would pass but for the values of the timesteps, in a quarter of its time.

    For a few rows the checks are a tenth of the call. What fails here may still be allowed, as other dtypes are under
    autocast: `_check` decides, and names what is wrong.
    """
    for tensor in (h, *layer, timesteps):
        if not isinstance(tensor, Tensor):
            return False
    dtype, device, size = h.dtype, h.device, h.shape
    shapes = []
    for tensor in layer:
        if tensor.dtype != dtype or tensor.device != device:
            return False
        shapes.append(tensor.shape)
    weight, bias, gamma, *vectors = shapes
    given = timesteps.shape
    if not dtype.is_floating_point or timesteps.dtype != torch.int64 or timesteps.device != device:
        return False
    if len(size) not in (2, 3) or len(weight) != 2 or len(gamma) != 2 or len(given) != 1:
        return False
    rows = size[-2]
    return (
        len(bias) == 1
        and bias[0] == weight[0] == gamma[1]
        and vectors == [bias] * 4
        and weight[1] == size[-1]
        and (given[0] == rows or given[0] == 1)
        and (rows >= 2 or not training)
        and (len(size) == 2 or size[0] > 0)
    )


def _check(
    args: Arguments, h: Tensor, layer: ConditionalLayer, timesteps: Tensor, training: bool
) -> None:
    args.floating("h", h, "B in", "S B in")
    if h.ndim == 3 and h.shape[0] == 0:
        raise ValueError(
            f"conditional_linear: h must have one stream at least, got {tuple(h.shape)}"
        )
    check_layer(args, layer, timesteps, "in", training)


def check_layer(
    args: Arguments, layer: ConditionalLayer, timesteps: Tensor, width: str, training: bool
) -> None:
    """The parameters of a conditional layer whose input has the width named `width`."""
    args.floating("weight", layer.weight, f"out {width}")
    for name in ("bias", "norm_weight", "norm_bias", "running_mean", "running_var"):
        args.floating(name, getattr(layer, name), "out")
    args.floating("gamma", layer.gamma, "rows out")
    args.integer("timesteps", timesteps, "B", "1")
    args.within("timesteps", timesteps, 0, args.sizes["rows"] - 1)
    if training and args.sizes["B"] < 2:
        raise ValueError(
            f"{args.operation}: training needs at least 2 rows for its batch statistics, got {args.sizes['B']}"
        )


def _wants_gradient(h: Tensor, layer: ConditionalLayer) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (h, *layer[:5]))


# ---- the whole layer in eval mode -------------------------------------------------------------


def _conditional_linear(h: Tensor, timesteps: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    from diffmic_fast.triton.conditional_linear import conditional_linear as kernel

    bias, gamma, *vectors, eps, tf32 = rest
    layer = ConditionalLayer(
        weight.detach().resolve_neg(), compact(bias), with_unit_rows(gamma), *map(compact, vectors)
    )
    return kernel(h.detach().resolve_neg(), layer, timesteps, eps=eps, tf32=tf32)


_PARAMETERS = (
    "Tensor bias, Tensor gamma, Tensor norm_weight, Tensor norm_bias, Tensor running_mean, "
    "Tensor running_var"
)
register(
    "conditional_linear",
    f"(Tensor h, Tensor timesteps, Tensor weight, {_PARAMETERS}, float eps, bool tf32) -> Tensor",
    _conditional_linear,
    lambda h, timesteps, weight, *rest: h.new_empty((*h.shape[:-1], weight.shape[0])),
)


# ---- what stands around the product -----------------------------------------------------------


def _streams(tensor: Tensor) -> Tensor:
    """[S, B, F] of [B, F] or [S, B, F]."""
    return with_unit_rows(tensor if tensor.ndim == 3 else tensor[None])


def _norm_outputs(product: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory of h, of the statistics, and in training of the updated running mean and variance, else empty."""
    features, streams = product.shape[-1], product.shape[0] if product.ndim == 3 else 1
    updated = features if training else 0

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=product.device)

    return (
        product.new_empty(product.shape),
        new(2, streams, features),
        new(updated),
        new(updated),
    )


def _conditional_norm(product: Tensor, timesteps: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from diffmic_fast.triton.conditional_norm import forward

    bias, gamma, norm_weight, norm_bias, running_mean, running_var, training, momentum, eps = rest
    found = h, statistics, mean, variance = _norm_outputs(product, training)
    forward(
        _streams(product),
        timesteps,
        compact(bias),
        with_unit_rows(gamma),
        compact(norm_weight),
        compact(norm_bias),
        compact(running_mean),
        compact(running_var),
        h if h.ndim == 3 else h[None],
        statistics,
        mean if training else None,
        variance if training else None,
        momentum=momentum,
        eps=eps,
    )
    return found


def _fake_norm(product: Tensor, timesteps: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _norm_outputs(product, rest[6])


def _norm_gradients(product: Tensor, gamma: Tensor, make: Any) -> list[Tensor]:
    """Memory of the gradients of product, bias, gamma (zeros), norm_weight and norm_bias."""
    features, device = product.shape[-1], product.device
    vectors = [torch.empty(features, dtype=torch.float32, device=device) for _ in range(3)]
    table = make(gamma.shape, dtype=torch.float32, device=device)
    return [product.new_empty(product.shape), vectors[0], table, *vectors[1:]]


def _conditional_norm_backward(
    grad: Tensor, product: Tensor, timesteps: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    from diffmic_fast.triton.conditional_norm import backward

    bias, gamma, norm_weight, norm_bias, statistics, training, eps = rest
    found = _norm_gradients(product, gamma, torch.zeros)
    written = [found[0] if product.ndim == 3 else found[0][None], *found[1:]]
    backward(
        _streams(grad),
        _streams(product),
        timesteps,
        compact(bias),
        with_unit_rows(gamma),
        compact(norm_weight),
        compact(norm_bias),
        compact(statistics),
        written,
        training=training,
        eps=eps,
    )
    return tuple(found)


def _fake_norm_backward(
    grad: Tensor, product: Tensor, timesteps: Tensor, bias: Tensor, gamma: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(_norm_gradients(product, gamma, torch.empty))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    # The running statistics of now are in output[1]: later calls in training may change the layer's.
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.training, _, ctx.eps = inputs[8:]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    found: list[Tensor | None] = [None] * 11
    if grad is None:
        return tuple(found)
    product, timesteps, *parameters, statistics = ctx.saved_tensors
    of: Sequence[Tensor]
    if torch.is_grad_enabled():
        of = _through_the_reference(ctx, grad, product, timesteps, parameters, statistics)
    else:
        of = torch.ops.diffmic_fast.conditional_norm_backward.default(
            grad, product, timesteps, *parameters, statistics, ctx.training, ctx.eps
        )
    # timesteps, between the product and the parameters, have none.
    for place, gradient, like in zip((0, 2, 3, 4, 5), of, (product, *parameters), strict=True):
        if ctx.needs_input_grad[place]:
            found[place] = gradient.to(like.dtype)
    return tuple(found)


def _through_the_reference(
    ctx: Any,
    grad: Tensor,
    product: Tensor,
    timesteps: Tensor,
    parameters: Sequence[Tensor],
    statistics: Tensor,
) -> Sequence[Tensor]:
    """The same gradients as functions that can be derived again."""
    # Views, so that an argument made from another one is not followed back to it.
    leaves = [tensor.view_as(tensor) for tensor in (product, *parameters)]
    leaves = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
    product, bias, gamma, norm_weight, norm_bias = leaves
    floats = [tensor.float() for tensor in (gamma, norm_weight, norm_bias)]
    running = (part[0].clone() for part in statistics)
    layer = ConditionalLayer(product, bias, *floats, *running)
    h = reference.conditional_norm(
        product.float() + bias.float(), layer, timesteps, training=ctx.training, eps=ctx.eps
    )
    return torch.autograd.grad(h, leaves, grad.float(), create_graph=True)


register(
    "conditional_norm",
    f"(Tensor product, Tensor timesteps, {_PARAMETERS}, bool training, float momentum, float eps) "
    "-> (Tensor h, Tensor statistics, Tensor updated_mean, Tensor updated_var)",
    _conditional_norm,
    _fake_norm,
)
register(
    "conditional_norm_backward",
    "(Tensor grad, Tensor product, Tensor timesteps, Tensor bias, Tensor gamma, Tensor norm_weight, Tensor norm_bias, "
    "Tensor statistics, bool training, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _conditional_norm_backward,
    _fake_norm_backward,
)
register_autograd("conditional_norm", _save, _backward)
