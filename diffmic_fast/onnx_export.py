"""Export of a trained model to ONNX: guidance, image encoder and one evaluation of the denoiser.

    guidance.onnx   images [B, 3, H, W] -> fused, global, local [B, C], saliency [B, C, h, w], boxes [B, K, 4]
    encoder.onnx    images [B, 3, H, W] -> features [B, F]
    denoiser.onnx   features [M, F], y [M, C], guidance [M, C], timestep [1] -> eps [M, C]
    sampling.json   step table, class names, preprocessing, views, scaling of the calibration

The chain is a loop of the caller (docs/usage.md, "ONNX"); its noise, the detector of unlike images and prediction sets
are not exported. B and M are dynamic, everything else is fixed.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffmic_fast import __version__
from diffmic_fast._optional import require
from diffmic_fast.atomic_files import atomic_folder, check_target
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.models import DCG, ConditionalModel, DiffMIC
from diffmic_fast.models.diffmic import FLIPS
from diffmic_fast.models.guidance import foreground
from diffmic_fast.models.modes import evaluation_mode
from diffmic_fast.models.trained import TrainedModel
from diffmic_fast.reference.denoise import COEFFICIENTS, predict_noise
from diffmic_fast.reference.rois import Channels, cell_to_pixel, greedy_windows, window_size

OPSET = 18
NAMES = ("guidance.onnx", "encoder.onnx", "denoiser.onnx", "sampling.json")
_MAX_ROWS = 2**31 - 1  # torch 2.7 requires an upper bound
FORMAT = "diffmic_fast.onnx"
FORMAT_VERSION = 1


class _Graph(NamedTuple):
    """A network that is exported to one file.

    Attributes:
        module: with tensors as arguments and results.
        arguments: examples, by name; those of more than one row have a dynamic first dimension.
        outputs: names of the results.
    """

    module: nn.Module
    arguments: dict[str, Tensor]
    outputs: tuple[str, ...]


class _Guidance(nn.Module):
    """`DiffMIC.guide` in operations that ONNX has."""

    def __init__(self, guidance: DCG, views: int) -> None:
        super().__init__()
        self.guidance, self.views = guidance, views

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """fused, global, local, saliency, boxes."""
        first, *others = (self._detail(images.flip(axes)) for axes in FLIPS[: self.views])
        branches = first[0]
        if others:
            branches = torch.stack([branches, *(each[0] for each in others)]).mean(dim=0)
        return (*branches.unbind(), first[1], first[2])

    def _detail(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [3, B, C], saliency and boxes of one view."""
        guidance = self.guidance
        size = (guidance.crop_size, guidance.crop_size)
        saliency = guidance.left_postprocess_net(guidance.ds_net(images))
        global_ = guidance.aggregate(saliency)
        responses = saliency
        grid = (responses.shape[2], responses.shape[3])
        image = (images.shape[2], images.shape[3])
        if guidance.crop_foreground:
            least = responses.amin(dim=(2, 3), keepdim=True)
            responses = responses.where(foreground(images, grid)[:, None], least)
        cells = greedy_windows(responses, window_size(size, image, grid), guidance.crops)
        origins = cell_to_pixel(cells, grid, image)
        crops = gathered_crops(images, origins, guidance.crop_size, guidance.crop_channels)
        local = guidance.classify_patches(crops)[2]
        boxes = torch.cat((origins, origins + guidance.crop_size), dim=-1)
        return torch.stack([(global_ + local) / 2, global_, local]), saliency, boxes


class _Encoder(nn.Module):
    """`DiffMIC.encode`."""

    def __init__(self, denoiser: ConditionalModel, views: int) -> None:
        super().__init__()
        self.encoder, self.norm, self.views = denoiser.encoder_x, denoiser.norm, views

    def forward(self, images: Tensor) -> Tensor:
        views = [self.norm(self.encoder(images.flip(axes))) for axes in FLIPS[: self.views]]
        return torch.stack(views).mean(dim=0) if len(views) > 1 else views[0]


class _Step(nn.Module):
    """eps of the denoiser from image features."""

    def __init__(self, denoiser: ConditionalModel) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, features: Tensor, y: Tensor, guidance: Tensor, timestep: Tensor) -> Tensor:
        return predict_noise(features, y, guidance, self.denoiser.weights(), timestep)


def gathered_crops(images: Tensor, origins: Tensor, size: int, channels: Channels) -> Tensor:
    """`reference.rois.cut_crops` as one gather, for origins inside the image.

    Args:
        images: [B, Ch, H, W].
        origins: [B, K, 2] int64, upper-left pixel (row, column), in the image.
        size: side of a crop in pixels.
        channels: "first" or "all".

    Returns:
        [B, K, 3 or Ch, size, size].
    """
    height, width = images.shape[2:]
    depth = 3 if channels == "first" else images.shape[1]
    if channels == "first":
        images = images[:, :1]
    position = torch.arange(size, device=images.device)
    # The part of a crop inside the image is aligned to the lower right.
    margins = (origins + size - origins.new_tensor([height, width])).clamp_min(0)
    rows = origins[..., :1] + position - margins[..., :1]
    columns = origins[..., 1:] + position - margins[..., 1:]
    inside = (position >= margins[..., :1])[..., :, None] & (position >= margins[..., 1:])[
        ..., None, :
    ]
    index = rows.clamp_min(0)[..., :, None] * width + columns.clamp_min(0)[..., None, :]
    pixels = images.flatten(2)
    count = pixels.shape[1]
    flat = index.flatten(1)[:, None].expand(-1, count, -1)
    crops = pixels.gather(2, flat).unflatten(2, index.shape[1:])
    least = pixels.amin(dim=2)[:, :, None, None, None]
    crops = torch.where(inside[:, None], crops, least).transpose(1, 2)
    return crops.expand(-1, -1, depth, -1, -1)


def export_onnx(model: TrainedModel, folder: str | Path, *, overwrite: bool = False) -> None:
    """As `DiffMIC.export_onnx`."""
    folder = Path(folder)
    check_target("export_onnx", folder, NAMES, overwrite=overwrite)
    for module in ("onnx", "onnxscript"):
        require(module, extra="onnx", purpose="export_onnx")
    if not isinstance(model, DiffMIC):
        raise TypeError(f"export_onnx: the model must be a DiffMIC, got {type(model).__name__}")
    denoiser = model.denoiser
    with evaluation_mode(model):
        if not denoiser.runs_on_weights:
            raise ValueError(
                "export_onnx: the denoiser's layers must be as they were built, got replaced ones or hooks"
            )
        if type(model.guidance).detail is not DCG.detail:
            raise ValueError("export_onnx: the guidance model must be a DCG, got a subclass")
        options = model.sampling or SamplingOptions()
        with atomic_folder(folder, overwrite=overwrite) as written:
            for name, graph in _graphs(model, options.views).items():
                _export(name, graph, written / f"{name}.onnx")
            text = json.dumps(_sampling(model, options), indent=2, ensure_ascii=False)
            (written / "sampling.json").write_text(text + "\n", encoding="utf-8")


def _graphs(model: DiffMIC, views: int) -> dict[str, _Graph]:
    config = model.config
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def example(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(parameter.device)

    images = {"images": example(2, 3, config.image_size, config.image_size)}
    state = {
        "features": example(2, config.feature_dim),
        "y": example(2, config.classes),
        "guidance": example(2, config.classes),
        "timestep": torch.zeros(1, dtype=torch.int64, device=parameter.device),
    }
    outputs = ("fused", "global", "local", "saliency", "boxes")
    return {
        "guidance": _Graph(_Guidance(model.guidance, views), images, outputs),
        "encoder": _Graph(_Encoder(model.denoiser, views), images, ("features",)),
        "denoiser": _Graph(_Step(model.denoiser), state, ("eps",)),
    }


def _export(name: str, graph: _Graph, path: Path) -> None:
    """Write one graph; raises ValueError where torch.onnx cannot export it."""
    rows = torch.export.Dim("rows", min=1, max=_MAX_ROWS)
    shapes = {
        key: {0: rows} if tensor.shape[0] > 1 else None for key, tensor in graph.arguments.items()
    }
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # deprecations inside the exporter
            torch.onnx.export(
                graph.module.eval(),
                (),
                path,
                kwargs=graph.arguments,
                input_names=list(graph.arguments),
                output_names=list(graph.outputs),
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # of many types, for an operation that ONNX or the exporter lacks
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next(filter(None, str(cause).splitlines()), type(cause).__name__)
        raise ValueError(
            f"export_onnx: {name} cannot be exported by torch {torch.__version__}: {reason}"
        ) from error


def _sampling(model: DiffMIC, options: SamplingOptions) -> dict[str, Any]:
    """The content of sampling.json, for the loop of the caller."""
    table = options.step_table(model.schedule)
    calibration, pixels = model.calibration, model.preprocessing
    scaling = None
    if calibration is not None and calibration.mismatch(options) is None:
        fitted = calibration.diffusion
        scaling = {
            "factor": fitted.factor, "prior_factor": fitted.prior_factor, "bias": fitted.bias.tolist(),
        }  # fmt: skip
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {"diffmic_fast": __version__, "torch": torch.__version__},
        "opset": OPSET,
        "image_size": model.config.image_size,
        "classes": model.config.classes,
        "class_names": model.class_names,
        "preprocessing": None if pixels is None else asdict(pixels),
        "sampler": options.method,
        "samples": options.samples,
        "views": options.views,
        "steps": {
            "timesteps": table.timesteps.tolist(),
            **{name: getattr(table, name).tolist() for name in COEFFICIENTS},
        },
        "calibration": scaling,
    }
