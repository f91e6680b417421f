"""The section `training` of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from diffmic_fast.config.fields import (
    SECTION,
    AtLeastTwo,
    Count,
    Flag,
    Fraction,
    Natural,
    NonNegative,
    OpenUnit,
    Positive,
    Samples,
)


@dataclass(config=SECTION)
class TrainingConfig:
    """Length, optimizers and precision of a training run; the defaults are the published settings.

    Attributes:
        batch_size: images per step and process, at least 2 (batch normalisation). The last batch of an epoch may be
            smaller; fewer left-over images than two per process join the batch before them.
        accumulation: number of micro-batches that a batch is split into. Their gradients are accumulated for one step
            of each optimizer. Batch statistics and the two MMD terms are then those of a micro-batch, and the running
            statistics are updated once per micro-batch.
        recompute: activation checkpointing of the image networks (the denoiser's encoder, the guidance model's
            trunks): the same numbers with less memory and one more forward pass.
        sync_batch_norm: several processes: batch statistics over the images of all processes, equal to those of one
            process with the whole batch. Otherwise each process has its own, and those of rank 0 are kept.
        gather_mmd: several processes: the two MMD terms over the gathered rows of all processes, not of each.
        fsdp: several processes: shard weights, gradients, moving average and optimizer state (PyTorch's FSDP2) instead
            of replicating them.
        draws: timesteps and noises per image in a denoiser step. The published number is 1; more share the encoder
            pass of the image and let the denoiser learn from few images.
        epochs: joint epochs.
        guidance_epochs: epochs of the guidance model alone, before the joint ones.
        warmup_epochs: joint epochs in which the denoiser's learning rate rises linearly from 0. It then follows a
            half-cosine to `min_learning_rate`.
        learning_rate: of the denoiser after the warm-up.
        min_learning_rate: of the denoiser at the end, at most `learning_rate`.
        encoder_learning_rate: of the denoiser's image encoder; None for `learning_rate`. A pretrained encoder needs a
            lower rate than the randomly initialised layers after it.
        weight_decay: of the denoiser.
        gradient_clip: largest gradient norm of a denoiser step; None for no clipping.
        guidance_learning_rate: of the guidance model.
        guidance_weight_decay: of the guidance model.
        guidance_cosine: whether the guidance model's learning rate falls by a half-cosine over all epochs that train
            it; otherwise it is constant.
        guidance_warmup_epochs: epochs in which the guidance model's learning rate rises linearly from 0.
        ema_decay: of the moving average of the denoiser's weights; None for no average. It averages over about
            1 / (1 - ema_decay) steps: short runs need a smaller value than the published 0.9999.
        guidance_gradient_clip: largest gradient norm of a step of the guidance model; None for no clipping.
        encoder_epochs: epochs of the denoiser's image encoder alone, as a classifier with a linear layer of its own,
            after those of the guidance model. Its rate is `encoder_learning_rate`, with the schedule of joint epochs.
        feature_epochs: epochs of the denoiser's layers alone, after the joint ones, on features of the encoder and
            label distributions of the guidance model, computed once for `feature_views` augmented views per image.
        feature_views: augmented views per image of these epochs.
        feature_batch_size: rows per step of these epochs.
        joint_guidance: whether the guidance model is also trained in joint epochs, as published. Otherwise it is left
            as its own epochs made it.
        prior_dropout: share of the images of a denoiser step whose label distributions of the guidance model are
            replaced by the uniform one, as prior mean and as condition, so that the denoiser has to look at the image.
        classifier_ema_decay: of moving averages, of weights and running statistics, of the guidance model in
            `guidance_epochs` and of the encoder in `encoder_epochs`; they replace what they average at the end of these
            epochs. None for no average.
        classifier_dropout: dropout of the features before the last layers of guidance model and encoder classifier,
            whenever they are trained; in a single process.
        classifier_head_factor: learning rate of the layers after the trunks of these two, as a multiple of
            `guidance_learning_rate` and `encoder_learning_rate`.
        label_smoothing: in the cross-entropies of guidance model and encoder, the share of the target that is spread
            over the other classes.
        ordinal: whether the classes are ordered grades: smoothing then spreads over the neighbouring classes only.
        balance: images are drawn with probabilities proportional to (images of their class)^-balance, with
            replacement. 0 is every image once per epoch, 1 all classes equally often.
        precision: "fp32", or "bf16" for forward passes under autocast to bfloat16; weights, optimizers, batch
            statistics and MMD stay in float32. "auto" is bf16 where the processor multiplies bfloat16 (AMX, AVX-512),
            otherwise fp32; the choice is recorded in config.yml and the checkpoint, and a resumed run keeps it.
        validate_every: joint epochs between two validations; the last epoch is always validated.
        checkpoint_every: epochs between two checkpoints; one is always written at the end and when interrupted.
        select: validation metric that selects the best checkpoint.
        tensorboard: write TensorBoard events.

    Raises:
        ValueError: from the constructor, for a value of another type or out of its range.
    """

    batch_size: AtLeastTwo = 32
    accumulation: Count = 1
    recompute: Flag = False
    sync_batch_norm: Flag = False
    gather_mmd: Flag = False
    fsdp: Flag = False
    draws: Samples = 1
    epochs: Natural = 1000
    guidance_epochs: Natural = 15
    warmup_epochs: NonNegative = 40.0
    learning_rate: Positive = 1e-3
    min_learning_rate: NonNegative = 0.0
    encoder_learning_rate: Positive | None = None
    weight_decay: NonNegative = 0.0
    gradient_clip: Positive | None = 1.0
    guidance_learning_rate: Positive = 2e-4
    guidance_weight_decay: NonNegative = 0.0
    guidance_cosine: Flag = False
    guidance_warmup_epochs: NonNegative = 0.0
    guidance_gradient_clip: Positive | None = None
    encoder_epochs: Natural = 0
    feature_epochs: Natural = 0
    feature_views: Count = 8
    feature_batch_size: AtLeastTwo = 64
    joint_guidance: Flag = True
    prior_dropout: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.0
    classifier_ema_decay: OpenUnit | None = None
    classifier_dropout: Fraction = 0.0
    classifier_head_factor: Positive = 1.0
    label_smoothing: Fraction = 0.0
    ordinal: Flag = False
    balance: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.0
    ema_decay: OpenUnit | None = 0.9999
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    validate_every: Count = 1
    checkpoint_every: Count = 1
    select: Literal["accuracy", "macro_f1", "kappa", "balanced_accuracy"] = "macro_f1"
    tensorboard: Flag = True

    def __post_init__(self) -> None:
        if self.epochs + self.guidance_epochs + self.encoder_epochs + self.feature_epochs == 0:
            raise ValueError(
                "epochs, guidance_epochs, encoder_epochs and feature_epochs must not all be 0"
            )
        if (
            self.classifier_ema_decay is not None
            and self.guidance_epochs
            and self.joint_guidance
            and self.epochs
        ):
            raise ValueError(
                "joint_guidance must be false with classifier_ema_decay, whose average replaces the guidance model "
                "before the joint epochs"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate must be at most learning_rate {self.learning_rate}, got {self.min_learning_rate}"
            )
