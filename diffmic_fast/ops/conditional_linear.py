"""`conditional_linear`: a linear layer of the denoiser followed by gamma, BatchNorm and softplus.

Two operators. `conditional_linear` is the whole layer in eval mode, one kernel. `conditional_norm` is what follows the
matrix product, in training and wherever a gradient is needed; PyTorch's `linear` computes the product and its
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmic_fast.checks import Arguments, assert_within, autocast_enabled
from diffmic_fast.ops._backend import choose
from diffmic_fast.ops._conditioning import Outputs, update
from diffmic_fast.ops._layout import compact, detached, with_unit_rows
from diffmic_fast.ops._operators import Derivative, register
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
    """softplus(BN(gamma_t * (W h + b))) (docs/algorithm.md, "Denoiser").

    Under autocast the matrix product is in the dtype of autocast; gamma, BatchNorm with its statistics, and softplus
    are in float32.

    Args:
        h: [B, in], or [S, B, in] for S guidance branches, floating.
        layer: parameters; the running statistics are updated in place in training.
        timesteps: [B] or [1] int64 in [0, T], shared by the branches. On a GPU a value out of range is found by a
            device-side assertion.
        training: normalise with the statistics of the batch, computed for each branch separately.
        momentum: weight of a batch in the running statistics.
        eps: epsilon of BatchNorm.
        backend: name of a backend, or "auto", which on a GPU selects "triton" for float32, bfloat16 and float16
            tensors. "triton" multiplies float32 as `torch.set_float32_matmul_precision` says, and is reproducible
            except for the product in training, which is PyTorch's.

    Returns:
        [B, out] or [S, B, out], differentiable in `h` and the parameters. Under autocast "triton" returns the dtype of
        autocast, the reference what PyTorch's own rules give.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
        BackendError: the requested backend cannot serve; a RuntimeError.
    """
    args = Arguments("conditional_linear")
    if _fits(h, layer, timesteps, training):
        args.within("timesteps", timesteps, 0, layer.gamma.shape[0] - 1)
    else:
        _check(args, h, layer, timesteps, training)
    name = choose("conditional_linear", backend, (h, *layer), _TRITON_DTYPES)
    assert_within("conditional_linear: timesteps", timesteps, 0, layer.gamma.shape[0] - 1)
    if name == "reference":
        return reference.conditional_linear(
            h, layer, timesteps, training=training, momentum=momentum, eps=eps
        )
    weight, *others = layer
    if autocast_enabled(h.device):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, weight = h.to(dtype), weight.to(dtype)
    if not training and not _needs_gradient(h, layer):
        return _conditional_linear(
            Linear(
                h=h, timesteps=timesteps, layer=ConditionalLayer(weight, *others), eps=eps,
                tf32=torch.get_float32_matmul_precision() != "highest",
            )
        )  # fmt: skip
    found = _conditional_norm(
        Norm(
            product=F.linear(h, weight), timesteps=timesteps,
            parameters=NormParameters(layer.bias, layer.gamma, layer.norm_weight, layer.norm_bias),
            running_mean=layer.running_mean, running_var=layer.running_var, training=training, momentum=momentum,
            eps=eps,
        )
    )  # fmt: skip
    if training:
        update(layer, found.updated_mean, found.updated_var)
    return found.h


def _fits(h: Tensor, layer: ConditionalLayer, timesteps: Tensor, training: bool) -> bool:
    """Whether `_check` would pass, apart from the values of the timesteps, in a quarter of its time.

    For a few rows the checks are a tenth of the call. Arguments that fail here may still be valid, as mixed dtypes are
    under autocast: `_check` decides, and raises.
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
        and list(vectors) == [bias] * 4  # a tuple in older versions of torch.compile
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
            f"conditional_linear: h must have at least one branch, got {tuple(h.shape)}"
        )
    check_layer(args, layer, timesteps, "in", training)


def check_layer(
    args: Arguments, layer: ConditionalLayer, timesteps: Tensor, width: str, training: bool
) -> None:
    """Checks a conditional layer whose input has the width named `width`, and its timesteps."""
    check_parameters(args, layer, width)
    args.integer("timesteps", timesteps, "B", "1")
    args.within("timesteps", timesteps, 0, args.sizes["rows"] - 1)
    if training and args.sizes["B"] < 2:
        raise ValueError(
            f"{args.operation}: training needs at least 2 rows for its batch statistics, got {args.sizes['B']}"
        )


def check_parameters(args: Arguments, layer: ConditionalLayer, width: str) -> None:
    """Checks the tensors of a conditional layer whose input has the width named `width`."""
    args.floating("weight", layer.weight, f"out {width}")
    for name in ("bias", "norm_weight", "norm_bias", "running_mean", "running_var"):
        args.floating(name, getattr(layer, name), "out")
    args.floating("gamma", layer.gamma, "rows out")


def _needs_gradient(h: Tensor, layer: ConditionalLayer) -> bool:
    *parameters, _, _ = layer
    return torch.is_grad_enabled() and any(t.requires_grad for t in (h, *parameters))


# ---- the whole layer in eval mode -------------------------------------------------------------


class Linear(NamedTuple):
    """Arguments of the operator `conditional_linear`; `tf32` lets the product of float32 tensors use TF32."""

    h: Tensor
    timesteps: Tensor
    layer: ConditionalLayer
    eps: float
    tf32: bool


def _linear(call: Linear) -> Tensor:
    from diffmic_fast.triton.conditional_linear import conditional_linear as kernel

    weight, bias, gamma, *vectors = call.layer
    layer = ConditionalLayer(
        detached(weight), compact(bias), with_unit_rows(gamma), *map(compact, vectors)
    )
    return kernel(detached(call.h), layer, call.timesteps, eps=call.eps, tf32=call.tf32)


def _fake_linear(call: Linear) -> Tensor:
    return call.h.new_empty((*call.h.shape[:-1], call.layer.weight.shape[0]))


_conditional_linear = register("conditional_linear", Linear, Tensor, _linear, _fake_linear)


# ---- what follows the product -----------------------------------------------------------------


class NormParameters(NamedTuple):
    """The parameters of a `ConditionalLayer` but for its weight."""

    bias: Tensor
    gamma: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


class Norm(NamedTuple):
    """Arguments of the operator `conditional_norm`; `product` is W h."""

    product: Tensor
    timesteps: Tensor
    parameters: NormParameters
    running_mean: Tensor
    running_var: Tensor
    training: bool
    momentum: float
    eps: float


class NormBackward(NamedTuple):
    """Arguments of the operator `conditional_norm_backward`; `grad` is the gradient of `Outputs.h`."""

    grad: Tensor
    product: Tensor
    timesteps: Tensor
    parameters: NormParameters
    statistics: Tensor
    training: bool
    eps: float


class NormGradients(NamedTuple):
    """Results of the operator `conditional_norm_backward`."""

    product: Tensor
    bias: Tensor
    gamma: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def _branches(tensor: Tensor) -> Tensor:
    """A view [S, B, F] of [B, F] or [S, B, F]."""
    return tensor if tensor.ndim == 3 else tensor[None]


def _prepared(parameters: NormParameters) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parameters in the layout of the kernels."""
    bias, gamma, norm_weight, norm_bias = parameters
    return compact(bias), with_unit_rows(gamma), compact(norm_weight), compact(norm_bias)


def _allocate(call: Norm) -> Outputs:
    product = call.product
    features, branches = product.shape[-1], product.shape[0] if product.ndim == 3 else 1
    updated = features if call.training else 0

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=product.device)

    return Outputs(
        h=product.new_empty(product.shape),
        statistics=new(2, branches, features),
        updated_mean=new(updated),
        updated_var=new(updated),
    )


def _norm(call: Norm) -> Outputs:
    from diffmic_fast.triton.conditional_norm import forward

    found = _allocate(call)
    forward(
        with_unit_rows(_branches(call.product)),
        call.timesteps,
        *_prepared(call.parameters),
        compact(call.running_mean),
        compact(call.running_var),
        _branches(found.h),
        found.statistics,
        found.updated_mean if call.training else None,
        found.updated_var if call.training else None,
        momentum=call.momentum,
        eps=call.eps,
    )
    return found


def _allocate_gradients(call: NormBackward, make: Callable[..., Tensor]) -> NormGradients:
    """Memory for the gradients, that of gamma from `make`."""
    features, device = call.product.shape[-1], call.product.device
    bias, norm_weight, norm_bias = (
        torch.empty(features, dtype=torch.float32, device=device) for _ in range(3)
    )
    gamma = make(call.parameters.gamma.shape, dtype=torch.float32, device=device)
    product = call.product.new_empty(call.product.shape)
    return NormGradients(product, bias, gamma, norm_weight, norm_bias)


def _norm_backward(call: NormBackward) -> NormGradients:
    from diffmic_fast.triton.conditional_norm import backward

    found = _allocate_gradients(call, torch.zeros)
    backward(
        with_unit_rows(_branches(call.grad)),
        with_unit_rows(_branches(call.product)),
        call.timesteps,
        *_prepared(call.parameters),
        compact(call.statistics),
        found._replace(product=_branches(found.product)),
        training=call.training,
        eps=call.eps,
    )
    return found


def _gradients(
    call: Norm, outputs: Outputs, wanted: Set[str], grad: Tensor, *_: Any
) -> dict[str, Tensor | None]:
    backward = NormBackward(
        grad=grad, product=call.product, timesteps=call.timesteps, parameters=call.parameters,
        statistics=outputs.statistics, training=call.training, eps=call.eps,
    )  # fmt: skip
    of = _through_the_reference if torch.is_grad_enabled() else _conditional_norm_backward
    arguments = NormGradients(call.product, *call.parameters)
    return {
        name: gradient.to(argument.dtype)
        for name, gradient, argument in zip(arguments._fields, of(backward), arguments, strict=True)
        if name in wanted
    }


def _through_the_reference(call: NormBackward) -> NormGradients:
    """The same gradients as differentiable functions."""
    # Views, so that the graph of an argument that is computed from another one is not followed.
    leaves = [tensor.view_as(tensor) for tensor in (call.product, *call.parameters)]
    leaves = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
    product, bias, gamma, norm_weight, norm_bias = leaves
    floats = [tensor.float() for tensor in (gamma, norm_weight, norm_bias)]
    running = (part[0].clone() for part in call.statistics)
    layer = ConditionalLayer(product, bias, *floats, *running)
    h = reference.conditional_norm(
        product.float() + bias.float(), layer, call.timesteps, training=call.training, eps=call.eps
    )
    return NormGradients(*torch.autograd.grad(h, leaves, call.grad.float(), create_graph=True))


_conditional_norm = register(
    "conditional_norm",
    Norm,
    Outputs,
    _norm,
    _allocate,
    # The running statistics are not saved: later calls in training may have changed the layer's.
    Derivative(
        _gradients, saves=["timesteps", *NormGradients._fields], saved_results=["statistics"]
    ),
)
_conditional_norm_backward = register(
    "conditional_norm_backward",
    NormBackward,
    NormGradients,
    _norm_backward,
    lambda call: _allocate_gradients(call, torch.empty),
)
