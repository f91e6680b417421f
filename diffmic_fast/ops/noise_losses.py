"""`noise_losses`: all terms of the denoiser's training loss and their gradients in one call.

Each loss depends on its own prediction alone. The kernels therefore compute the gradients in the pass that computes the
values, and the backward pass is a multiplication by one number per prediction.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmic_fast.checks import Arguments
from diffmic_fast.ops._autocast import in_float32
from diffmic_fast.ops._backend import choose
from diffmic_fast.ops._layout import READABLE, empty_like, of_dtype, readable
from diffmic_fast.ops._operators import Derivative, kernels_of, register
from diffmic_fast.reference import noise_losses as reference

__all__ = ["noise_losses"]


@in_float32
def noise_losses(noise: Tensor, predictions: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean squared error of the first prediction, `mmd(noise, prediction)` of each other.

    See docs/algorithm.md, "Training step". On a GPU one launch for few rows, two for many, for any number of
    predictions. Runs in float32 under autocast.

    Args:
        noise: [B, C] float32, float64, float16 or bfloat16 (computed in float32), not empty; any strides. Not
            differentiable.
        predictions: [S, B, C], S >= 1, dtype and device of `noise`; any strides.
        backend: name of a backend of `ops.mmd`, or "auto".

    Returns:
        [S] of that dtype, twice differentiable in `predictions`. "cpu" and "cuda" give the bits of `ops.mmd`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
        BackendError: the requested backend cannot serve; a RuntimeError.
    """
    args = Arguments("noise_losses")
    args.floating("noise", noise, "B C")
    args.floating("predictions", predictions, "S B C")
    for name, value in (("noise", noise), ("predictions", predictions)):
        if value.numel() == 0:
            raise ValueError(f"noise_losses: {name} must not be empty, got {tuple(value.shape)}")
    if noise.requires_grad:
        raise ValueError("noise_losses: noise must not require gradients: detach() it")
    name = choose("mmd", backend, (noise, predictions), READABLE, caller="noise_losses")
    if name == "reference":
        return reference.noise_losses(noise, predictions)
    gradients = torch.is_grad_enabled() and predictions.requires_grad
    return _noise_losses(
        NoiseLosses(noise=noise, predictions=predictions, gradients=gradients, backend=name)
    ).losses


class NoiseLosses(NamedTuple):
    """Arguments of the operator `noise_losses`; `gradients` says whether they are computed."""

    noise: Tensor
    predictions: Tensor
    gradients: bool
    backend: str


class Losses(NamedTuple):
    """Results of the operator: losses [S], and gradients [S, B, C] of each loss, or an empty tensor."""

    losses: Tensor
    gradients: Tensor


def _forward(call: NoiseLosses) -> Losses:
    noise, predictions = readable(call.noise), readable(call.predictions)
    losses = predictions.new_empty(predictions.shape[0])
    gradients = empty_like(predictions) if call.gradients else None
    kernels, launch = kernels_of(call.backend, predictions)
    workspace: tuple[Tensor, ...] = ()
    if call.backend != "cpu":
        size = kernels.noise_losses_workspace(
            *predictions.shape, predictions.element_size(), call.gradients
        )
        workspace = (predictions.new_empty(size, dtype=torch.float64),)
    kernels.noise_losses(noise, predictions, losses, gradients, *workspace, launch)
    dtype = call.predictions.dtype
    return Losses(
        of_dtype(losses, dtype),
        call.predictions.new_empty(0) if gradients is None else of_dtype(gradients, dtype),
    )


def _fake_forward(call: NoiseLosses) -> Losses:
    shape = call.predictions.shape
    new = call.predictions.new_empty
    return Losses(new(shape[0]), new(shape if call.gradients else 0))


def _gradients(
    call: NoiseLosses, result: Losses, wanted: Set[str], grad: Tensor, *_: Any
) -> dict[str, Tensor]:
    if "predictions" not in wanted:
        return {}
    if torch.is_grad_enabled():  # for second derivatives
        predictions = call.predictions.view_as(call.predictions)
        losses = reference.noise_losses(call.noise, predictions)
        (found,) = torch.autograd.grad(losses, predictions, grad, create_graph=True)
        return {"predictions": found}
    if not call.gradients:
        raise RuntimeError(
            "noise_losses: the gradient was not requested when the losses were computed: compute them with predictions "
            "that require gradients"
        )
    return {"predictions": grad.view(-1, 1, 1) * result.gradients}


_noise_losses = register(
    "noise_losses",
    NoiseLosses,
    Losses,
    _forward,
    _fake_forward,
    Derivative(_gradients, saves=["noise", "predictions"], saved_results=["gradients"]),
)
