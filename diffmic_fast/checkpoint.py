"""Checkpoint files, in the published format: read without running code, written atomically.

A checkpoint is the published list, [denoiser state dict, optimizer state, epoch, step, moving average by name], the
last entry only where there is an average; programs of this family take the average from the end of the list. All else
that an exact resume needs (the guidance model, its optimizer, position, random states, configuration, class names), and
the calibration, is in the optimizer's state under a key of its own, which optimizers ignore. The published guidance
file, [state dict, optimizer state], is written beside it.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffmic_fast.archive import check_archive
from diffmic_fast.atomic_files import atomic_file
from diffmic_fast.calibration import Calibration
from diffmic_fast.config.description import ModelDescription
from diffmic_fast.config.run import RunConfig
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.models import DiffMIC, DiffMICConfig
from diffmic_fast.pretrained_folder import is_pretrained_folder, read_folder

NAME = "ckpt.pth"
GUIDANCE_NAME = "aux_ckpt.pth"
BEST_NAME = "ckpt_best.pth"
GUIDANCE_BEST_NAME = "aux_ckpt_best.pth"

_EXTRAS = "diffmic_fast"
_CALIBRATION = "calibration"
_DESCRIPTION = "description"
_ZIP = b"PK\x03\x04"
_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6


@dataclass
class Checkpoint:
    """The content of a checkpoint file; what the file lacks is empty or 0.

    Attributes:
        path: of the file.
        denoiser: state dict.
        optimizer: state dict of the denoiser's optimizer.
        epoch: finished joint epochs.
        step: finished steps of the denoiser.
        ema: moving average of the denoiser's parameters, by name.
        extras: what else an exact resume needs, and the calibration.
    """

    path: Path
    denoiser: dict[str, Tensor]
    optimizer: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    ema: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Classes, feature_dim and timesteps, from the shapes of the denoiser's weights."""
        sizes: dict[str, int] = {}
        output, embedding = self.denoiser.get("lin4.weight"), self.denoiser.get("lin1.embed.weight")
        if output is not None and output.ndim == 2:
            sizes["classes"], sizes["feature_dim"] = output.shape
        if embedding is not None:
            sizes["timesteps"] = embedding.shape[0] - 1
        return sizes

    @property
    def config(self) -> RunConfig | None:
        """The configuration in the file, or None."""
        values = self.extras.get("config")
        return RunConfig.from_dict(values) if values else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The class names in the file, or None."""
        names = self.extras.get("classes")
        return tuple(names) if names else None

    @property
    def description(self) -> ModelDescription | None:
        """The description in the file, or that of its run's configuration; None if the file has neither."""
        values = self.extras.get(_DESCRIPTION)
        if values is not None:
            return ModelDescription.from_dict(values)
        config = self.config
        return None if config is None else ModelDescription.from_run(config, self.class_names)

    @classmethod
    def from_folder(cls, path: str | Path) -> Checkpoint:
        """The content of a folder of `DiffMIC.save_pretrained`; raises ValueError as `read_folder`."""
        content = read_folder(path)
        parts = {name: _part(content.weights, f"{name}.") for name in ("denoiser", "guidance")}
        others = content.weights.keys() - {f"{n}.{k}" for n, part in parts.items() for k in part}
        if others:
            raise ValueError(
                f"{path}: names of weights must begin with denoiser. or guidance., got {', '.join(sorted(others)[:4])}"
            )
        description = content.description
        run = description.to_run()
        extras: dict[str, Any] = {
            _DESCRIPTION: description.to_dict(),
            "guidance": parts["guidance"],
            _CALIBRATION: content.calibration,
            "classes": None if description.class_names is None else list(description.class_names),
            "config": None if run is None else run.to_dict(),
        }
        extras = {name: value for name, value in extras.items() if value is not None}
        return cls(Path(path), parts["denoiser"], extras=extras)

    @property
    def seen(self) -> dict[str, Tensor]:
        """Keys (`data.identity.image_keys`) of the images of the training, by split; {} if they are not known."""
        return dict(self.extras.get("images", {}))

    @property
    def calibration(self) -> Calibration | None:
        """The calibration in the file, or None; raises ValueError if it is damaged or of another class count."""
        state = self.extras.get(_CALIBRATION)
        if state is None:
            return None
        try:
            return Calibration.from_state(state, self.sizes.get("classes"))
        except ValueError as error:
            raise ValueError(f"checkpoint: {self.path}: {error}") from error


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def save_checkpoint(checkpoint: Checkpoint, *, published: bool = False) -> None:
    """Write a checkpoint to its path, and the published guidance file beside it, as aux_NAME.

    Args:
        checkpoint: with the guidance model in its extras.
        published: write the entries of the published format alone, without the other extras.
    """
    extras = checkpoint.extras
    parts: list[Any] = [
        checkpoint.denoiser,
        checkpoint.optimizer | ({} if published else {_EXTRAS: extras}),
        checkpoint.epoch,
        checkpoint.step,
    ]
    if checkpoint.ema:
        parts.append(checkpoint.ema)
    guidance = [extras["guidance"], extras.get("guidance_optimizer", {})]
    # The denoiser's file last: a resume reads it alone.
    atomic_save(guidance, guidance_path(checkpoint.path))
    atomic_save(parts, checkpoint.path)


def guidance_path(path: Path) -> Path:
    """The guidance file beside a checkpoint."""
    return path.with_name(f"aux_{path.name}")


def add_calibration(path: str | Path, calibration: Calibration) -> None:
    """Write a calibration into an existing checkpoint file, atomically; all else in the file is unchanged.

    Raises:
        ValueError: the file is not a checkpoint in the published format, a list with the optimizer's state.
    """
    check_takes_calibration(path)
    parts = _load(path, mmap=False)
    if not isinstance(parts, list) or len(parts) < 2 or not isinstance(parts[1], dict):
        raise ValueError(
            f"checkpoint: {path} must hold a list [state dict, optimizer state, epoch, step, ...] to take a "
            f"calibration, got {type(parts).__name__}"
        )
    extras = {**parts[1].get(_EXTRAS, {}), _CALIBRATION: calibration.to_state()}
    parts[1] = {**parts[1], _EXTRAS: extras}
    atomic_save(parts, path)


def check_takes_calibration(path: str | Path) -> None:
    """Raise ValueError for a folder of `DiffMIC.save_pretrained`, before the work of a calibration."""
    if Path(path).is_dir():
        raise ValueError(
            f"checkpoint: {path} must be a checkpoint file to take a calibration, got a folder; write one with "
            "diffmic-fast convert, or set model.calibration and save the model again"
        )


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names, shapes, dtypes and values of all tensors of the state dict, in hexadecimal."""
    hashed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.detach().cpu().reshape(-1).contiguous()
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        hashed.update(values.view(torch.uint8).numpy())
    return hashed.hexdigest()


def atomic_save(value: Any, path: str | Path) -> None:
    """`torch.save` through `atomic_file`."""
    with atomic_file(path) as file:
        torch.save(value, file)


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> Checkpoint:
    """Read a denoiser's checkpoint, ours or a published one (a list), a bare state dict, or a pretrained folder.

    Args:
        path: of the file, or of a folder of `DiffMIC.save_pretrained`.
        mmap: map the file into memory instead of reading it, for a model without its optimizer's state.

    Raises:
        ValueError: a missing or damaged file (by its checksums, which files of torch before 1.6 lack), another content,
            or a pickle that would run code.
        MemoryError: the file does not fit into memory.
    """
    if is_pretrained_folder(path):
        return Checkpoint.from_folder(path)
    value = _load(path, mmap=mmap)
    if isinstance(value, Mapping):
        return Checkpoint(Path(path), strip_module(_unwrapped(value), f"{path}"))
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(
            f"checkpoint: {path} must hold a list [state dict, optimizer state, epoch, step, ...], "
            f"got {type(value).__name__}"
        )
    result = Checkpoint(Path(path), strip_module(value[0], f"{path}, entry 0"))
    if len(value) > 1 and isinstance(value[1], dict):
        result.optimizer = dict(value[1])
        result.extras = result.optimizer.pop(_EXTRAS, {})
    for index, name in ((2, "epoch"), (3, "step")):
        if len(value) > index:
            if not isinstance(value[index], int):
                raise ValueError(
                    f"checkpoint: {path}, entry {index} ({name}), must be a whole number, got "
                    f"{type(value[index]).__name__}"
                )
            setattr(result, name, value[index])
    if len(value) > 4 and value[4]:
        result.ema = strip_module(value[4], f"{path}, entry 4 (moving average)")
    return result


def read_guidance(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a guidance file, which is [state dict, optimizer state] or the state dict alone."""
    value = _load(path, mmap=True)
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return strip_module(_unwrapped(value), f"{path}")


def strip_module(state: Any, what: str) -> dict[str, Tensor]:
    """A state dict without the prefix "module." of DataParallel.

    Raises:
        ValueError: `state`, named `what`, is not a state dict.
    """
    good = isinstance(state, Mapping) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    )
    if not good:
        raise ValueError(
            f"checkpoint: {what} must be a state dict (names with tensors), got {type(state).__name__}"
        )
    return {k.removeprefix("module."): v for k, v in state.items()}


def _unwrapped(value: Any) -> Any:
    """The state dict of a file {"state_dict": ...}; any other value itself."""
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        return value["state_dict"]
    return value


def _load(path: str | Path, *, mmap: bool) -> Any:
    path = Path(path)
    if not path.exists():
        raise ValueError(f"checkpoint: there is no file {path}")
    if not path.is_file():
        raise ValueError(f"checkpoint: {path} is not a file")
    with open(path, "rb") as file:
        head = file.read(len(_LEGACY_TORCH))
    if not head:
        raise ValueError(f"checkpoint: {path} is empty (0 bytes)")
    is_zip = head.startswith(_ZIP)
    if not is_zip and head != _LEGACY_TORCH:
        if head.startswith(b"\x80"):
            raise ValueError(
                f"checkpoint: {path} is a plain Python pickle, not a checkpoint; a pickle can run code while it is "
                "read, so only files of torch.save with tensors, numbers and text are accepted"
            )
        raise ValueError(
            f"checkpoint: {path} is not a checkpoint: it must be a file of torch.save, got one that starts with "
            f"{head[:8]!r}"
        )
    if is_zip:
        try:
            check_archive(path)
        except ValueError as error:
            raise ValueError(f"checkpoint: {path} {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except Exception as error:
        # Of the allocator, "DefaultCPUAllocator: can't allocate memory", and of mmap, "Cannot allocate memory (12)".
        if isinstance(error, MemoryError) or "t allocate memory" in str(error):
            raise MemoryError(f"checkpoint: {path}: {error}") from error
        raise ValueError(f"checkpoint: {path} {_reason(error, path, is_zip)}") from error


def _reason(error: Exception, path: Path, is_zip: bool) -> str:
    """Why `torch.load` failed."""
    text = str(error)
    line = text.splitlines()[0][:160] if text else repr(error)
    forbidden = re.search(r"GLOBAL ([\w.]+)", text)
    if forbidden:
        return (
            f"is rejected: it asks to load the Python object {forbidden.group(1)}, which could run code; only "
            "tensors, numbers, text, lists and dicts are read (weights_only). Save the state dict alone, from a "
            "program you trust"
        )
    if is_zip and isinstance(error, (RuntimeError, EOFError)):
        return f"is damaged or truncated ({path.stat().st_size} bytes): {line}"
    return f"cannot be read as a checkpoint: {line}"


def check_sizes(checkpoint: Checkpoint, config: DiffMICConfig) -> None:
    """Raise ValueError if a checkpoint has other sizes than a configuration; names both."""
    for key, found in checkpoint.sizes.items():
        configured = getattr(config, key)
        if found != configured:
            raise ValueError(
                f"checkpoint: {checkpoint.path} was trained with {key} {found}, the configuration says {configured}; "
                f"use the configuration it was trained with (model.{key}={found})"
            )


def load_state(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict, named `what` in errors; raises ValueError listing missing, unexpected and misshapen keys."""
    own = module.state_dict()
    lists = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [
            f"{k}: file {tuple(state[k].shape)}, model {tuple(own[k].shape)}"
            for k in own
            if k in state and state[k].shape != own[k].shape
        ],
    }
    problems = []
    for title, names in lists.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{len(names)} {title} ({'; '.join(names[:4])}{more})")
    if problems:
        raise ValueError(
            f"checkpoint: {what} does not fit the model: {', '.join(problems)}; is it the same encoder and guidance "
            "trunk?"
        )
    module.load_state_dict(dict(state))


@torch.no_grad()
def apply_average(denoiser: nn.Module, ema: Mapping[str, Tensor], what: str) -> None:
    """Copy a moving average, by parameter name, into the denoiser; buffers are unchanged."""
    parameters = dict(denoiser.named_parameters())
    differing = sorted(parameters.keys() ^ ema.keys())
    if differing:
        raise ValueError(
            f"checkpoint: the moving average of {what} does not fit the denoiser: {len(differing)} names are in one of "
            f"them only, {differing[:4]}"
        )
    for key, average in ema.items():
        if average.shape != parameters[key].shape:
            raise ValueError(
                f"checkpoint: the moving average of {what} does not fit the denoiser: {key} must be "
                f"{tuple(parameters[key].shape)}, got {tuple(average.shape)}"
            )
    for key, average in ema.items():
        parameters[key].copy_(average)


def load_model(
    checkpoint: str | Path,
    guidance: str | Path | None = None,
    config: DiffMICConfig | RunConfig | None = None,
    ema: bool = True,
) -> tuple[DiffMIC, tuple[str, ...] | None]:
    """A DiffMIC in evaluation mode, on the CPU, from our checkpoint or from published files.

    Args:
        checkpoint: file of the denoiser, or a folder of `DiffMIC.save_pretrained`.
        guidance: file of the guidance model; default: the state in `checkpoint` itself, or else the file aux_ckpt.pth
            (aux_ckpt_best.pth) beside a ckpt.pth (ckpt_best.pth).
        config: required for a file without a configuration inside (a published one).
        ema: load the moving average of the weights if the file has one.

    Returns:
        The model, with the calibration in the file if it was fitted for the loaded weights, and the class names, None
        if the file has none. A calibration for other weights is left out with a UserWarning. The model's
        `preprocessing`, `sampling` and `class_names` are those of `config` if it is a RunConfig, otherwise those of the
        file, or None. Class names in the file take precedence over those of `config`.

    Raises:
        ValueError: a file that is not a checkpoint or has other sizes than `config`, or a damaged calibration.
    """
    file = read_checkpoint(checkpoint, mmap=True)
    return build_model(file, guidance, config, ema), file.class_names


def build_model(
    file: Checkpoint,
    guidance: str | Path | None = None,
    config: DiffMICConfig | RunConfig | None = None,
    ema: bool = True,
) -> DiffMIC:
    """The model of `load_model`, of a checkpoint that was read."""
    description = None if isinstance(config, RunConfig) else file.description
    if config is None and description is not None:
        config = description.model
    if config is None:
        sizes = ", ".join(f"{k} {v}" for k, v in file.sizes.items()) or "no known sizes"
        raise ValueError(
            f"checkpoint: {file.path} has no configuration inside (its weights say {sizes}); give the one it was "
            "trained with (--config)"
        )
    model_config = config.model if isinstance(config, RunConfig) else config
    check_sizes(file, model_config)
    if isinstance(config, RunConfig):
        description = ModelDescription.from_run(config, file.class_names)
    # As in the file, float32 on the CPU, whatever torch's defaults are.
    with torch.device("cpu"):
        model = DiffMIC(model_config, pretrained=False).float()
    load_state(model.denoiser, file.denoiser, f"{file.path}")
    if ema and file.ema:
        apply_average(model.denoiser, file.ema, f"{file.path}")
    if "progress" in file.extras and file.step == 0:
        warnings.warn(
            f"checkpoint: {file.path} was written before the denoiser's first step; its diffusion is untrained (the "
            "guidance model may be trained)",
            UserWarning,
            stacklevel=3,
        )
    load_state(model.guidance, *guidance_state(file, guidance))
    model.calibration = _fitting_calibration(file, model)
    if description is not None:
        model.class_names, model.preprocessing = description.class_names, description.preprocessing
        if description.sampling is not None:
            model.sampling = SamplingOptions.from_config(description.sampling)
    return model.eval()


def _fitting_calibration(file: Checkpoint, model: DiffMIC) -> Calibration | None:
    """The calibration in the file, if it was fitted for these weights."""
    calibration = file.calibration
    if calibration is None or calibration.weights == weights_digest(model):
        return calibration
    warnings.warn(
        f"checkpoint: the calibration of {file.path} is left out: it was fitted for other weights than those loaded "
        "(their moving average or not, or another guidance file)",
        UserWarning,
        stacklevel=4,
    )
    return None


def guidance_state(file: Checkpoint, guidance: str | Path | None) -> tuple[dict[str, Tensor], str]:
    """The guidance model's state dict for `load_model`, and its name for errors."""
    if guidance is None and "guidance" in file.extras:
        what = f"{file.path}, guidance"
        return strip_module(file.extras["guidance"], what), what
    path = guidance_path(file.path) if guidance is None else Path(guidance)
    if guidance is None and not path.is_file():
        raise ValueError(
            f"checkpoint: {file.path} holds the denoiser only and there is no {path.name} beside it; name the "
            "guidance model's file (--guidance)"
        )
    return read_guidance(path), f"{path}"
