"""`DiffMIC.save_pretrained` and `from_pretrained`: models in folders, and on the Hugging Face hub."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffmic_fast._optional import require
from diffmic_fast.calibration import Calibration
from diffmic_fast.checkpoint import Checkpoint, build_model, weights_digest
from diffmic_fast.config.description import ModelDescription, without_initial_weights
from diffmic_fast.config.sampling import SamplingConfig
from diffmic_fast.model_card import make_card, read_evaluation
from diffmic_fast.models import DiffMIC, DiffMICConfig
from diffmic_fast.models.trained import TrainedModel
from diffmic_fast.pretrained_folder import (
    CALIBRATION_NAME,
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    PretrainedFolder,
    write_folder,
)

if TYPE_CHECKING:
    from diffmic_fast.inference.evaluation import Evaluation

# "name" or "owner/name"; a path of more parts, or one that begins with a dot, is that of a folder.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Options of `SamplingOptions` that are saved; precision and `compile` depend on the machine.
_SAMPLING = ("sampler", "steps", "eta", "samples", "views", "seed")


def save_pretrained(
    model: TrainedModel,
    folder: str | Path,
    *,
    evaluation: Evaluation | Mapping[str, Any] | str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """As `DiffMIC.save_pretrained`."""
    state = model.state_dict()
    _check_buildable(model)
    sampling = None
    if model.sampling is not None:
        sampling = SamplingConfig(**{name: getattr(model.sampling, name) for name in _SAMPLING})
    description = ModelDescription(
        without_initial_weights(model.config), model.class_names, model.preprocessing, sampling
    )
    calibration = model.calibration
    if calibration is not None and calibration.weights != weights_digest(model):
        raise ValueError(
            "save_pretrained: model.calibration must be fitted for the model's weights, which have changed since; "
            "calibrate it again, or set model.calibration = None"
        )
    save_content(
        folder,
        PretrainedFolder(
            description, state, None if calibration is None else calibration.to_state()
        ),
        evaluation=evaluation,
        overwrite=overwrite,
    )


def save_content(
    folder: str | Path,
    content: PretrainedFolder,
    *,
    evaluation: Evaluation | Mapping[str, Any] | str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder with its model card; arguments and errors as in `DiffMIC.save_pretrained`."""
    calibration = (
        None if content.calibration is None else Calibration.from_state(content.calibration)
    )
    measures = None if evaluation is None else read_evaluation(evaluation)
    title = Path(folder).resolve().name or "DiffMIC"
    card = make_card(title, content.description, calibration, measures)
    write_folder(folder, content, card, overwrite=overwrite)


_Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by name


def _check_buildable(model: TrainedModel) -> None:
    """Raise ValueError unless a model built from the configuration has the same tensors."""
    wanted = _built(tuple(vars(without_initial_weights(model.config)).items()))
    found = _tensors(model)
    differing = [name for name in wanted.keys() | found if wanted.get(name) != found.get(name)]
    if differing:
        name = min(differing)
        raise ValueError(
            "save_pretrained: the model must have the tensors of one built from its configuration, got "
            f"{len(differing)} others, such as {name}: {found.get(name)} instead of {wanted.get(name)}; were layers "
            "replaced, or was the dtype changed?"
        )


@functools.lru_cache(maxsize=8)
def _built(config: tuple[tuple[str, Any], ...]) -> _Tensors:
    """The tensors of a model built from the entries of a configuration."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return _tensors(DiffMIC(DiffMICConfig(**dict(config)), pretrained=False).float())


def _tensors(model: TrainedModel) -> _Tensors:
    return {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> DiffMIC:
    """As `DiffMIC.from_pretrained`."""
    folder = Path(name)
    if not folder.is_dir():
        if not isinstance(name, str) or not _HUB_ID.fullmatch(name):
            raise ValueError(
                f"from_pretrained: there is no folder {name}, and it is not the id of a model on the hub"
            )
        folder = _download(name, revision, cache_dir, local_files_only)
    return build_model(Checkpoint.from_folder(folder))


def _download(
    name: str, revision: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> Path:
    hub = require(
        "huggingface_hub", extra="hub", purpose=f"from_pretrained: {name} is not a folder; the hub"
    )
    try:
        path = hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, CALIBRATION_NAME, CARD_NAME],
            library_name="diffmic_fast",
        )
    except (OSError, ValueError) as error:  # of the network, the hub, or its check of the id
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"from_pretrained: there is no folder {name}, and it cannot be downloaded from the hub: {reason}"
        ) from error
    return Path(path)
