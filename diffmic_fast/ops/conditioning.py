"""`conditioning`: noisy label and guidance of all streams to the first hidden layer of the denoiser."""

from __future__ import annotations

from torch import Tensor

from diffmic_fast.checks import Arguments
from diffmic_fast.ops._backend import resolve
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

    Args:
        x: [B, F] floating, image features after `norm`, shared by the streams.
        y_t: [B, C], or [S, B, C] for S streams.
        guidance: shape of `y_t`.
        layer: first conditional layer, 2C -> F; the running statistics are updated in place in training.
        timesteps: [B] or [1] int64 in [0, T].
        training, momentum, eps: as in `conditional_linear`.
        backend: a backend's name, or "auto".

    Returns:
        [B, F] or [S, B, F], differentiable in all tensors but `timesteps`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
        RuntimeError: the backend asked for cannot serve.
    """
    args = Arguments("conditioning")
    args.floating("x", x, "B out")
    args.floating("y_t", y_t, "B C", "S B C")
    args.floating("guidance", guidance, "S B C" if y_t.ndim == 3 else "B C")
    args.sizes["2C"] = 2 * args.sizes["C"]
    check_layer(args, layer, timesteps, "2C", training)
    resolve("conditioning", backend, x.device)
    return reference.conditioning(
        x, y_t, guidance, layer, timesteps, training=training, momentum=momentum, eps=eps
    )
