"""DiffMIC: guidance, denoiser and diffusion, from images to a diagnosis."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmic_fast.checks import Arguments
from diffmic_fast.config.model import DiffMICConfig
from diffmic_fast.diffusion.samplers import make_steps
from diffmic_fast.diffusion.schedule import make_schedule
from diffmic_fast.models.denoiser import ConditionalModel, Noising
from diffmic_fast.models.encoders import evaluation_mode
from diffmic_fast.models.execution import inference
from diffmic_fast.models.guidance import DCG, GuidanceDetail
from diffmic_fast.models.image_ids import image_ids
from diffmic_fast.ops._backend import BackendError
from diffmic_fast.ops.denoise import PRECISIONS, StepTable, denoise
from diffmic_fast.ops.mmd import mmd
from diffmic_fast.ops.noise_losses import noise_losses
from diffmic_fast.reference.denoise import chain


class DiffMICLoss(NamedTuple):
    """Parts of the training loss, scalars (spec, section 5).

    Attributes:
        total: noise + mmd_weight * (mmd_global + mmd_local); the one to differentiate.
        noise: mean squared error of the fused stream's noise.
        mmd_global, mmd_local: discrepancy between true and predicted noise of the other streams.
    """

    total: Tensor
    noise: Tensor
    mmd_global: Tensor
    mmd_local: Tensor


class Prediction(NamedTuple):
    """What `DiffMIC.predict` tells about B images.

    Attributes:
        probabilities: [B, C] float32, softmax of y_0, mean over the samples.
        label: [B] int64, its argmax.
        spread: [B, C], standard deviation of the probabilities over the samples (0 for one sample).
        samples: [B, S, C], y_0 of every sample.
        guidance: [B, 3, C], probabilities of the guidance's fused, global and local streams.
        trajectory: [B, S, n + 1, C] from the chain's beginning to y_0, or None.
        saliency: [B, C, h, w], or None.
        boxes: [B, K, 4] int64 patches in pixels (top, left, bottom, right; the last two exclusive), or None.
    """

    probabilities: Tensor
    label: Tensor
    spread: Tensor
    samples: Tensor
    guidance: Tensor
    trajectory: Tensor | None = None
    saliency: Tensor | None = None
    boxes: Tensor | None = None


class DiffMIC(nn.Module):
    """The whole model.

    Attributes:
        config: what it was built from.
        denoiser: `ConditionalModel`.
        guidance: `DCG`.
        schedule: tables of the noise schedule, on the CPU.
    """

    def __init__(self, config: DiffMICConfig, *, pretrained: bool = True) -> None:
        """Build the model.

        Args:
            config: see `DiffMICConfig`.
            pretrained: load the ImageNet weights that the configuration names; False where a checkpoint follows.

        Raises:
            ValueError: a value outside its range, an unknown encoder or schedule.
        """
        super().__init__()
        self.config = config
        self.schedule = make_schedule(
            config.schedule, config.timesteps, config.beta_start, config.beta_end
        )
        self.denoiser = ConditionalModel(
            config.classes,
            config.timesteps,
            config.feature_dim,
            config.encoder,
            encoder_weights=config.encoder_weights if pretrained else None,
        )
        self.guidance = DCG(
            config.classes,
            config.guidance_trunk,
            crops=config.crops,
            crop_size=config.crop_size,
            percent_t=config.percent_t,
            crop_channels=config.crop_channels,
            trunk_weights=config.guidance_weights if pretrained else None,
        )
        # The layout that convolutions are fastest in, on CPUs (up to four times) as on GPUs.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Class probabilities [B, C] of images [B, 3, H, W], by the whole chain of one sample (eval mode only).

        Raises:
            RuntimeError: in training mode.
        """
        if self.training:
            raise RuntimeError(
                "DiffMIC: forward gives class probabilities and wants eval mode; call eval() first, or loss(images, "
                "labels) to train"
            )
        return self.predict(images).probabilities

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        draws: int = 1,
        generator: torch.Generator | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        denoiser: Callable[..., Tensor] | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> DiffMICLoss:
        """Training loss of the denoiser (spec, section 5).

        The guidance model runs in eval mode and gets no gradient. Timesteps are antithetic, one noise serves the three
        streams, and one encoder pass serves them all. `torch.compile(fullgraph=True)` takes it, for any batch; labels
        and timesteps are then not looked at, and images not searched for numbers that are not finite.

        Args:
            images: [B, 3, H, W] float32, or float64 as a model made so; B >= 2 in training mode.
            labels: [B] int64 in [0, C).
            draws: timesteps and noises an image, as published 1. More cost little beside the encoder pass that they
                share, and let the denoiser learn from few images; batch statistics and MMD are then over B * draws.
            generator: CPU generator of timesteps and noise (default: torch's own).
            timesteps: [B * draws] int64 in [0, T), to be used instead of drawn ones.
            noise: [B * draws, C], likewise.
            denoiser: a wrapper of the model's own to call in its place (`DistributedDataParallel`).
            gather: makes [B * draws, C] the rows that the two MMD terms compare, for those of several processes.

        Raises:
            ValueError, TypeError: images or labels that do not fit, named.
        """
        images = self._check_images("DiffMIC.loss", images)
        classes = self.config.classes
        args = Arguments("DiffMIC.loss")
        args.sizes["B"] = images.shape[0]
        args.integer("labels", labels, "B")
        args.within("labels", labels, 0, classes - 1)
        if self.denoiser.training and images.shape[0] < 2:
            raise ValueError(
                "DiffMIC.loss: training needs at least 2 images for its batch statistics, got 1"
            )
        if draws < 1:
            raise ValueError(f"DiffMIC.loss: draws must be at least 1, got {draws}")
        rows = args.sizes["rows"] = images.shape[0] * draws
        args.sizes["C"] = classes
        if timesteps is None:
            timesteps = antithetic_timesteps(rows, self.config.timesteps, generator)
        if noise is None:
            noise = torch.randn(rows, classes, generator=generator)
        timesteps, noise = timesteps.to(images.device), noise.to(images.device)
        args.integer("timesteps", timesteps, "rows")
        args.within("timesteps", timesteps, 0, self.config.timesteps - 1)
        dtype = torch.promote_types(images.dtype, torch.float32)
        noise = args.floating("noise", noise, "rows C").to(dtype)
        with torch.no_grad(), evaluation_mode(self.guidance):
            prior = torch.stack(self.guidance(images)).to(dtype).softmax(dim=-1)
        prior = prior.repeat_interleave(draws, dim=1)
        y_0 = F.one_hot(labels.repeat_interleave(draws), classes).to(noise.dtype)
        call = self.denoiser if denoiser is None else denoiser
        noising = Noising(self.schedule, noise)
        eps = call(images, y_0, timesteps, prior, draws, noising).to(dtype)
        if gather is None:
            error, *discrepancies = noise_losses(noise, eps).unbind()
        else:
            error = F.mse_loss(eps[0], noise)
            compared = [gather(each) for each in (noise, eps[1], eps[2])]
            discrepancies = [mmd(compared[0], other) for other in compared[1:]]
        total = error + self.config.mmd_weight * (discrepancies[0] + discrepancies[1])
        return DiffMICLoss(total, error, *discrepancies)

    @torch.no_grad()
    def guide(
        self, images: Tensor, *, precision: str = "fp32", compile: bool = False
    ) -> GuidanceDetail:
        """The guidance model's part of `predict`, to be used for several predictions of the same images.

        Args:
            images, precision, compile: as in `predict`.
        """
        images = self._check_images("DiffMIC.guide", images)
        with self._ready("DiffMIC.guide", precision, compile):
            return self.guidance.detail(images)

    @torch.no_grad()
    def encode(self, images: Tensor, *, precision: str = "fp32", compile: bool = False) -> Tensor:
        """The image encoder's part of `predict`: features [B, F] float32; see `guide`."""
        images = self._check_images("DiffMIC.encode", images)
        with self._ready("DiffMIC.encode", precision, compile):
            return self.denoiser.encode(images).float()

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        *,
        sampler: str = "ddpm",
        steps: int | None = None,
        eta: float = 0.0,
        samples: int = 1,
        seed: int = 0,
        ids: Tensor | None = None,
        precision: str = "fp32",
        compile: bool = False,
        trajectory: bool = False,
        saliency: bool = False,
        boxes: bool = False,
        guidance: GuidanceDetail | None = None,
        features: Tensor | None = None,
    ) -> Prediction:
        """Classify images (in eval mode, whatever the model's own).

        A prediction depends on the image, the seed and the sample's number, never on the batch: noise is addressed by
        them (`reference.philox`). Guidance and encoder run once an image, however many samples and steps. Beside the
        weights there is memory for the activations of the batch, for one layer's weight at a time (with BatchNorm
        folded in, `models.folding`) and for [B * S, F] features; with convolutions in bfloat16 for the weights of one
        network in bfloat16 and the activations of a few images (`models.fused`).

        Args:
            images: [B, 3, H, W] float32, finite.
            sampler, steps, eta: see `diffusion.make_steps`.
            samples: S >= 1 chains an image.
            seed: 64-bit key of the noise.
            ids: [B] int64, key of each image's noise (default: a hash of its pixels).
            precision: of the chain (see `ops.denoise`). With "bf16" the convolutions of guidance and encoder are in
                bfloat16 too if the device has such instructions (on a CPU AMX or those of AVX-512 or Arm, as the
                processor reports: `models.inference.bfloat16_obstacle`, shown by `python -m diffmic_fast info`), else
                in float32, which is faster there. Saliency, choice of patches,
                attention and softmax are float32 always. Networks put in the place of ours run as they are.
            compile: run the convolutions through `torch.compile`: some percent faster after minutes of compiling, for
                tens of thousands of images.
            trajectory, saliency, boxes: what to return beside the labels.
            guidance, features: what `guide` and `encode` gave for these images; computed if not given.

        Raises:
            ValueError, TypeError: arguments that do not fit, named; images that are not finite, by their index.
            BackendError: a precision other than "fp32" cannot be served here; says why.
            FloatingPointError: the model's result for an image is not finite.
        """
        images = self._check_images("DiffMIC.predict", images)
        for name, value in (("samples", samples), ("seed", seed), ("steps", steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"DiffMIC.predict: {name} must be a whole number, got {value!r}")
        if not isinstance(compile, bool):
            raise TypeError(f"DiffMIC.predict: compile must be True or False, got {compile!r}")
        if samples < 1:
            raise ValueError(f"DiffMIC.predict: samples must be at least 1, got {samples}")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"DiffMIC.predict: seed must have at most 64 bits, got {seed}")
        table = make_steps(self.schedule, sampler, steps, eta)
        batch = images.shape[0]  # len() would fix it where this is traced
        args = Arguments("DiffMIC.predict")
        args.sizes["B"] = batch
        if ids is None:
            ids = image_ids(images)
        else:
            args.integer("ids", ids, "B")
        if guidance is not None:
            args.floating("guidance.logits.fused", guidance.logits.fused, "B C")
        if features is not None:
            args.floating("features", features, "B F")
        with self._ready("DiffMIC.predict", precision, compile):
            detail = self.guidance.detail(images) if guidance is None else guidance
            streams = torch.stack(detail.logits, dim=1).float().softmax(dim=-1)
            x = self.denoiser.encode(images) if features is None else features
            states = self._chain(
                _each_sample(x.float(), samples),
                _each_sample(streams[:, 0], samples),
                table,
                seed,
                ids.to(images.device).repeat_interleave(samples),
                torch.arange(samples, device=images.device).repeat(batch),
                trajectory,
                precision,
            )
        y_0 = (states[-1] if trajectory else states).view(batch, samples, -1)
        _check_finite("the model's result", y_0, FloatingPointError)
        each = y_0.softmax(dim=-1)
        probabilities = each.mean(dim=1)
        size = torch.tensor([0, 0, self.config.crop_size, self.config.crop_size])
        return Prediction(
            probabilities=probabilities,
            label=probabilities.argmax(dim=-1),
            spread=each.std(dim=1, correction=0),
            samples=y_0,
            guidance=streams,
            trajectory=states.view(-1, batch, samples, y_0.shape[-1]).permute(1, 2, 0, 3)
            if trajectory
            else None,
            saliency=detail.saliency if saliency else None,
            boxes=detail.origins.repeat(1, 1, 2) + size.to(images.device) if boxes else None,
        )

    @contextlib.contextmanager
    def _ready(self, operation: str, precision: str, compile: bool) -> Iterator[None]:
        """In eval mode, with guidance and encoder run as the arguments say."""
        if precision not in PRECISIONS:
            raise ValueError(
                f"{operation}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
            )
        # While somebody traces this, layers run as they are.
        how = (
            contextlib.nullcontext()
            if torch.compiler.is_compiling()
            else inference(bfloat16=precision == "bf16", compile=compile)
        )
        with evaluation_mode(self), how:
            yield

    def _chain(
        self,
        features: Tensor,
        prior: Tensor,
        steps: StepTable,
        seed: int,
        image_ids: Tensor,
        sample_ids: Tensor,
        trajectory: bool,
        precision: str,
    ) -> Tensor:
        """The reverse chain in one call, or layer by layer where a layer was replaced or carries a hook."""
        if self.denoiser.runs_on_weights:
            return denoise(
                features,
                prior,
                prior,
                self.denoiser.weights(),
                steps,
                seed=seed,
                image_ids=image_ids,
                sample_ids=sample_ids,
                trajectory=trajectory,
                precision=precision,
            )
        if precision != "fp32":
            raise BackendError(
                f"DiffMIC.predict: precision={precision!r} cannot be served: a layer of the denoiser was replaced or "
                "carries a hook, so the chain runs through the layers themselves"
            )
        return chain(
            lambda y, timestep: self.denoiser.denoise_features(features, y, timestep, prior),
            prior,
            steps,
            seed=seed,
            image_ids=image_ids,
            sample_ids=sample_ids,
            trajectory=trajectory,
        )

    def _check_images(self, operation: str, images: Tensor) -> Tensor:
        args = Arguments(operation)
        args.floating("images", images, "B 3 H W")
        wanted = next(self.denoiser.parameters())
        if images.dtype != wanted.dtype and not torch.is_autocast_enabled(images.device.type):
            raise TypeError(
                f"{operation}: images must be {wanted.dtype} as the model is, got {images.dtype}"
            )
        if images.device != wanted.device:
            raise ValueError(
                f"{operation}: images must be on {wanted.device} as the model is, got {images.device}"
            )
        if 0 in images.shape:
            raise ValueError(f"{operation}: images must not be empty, got {tuple(images.shape)}")
        _check_finite(f"{operation}: the argument images", images, ValueError)
        return images


def antithetic_timesteps(
    count: int, timesteps: int, generator: torch.Generator | None = None
) -> Tensor:
    """`count` timesteps: floor(count / 2) + 1 draws from 0 … T - 1, then T - 1 minus them, cut to `count`.

    Returns:
        [count] int64 on the CPU.
    """
    drawn = torch.randint(0, timesteps, (count // 2 + 1,), generator=generator)
    return torch.cat((drawn, timesteps - 1 - drawn))[:count]


def _each_sample(rows: Tensor, samples: int) -> Tensor:
    """[B, n] to [B * samples, n], every row `samples` times; the rows themselves for one sample."""
    return rows[:, None].expand(-1, samples, -1).flatten(0, 1)


def _check_finite(what: str, values: Tensor, error: type[Exception]) -> None:
    if torch.compiler.is_compiling():
        return
    # One pass without temporaries, where isfinite makes four; a sum may overflow where every value is finite.
    if bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all()):
        return
    finite = torch.isfinite(values.flatten(1)).all(dim=1)
    indices = (~finite).nonzero()[:, 0].tolist()
    raise error(f"{what}: not-a-number or infinite for image {', '.join(map(str, indices[:8]))}")
