"""The section `model` of a configuration: what a DiffMIC model is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, Strict

from diffmic_fast.config.fields import AtLeastTwo, Count, Flag, Number, OpenUnit, one_of
from diffmic_fast.diffusion.schedule import SCHEDULES
from diffmic_fast.limits import MAX_TIMESTEPS
from diffmic_fast.reference.rois import Channels


# A dataclass of the standard library: by itself it is not checked, because the model checks its arguments; as the
# section of a RunConfig it is.
@dataclass
class DiffMICConfig:
    """What a DiffMIC model is made of; the section `model` of a configuration file.

    Attributes:
        classes: C >= 2.
        image_size: side of the (square) images that the model is meant for, in pixels.
        timesteps: T in [2, 1,000,000], the length of the noise schedule.
        schedule: the noise schedule, one of `diffusion.SCHEDULES`.
        beta_start: first beta of the schedule.
        beta_end: last beta of the schedule.
        feature_dim: F, width of the denoiser.
        encoder: image encoder of the denoiser (`models.encoders.make_trunk`).
        encoder_weights: its pretrained weights: "imagenet", the path of a file (`models.encoders.make_trunk`), or None.
        guidance_trunk: network of both trunks of the guidance model.
        guidance_weights: their pretrained weights, or None.
        crops: K, patches an image of the guidance model (`models.DCG`).
        crop_size: side of a patch in pixels, at most `image_size`.
        percent_t: share of the saliency map's pixels that the global branch averages, in (0, 1].
        crop_channels: channels of the image that a patch shows.
        crop_foreground: choose patches where the image has contrast, not in its background (`models.guidance`). The
            published program chooses both.
        mmd_weight: weight of the two MMD terms in the training loss.
    """

    classes: AtLeastTwo
    image_size: Count = 224
    timesteps: Annotated[int, Strict(), Field(ge=2, le=MAX_TIMESTEPS)] = 1000
    schedule: Annotated[str, one_of(SCHEDULES)] = "linear"
    beta_start: OpenUnit = 1e-4
    beta_end: OpenUnit = 2e-2
    feature_dim: Count = 6144
    encoder: str = "resnet18"
    encoder_weights: str | None = None
    guidance_trunk: str = "resnet50"
    guidance_weights: str | None = None
    crops: Count = 6
    crop_size: Count = 32
    percent_t: Annotated[float, Strict(), Field(gt=0, le=1)] = 1.0
    crop_channels: Channels = "first"
    crop_foreground: Flag = False
    mmd_weight: Number = 0.5
