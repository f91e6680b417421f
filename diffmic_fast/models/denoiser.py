"""The denoiser: image encoder and four conditional layers (docs/algorithm.md, "Denoiser")."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmic_fast.checks import Arguments, assert_within
from diffmic_fast.diffusion.schedule import Schedule, q_sample
from diffmic_fast.distributed.sync_batch_norm import SyncBatchNorm
from diffmic_fast.models._torch_internals import has_hooks, is_replica
from diffmic_fast.models.encoders import ImageEncoder
from diffmic_fast.models.feature_cache import FeatureCache
from diffmic_fast.models.modes import repeated_statistics
from diffmic_fast.ops._transfer import to_device
from diffmic_fast.ops.conditional_linear import ConditionalLayer, conditional_linear
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.ops.denoise import DenoiserWeights
from diffmic_fast.ops.noised_conditioning import noised_conditioning


class _Norm(TypedDict):
    training: bool
    momentum: float
    eps: float


class ConditionalLinear(nn.Module):
    """gamma_t * (W h + b), with one row of gamma per timestep.

    Attributes:
        lin: W and b.
        embed: gamma, [rows, out_features], initialised uniformly in [0, 1).
    """

    def __init__(self, in_features: int, out_features: int, rows: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_features, out_features)
        self.embed = nn.Embedding(rows, out_features)
        nn.init.uniform_(self.embed.weight)

    def forward(self, h: Tensor, timesteps: Tensor) -> Tensor:
        """[..., B, in] and timesteps [B] or [1] to [..., B, out]."""
        return self.embed(timesteps) * self.lin(h)


class ConditionalModel(nn.Module):
    """Predicts the noise in a label vector, given the image and the guidance.

    Called as `model(images, y_t, timesteps, guidance)`. In evaluation mode without gradients the image features are
    cached until images or encoder change, so that a sampling loop runs the encoder once.

    Attributes:
        encoder_x, norm: Image features, [B, feature_dim].
        lin1 … lin3, unetnorm1 … unetnorm3: The conditional layers.
        lin4: Linear, feature_dim to classes.
        guidance: Whether lin1 reads [y_t ; guidance] or y_t alone.
    """

    def __init__(
        self,
        classes: int,
        timesteps: int = 1000,
        feature_dim: int = 6144,
        encoder: str = "resnet18",
        *,
        guidance: bool = True,
        encoder_weights: str | None = None,
    ) -> None:
        """Build the denoiser.

        Args:
            classes: C >= 2, length of the label vector.
            timesteps: T >= 1; the gamma tables have T + 1 rows.
            feature_dim: F >= 1, width of the layers.
            encoder: A torchvision or timm name.
            guidance: Condition on the guidance model's label distribution.
            encoder_weights: As in `make_trunk`.

        Raises:
            ValueError: A size is too small, or the encoder does not exist.
        """
        super().__init__()
        for name, value, least in (
            ("classes", classes, 2),
            ("timesteps", timesteps, 1),
            ("feature_dim", feature_dim, 1),
        ):
            if value < least:
                raise ValueError(f"ConditionalModel: {name} must be at least {least}, got {value}")
        self.guidance = guidance
        rows = timesteps + 1
        self.encoder_x: nn.Module = ImageEncoder(encoder, feature_dim, encoder_weights)
        self.norm: nn.Module = nn.BatchNorm1d(feature_dim)
        self.lin1: nn.Module = ConditionalLinear(
            2 * classes if guidance else classes, feature_dim, rows
        )
        self.unetnorm1: nn.Module = nn.BatchNorm1d(feature_dim)
        self.lin2: nn.Module = ConditionalLinear(feature_dim, feature_dim, rows)
        self.unetnorm2: nn.Module = nn.BatchNorm1d(feature_dim)
        self.lin3: nn.Module = ConditionalLinear(feature_dim, feature_dim, rows)
        self.unetnorm3: nn.Module = nn.BatchNorm1d(feature_dim)
        self.lin4: nn.Module = nn.Linear(feature_dim, classes)
        self._cache = FeatureCache()

    def train(self, mode: bool = True) -> ConditionalModel:
        """As `nn.Module.train`; training mode also frees the cached image features."""
        if mode:
            self._cache.clear()
        super().train(mode)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Image features after `norm`, [B, F]."""
        return self.norm(self.encoder_x(images))

    def features(self, images: Tensor) -> Tensor:
        """As `encode`, or the cached result of the last call where nothing has changed (see the class)."""
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or not isinstance(images, Tensor)
            or is_replica(self)
        ):
            return self.encode(images)
        modules = (self.encoder_x, self.norm)
        return self._cache.features(images, modules, lambda: self.encode(images))

    def forward(self, x: Tensor, y: Tensor, t: Tensor, y_0_hat: Tensor | None = None) -> Tensor:
        """eps of one branch.

        Args:
            x: [B, 3, H, W] float32 images (or whatever `encoder_x` takes).
            y: [B, C] noisy label vectors.
            t: [B] or [1] int64 timesteps in [0, T].
            y_0_hat: [B, C], label distribution of the guidance model; not used by a model without guidance.

        Returns:
            [B, C].

        Raises:
            ValueError, TypeError: An argument does not fit; the message names it.
        """
        if isinstance(y, Tensor) and y.ndim == 3:
            raise ValueError(
                f"ConditionalModel: y must be [rows, C], one branch, got {tuple(y.shape)}; "
                "forward_branches takes several"
            )
        return self.denoise_features(self.features(x), y, t, y_0_hat)

    def forward_branches(
        self,
        x: Tensor,
        y_0: Tensor,
        t: Tensor,
        guidance: Tensor,
        noise: Tensor,
        schedule: Schedule,
        draws: int = 1,
    ) -> Tensor:
        """eps of S branches in training, from clean labels, in one encoder pass (docs/algorithm.md, "Training step").

        Equal to S calls of `forward` with each branch's noisy labels, running statistics included: in training mode
        every branch has its own batch statistics, and every BatchNorm is updated once per branch, in order. (An
        encoder with dropout draws one mask for all branches.) The labels are noised in the kernel of the first layer.

        Args:
            x: [B, 3, H, W].
            y_0: [B * draws, C] clean label vectors, the draws of an image one after another.
            t: [B * draws] int64 timesteps in [0, T).
            guidance: [S, B * draws, C]; prior mean of each branch's noisy labels, and guidance of its layers.
            noise: [B * draws, C], shared by the branches.
            schedule: Its tables of sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t).
            draws: Noisy labels per image and branch.

        Returns:
            [S, B * draws, C].

        Raises:
            ValueError, TypeError: An argument does not fit; the message names it.
        """
        args = Arguments("ConditionalModel")
        args.tensor("y_0", y_0, "rows C")
        args.tensor("guidance", guidance, "S rows C")
        args.tensor("noise", noise, "rows C")
        args.integer("t", t, "rows", "1")
        args.within("timesteps", t, 0, len(schedule.sqrt_alpha_bar) - 1)
        branches = guidance.shape[0]
        with (
            repeated_statistics(self.encoder_x, branches),
            repeated_statistics(self.norm, branches),
        ):
            features = self.encode(x)
        features = features.repeat_interleave(draws, dim=0)
        _check_rows("y_0", y_0, features)
        if not self.guidance or not self._is_standard():
            assert_within("ConditionalModel: timesteps", t, 0, len(schedule.sqrt_alpha_bar) - 1)
            y = q_sample(y_0, guidance, schedule, t, noise)
            return self.denoise_features(features, y, t, guidance)
        both = (schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar)
        tables = [to_device(table, noise.device).to(noise.dtype) for table in both]
        norm = self._norm(1, guidance)
        conditioned = noised_conditioning(
            features, y_0, guidance, self._layer(1), t, *tables, noise=noise, **norm
        )
        return self._after_conditioning(conditioned.h, t)

    def denoise_features(
        self, features: Tensor, y: Tensor, t: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """eps from image features [B, F] and noisy labels.

        Args:
            features: [B, F], of `encode`.
            y: [B, C], or [S, B, C] for S branches.
            t: [B] or [1] int64 timesteps in [0, T].
            guidance: Shape of `y`.

        Returns:
            Shape of `y`.
        """
        if self.guidance and guidance is None:
            raise ValueError(
                "ConditionalModel: this model is conditioned on the guidance's label distribution; pass y_0_hat"
            )
        args = Arguments("ConditionalModel")
        args.integer("t", t, "B", "1")
        args.tensor("y", y, "rows C", "S rows C")
        embed = getattr(self.lin1, "embed", None)
        if isinstance(embed, nn.Embedding):
            args.within("timesteps", t, 0, embed.num_embeddings - 1)
            if not self._is_standard():
                assert_within("ConditionalModel: timesteps", t, 0, embed.num_embeddings - 1)
        _check_rows("y", y, features)
        if not self._is_standard():
            return self._composed(features, y, t, guidance)
        if guidance is None or not self.guidance:
            return self._after_conditioning(features * self._conditional_linear(1, y, t), t)
        h = conditioning(features, y, guidance, self._layer(1), t, **self._norm(1, guidance))
        return self._after_conditioning(h, t)

    def _after_conditioning(self, h: Tensor, t: Tensor) -> Tensor:
        for number in (2, 3):
            h = self._conditional_linear(number, h, t)
        return self.lin4(h)

    def _conditional_linear(self, number: int, h: Tensor, t: Tensor) -> Tensor:
        return conditional_linear(h, self._layer(number), t, **self._norm(number, h))

    def weights(self) -> DenoiserWeights:
        """The layers after the image encoder, for `ops.denoise`.

        Raises:
            TypeError: The weights do not describe the model completely (see `runs_on_weights`).
        """
        if not self.runs_on_weights or not isinstance(self.lin4, nn.Linear):
            raise TypeError(
                "ConditionalModel: weights() needs a model with guidance in evaluation mode, none of whose layers "
                "was replaced or carries a hook"
            )
        return DenoiserWeights(
            self._layer(1),
            (self._layer(2), self._layer(3)),
            self.lin4.weight,
            self.lin4.bias,
            tuple(getattr(self, f"unetnorm{number}").eps for number in (1, 2, 3)),
        )

    @property
    def runs_on_weights(self) -> bool:
        """Whether the layers are as built and in evaluation mode, so that `weights()` describes them completely."""
        return (
            self._is_standard()
            and type(self.lin4) is nn.Linear
            and not has_hooks(self.lin4)
            and self.guidance
            and not any(getattr(self, f"unetnorm{number}").training for number in (1, 2, 3))
        )

    def _is_standard(self) -> bool:
        """Whether the conditional layers are of the types that `ops` computes, without hooks."""
        for number in (1, 2, 3):
            layer, norm = getattr(self, f"lin{number}"), getattr(self, f"unetnorm{number}")
            if type(layer) is not ConditionalLinear:
                return False
            # The kernels compute statistics of one process's batch; in evaluation mode there is no difference.
            synced = isinstance(norm, (SyncBatchNorm, nn.SyncBatchNorm)) and not norm.training
            if type(norm) is not nn.BatchNorm1d and not synced:
                return False
            if type(layer.lin) is not nn.Linear or type(layer.embed) is not nn.Embedding:
                return False
            if norm.running_mean is None or norm.weight is None or norm.momentum is None:
                return False
            if any(has_hooks(part) for part in (layer, layer.lin, layer.embed, norm)):
                return False
        return True

    def _composed(self, features: Tensor, y: Tensor, t: Tensor, guidance: Tensor | None) -> Tensor:
        """`denoise_features` by calls of the layers, whatever they were replaced by."""
        if y.ndim == 3:
            outputs = [
                self._composed(features, y[s], t, None if guidance is None else guidance[s])
                for s in range(y.shape[0])
            ]
            return torch.stack(outputs)
        h = torch.cat((y, guidance), dim=-1) if guidance is not None and self.guidance else y
        h = features * F.softplus(self.unetnorm1(self.lin1(h, t)))
        h = F.softplus(self.unetnorm2(self.lin2(h, t)))
        h = F.softplus(self.unetnorm3(self.lin3(h, t)))
        return self.lin4(h)

    def _layer(self, number: int) -> ConditionalLayer:
        layer, norm = getattr(self, f"lin{number}"), getattr(self, f"unetnorm{number}")
        return ConditionalLayer(
            layer.lin.weight,
            layer.lin.bias,
            layer.embed.weight,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
        )

    def _norm(self, number: int, h: Tensor) -> _Norm:
        """Options of BatchNorm `number`; in training mode its branches are counted as by its forward."""
        norm = getattr(self, f"unetnorm{number}")
        if norm.training:
            norm.num_batches_tracked.add_(h.shape[0] if h.ndim == 3 else 1)
        return {"training": norm.training, "momentum": norm.momentum, "eps": norm.eps}


def _check_rows(name: str, labels: Tensor, features: Tensor) -> None:
    if features.shape[0] != labels.shape[-2]:
        raise ValueError(
            f"ConditionalModel: {name} must have one row per row of features, got {tuple(labels.shape)} for "
            f"{features.shape[0]} rows"
        )


class BranchForward(nn.Module):
    """`ConditionalModel.forward_branches` as the forward of a module, for `DistributedDataParallel` to wrap.

    Attributes:
        denoiser: The model.
    """

    def __init__(self, denoiser: ConditionalModel) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, *arguments: Any) -> Tensor:
        """As `ConditionalModel.forward_branches`."""
        return self.denoiser.forward_branches(*arguments)
