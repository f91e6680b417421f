"""`conditioning`: noisy label and guidance of all streams to the first hidden layer of the denoiser; and
`noised_conditioning`, which makes the noisy labels, too.

The operators change nothing in place, for `torch.library` derives only such: they return the running
statistics behind the call, and the public call writes them where they belong. Backward passes of
which a graph is wanted (second derivatives) are taken through the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.checks import Arguments
from diffmic_fast.ops._backend import BackendError, asked_by_name, resolve, stream_of
from diffmic_fast.ops._layout import compact, with_unit_rows
from diffmic_fast.ops.conditional_linear import check_layer
from diffmic_fast.reference import conditioning as reference
from diffmic_fast.reference import philox
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.conditioning import NoisedConditioning

__all__ = ["NoisedConditioning", "conditioning", "noised_conditioning"]


def conditioning(
    x: Tensor,
    y_t: Tensor,
    guidance: Tensor,
    layer: ConditionalLayer,
    timesteps: Tensor,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """h1 = x * softplus(BN1(gamma1_t * (W1 [y_t ; guidance] + b1))) (spec, section 4).

    Args:
        x: [B, F] floating, image features after `norm`, shared by the streams.
        y_t: [B, C], or [S, B, C] for S streams.
        guidance: shape of `y_t`.
        layer: first conditional layer, 2C -> F; the running statistics are updated in place in training.
        timesteps: [B] or [1] int64 in [0, T].
        training, momentum, eps: as in `conditional_linear`.
        backend: a backend's name, or "auto", which takes the reference where a tensor is not float32. Each of "cpu",
            "cuda" and "cuda-emulated" gives the same bits in every run, whatever the number of threads (torch's), and
            in eval mode to a row in any batch.

    Returns:
        [B, F] or [S, B, F], differentiable in all tensors but `timesteps`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
        BackendError: the backend asked for cannot serve; a RuntimeError.
    """
    args = Arguments("conditioning")
    args.floating("x", x, "B out")
    args.floating("y_t", y_t, "B C", "S B C")
    if y_t.ndim == 3 and y_t.shape[0] == 0:
        raise ValueError(f"conditioning: y_t must have one stream at least, got {tuple(y_t.shape)}")
    args.floating("guidance", guidance, "S B C" if y_t.ndim == 3 else "B C")
    args.sizes["2C"] = 2 * args.sizes["C"]
    check_layer(args, layer, timesteps, "2C", training)
    name = _choose(backend, (x, y_t, guidance, *layer))
    if name == "reference":
        return reference.conditioning(
            x, y_t, guidance, layer, timesteps, training=training, momentum=momentum, eps=eps
        )
    h, _, mean, variance = torch.ops.diffmic_fast.conditioning.default(
        x, y_t, guidance, timesteps, *layer, training, momentum, eps, name
    )
    if training:
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
    return h


def noised_conditioning(
    x: Tensor,
    y_0: Tensor,
    guidance: Tensor,
    layer: ConditionalLayer,
    timesteps: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int = 0,
    image_ids: Tensor | None = None,
    sample_ids: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> NoisedConditioning:
    """`conditioning` of y_t = a y_0 + (1 - a) guidance + d noise (spec, section 5), a and d the tables at timesteps.

    On a GPU noise, noisy labels and layer are one kernel (two for a batch that does not fit into a block).

    Args:
        x, layer, training, momentum, eps, backend: as in `conditioning`.
        y_0: [B, C] floating label vectors, shared by the streams.
        guidance: [B, C], or [S, B, C] for S streams: prior mean of the noisy labels, and guidance of the layer.
        timesteps: [B] or [1] int64 in [0, T).
        sqrt_alpha_bar, sqrt_one_minus_alpha_bar: [T] floating, those of a `diffusion.Schedule`.
        noise: [B, C] floating, shared by the streams. Without it, Philox noise addressed by (seed, image, sample,
            timestep 0): the same bits from every backend.
        seed: 64-bit key of that noise.
        image_ids, sample_ids: [B] int64, the row's image and sample (default 0 … B-1, and 0); samples in [0, 2**32).

    Returns:
        h of `conditioning`; y_t, shape of `guidance`; noise [B, C]. h is differentiable in x, y_0, guidance, noise and
        the layer, y_t in y_0, guidance and noise.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
        BackendError: the backend asked for cannot serve; a RuntimeError.
    """
    args = Arguments("noised_conditioning")
    args.floating("x", x, "B out")
    args.floating("y_0", y_0, "B C")
    args.floating("guidance", guidance, "B C", "S B C")
    if guidance.ndim == 3 and guidance.shape[0] == 0:
        raise ValueError(
            f"noised_conditioning: guidance must have one stream at least, got {tuple(guidance.shape)}"
        )
    args.sizes["2C"] = 2 * args.sizes["C"]
    check_layer(args, layer, timesteps, "2C", training)
    args.floating("sqrt_alpha_bar", sqrt_alpha_bar, "T")
    args.floating("sqrt_one_minus_alpha_bar", sqrt_one_minus_alpha_bar, "T")
    args.within("timesteps", timesteps, 0, args.sizes["T"] - 1)
    if noise is not None:
        args.floating("noise", noise, "B C")
    elif args.sizes["C"] > philox.MAX_CLASSES:
        raise ValueError(
            f"noised_conditioning: noise is drawn for at most {philox.MAX_CLASSES} classes, these are "
            f"{args.sizes['C']}: give noise"
        )
    if image_ids is not None:
        args.integer("image_ids", image_ids, "B")
    if sample_ids is not None:
        args.integer("sample_ids", sample_ids, "B")
        args.within("sample_ids", sample_ids, 0, 2**32 - 1)
    floats = [x, y_0, guidance, *layer, sqrt_alpha_bar, sqrt_one_minus_alpha_bar]
    name = _choose(backend, floats if noise is None else [*floats, noise])
    if name == "reference":
        return reference.noised_conditioning(
            x, y_0, guidance, layer, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, noise=noise, seed=seed,
            image_ids=image_ids, sample_ids=sample_ids, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    h, y_t, drawn, _, mean, variance = torch.ops.diffmic_fast.noised_conditioning.default(
        x, y_0, guidance, timesteps, *layer, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, noise,
        # The schema has signed integers; the key is these 64 bits either way.
        (seed + 2**63) % 2**64 - 2**63, image_ids, sample_ids, training, momentum, eps, name,
    )  # fmt: skip
    if training:
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
    return NoisedConditioning(h, y_t, drawn if noise is None else noise)


def _choose(backend: str, tensors: Sequence[Tensor]) -> str:
    """The backend of a call: where "auto" would take one that cannot serve these tensors, the reference."""
    name = resolve("conditioning", backend, tensors[0].device)
    if name == "reference" or all(tensor.dtype == torch.float32 for tensor in tensors):
        return name
    if asked_by_name("conditioning", backend):
        raise BackendError(
            f"conditioning: the backend {name} cannot serve: it takes float32 tensors, got "
            + ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
        )
    return "reference"


# ---- operators -------------------------------------------------------------------------------

_LAYER = "Tensor weight, Tensor bias, Tensor gamma, Tensor norm_weight, Tensor norm_bias"
_DIFFERENTIABLE = 8  # x, y_t, guidance and the layer's first five

_library = torch.library.Library("diffmic_fast", "FRAGMENT")
_library.define(
    f"conditioning(Tensor x, Tensor y_t, Tensor guidance, Tensor timesteps, {_LAYER}, "
    "Tensor running_mean, Tensor running_var, bool training, float momentum, float eps, "
    "str backend) "
    "-> (Tensor h, Tensor statistics, Tensor updated_mean, Tensor updated_var)"
)
_library.define(
    f"noised_conditioning(Tensor x, Tensor y_0, Tensor guidance, Tensor timesteps, {_LAYER}, "
    "Tensor running_mean, Tensor running_var, Tensor sqrt_alpha_bar, Tensor sqrt_one_minus_alpha_bar, "
    "Tensor? noise, SymInt seed, Tensor? image_ids, Tensor? sample_ids, bool training, "
    "float momentum, float eps, str backend) "
    "-> (Tensor h, Tensor y_t, Tensor drawn, Tensor statistics, Tensor updated_mean, Tensor updated_var)"
)
_library.define(
    f"conditioning_backward(Tensor grad, Tensor x, Tensor y_t, Tensor guidance, Tensor timesteps, "
    f"{_LAYER}, Tensor statistics, bool training, float eps, bool[] wanted, str backend) "
    f"-> ({', '.join(['Tensor'] * _DIFFERENTIABLE)})"
)


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


def _outputs(
    x: Tensor, y_t: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Memory of `conditioning`'s outputs; the last two are only there in training."""
    features = x.shape[1]
    streams = (y_t.shape[0] if y_t.ndim == 3 else 1) if training else 1
    return (
        x.new_empty((*y_t.shape[:-1], features)),
        x.new_empty((2, streams, features)),
        x.new_empty(features) if training else None,
        x.new_empty(features) if training else None,
    )


def _kernels(backend: str, x: Tensor) -> tuple[ModuleType, int]:
    """The backend's module, and the last argument of its functions: threads, or the stream."""
    if backend == "cpu":
        return _native.extension(), torch.get_num_threads()
    return _native.cuda(backend), stream_of(x)


def _conditioning(
    x: Tensor,
    y_t: Tensor,
    guidance: Tensor,
    timesteps: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, statistics, mean, variance = _outputs(x, y_t, training)
    kernels, how = _kernels(backend, x)
    kernels.conditioning(
        *_inputs(x, y_t, guidance, timesteps, weight, bias, gamma, norm_weight, norm_bias),
        compact(running_mean),
        compact(running_var),
        training,
        momentum,
        eps,
        statistics,
        mean,
        variance,
        h,
        None,
        how,
    )
    return h, statistics, _given(mean, x), _given(variance, x)


def _noised_outputs(
    x: Tensor, y_0: Tensor, guidance: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Memory of the noisy labels, and of the noise where it is drawn."""
    return x.new_empty(guidance.shape), x.new_empty(y_0.shape) if noise is None else None


def _noised_conditioning(
    x: Tensor,
    y_0: Tensor,
    guidance: Tensor,
    timesteps: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    noise: Tensor | None,
    seed: int,
    image_ids: Tensor | None,
    sample_ids: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, ...]:
    y_t, drawn = _noised_outputs(x, y_0, guidance, noise)
    h, statistics, mean, variance = _outputs(x, y_t, training)
    kernels, how = _kernels(backend, x)
    kernels.conditioning(
        *_inputs(x, y_t, guidance, timesteps, weight, bias, gamma, norm_weight, norm_bias),
        compact(running_mean),
        compact(running_var),
        training,
        momentum,
        eps,
        statistics,
        mean,
        variance,
        h,
        (
            y_0.detach().resolve_neg(),
            compact(sqrt_alpha_bar),
            compact(sqrt_one_minus_alpha_bar),
            None if noise is None else compact(noise),
            seed % 2**64,
            None if image_ids is None else image_ids.contiguous(),
            None if sample_ids is None else sample_ids.contiguous(),
            drawn,
        ),
        how,
    )
    return h, y_t, _given(drawn, x), statistics, _given(mean, x), _given(variance, x)


def _fake_noised_conditioning(
    x: Tensor, y_0: Tensor, guidance: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    y_t, drawn = _noised_outputs(x, y_0, guidance, rest[10])
    h, statistics, mean, variance = _outputs(x, y_t, rest[14])
    return h, y_t, _given(drawn, x), statistics, _given(mean, x), _given(variance, x)


def _given(output: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if output is None else output


def _fake_conditioning(
    x: Tensor,
    y_t: Tensor,
    guidance: Tensor,
    timesteps: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, statistics, mean, variance = _outputs(x, y_t, training)
    return h, statistics, _given(mean, x), _given(variance, x)


def _gradient_outputs(like: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    # Of gamma's rows only those of a timestep are written, by adding to them.
    return [
        (tensor.new_zeros if i == 5 else tensor.new_empty)(tensor.shape) if want else None
        for i, (tensor, want) in enumerate(zip(like, wanted, strict=True))
    ]


def _conditioning_backward(
    grad: Tensor,
    x: Tensor,
    y_t: Tensor,
    guidance: Tensor,
    timesteps: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    statistics: Tensor,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    layer = (weight, bias, gamma, norm_weight, norm_bias)
    gradients = _gradient_outputs((x, y_t, guidance, *layer), wanted)
    kernels, how = _kernels(backend, x)
    scratch: tuple[Tensor | None, ...] = ()
    if backend != "cpu":
        sizes = x.shape[1], y_t.shape[0] if y_t.ndim == 3 else 1, *y_t.shape[-2:]
        labels = wanted[1] or wanted[2]
        scratch = (x.new_empty(kernels.conditioning_workspace(*sizes)) if labels else None,)
    kernels.conditioning_backward(
        with_unit_rows(grad),
        *_inputs(x, y_t, guidance, timesteps, *layer),
        compact(statistics),
        training,
        eps,
        gradients,
        *scratch,
        how,
    )
    return tuple(_given(gradient, x) for gradient in gradients)


def _fake_conditioning_backward(
    grad: Tensor,
    x: Tensor,
    y_t: Tensor,
    guidance: Tensor,
    timesteps: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    statistics: Tensor,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    like = (x, y_t, guidance, weight, bias, gamma, norm_weight, norm_bias)
    return tuple(_given(gradient, x) for gradient in _gradient_outputs(like, wanted))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    # The running statistics of now are in output[1]: later calls in training may change the layer's.
    ctx.save_for_backward(*inputs[:9], output[1])
    ctx.training, _, ctx.eps, ctx.backend = inputs[11:]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    found: list[Tensor | None] = [None] * 15
    if grad is None:
        return tuple(found)
    *inputs, statistics = ctx.saved_tensors
    places = [place for place in range(9) if place != 3]  # timesteps have no gradient
    wanted = [ctx.needs_input_grad[place] for place in places]
    if torch.is_grad_enabled():
        gradients = _through_the_reference(ctx, grad, inputs, statistics, wanted)
    else:
        gradients = torch.ops.diffmic_fast.conditioning_backward.default(
            grad, *inputs, statistics, ctx.training, ctx.eps, wanted, ctx.backend
        )
    for place, want, gradient in zip(places, wanted, gradients, strict=True):
        found[place] = gradient if want else None
    return tuple(found)


def _save_noised(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    x, _, guidance, *rest = inputs[:9]
    ctx.save_for_backward(x, output[1], guidance, *rest, *inputs[11:13], output[3])
    ctx.training, _, ctx.eps, ctx.backend = inputs[17:]


def _noised_backward(
    ctx: Any, grad: Tensor | None, y_grad: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    found: list[Tensor | None] = [None] * 21
    *inputs, a_table, d_table, statistics = ctx.saved_tensors
    wants = ctx.needs_input_grad
    through = wants[1] or wants[2] or wants[13]  # the noisy labels
    wanted = [wants[0], through, *wants[2:3], *wants[4:9]]
    if grad is not None:
        if torch.is_grad_enabled():
            gradients = _through_the_reference(ctx, grad, inputs, statistics, wanted)
        else:
            gradients = torch.ops.diffmic_fast.conditioning_backward.default(
                grad, *inputs, statistics, ctx.training, ctx.eps, wanted, ctx.backend
            )
        found[0], of_labels, found[2], *found[4:9] = (
            gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)
        )
        if of_labels is not None:
            y_grad = of_labels if y_grad is None else y_grad + of_labels
    if y_grad is None or not through:
        return tuple(found)
    a, d = (table[inputs[3]][:, None] for table in (a_table, d_table))
    of_streams = y_grad.sum(dim=0) if y_grad.ndim == 3 else y_grad
    if wants[1]:
        found[1] = a * of_streams
    if wants[2]:
        share = (1.0 - a) * y_grad
        found[2] = share if found[2] is None else found[2] + share
    if wants[13]:
        found[13] = d * of_streams
    return tuple(found)


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


for _name, _kernel, _fake in (
    ("conditioning", _conditioning, _fake_conditioning),
    ("noised_conditioning", _noised_conditioning, _fake_noised_conditioning),
    ("conditioning_backward", _conditioning_backward, _fake_conditioning_backward),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"diffmic_fast::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "diffmic_fast::conditioning", _backward, setup_context=_save, lib=_library
)
torch.library.register_autograd(
    "diffmic_fast::noised_conditioning", _noised_backward, setup_context=_save_noised, lib=_library
)
