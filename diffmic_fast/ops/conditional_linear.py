"""`conditional_linear`: gamma, BatchNorm and softplus around a product of the denoiser."""

from __future__ import annotations

from torch import Tensor

from diffmic_fast.checks import Arguments
from diffmic_fast.ops._backend import resolve
from diffmic_fast.reference import conditional_linear as reference
from diffmic_fast.reference.conditional_linear import ConditionalLayer

__all__ = ["ConditionalLayer", "conditional_linear"]


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

    Args:
        h: [B, in], or [S, B, in] for S streams, floating.
        layer: parameters; the running statistics are updated in place in training.
        timesteps: [B] or [1] int64 in [0, T], shared by the streams.
        training: normalise with the statistics of the batch, taken for each stream on its own.
        momentum: weight of a batch in the running statistics.
        eps: BatchNorm's.
        backend: a backend's name, or "auto".

    Returns:
        [B, out] or [S, B, out], differentiable in `h` and the parameters.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
        BackendError: the backend asked for cannot serve; a RuntimeError.
    """
    args = Arguments("conditional_linear")
    args.floating("h", h, "B in", "S B in")
    check_layer(args, layer, timesteps, "in", training)
    resolve("conditional_linear", backend, h.device)
    return reference.conditional_linear(
        h, layer, timesteps, training=training, momentum=momentum, eps=eps
    )


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
