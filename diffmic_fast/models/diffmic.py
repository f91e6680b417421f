"""DiffMIC: guidance model, denoiser and diffusion, from images to a diagnosis."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from diffmic_fast.checks import Arguments, assert_within, autocast_enabled, check_finite
from diffmic_fast.config.model import DiffMICConfig
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.diffusion.schedule import make_schedule
from diffmic_fast.models.denoiser import ConditionalModel
from diffmic_fast.models.encoders import ImageEncoder
from diffmic_fast.models.execution import inference
from diffmic_fast.models.guidance import DCG, Guidance, GuidanceDetail
from diffmic_fast.models.loss import DiffMICLoss, antithetic_timesteps, denoising_loss
from diffmic_fast.models.modes import evaluation_mode
from diffmic_fast.models.prediction import Prediction
from diffmic_fast.models.trained import TrainedModel
from diffmic_fast.ops._backend import BackendError
from diffmic_fast.ops._transfer import to_device
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.ops.image_ids import image_ids
from diffmic_fast.reference.denoise import chain

if TYPE_CHECKING:
    from diffmic_fast.data.inputs import ImageInputs


# Axes of [B, 3, H, W] along which each view is mirrored.
FLIPS: tuple[tuple[int, ...], ...] = ((), (3,), (2,), (2, 3))

_Number = TypeVar("_Number", int, float)


class DiffMIC(TrainedModel):
    """The whole model.

    Attributes:
        config: What it was built from.
        denoiser: `ConditionalModel`.
        guidance: `DCG`.
        schedule: Tables of the noise schedule, on the CPU.
        calibration, class_names, preprocessing, sampling: See `TrainedModel`.
    """

    def __init__(self, config: DiffMICConfig, *, pretrained: bool = True) -> None:
        """Build the model.

        Args:
            config: See `DiffMICConfig`.
            pretrained: Load the ImageNet weights that the configuration names; False where a checkpoint follows.

        Raises:
            ValueError: A value is out of range, or an encoder or the schedule is unknown.
        """
        super().__init__(config)
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
            crop_foreground=config.crop_foreground,
            trunk_weights=config.guidance_weights if pretrained else None,
        )
        # Convolutions are fastest in this layout, on CPUs (up to four times) as on GPUs.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Class probabilities [B, C] of images [B, 3, H, W], by one whole chain per image (evaluation mode only).

        Raises:
            RuntimeError: The model is in training mode.
        """
        if self.training:
            raise RuntimeError(
                "DiffMIC: forward returns class probabilities and must be called in evaluation mode; call eval() "
                "first, or loss(images, labels) to train"
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
        prior: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> DiffMICLoss:
        """Training loss of the denoiser (docs/algorithm.md, "Training step").

        The guidance model runs in evaluation mode and gets no gradient. Timesteps are antithetic; the three branches
        share the noise and one encoder pass. Supports `torch.compile(fullgraph=True)` for any batch size; the values
        of images, labels and timesteps are not checked there. On a GPU neither the loss nor its backward pass waits for
        the device: labels, timesteps, noise and `hidden` may be on the CPU, where they are checked; on the GPU an image
        that is not finite makes the loss NaN, as does a timestep out of range, and a label out of range is found by a
        device-side assertion.

        Args:
            images: [B, 3, H, W] float32, or float64 for a model of that dtype; B >= 2 in training mode.
            labels: [B] int64 in [0, C).
            draws: Timesteps and noises per image, as published 1. More cost little beside the encoder pass that they
                share, and let the denoiser learn from few images; batch statistics and MMD are then over B * draws.
            generator: CPU generator of timesteps and noise (default: torch's own).
            timesteps: [B * draws] int64 in [0, T), used instead of drawn ones.
            noise: [B * draws, C], likewise.
            denoiser: Called instead of `ConditionalModel.forward_branches`, with the same arguments, such as a
                `DistributedDataParallel(BranchForward(model.denoiser))`.
            gather: Collects the [B * draws, C] rows of several processes that the two MMD terms compare.
            prior: [3, B, C] float32, label distributions of the guidance model's three branches, which then does not
                run. `images` may then be [B, channels], rows of `ImageEncoder.pooled`.
            hidden: [B] bool, images whose label distributions are replaced by the uniform one.

        Raises:
            ValueError, TypeError: Images or labels do not fit; the message names them.
        """
        if prior is None or images.ndim != 2:
            images = self._check_images("DiffMIC.loss", images)
        classes, last = self.config.classes, self.config.timesteps - 1
        args = Arguments("DiffMIC.loss", images.device)
        args.sizes.update(B=images.shape[0], C=classes)
        args.integer("labels", labels, "B", host=True)
        args.within("labels", labels, 0, classes - 1)
        assert_within("DiffMIC.loss: labels", labels, 0, classes - 1)
        labels = to_device(labels, images.device)
        if self.denoiser.training and images.shape[0] < 2:
            raise ValueError(
                "DiffMIC.loss: training needs at least 2 images for its batch statistics, got 1"
            )
        if draws < 1:
            raise ValueError(f"DiffMIC.loss: draws must be at least 1, got {draws}")
        rows = args.sizes["rows"] = images.shape[0] * draws
        if timesteps is None:
            timesteps = antithetic_timesteps(rows, self.config.timesteps, generator)
        if noise is None:
            noise = torch.randn(
                rows, classes, generator=generator, dtype=torch.float32, device="cpu"
            )
        args.integer("timesteps", timesteps, "rows", host=True)
        args.within("timesteps", timesteps, 0, last)
        timesteps = to_device(timesteps, images.device)
        dtype = torch.promote_types(images.dtype, torch.float32)
        noise = args.floating("noise", to_device(noise, images.device), "rows C").to(dtype)
        if prior is None:
            with torch.no_grad(), evaluation_mode(self.guidance):
                prior = torch.stack(self.guidance(images)).to(dtype).softmax(dim=-1)
        else:
            prior = args.floating("prior", prior, "3 B C").to(dtype)
        if hidden is not None:
            args.tensor("hidden", hidden, "B", host=True)
            if hidden.dtype != torch.bool:
                raise TypeError(f"DiffMIC.loss: hidden must be bool, got {hidden.dtype}")
            prior = prior.masked_fill(to_device(hidden, images.device)[None, :, None], 1 / classes)
        prior = prior.repeat_interleave(draws, dim=1)
        # Not F.one_hot, which may read the labels back to check them.
        y_0 = labels.repeat_interleave(draws)[:, None] == torch.arange(
            classes, device=labels.device
        )
        y_0 = y_0.to(dtype)
        call = self.denoiser.forward_branches if denoiser is None else denoiser
        eps = call(images, y_0, timesteps, prior, noise, self.schedule, draws).to(dtype)
        return denoising_loss(noise, eps, self.config.mmd_weight, gather)

    @torch.no_grad()
    def guide(
        self, images: Tensor, *, precision: str = "fp32", compile: bool = False, views: int = 1
    ) -> GuidanceDetail:
        """The guidance model's part of `predict`, for several predictions of the same images.

        Args:
            images, precision, compile, views: As in `predict`.

        Returns:
            Logits averaged over the views, and saliency and patches of the images themselves.
        """
        images = self._check_images("DiffMIC.guide", images)
        options = SamplingOptions(precision=precision, compile=compile, views=views)
        with self._inference(options):
            return self._guide(images, views)

    @torch.no_grad()
    def encode(
        self, images: Tensor, *, precision: str = "fp32", compile: bool = False, views: int = 1
    ) -> Tensor:
        """The image encoder's part of `predict`: features [B, F] float32, averaged over the views; see `guide`."""
        images = self._check_images("DiffMIC.encode", images)
        options = SamplingOptions(precision=precision, compile=compile, views=views)
        with self._inference(options):
            return self._encode(images, views).float()

    @torch.no_grad()
    def pool(self, images: Tensor, *, precision: str = "fp32", compile: bool = False) -> Tensor:
        """The image encoder's features before its linear layer, [B, channels] float32; see `guide`.

        Raises:
            TypeError: The encoder was replaced by one that has no such features.
        """
        images = self._check_images("DiffMIC.pool", images)
        encoder = self.denoiser.encoder_x
        if not isinstance(encoder, ImageEncoder):
            raise TypeError(
                f"DiffMIC.pool: the encoder must be an ImageEncoder, got {type(encoder).__name__}"
            )
        with self._inference(SamplingOptions(precision=precision, compile=compile)):
            return encoder.pooled(images).float()

    @torch.no_grad()
    def predict(
        self,
        images: Tensor | ImageInputs,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        samples: int | None = None,
        seed: int | None = None,
        ids: Tensor | None = None,
        precision: str = "fp32",
        compile: bool = False,
        views: int | None = None,
        trajectory: bool = False,
        saliency: bool = False,
        boxes: bool = False,
        guidance: GuidanceDetail | None = None,
        features: Tensor | None = None,
        probability: str | None = None,
    ) -> Prediction:
        """Classify images, in evaluation mode whatever the model's own.

        A prediction depends on the image, the seed and the index of the sample, which address its noise
        (docs/algorithm.md, "Philox noise"), and up to rounding on nothing else in the batch. Guidance model and encoder
        run once per image, however many samples and steps. Memory beside the weights: the activations of the batch, one
        layer's weight at a time with BatchNorm folded in (`models.folding`), and [B * S, F] features; with bfloat16
        convolutions the weights of one network in bfloat16 and the activations of a few images
        (`models.fused_layers`).

        On a GPU the call does not wait for the device and cannot raise for values there: an image that is not finite,
        or whose result is not, has NaN samples and probabilities and the label -1 (`Prediction.check` raises for it).

        Args:
            images: [B, 3, H, W] float32, finite; or what `preprocess` takes: a path, a Pillow image, or a list of
                either. All of them are one batch.
            sampler, steps, eta, samples, seed, views: As in `diffusion.sampling_options.SamplingOptions`. Default:
                those of the model's `sampling`. If a sampler is given, or `sampling` is None, those of
                `SamplingOptions()`: "ddpm", a single sample.
            ids: [B] int64, key of each image's noise, on any device (default: a hash of its pixels).
            precision: Of the chain (see `ops.denoise`). With "bf16" the convolutions of guidance model and encoder are
                in bfloat16 too if the device has such instructions (on a CPU AMX or those of AVX-512 or Arm:
                `models.execution.bfloat16_obstacle`, shown by `python -m diffmic_fast info`), else in float32, which
                is faster there. Saliency, choice of patches, attention and softmax are float32 always. Networks that
                replace the built ones run as they are.
            compile: Run the convolutions through `torch.compile`: some percent faster after minutes of compiling, for
                tens of thousands of images.
            trajectory, saliency, boxes: Whether to return them.
            guidance, features: Results of `guide` and `encode` for these images; computed if None. With one of them
                the default of `views` is 1.
            probability: "published" for the mean softmax of y_0, "calibrated" for the probabilities of `calibration`.
                None for the latter where `calibration` was fitted for this sampler, steps, eta, samples and views,
                otherwise the former; `Prediction.calibrated` tells which.

        Raises:
            ValueError, TypeError: An argument does not fit, or images on the CPU are not finite; the message names it.
            ValueError: Calibrated probabilities are asked for and there is no calibration for them; or files or Pillow
                images are given, and one is unreadable or `preprocessing` is None.
            BackendError: A precision other than "fp32" is not available here; the message says why.
            FloatingPointError: The model's result for an image is not finite, on the CPU.
        """
        if not isinstance(images, Tensor):
            images = self._load("DiffMIC.predict", images)
        images = self._check_images("DiffMIC.predict", images)
        own = self.sampling if sampler is None and self.sampling is not None else SamplingOptions()
        single = guidance is not None or features is not None
        options = SamplingOptions(
            own.sampler if sampler is None else sampler,
            own.steps if steps is None else steps,
            _given(eta, own.eta),
            _given(samples, own.samples),
            _given(seed, own.seed),
            precision,
            compile,
            _given(views, 1 if single else own.views),
        )
        calibration = self._calibration(options, probability)
        args = Arguments("DiffMIC.predict")
        args.sizes["B"] = images.shape[0]  # len() would specialise a traced size
        if ids is None:
            ids = image_ids(images)
        else:
            args.integer("ids", ids, "B")
        if guidance is not None:
            args.floating("guidance.logits.fused", guidance.logits.fused, "B C")
        if features is not None:
            args.floating("features", features, "B F")
        with self._inference(options):
            detail = self._guide(images, options.views) if guidance is None else guidance
            branches = torch.stack(detail.logits, dim=1).float().softmax(dim=-1)
            x = (self._encode(images, options.views) if features is None else features).float()
            ids = to_device(ids, images.device)
            states = self._sample(x, branches[:, 0], ids, options, trajectory)
        if _marks(images):
            # Networks that replace the built ones may give numbers for NaN.
            invalid = images[:, 0, 0, 0].isnan()
            rows = invalid.repeat_interleave(options.samples)
            states = states.masked_fill(rows[None, :, None], torch.nan)
            branches = branches.masked_fill(invalid[:, None, None], torch.nan)
        result = Prediction.from_states(states, branches, options.samples, trajectory=trajectory)
        if calibration is not None:
            result = result.calibrate(calibration)
        if not _marks(images):
            result.check()
        corners = (detail.origins, detail.origins + self.config.crop_size)
        return result._replace(
            saliency=detail.saliency if saliency else None,
            boxes=torch.cat(corners, dim=-1) if boxes else None,
            features=x,
        )

    def _guide(self, images: Tensor, views: int) -> GuidanceDetail:
        detail, *others = (self.guidance.detail(view) for view in _mirrored(images, views))
        if not others:
            return detail
        logits = torch.stack([torch.stack(each.logits) for each in (detail, *others)])
        return detail._replace(logits=Guidance(*logits.float().mean(dim=0).unbind()))

    def _encode(self, images: Tensor, views: int) -> Tensor:
        first, *others = (self.denoiser.encode(view) for view in _mirrored(images, views))
        return torch.stack([first, *others]).float().mean(dim=0) if others else first

    def _sample(
        self,
        features: Tensor,
        prior: Tensor,
        ids: Tensor,
        options: SamplingOptions,
        trajectory: bool,
    ) -> Tensor:
        """Run S reverse chains per image, in one call or layer by layer.

        Args:
            features: [B, F] float32.
            prior: [B, C] float32, the fused branch's label distribution.
            ids: [B] int64, key of each image's noise.
            options: Sampler, samples, seed and precision.
            trajectory: Return every state instead of the last.

        Returns:
            [n + 1, B * S, C] or [1, B * S, C].
        """
        samples, batch = options.samples, ids.shape[0]
        steps = options.step_table(self.schedule)
        features, prior = _repeat(features, samples), _repeat(prior, samples)
        image_ids = ids.repeat_interleave(samples)
        sample_ids = torch.arange(samples, device=ids.device).repeat(batch)
        if self.denoiser.runs_on_weights:
            weights = self.denoiser.weights()
            run = partial(
                denoise, features, prior, prior, weights, steps, precision=options.precision
            )
        elif options.precision != "fp32":
            raise BackendError(
                f"DiffMIC.predict: precision={options.precision!r} is not available: a layer of the denoiser was "
                "replaced or carries a hook, so the chain calls the layers themselves"
            )
        else:
            eps = partial(self.denoiser.denoise_features, features, guidance=prior)
            run = partial(chain, eps, prior, steps)
        states = run(
            seed=options.seed, image_ids=image_ids, sample_ids=sample_ids, trajectory=trajectory
        )
        return states if trajectory else states[None]

    @contextlib.contextmanager
    def _inference(self, options: SamplingOptions) -> Iterator[None]:
        """Evaluation mode, with the networks run in the precision and way of the options."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluation_mode(self))
            if not torch.compiler.is_compiling():  # in a trace the layers run as they are
                bfloat16 = options.precision == "bf16"
                stack.enter_context(inference(bfloat16=bfloat16, compile=options.compile))
            yield

    def _check_images(self, operation: str, images: Tensor) -> Tensor:
        args = Arguments(operation)
        args.floating("images", images, "B 3 H W")
        parameter = next(self.denoiser.parameters())
        self._check_dtype(operation, parameter.dtype)
        if images.dtype != parameter.dtype and not autocast_enabled(images.device):
            raise TypeError(
                f"{operation}: images must be {parameter.dtype} as the model is, got {images.dtype}"
            )
        if images.device != parameter.device:
            raise ValueError(
                f"{operation}: images must be on {parameter.device} as the model is, got {images.device}"
            )
        if 0 in images.shape:
            raise ValueError(f"{operation}: images must not be empty, got {tuple(images.shape)}")
        if _marks(images):
            finite = torch.isfinite(images).flatten(1).all(dim=1)
            return images.masked_fill(~finite[:, None, None, None], torch.nan)
        check_finite(f"{operation}: the argument images", images, ValueError)
        return images

    def _check_dtype(self, operation: str, dtype: torch.dtype) -> None:
        """Raise TypeError for a model in half precision, and where the chain runs, which is float32, in double."""
        # Not next(parameters, None), which torch.compile of torch 2.8 does not trace.
        dtypes = [dtype, *(parameter.dtype for parameter in self.guidance.parameters())][:2]
        single = operation == "DiffMIC.predict"
        allowed = (torch.float32,) if single else (torch.float32, torch.float64)
        for found in dtypes:
            if found not in allowed or found != dtype:
                raise TypeError(
                    f"{operation}: the model must be {' or '.join(map(str, allowed))}, got {found}; call float() on "
                    "it (precision='bf16' computes in bfloat16 where that is accurate)"
                )


def _given(value: _Number | None, default: _Number) -> _Number:
    return default if value is None else value


def _marks(images: Tensor) -> bool:
    """Whether images that are not finite are marked by NaN, which makes their results NaN, instead of an error.

    An error would wait for the GPU. While `torch.compile` traces, images are not checked.
    """
    return images.device.type == "cuda" and not torch.compiler.is_compiling()


def _mirrored(images: Tensor, views: int) -> Iterator[Tensor]:
    """Images [B, 3, H, W] and, for 2 or 4 views, their mirror images."""
    for axes in FLIPS[:views]:
        flipped = images.flip(axes) if axes else images
        yield flipped.contiguous(memory_format=torch.channels_last) if axes else flipped


def _repeat(rows: Tensor, times: int) -> Tensor:
    """[B, n] to [B * times, n], every row `times` times; the rows themselves for one time."""
    return rows[:, None].expand(-1, times, -1).flatten(0, 1)
