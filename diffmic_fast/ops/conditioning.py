"""`conditioning`: noisy label and guidance of all streams to the first hidden layer of the denoiser."""

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
    gradients,
    outputs,
    update,
)
from diffmic_fast.ops._operators import register, register_autograd
from diffmic_fast.ops.conditional_linear import check_layer
from diffmic_fast.reference import conditioning as reference
from diffmic_fast.reference.conditional_linear import ConditionalLayer


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

    Under autocast in float32 (`ops._autocast`).

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
    if autocast.active(x):
        single = autocast.single_layer(layer)
        with autocast.off(x):
            h = conditioning(
                autocast.single(x), autocast.single(y_t), autocast.single(guidance), single, timesteps,
                training=training, momentum=momentum, eps=eps, backend=backend,
            )  # fmt: skip
        autocast.keep_statistics(layer, single)
        return h
    name = choose("conditioning", backend, (x, y_t, guidance, *layer), (torch.float32,))
    if name == "reference":
        return reference.conditioning(
            x, y_t, guidance, layer, timesteps, training=training, momentum=momentum, eps=eps
        )
    h, _, mean, variance = torch.ops.diffmic_fast.conditioning.default(
        x, y_t, guidance, timesteps, *layer, training, momentum, eps, name
    )
    if training:
        update(layer, mean, variance)
    return h


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    # The running statistics of now are in output[1]: later calls in training may change the layer's.
    ctx.save_for_backward(*inputs[:9], output[1])
    ctx.training, _, ctx.eps, ctx.backend = inputs[11:]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    found: list[Tensor | None] = [None] * len(Call._fields)
    if grad is None:
        return tuple(found)
    *inputs, statistics = ctx.saved_tensors
    wants = ctx.needs_input_grad
    wanted = [*wants[:3], *wants[4:9]]  # timesteps have no gradient
    of = gradients(ctx, grad, inputs, statistics, wanted)
    found[:3], found[4:9] = of[:3], of[3:]
    return tuple(found)


register(
    "conditioning",
    f"({FORWARD.format(labels='y_t')}) -> (Tensor h, Tensor statistics, Tensor updated_mean, Tensor updated_var)",
    lambda *arguments: forward(Call(*arguments)),
    lambda *arguments: outputs(Call(*arguments)),
)
register_autograd("conditioning", _save, _backward)
