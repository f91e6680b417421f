"""The denoiser: image encoder and four conditional layers (spec, section 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmic_fast.checks import Arguments
from diffmic_fast.diffusion.schedule import Schedule, q_sample
from diffmic_fast.distributed.sync_batch_norm import SyncBatchNorm
from diffmic_fast.models.encoders import ImageEncoder, repeated_statistics
from diffmic_fast.models.feature_cache import FeatureCache, every_module
from diffmic_fast.models.folding import has_hooks
from diffmic_fast.ops.conditional_linear import ConditionalLayer, conditional_linear
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.ops.denoise import DenoiserWeights
from diffmic_fast.ops.noised_conditioning import noised_conditioning


class Noising(NamedTuple):
    """How clean labels become those that the denoiser sees in training (spec, section 5).

    Attributes:
        schedule: its tables of sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t).
        noise: [B, C], shared by the streams.
    """

    schedule: Schedule
    noise: Tensor


class ConditionalLinear(nn.Module):
    """gamma_t * (W h + b), with one row of gamma a timestep.

    Attributes:
        lin: W and b.
        embed: gamma, [rows, out_features], uniform in [0, 1) at the start.
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

    Called as `model(images, y_t, timesteps, guidance)`. In eval mode without gradients, the image features are kept and
    given again while images and encoder stay what they are, so a sampling loop pays for one encoder pass.

    Attributes:
        encoder_x, norm: image features, [B, feature_dim].
        lin1 … lin3, unetnorm1 … unetnorm3: the conditional layers.
        lin4: linear, feature_dim -> classes.
        guidance: whether lin1 reads [y_t ; guidance] or y_t alone.
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
            feature_dim: F, width of the layers.
            encoder: torchvision or timm name.
            guidance: condition on the guidance's label distribution.
            encoder_weights: as in `make_trunk`.

        Raises:
            ValueError: a size below its least value, or an encoder that does not exist.
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
        """As `nn.Module.train`; training also frees the kept image features."""
        if mode:
            self._cache.clear()
        super().train(mode)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Image features after `norm`, [B, F]."""
        return self.norm(self.encoder_x(images))

    def features(self, images: Tensor) -> Tensor:
        """As `encode`, computed anew only if something changed (see the class)."""
        modules = (self.encoder_x, self.norm)
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or not isinstance(images, Tensor)
            or getattr(self, "_is_replica", False)
            or any(part.training for part in every_module(modules))
        ):
            return self.encode(images)
        return self._cache.features(images, modules, lambda: self.encode(images))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        y_0_hat: Tensor | None = None,
        draws: int = 1,
        noising: Noising | None = None,
    ) -> Tensor:
        """eps of one stream, or of several as `forward_streams` (for wrappers, which see a module's forward alone).

        Args:
            x: [B, 3, H, W] float32 images (or whatever `encoder_x` takes).
            y: [B, C] noisy label vectors, or [S, B * draws, C].
            t: [B] or [1] int64 timesteps in [0, T]; [B * draws] for several streams.
            y_0_hat: shape of `y`, label distribution of the guidance model; not used by a model without guidance.
            draws: noisy labels an image, for several streams.
            noising: as in `forward_streams`; for one stream too.

        Returns:
            Shape of `y`, with a noising that of `y_0_hat`.

        Raises:
            ValueError, TypeError: arguments that do not fit, named.
        """
        if y_0_hat is not None and y_0_hat.ndim == 3:
            return self.forward_streams(x, y, t, y_0_hat, draws, noising)
        return self.denoise_features(self.features(x), y, t, y_0_hat, noising)

    def forward_streams(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        guidance: Tensor,
        draws: int = 1,
        noising: Noising | None = None,
    ) -> Tensor:
        """eps of S streams over the same images and timesteps, in one encoder pass.

        Gives the numbers of S calls of `forward`, running statistics included: in training each stream has its own
        batch statistics, and every BatchNorm is updated once a stream, in order. (An encoder with dropout draws one
        mask for all streams.)

        Args:
            x: [B, 3, H, W].
            y, guidance: [S, B * draws, C], the draws of an image one after another.
            t: [B * draws] int64.
            draws: noisy labels an image.
            noising: with it `y` are clean labels [B * draws, C], from which each stream's noisy ones are made around
                its guidance, in the same kernel as the first layer.

        Returns:
            [S, B * draws, C].
        """
        streams = guidance.shape[0]
        with repeated_statistics(self.encoder_x, streams), repeated_statistics(self.norm, streams):
            features = self.encode(x)
        features = features.repeat_interleave(draws, dim=0)
        return self.denoise_features(features, y, t, guidance, noising)

    def denoise_features(
        self,
        features: Tensor,
        y: Tensor,
        t: Tensor,
        guidance: Tensor | None = None,
        noising: Noising | None = None,
    ) -> Tensor:
        """eps from image features [B, F] that are there already; y and guidance [B, C] or [S, B, C].

        With a noising y are clean labels [B, C], as in `forward_streams`.
        """
        if self.guidance and guidance is None:
            raise ValueError(
                "ConditionalModel: this model is conditioned on the guidance's label distribution; pass y_0_hat"
            )
        args = Arguments("ConditionalModel")
        args.integer("t", t, "B", "1")
        if noising is None:
            args.tensor("y", y, "rows C", "S rows C")
        else:
            args.tensor("y", y, "rows C")
            args.tensor("noise", noising.noise, "rows C")
        embed = getattr(self.lin1, "embed", None)
        if isinstance(embed, nn.Embedding):
            args.within("timesteps", t, 0, embed.num_embeddings - 1)
        if features.shape[0] != y.shape[-2]:
            raise ValueError(
                f"ConditionalModel: y must have a row an image, got {tuple(y.shape)} for {features.shape[0]} images"
            )
        plain, guided = self._is_plain(), guidance is not None and self.guidance
        if noising is not None and not (plain and guided):
            if guidance is None:
                raise ValueError("ConditionalModel: labels are noised around y_0_hat; pass it")
            y, noising = q_sample(y, guidance, noising.schedule, t, noising.noise), None
        if not plain:
            return self._composed(features, y, t, guidance)
        if guidance is not None and self.guidance:
            h = self._conditioning(features, y, t, guidance, noising)
        else:
            h = features * self._conditional_linear(1, y, t)
        for number in (2, 3):
            h = self._conditional_linear(number, h, t)
        return self.lin4(h)

    def _conditioning(
        self, features: Tensor, y: Tensor, t: Tensor, guidance: Tensor, noising: Noising | None
    ) -> Tensor:
        training, momentum, eps = self._norm(1, guidance)
        layer = self._layer(1)
        if noising is None:
            return conditioning(
                features, y, guidance, layer, t, training=training, momentum=momentum, eps=eps
            )
        schedule, noise = noising
        tables = (
            table.to(noise)
            for table in (schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar)
        )
        return noised_conditioning(
            features, y, guidance, layer, t, *tables,
            noise=noise, training=training, momentum=momentum, eps=eps,
        ).h  # fmt: skip

    def _conditional_linear(self, number: int, h: Tensor, t: Tensor) -> Tensor:
        training, momentum, eps = self._norm(number, h)
        return conditional_linear(
            h, self._layer(number), t, training=training, momentum=momentum, eps=eps
        )

    def weights(self) -> DenoiserWeights:
        """The layers behind the image encoder, for `ops.denoise`.

        Raises:
            TypeError: there is more to a chain than its weights (see `runs_on_weights`).
        """
        if not self.runs_on_weights or not isinstance(self.lin4, nn.Linear):
            raise TypeError(
                "ConditionalModel: weights tell all there is only of a guided model in eval mode, none of whose layers "
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
        """Whether the layers are as built, in eval mode, so that `weights()` tells all there is to a chain."""
        return (
            self._is_plain()
            and type(self.lin4) is nn.Linear
            and not has_hooks(self.lin4)
            and self.guidance
            and not any(getattr(self, f"unetnorm{number}").training for number in (1, 2, 3))
        )

    def _is_plain(self) -> bool:
        """Whether the conditional layers are of the types that `ops` knows, free of hooks."""
        for number in (1, 2, 3):
            layer, norm = getattr(self, f"lin{number}"), getattr(self, f"unetnorm{number}")
            if type(layer) is not ConditionalLinear:
                return False
            # Kernels know a batch's own statistics; without a batch there is no difference.
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
        """The same from the modules themselves, whatever they were replaced by."""
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

    def _norm(self, number: int, h: Tensor) -> tuple[bool, float, float]:
        """Mode, momentum and eps of BatchNorm `number`; in training it counts its streams as its forward would."""
        norm = getattr(self, f"unetnorm{number}")
        if norm.training:
            norm.num_batches_tracked.add_(h.shape[0] if h.ndim == 3 else 1)
        return norm.training, norm.momentum, norm.eps
