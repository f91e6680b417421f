"""`conditioning`: noisy labels and guidance of all branches to the first hidden layer of the denoiser."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from diffmic_fast.checks import Arguments, assert_within
from diffmic_fast.ops._autocast import in_float32
from diffmic_fast.ops._backend import choose
from diffmic_fast.ops._conditioning import (
    SAVED,
    Conditioning,
    Outputs,
    allocate,
    forward,
    gradients,
    update,
)
from diffmic_fast.ops._operators import Derivative, register
from diffmic_fast.ops.conditional_linear import check_layer
from diffmic_fast.reference import conditioning as reference
from diffmic_fast.reference.conditional_linear import ConditionalLayer


@in_float32
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
    """h1 = x * softplus(BN1(gamma1_t * (W1 [y_t ; guidance] + b1))) (docs/algorithm.md, "Denoiser").

    Runs in float32 under autocast.

    Args:
        x: [B, F] floating, normalised image features, shared by the branches.
        y_t: [B, C], or [S, B, C] for S guidance branches.
        guidance: shape of `y_t`.
        layer: first conditional layer, 2C -> F; the running statistics are updated in place in training.
        timesteps: [B] or [1] int64 in [0, T]. On a GPU the rows of a value out of range are NaN, in training all; the
            reference finds it by a device-side assertion.
        training, momentum, eps: as in `conditional_linear`.
        backend: name of a backend, or "auto", which selects the reference if a tensor is not float32. "cpu", "cuda" and
            "cuda-emulated" are each reproducible for any number of threads (torch's), and batch-invariant in eval mode.

    Returns:
        [B, F] or [S, B, F], differentiable in all tensors but `timesteps`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
        BackendError: the requested backend cannot serve; a RuntimeError.
    """
    args = Arguments("conditioning")
    args.floating("x", x, "B out")
    args.floating("y_t", y_t, "B C", "S B C")
    if y_t.ndim == 3 and y_t.shape[0] == 0:
        raise ValueError(f"conditioning: y_t must have at least one branch, got {tuple(y_t.shape)}")
    args.floating("guidance", guidance, "S B C" if y_t.ndim == 3 else "B C")
    args.sizes["2C"] = 2 * args.sizes["C"]
    check_layer(args, layer, timesteps, "2C", training)
    name = choose("conditioning", backend, (x, y_t, guidance, *layer), (torch.float32,))
    if name == "reference":
        assert_within("conditioning: timesteps", timesteps, 0, layer.gamma.shape[0] - 1)
        return reference.conditioning(
            x, y_t, guidance, layer, timesteps, training=training, momentum=momentum, eps=eps
        )
    found = _conditioning(
        Conditioning(
            x=x, y_t=y_t, guidance=guidance, timesteps=timesteps, layer=layer, training=training, momentum=momentum,
            eps=eps, backend=name,
        )
    )  # fmt: skip
    if training:
        update(layer, found.updated_mean, found.updated_var)
    return found.h


def _gradients(
    call: Conditioning, outputs: Outputs, wanted: Set[str], grad: Tensor, *_: Any
) -> dict[str, Tensor | None]:
    return gradients(call, outputs.statistics, wanted, grad)


_conditioning = register(
    "conditioning",
    Conditioning,
    Outputs,
    forward,
    allocate,
    Derivative(_gradients, saves=SAVED, saved_results=["statistics"]),
)
