"""`TrainedModel`: calibration, class names, preprocessing and sampling of a trained model; saving and loading it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffmic_fast.calibration import Calibration
from diffmic_fast.checks import finite_on_device
from diffmic_fast.config.model import DiffMICConfig
from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.diffusion.sampling_options import SamplingOptions

if TYPE_CHECKING:
    from diffmic_fast.data.inputs import ImageInputs
    from diffmic_fast.inference.evaluation import Evaluation
    from diffmic_fast.models.diffmic import DiffMIC


class TrainedModel(nn.Module):
    """A model with the settings of its training; the base class of `DiffMIC`.

    The attributes are None for a model built from its configuration alone; `checkpoint.load_model` sets those that the
    file has. They are not a part of the state dict.

    Attributes:
        config: What the model was built from.
        calibration: Fitted on validation images for these weights; training makes it stale.
        class_names: Names of the C classes, in order.
        preprocessing: What happens to the pixels of an image before the model sees them.
        sampling: Default options of `predict`; its precision and `compile` have no effect.
    """

    config: DiffMICConfig
    calibration: Calibration | None = None
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    sampling: SamplingOptions | None = None

    def __init__(self, config: DiffMICConfig) -> None:
        super().__init__()
        self.config = config

    def preprocess(self, images: ImageInputs) -> Tensor:
        """Image files or Pillow images as the input tensor of the model.

        The pixels are those that `diffmic-fast predict` makes of the same files: bit depth, orientation, colour,
        centre square, size, mean and standard deviation (docs/usage.md, "From a file to the model").

        Args:
            images: A path, a Pillow image, or a list of paths or of Pillow images. A Pillow image as `Image.open`
                returns it gives the pixels of its file; one that was loaded or made otherwise those in memory
                (`data.pillow_images.decode_image`).

        Returns:
            [B, 3, image_size, image_size] float32 on the model's device.

        Raises:
            ValueError: `preprocessing` is None, the list is empty, or an image is unreadable
                (`data.decode.UnreadableImageError`).
            TypeError: `images` are of another type, or paths and Pillow images in one list.
        """
        return self._load("DiffMIC.preprocess", images)

    def _load(self, operation: str, images: ImageInputs) -> Tensor:
        from diffmic_fast.data.inputs import load_images

        if self.preprocessing is None:
            raise ValueError(
                f"{operation}: model.preprocessing must be set for files and Pillow images, got None; set it to that "
                "of the training, model.preprocessing = diffmic_fast.Preprocessing(centre_square=..., bit_depth=..., "
                "mean=..., std=...), or pass a tensor [B, 3, H, W]"
            )
        loaded = load_images(operation, images, self.config.image_size, self.preprocessing)
        return finite_on_device(f"{operation}: images", loaded, next(self.parameters()).device)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        evaluation: Evaluation | Mapping[str, Any] | str | Path | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the model as safetensors and JSON, with a model card, for `from_pretrained`.

        The folder has weights, configuration, class names, preprocessing, sampling options and calibration
        (`pretrained_folder`). It is written atomically: after an interruption there is none, or the previous one.

        Args:
            folder: Must not exist or be empty.
            evaluation: Measures for the card: the result of `inference.evaluate.evaluate`, its
                `to_dict()`, or the path of a file of `diffmic-fast evaluate --json`.
            overwrite: Replace a folder that `save_pretrained` has written.

        Raises:
            ValueError: The folder exists, the model has other tensors than its configuration says, the calibration
                was fitted for other weights, or the evaluation cannot be read or is of other classes.
        """
        from diffmic_fast.hub import save_pretrained

        save_pretrained(self, folder, evaluation=evaluation, overwrite=overwrite)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> DiffMIC:
        """The model of a folder of `save_pretrained`, or of the Hugging Face hub; in evaluation mode, on the CPU.

        No code is run: the files are JSON and safetensors, and are compared with their checksums.

        Args:
            name: A folder, or where there is none the id of a model on the hub, "owner/name".
            revision: Branch, tag or commit on the hub.
            cache_dir: Where downloads are kept.
            local_files_only: Download nothing.

        Raises:
            ValueError: There is no such folder or model, or a file is missing, damaged or does not fit.
            MissingPackageError: `huggingface_hub` is needed and not installed.
        """
        from diffmic_fast.hub import from_pretrained

        return from_pretrained(
            name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )

    def export_onnx(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write guidance, image encoder and one denoiser step as ONNX graphs of opset 18 (`onnx_export`).

        With them is sampling.json, of the sampling options, or the whole chain where the model has none.

        Args:
            folder: Must not exist or be empty.
            overwrite: Replace a folder that `export_onnx` has written.

        Raises:
            ValueError: The folder exists, layers were replaced, or PyTorch cannot export a network.
            MissingPackageError: onnx or onnxscript is needed and not installed.
        """
        from diffmic_fast.onnx_export import export_onnx

        export_onnx(self, folder, overwrite=overwrite)

    def calibration_obstacle(self, options: SamplingOptions) -> str | None:
        """Why `predict` has no calibrated probabilities for these options; None if it has."""
        if self.calibration is None:
            return "the model has no calibration"
        return self.calibration.mismatch(options)

    def _calibration(self, options: SamplingOptions, probability: str | None) -> Calibration | None:
        """The calibration that a call of `predict` uses."""
        if probability not in (None, "published", "calibrated"):
            raise ValueError(
                f"DiffMIC.predict: probability must be None, 'published' or 'calibrated', got {probability!r}"
            )
        if probability == "published":
            return None
        obstacle = self.calibration_obstacle(options)
        if obstacle is not None and probability == "calibrated":
            raise ValueError(f"DiffMIC.predict: probabilities are not calibrated: {obstacle}")
        return None if obstacle is not None else self.calibration
