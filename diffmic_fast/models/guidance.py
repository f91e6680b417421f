"""The guidance model: dual-granularity conditional guidance (docs/algorithm.md, "Guidance model")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmic_fast.models._torch_internals import register_namedtuple
from diffmic_fast.models.encoders import Trunk
from diffmic_fast.ops.rois import rois
from diffmic_fast.reference.rois import Channels

_ATTENTION_WIDTH = 128
_BLOCKS_PER_CELL = 4
_FLAT = 0.05
_EXTREME = 0.1
_BACKGROUND_SHARE = 0.25


class Guidance(NamedTuple):
    """Logits of the three branches, [B, C] each.

    Attributes:
        fused: Mean of the other two.
        global_: From the whole image.
        local: From the salient patches.
    """

    fused: Tensor
    global_: Tensor
    local: Tensor


# The name under which torch.export.save writes it, so that an exported guidance model can be saved.
register_namedtuple(Guidance, serialized_type_name="diffmic_fast.models.Guidance")


class GuidanceDetail(NamedTuple):
    """Everything that the guidance model computes for a batch.

    Attributes:
        logits: Of the three branches.
        saliency: [B, C, h, w].
        cells: [B, K, 2] int64, window of each patch on the saliency map.
        origins: [B, K, 2] int64, upper-left pixel (row, column) of each patch.
        crops: [B, K, 3, ch, cw], the patches.
        attention: [B, K], weight of each patch.
    """

    logits: Guidance
    saliency: Tensor
    cells: Tensor
    origins: Tensor
    crops: Tensor
    attention: Tensor


def foreground(images: Tensor, size: Sequence[int]) -> Tensor:
    """Cells of a grid over the image that are not background, such as the black around a fundus image.

    A cell is divided into 4 x 4 blocks. A block is background if the standard deviation of its grey values is less than
    5 % of the whole image's and their mean is within 10 % of the range from the darkest or the lightest. A cell is
    background if a quarter of its blocks are, or more.

    Args:
        images: [B, 3, H, W].
        size: (h, w) of the grid.

    Returns:
        [B, h, w] bool.
    """
    grey = images.float().mean(dim=1, keepdim=True)
    blocks = (_BLOCKS_PER_CELL * size[0], _BLOCKS_PER_CELL * size[1])
    mean = F.adaptive_avg_pool2d(grey, blocks)
    variance = F.adaptive_avg_pool2d(grey.square(), blocks) - mean.square()
    whole = grey.var(dim=(2, 3), correction=0, keepdim=True)
    low, high = grey.amin(dim=(2, 3), keepdim=True), grey.amax(dim=(2, 3), keepdim=True)
    from_end = torch.minimum(mean - low, high - mean)
    background = (variance <= _FLAT**2 * whole) & (from_end <= _EXTREME * (high - low))
    return F.avg_pool2d(background.float(), _BLOCKS_PER_CELL)[:, 0] < _BACKGROUND_SHARE


class SaliencyHead(nn.Module):
    """Class saliency of a feature map: a 1 x 1 convolution without bias."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.gn_conv_last = nn.Conv2d(channels, classes, kernel_size=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[B, channels, h, w] to [B, C, h, w]."""
        return self.gn_conv_last(features)


class DCG(nn.Module):
    """Classifies an image from the whole of it and from its K most salient patches.

    Attributes:
        ds_net: Trunk over the image.
        left_postprocess_net: Feature map to saliency.
        dn_resnet: Trunk over the patches.
        mil_attn_V, mil_attn_U, mil_attn_w: Gated attention over the patches.
        classifier_linear: Attended patch features to logits.
        dropout: Probability, in training, that a channel of the image's feature map and an attended feature of the
            patches is set to 0. The published model has none.
    """

    def __init__(
        self,
        classes: int,
        trunk: str = "resnet50",
        *,
        crops: int = 6,
        crop_size: int = 32,
        percent_t: float = 1.0,
        crop_channels: Channels = "first",
        crop_foreground: bool = False,
        trunk_weights: str | None = None,
    ) -> None:
        """Build the guidance model.

        Args:
            classes: C >= 2.
            trunk: torchvision or timm name of both trunks.
            crops: K >= 1, patches per image.
            crop_size: Side of a patch in pixels.
            percent_t: Share of the saliency map, in (0, 1], whose largest responses are averaged to a global logit.
            crop_channels: "first" cuts channel 0 and repeats it (as published), "all" cuts every channel.
            crop_foreground: Choose patches where the image has contrast (`foreground`). The published program also
                chooses black corners.
            trunk_weights: As in `make_trunk`, for both trunks.

        Raises:
            ValueError: A value is out of range, or the trunk does not exist.
        """
        super().__init__()
        if classes < 2 or crops < 1 or crop_size < 1:
            raise ValueError(
                "DCG: classes must be at least 2, crops and crop_size at least 1, got "
                f"{classes}, {crops}, {crop_size}"
            )
        if not 0.0 < percent_t <= 1.0:
            raise ValueError(f"DCG: percent_t must be in (0, 1], got {percent_t}")
        if crop_channels not in ("first", "all"):
            raise ValueError(f"DCG: crop_channels must be 'first' or 'all', got {crop_channels!r}")
        self.dropout = 0.0
        self.crops = crops
        self.crop_size = crop_size
        self.percent_t = percent_t
        self.crop_channels: Channels = crop_channels
        self.crop_foreground = crop_foreground
        global_trunk, local_trunk = Trunk(trunk, trunk_weights), Trunk(trunk, trunk_weights)
        width = local_trunk.channels
        self.ds_net: nn.Module = global_trunk
        self.left_postprocess_net: nn.Module = SaliencyHead(global_trunk.channels, classes)
        self.dn_resnet: nn.Module = local_trunk
        self.mil_attn_V: nn.Module = nn.Linear(width, _ATTENTION_WIDTH, bias=False)
        self.mil_attn_U: nn.Module = nn.Linear(width, _ATTENTION_WIDTH, bias=False)
        self.mil_attn_w: nn.Module = nn.Linear(_ATTENTION_WIDTH, 1, bias=False)
        self.classifier_linear: nn.Module = nn.Linear(width, classes, bias=False)

    def forward(self, images: Tensor) -> Guidance:
        """Logits of the three branches for images [B, 3, H, W]."""
        return self.detail(images).logits

    def detail(self, images: Tensor) -> GuidanceDetail:
        """Logits with what led to them.

        Args:
            images: [B, 3, H, W] floating.

        Raises:
            ValueError: `images` have another shape, or the saliency is not finite.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"DCG: images must be [B, 3, H, W], got {tuple(images.shape)}")
        features = F.dropout2d(self.ds_net(images), self.dropout, self.training)
        saliency = self.left_postprocess_net(features)
        global_ = self.aggregate(saliency)
        size = (self.crop_size, self.crop_size)
        responses = saliency.detach()
        if self.crop_foreground:
            # The least response of a class is 0 after the normalisation in `rois`.
            least = responses.amin(dim=(2, 3), keepdim=True)
            responses = responses.where(foreground(images, responses.shape[2:])[:, None], least)
        patches = rois(responses, images, size, self.crops, self.crop_channels)
        _, attention, local = self.classify_patches(patches.crops)
        logits = Guidance((global_ + local) / 2, global_, local)
        return GuidanceDetail(
            logits, saliency, patches.cells, patches.origins, patches.crops, attention
        )

    def aggregate(self, saliency: Tensor) -> Tensor:
        """Global logits [B, C]: the mean of each class's largest responses, a share `percent_t` of its map."""
        responses = saliency.flatten(2)
        count = max(1, round(responses.shape[2] * self.percent_t))
        return responses.topk(count, dim=2).values.mean(dim=2)

    def classify_patches(self, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The local branch.

        Args:
            crops: [B, K, 3, ch, cw].

        Returns:
            Attended features z [B, D], attention [B, K], logits [B, C].
        """
        batch, count = crops.shape[:2]
        h = self.dn_resnet(crops.flatten(0, 1))
        if h.ndim == 4:
            h = h.mean(dim=(2, 3))
        h = h.view(batch, count, -1)
        gate = torch.sigmoid(self.mil_attn_U(h)) * torch.tanh(self.mil_attn_V(h))
        attention = torch.softmax(self.mil_attn_w(gate)[..., 0], dim=1)
        z = (attention[..., None] * h).sum(dim=1)
        dropped = F.dropout(z, self.dropout, self.training)
        return z, attention, self.classifier_linear(dropped)
