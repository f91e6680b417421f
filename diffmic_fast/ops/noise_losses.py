"""`noise_losses`: all terms of the denoiser's training loss and their gradients in one call (spec, section 5).

Each loss depends on its own prediction alone. So the kernels give the gradients in the pass of the values, an array of
the predictions' size, and the backward pass is a product with a number a prediction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.checks import Arguments
from diffmic_fast.ops import _autocast as autocast
from diffmic_fast.ops._backend import choose, stream_of
from diffmic_fast.ops._layout import READABLE, readable
from diffmic_fast.ops._operators import register, register_autograd
from diffmic_fast.reference import noise_losses as reference

__all__ = ["noise_losses"]


def noise_losses(noise: Tensor, predictions: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean squared error of the first prediction, `mmd(noise, prediction)` of each other.

    On a GPU one launch for few rows, two for many, whatever the number of predictions. Under autocast in float32
    (`ops._autocast`).

    Args:
        noise: [B, C] float32, float64, float16 or bfloat16 (computed in float32), not empty; any strides. Not
            differentiable.
        predictions: [S, B, C], S >= 1, dtype and device of `noise`; any strides.
        backend: a backend's name, or "auto". Those of `ops.mmd`.

    Returns:
        [S] of that dtype, differentiable in `predictions`, twice too. "cpu" and "cuda" give discrepancies the same
        bits as `ops.mmd` does.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
        BackendError: the backend asked for cannot serve; a RuntimeError.
    """
    args = Arguments("noise_losses")
    args.floating("noise", noise, "B C")
    args.floating("predictions", predictions, "S B C")
    for name, value in (("noise", noise), ("predictions", predictions)):
        if value.numel() == 0:
            raise ValueError(f"noise_losses: {name} must not be empty, got {tuple(value.shape)}")
    if noise.requires_grad:
        raise ValueError(
            "noise_losses: noise must not require gradients, there are none: detach() it"
        )
    if autocast.active(noise):
        with autocast.off(noise):
            return noise_losses(
                autocast.single(noise), autocast.single(predictions), backend=backend
            )
    name = choose("mmd", backend, (noise, predictions), READABLE, caller="noise_losses")
    if name == "reference":
        return reference.noise_losses(noise, predictions)
    learns = torch.is_grad_enabled() and predictions.requires_grad
    losses, _ = torch.ops.diffmic_fast.noise_losses.default(noise, predictions, learns, name)
    return losses  # type: ignore[no-any-return]


def _noise_losses(
    noise: Tensor, predictions: Tensor, gradients: bool, backend: str
) -> tuple[Tensor, Tensor]:
    given, predicted = readable(noise), readable(predictions)
    losses = predicted.new_empty(len(predicted))
    found = predicted.new_empty(predicted.shape) if gradients else None
    if backend == "cpu":
        threads = torch.get_num_threads()
        _native.extension().noise_losses(given, predicted, losses, found, threads)
    else:
        kernels = _native.cuda(backend)
        sizes = *predicted.shape, predicted.element_size()
        scratch = predicted.new_empty(
            kernels.noise_losses_scratch(*sizes, gradients), dtype=torch.float64
        )
        kernels.noise_losses(given, predicted, losses, found, scratch, stream_of(predicted))
    dtype = predictions.dtype
    return losses.to(dtype), predictions.new_empty(0) if found is None else found.to(dtype)


def _fake_noise_losses(
    noise: Tensor, predictions: Tensor, gradients: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return (
        predictions.new_empty(predictions.shape[0]),
        predictions.new_empty(predictions.shape if gradients else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.has = inputs[2]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None or not ctx.needs_input_grad[1]:
        return None, None, None, None
    noise, predictions, gradients = ctx.saved_tensors
    if torch.is_grad_enabled():  # a graph of this pass is wanted
        predictions = predictions.view_as(predictions)
        losses = reference.noise_losses(noise, predictions)
        (found,) = torch.autograd.grad(losses, predictions, grad, create_graph=True)
        return None, found, None, None
    if not ctx.has:
        raise RuntimeError(
            "noise_losses: a gradient is asked for that was not when the losses were computed: compute them with "
            "predictions that require gradients"
        )
    return None, grad[:, None, None] * gradients, None, None


register(
    "noise_losses",
    "(Tensor noise, Tensor predictions, bool gradients, str backend) -> (Tensor losses, Tensor gradients)",
    _noise_losses,
    _fake_noise_losses,
)
register_autograd("noise_losses", _save, _backward)
