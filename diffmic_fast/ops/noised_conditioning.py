"""`noised_conditioning`: noise, noisy labels and the denoiser's first layer in one call, for a training step."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmic_fast.checks import Arguments, assert_within
from diffmic_fast.ops._autocast import in_float32
from diffmic_fast.ops._backend import choose
from diffmic_fast.ops._conditioning import (
    SAVED,
    Conditioning,
    Noising,
    allocate,
    forward,
    gradients,
    or_empty,
    update,
)
from diffmic_fast.ops._layout import compact, detached
from diffmic_fast.ops._operators import Derivative, register
from diffmic_fast.ops.conditional_linear import check_layer
from diffmic_fast.reference import conditioning as reference
from diffmic_fast.reference import philox
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.conditioning import NoisedConditioning

__all__ = ["NoisedConditioning", "noised_conditioning"]


@in_float32
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
    """`conditioning` of noisy labels that it makes (docs/algorithm.md, "Training step").

        y_t = a y_0 + (1 - a) guidance + d noise

    with a and d the entries of the two tables at the timestep. On a GPU noise, noisy labels and layer are one kernel,
    or two for a batch that does not fit into a block. Runs in float32 under autocast.

    Args:
        x, layer, training, momentum, eps, backend: as in `conditioning`.
        y_0: [B, C] floating label vectors, shared by the branches.
        guidance: [B, C], or [S, B, C] for S guidance branches: prior mean of the noisy labels, and guidance of the
            layer.
        timesteps: [B] or [1] int64 in [0, T); out of range on a GPU as in `conditioning`.
        sqrt_alpha_bar, sqrt_one_minus_alpha_bar: [T] floating, the tables of a `diffusion.Schedule`.
        noise: [B, C] floating, shared by the branches. Default: Philox noise at (seed, image, sample, timestep 0), the
            same bits from every backend.
        seed: 64-bit key of that noise.
        image_ids, sample_ids: [B] int64, image and sample of each row (default: 0 … B-1, and 0); samples in
            [0, 2**32); on a GPU the noise of a sample out of range is NaN.

    Returns:
        `h` of `conditioning`, `y_t` of the shape of `guidance`, and `noise` [B, C]. h is differentiable in x, y_0,
        guidance, noise and the layer; y_t in y_0, guidance and noise.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
        BackendError: the requested backend cannot serve; a RuntimeError.
    """
    args = Arguments("noised_conditioning")
    args.floating("x", x, "B out")
    args.floating("y_0", y_0, "B C")
    args.floating("guidance", guidance, "B C", "S B C")
    if guidance.ndim == 3 and guidance.shape[0] == 0:
        raise ValueError(
            f"noised_conditioning: guidance must have at least one branch, got {tuple(guidance.shape)}"
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
            f"noised_conditioning: classes must be at most {philox.MAX_CLASSES} for drawn noise, got "
            f"{args.sizes['C']}: pass noise"
        )
    if image_ids is not None:
        args.integer("image_ids", image_ids, "B")
    if sample_ids is not None:
        args.integer("sample_ids", sample_ids, "B")
        args.within("sample_ids", sample_ids, 0, 2**32 - 1)
    floats = [x, y_0, guidance, *layer, sqrt_alpha_bar, sqrt_one_minus_alpha_bar]
    floats += [] if noise is None else [noise]
    name = choose("conditioning", backend, floats, (torch.float32,), caller="noised_conditioning")
    if name == "reference":
        assert_within("noised_conditioning: timesteps", timesteps, 0, args.sizes["T"] - 1)
        return reference.noised_conditioning(
            x, y_0, guidance, layer, timesteps, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, noise=noise, seed=seed,
            image_ids=image_ids, sample_ids=sample_ids, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    found = _noised_conditioning(
        NoisedCall(
            x=x, y_0=y_0, guidance=guidance, timesteps=timesteps, layer=layer, training=training, momentum=momentum,
            eps=eps, backend=name, sqrt_alpha_bar=sqrt_alpha_bar,
            sqrt_one_minus_alpha_bar=sqrt_one_minus_alpha_bar, noise=noise,
            # The schema has signed integers; the key is these 64 bits either way.
            seed=(seed + 2**63) % 2**64 - 2**63,
            image_ids=image_ids, sample_ids=sample_ids,
        )
    )  # fmt: skip
    if training:
        update(layer, found.updated_mean, found.updated_var)
    return NoisedConditioning(found.h, found.y_t, found.drawn if noise is None else noise)


# ---- the operator ----------------------------------------------------------------------------


class NoisedCall(NamedTuple):
    """Arguments of the operator `noised_conditioning`, as in the function; the seed is signed."""

    x: Tensor
    y_0: Tensor
    guidance: Tensor
    timesteps: Tensor
    layer: ConditionalLayer
    training: bool
    momentum: float
    eps: float
    backend: str
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    noise: Tensor | None
    seed: int
    image_ids: Tensor | None
    sample_ids: Tensor | None

    def conditioning(self, y_t: Tensor) -> Conditioning:
        """The call of `conditioning` on the noisy labels."""
        return Conditioning(
            x=self.x, y_t=y_t, guidance=self.guidance, timesteps=self.timesteps, layer=self.layer,
            training=self.training, momentum=self.momentum, eps=self.eps, backend=self.backend,
        )  # fmt: skip


class NoisedOutputs(NamedTuple):
    """Results of the operator: `drawn` is empty if the noise was given, the others as in `Outputs`."""

    h: Tensor
    y_t: Tensor
    drawn: Tensor
    statistics: Tensor
    updated_mean: Tensor
    updated_var: Tensor


def _allocate(call: NoisedCall) -> tuple[Tensor, Tensor | None]:
    """Memory for the noisy labels, and for the noise if it is drawn."""
    drawn = None if call.noise is not None else call.x.new_empty(call.y_0.shape)
    return call.x.new_empty(call.guidance.shape), drawn


def _forward(call: NoisedCall) -> NoisedOutputs:
    y_t, drawn = _allocate(call)
    noising = Noising(
        y_0=detached(call.y_0),
        sqrt_alpha_bar=compact(call.sqrt_alpha_bar),
        sqrt_one_minus_alpha_bar=compact(call.sqrt_one_minus_alpha_bar),
        noise=None if call.noise is None else compact(call.noise),
        seed=call.seed % 2**64,
        image_ids=None if call.image_ids is None else call.image_ids.contiguous(),
        sample_ids=None if call.sample_ids is None else call.sample_ids.contiguous(),
        drawn=drawn,
    )
    h, *statistics = forward(call.conditioning(y_t), noising)
    return NoisedOutputs(h, y_t, or_empty(drawn, call.x), *statistics)


def _fake_forward(call: NoisedCall) -> NoisedOutputs:
    y_t, drawn = _allocate(call)
    h, *statistics = allocate(call.conditioning(y_t))
    return NoisedOutputs(h, y_t, or_empty(drawn, call.x), *statistics)


def _gradients(
    call: NoisedCall, outputs: NoisedOutputs, wanted: Set[str], grad: Tensor | None, y_grad: Tensor | None,
    *_: Any,
) -> dict[str, Tensor | None]:  # fmt: skip
    through_labels = "y_0" in wanted or "guidance" in wanted or "noise" in wanted
    found: dict[str, Tensor | None] = {}
    if grad is not None:
        through = wanted | {"y_t"} if through_labels else wanted
        found = gradients(call.conditioning(outputs.y_t), outputs.statistics, through, grad)
        of_labels = found.pop("y_t", None)
        if of_labels is not None:
            y_grad = of_labels if y_grad is None else y_grad + of_labels
    if y_grad is None or not through_labels:
        return found
    a = call.sqrt_alpha_bar[call.timesteps][:, None]
    d = call.sqrt_one_minus_alpha_bar[call.timesteps][:, None]
    of_branches = y_grad.sum(dim=0) if y_grad.ndim == 3 else y_grad
    if "y_0" in wanted:
        found["y_0"] = a * of_branches
    if "guidance" in wanted:
        share, direct = (1.0 - a) * y_grad, found.get("guidance")
        found["guidance"] = share if direct is None else direct + share
    if "noise" in wanted:
        found["noise"] = d * of_branches
    return found


_noised_conditioning = register(
    "noised_conditioning",
    NoisedCall,
    NoisedOutputs,
    _forward,
    _fake_forward,
    Derivative(
        _gradients,
        saves=[
            *(name for name in SAVED if name != "y_t"),
            "sqrt_alpha_bar",
            "sqrt_one_minus_alpha_bar",
        ],
        saved_results=["y_t", "statistics"],
        outputs=2,
    ),
)
