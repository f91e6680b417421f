"""Conversion of models between folders of `save_pretrained`, our checkpoints and those of the published program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from diffmic_fast.checkpoint import (
    Checkpoint,
    build_model,
    guidance_path,
    guidance_state,
    read_checkpoint,
    save_checkpoint,
)
from diffmic_fast.config.description import ModelDescription
from diffmic_fast.config.run import RunConfig
from diffmic_fast.hub import save_content
from diffmic_fast.pretrained_folder import PretrainedFolder, is_pretrained_folder

FORMS = {
    "pretrained": "a folder of save_pretrained",
    "checkpoint": "a checkpoint",
    "published": "a checkpoint of the published program",
}


def form_of(path: Path, file: Checkpoint) -> str:
    """The format of a model that was read: a key of `FORMS`."""
    if is_pretrained_folder(path):
        return "pretrained"
    return "checkpoint" if file.extras else "published"


def convert(
    source: str | Path,
    destination: str | Path,
    form: str,
    *,
    config: RunConfig | None = None,
    guidance: str | Path | None = None,
    ema: bool = True,
    evaluation: Mapping[str, Any] | str | Path | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a model in another format; its tensors are copied bit by bit.

    Conversion between checkpoints keeps the weights, their moving average and the optimizers' states. A folder of
    `save_pretrained` has only the weights that `predict` uses.

    Args:
        source: A folder of `save_pretrained`, or a checkpoint file.
        destination: A new folder, or a new file, beside which the guidance file aux_NAME is written.
        form: Format of the destination, a key of `FORMS`.
        config: Configuration of the run, instead of that in the source; required where the source has none.
        guidance: The guidance file, where the source has no guidance model inside and it is not beside it.
        ema: For a folder, take the moving average of the weights where there is one.
        evaluation: For a folder, as in `DiffMIC.save_pretrained`.
        overwrite: Replace the destination.

    Returns:
        A line for each part of the model that the new format does not store or that is not known.

    Raises:
        ValueError: The source cannot be read, has this format already, or lacks a configuration that it needs; the
            destination exists; an option does not apply to the format.
    """
    source, destination = Path(source), Path(destination)
    file = read_checkpoint(source, mmap=True)
    own = form_of(source, file)
    if own == form:
        raise ValueError(f"convert: {source} is {FORMS[form]} already")
    # Also checks that all tensors fit the configuration.
    model = build_model(file, guidance, config, ema)
    description = file.description
    if config is not None:
        description = ModelDescription.from_run(config, file.class_names)
    assert description is not None  # `build_model` raises without one
    if form == "pretrained":
        calibration = None if model.calibration is None else model.calibration.to_state()
        content = PretrainedFolder(description, model.state_dict(), calibration)
        save_content(destination, content, evaluation=evaluation, overwrite=overwrite)
        return _of_training(file, ema) + _unknown(description, calibration)
    if evaluation is not None:
        raise ValueError(
            f"convert: an evaluation is for a model card, which {FORMS[form]} does not have"
        )
    if not ema:
        raise ValueError(
            f"convert: --no-ema (ema=False) is for a folder of save_pretrained; {FORMS[form]} has both"
        )
    for path in (destination, guidance_path(destination)):
        if path.is_dir() or (path.exists() and not overwrite):
            raise ValueError(f"convert: {path} exists already; use another name, or overwrite it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    state, _ = guidance_state(file, guidance)
    if form == "checkpoint":
        extras = _extras(file, state, description, config)
        if model.calibration is None:  # none, or fitted for other weights
            extras.pop("calibration", None)
        save_checkpoint(replace(file, path=destination, extras=extras))
        return _unknown(description, model.calibration)
    extras = {
        "guidance": state,
        "guidance_optimizer": file.extras.get("guidance_optimizer", {}),
    }
    average = file.ema
    if own == "pretrained":  # the published program loads an average, by its default configuration
        average = {name: p.detach() for name, p in model.denoiser.named_parameters()}
    save_checkpoint(replace(file, path=destination, extras=extras, ema=average), published=True)
    return _lost_by_publishing(file, description)


def _extras(
    file: Checkpoint,
    guidance: dict[str, Tensor],
    description: ModelDescription,
    config: RunConfig | None,
) -> dict[str, Any]:
    """The entries of this package's checkpoint beside the published ones."""
    run = config or file.config
    extras: dict[str, Any] = {
        **file.extras,
        "format": 1,
        "description": description.to_dict(),
        "guidance": guidance,
        "guidance_optimizer": file.extras.get("guidance_optimizer", {}),
    }
    if description.class_names is not None:
        extras["classes"] = list(description.class_names)
    if run is not None:
        extras["config"] = run.to_dict()
    return extras


def _of_training(file: Checkpoint, ema: bool) -> list[str]:
    """A line for each part of a checkpoint that a folder does not store."""
    lines = []
    if file.optimizer or "progress" in file.extras:
        lines.append("not kept: the state of the training, which cannot be resumed from the folder")
    if file.ema:
        other = "the weights that it averages" if ema else "their moving average"
        lines.append(f"not kept: {other}")
    if file.seen:
        lines.append("not kept: keys of the training images, by which evaluate recognises them")
    if file.extras.get("config") is not None:
        lines.append("not kept: where the images are, augmentation and settings of the training")
    return lines


def _unknown(description: ModelDescription, calibration: Any) -> list[str]:
    """A line for each part of a model that is not known."""
    lines = []
    if description.preprocessing is None:
        lines.append(
            "not known: the preprocessing of the images; preprocess raises until it is set (--config)"
        )
    if description.class_names is None:
        lines.append("not known: the names of the classes")
    if calibration is None:
        lines.append("not known: a calibration; probabilities are those of the softmax")
    return lines


def _lost_by_publishing(file: Checkpoint, description: ModelDescription) -> list[str]:
    """A line for each part that a published checkpoint does not store."""
    parts = {
        "the calibration": file.extras.get("calibration"),
        "the preprocessing of the images": description.preprocessing,
        "the names of the classes": description.class_names,
        "the sampling options": description.sampling,
        "the state of the training beside the optimizers": file.extras.get("progress"),
        "keys of the training images": file.seen or None,
    }
    lost = [name for name, part in parts.items() if part is not None]
    return [
        *(f"not kept: {name}, which the published format does not store" for name in lost),
        "not kept: the architecture; pass its configuration with --config",
    ]
