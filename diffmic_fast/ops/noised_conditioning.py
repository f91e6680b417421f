"""`noised_conditioning`: noise, noisy labels and the denoiser's first layer in one call, for a training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffmic_fast.checks import Arguments
from diffmic_fast.ops import _autocast as autocast
from diffmic_fast.ops._backend import choose
from diffmic_fast.ops._conditioning import (
    FORWARD,
    Call,
    forward,
    given,
    gradients,
    outputs,
    update,
)
from diffmic_fast.ops._layout import compact
from diffmic_fast.ops._operators import register, register_autograd
from diffmic_fast.ops.conditional_linear import check_layer
from diffmic_fast.reference import conditioning as reference
from diffmic_fast.reference import philox
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.conditioning import NoisedConditioning

__all__ = ["NoisedConditioning", "noised_conditioning"]


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

    On a GPU noise, noisy labels and layer are one kernel (two for a batch that does not fit into a block). Under
    autocast in float32 (`ops._autocast`).

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
    if autocast.active(x):
        single = autocast.single_layer(layer)
        with autocast.off(x):
            found = noised_conditioning(
                autocast.single(x), autocast.single(y_0), autocast.single(guidance), single, timesteps,
                autocast.single(sqrt_alpha_bar), autocast.single(sqrt_one_minus_alpha_bar),
                noise=None if noise is None else autocast.single(noise), seed=seed, image_ids=image_ids,
                sample_ids=sample_ids, training=training, momentum=momentum, eps=eps, backend=backend,
            )  # fmt: skip
        autocast.keep_statistics(layer, single)
        return found
    floats = [x, y_0, guidance, *layer, sqrt_alpha_bar, sqrt_one_minus_alpha_bar]
    floats += [] if noise is None else [noise]
    name = choose("conditioning", backend, floats, (torch.float32,), caller="noised_conditioning")
    if name == "reference":
        return reference.noised_conditioning(
            x, y_0, guidance, layer, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, noise=noise, seed=seed,
            image_ids=image_ids, sample_ids=sample_ids, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    h, y_t, drawn, _, mean, variance = torch.ops.diffmic_fast.noised_conditioning.default(
        x, y_0, guidance, timesteps, *layer, training, momentum, eps, name, sqrt_alpha_bar, sqrt_one_minus_alpha_bar,
        # The schema has signed integers; the key is these 64 bits either way.
        noise, (seed + 2**63) % 2**64 - 2**63, image_ids, sample_ids,
    )  # fmt: skip
    if training:
        update(layer, mean, variance)
    return NoisedConditioning(h, y_t, drawn if noise is None else noise)


# ---- the operator: the arguments of `conditioning`'s, y_0 in the place of y_t, and six more -----------------------

_CALL = len(Call._fields)
_SCHEMA = (
    f"({FORWARD.format(labels='y_0')}, Tensor sqrt_alpha_bar, Tensor sqrt_one_minus_alpha_bar, Tensor? noise, "
    "SymInt seed, Tensor? image_ids, Tensor? sample_ids) "
    "-> (Tensor h, Tensor y_t, Tensor drawn, Tensor statistics, Tensor updated_mean, Tensor updated_var)"
)


def _prepare(arguments: tuple[Any, ...]) -> tuple[Call, Tensor | None]:
    """The call with memory for the noisy labels, and that of the noise where it is drawn."""
    call, noise = Call(*arguments[:_CALL]), arguments[_CALL + 2]
    drawn = None if noise is not None else call.x.new_empty(call.y_t.shape)
    return call._replace(y_t=call.x.new_empty(call.guidance.shape)), drawn


def _noised_conditioning(*arguments: Any) -> tuple[Tensor, ...]:
    call, drawn = _prepare(arguments)
    y_0 = arguments[1].detach().resolve_neg()
    a_table, d_table, noise, seed, *ids = arguments[_CALL:]
    noising = (
        y_0,
        compact(a_table),
        compact(d_table),
        None if noise is None else compact(noise),
        seed % 2**64,
        *(None if each is None else each.contiguous() for each in ids),
        drawn,
    )
    h, *rest = forward(call, noising)
    return h, call.y_t, given(drawn, call.x), *rest


def _fake_noised_conditioning(*arguments: Any) -> tuple[Tensor, ...]:
    call, drawn = _prepare(arguments)
    h, *rest = outputs(call)
    return h, call.y_t, given(drawn, call.x), *rest


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    x, _, *rest = inputs[:9]
    ctx.save_for_backward(x, output[1], *rest, *inputs[_CALL : _CALL + 2], output[3])
    ctx.training, _, ctx.eps, ctx.backend = inputs[11:_CALL]


def _backward(ctx: Any, grad: Tensor | None, y_grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    found: list[Tensor | None] = [None] * (_CALL + 6)
    *inputs, a_table, d_table, statistics = ctx.saved_tensors
    wants, noise = ctx.needs_input_grad, _CALL + 2
    through = wants[1] or wants[2] or wants[noise]  # the noisy labels
    if grad is not None:
        wanted = [wants[0], through, wants[2], *wants[4:9]]
        found[0], of_labels, found[2], *found[4:9] = gradients(
            ctx, grad, inputs, statistics, wanted
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
    if wants[noise]:
        found[noise] = d * of_streams
    return tuple(found)


register("noised_conditioning", _SCHEMA, _noised_conditioning, _fake_noised_conditioning)
register_autograd("noised_conditioning", _save, _backward)
