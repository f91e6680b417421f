"""Checkpoint files: written whole or not at all, read without running code, errors in words.

A checkpoint is the published list, [denoiser state dict, optimizer state, epoch, step, moving
average by name], the last left out where there is none; programs of this family take the average
from the list's end. All else that an exact resume needs (the guidance model, its optimizer,
position, random states, configuration, class names) lies in the optimizer's state under a key of
our own, which optimizers do not look at. Beside it stands the published form of the guidance file,
[state dict, optimizer state].
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from diffmic_fast.config.run import RunConfig
from diffmic_fast.models import DiffMIC, DiffMICConfig

NAME = "ckpt.pth"
GUIDANCE_NAME = "aux_ckpt.pth"
BEST_NAME = "ckpt_best.pth"
_EXTRAS = "diffmic_fast"
GUIDANCE_BEST_NAME = "aux_ckpt_best.pth"

_ZIP = b"PK\x03\x04"
_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6


@dataclass
class Checkpoint:
    """The content of a checkpoint file; `ema` and `extras` are empty where the file has none."""

    path: Path
    denoiser: dict[str, Tensor]
    optimizer: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    ema: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Classes, feature_dim and timesteps, as the shapes of the denoiser's weights tell them."""
        return denoiser_sizes(self.denoiser)

    @property
    def config(self) -> RunConfig | None:
        """The configuration stored in the file, None if there is none."""
        values = self.extras.get("config")
        return RunConfig.from_dict(values) if values else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The class names stored in the file, None if there are none."""
        names = self.extras.get("classes")
        return tuple(names) if names else None


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for binary writing; on success it becomes `path`.

    The content is on the disk (fsync) before the rename, so that a reader finds either the old
    file or the new one whole, also after a power cut. If the block raises, `path` stays as it was.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes files that only the owner may read
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def atomic_save(value: Any, path: str | Path) -> None:
    """torch.save through `atomic_file`."""
    with atomic_file(path) as file:
        torch.save(value, file)


def save_checkpoint(checkpoint: Checkpoint, guidance_name: str = GUIDANCE_NAME) -> None:
    """Write `checkpoint` to its path and the published guidance file beside it."""
    extras = checkpoint.extras
    parts: list[Any] = [
        checkpoint.denoiser,
        checkpoint.optimizer | {_EXTRAS: extras},
        checkpoint.epoch,
        checkpoint.step,
    ]
    if checkpoint.ema:
        parts.append(checkpoint.ema)
    guidance = [extras["guidance"], extras["guidance_optimizer"]]
    # The denoiser's file last: it is the one that a resume reads, and it is complete by itself.
    atomic_save(guidance, checkpoint.path.parent / guidance_name)
    atomic_save(parts, checkpoint.path)


def remove_unfinished(folder: Path) -> None:
    """Remove what `atomic_file` leaves of a file when the process is killed while it writes."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def keep_copy(path: Path, copy: Path) -> None:
    """Keep the present content of `path` as `copy`, atomically, without writing it again.

    A hard link: the next checkpoint replaces the name `path`, not the content the link holds.
    """
    temporary = copy.with_name(f".{copy.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links: copy the bytes
        with atomic_file(copy) as target, open(path, "rb") as source:
            while block := source.read(1 << 24):
                target.write(block)
        return
    os.replace(temporary, copy)


def _read_list(path: str | Path, *, mmap: bool) -> Any:
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
                f"checkpoint: {path} is a plain Python pickle, not a checkpoint; a pickle can run "
                "code while it is read, so only files of torch.save with tensors, numbers and "
                "text are accepted"
            )
        raise ValueError(
            f"checkpoint: {path} is no checkpoint: it starts with {head[:8]!r}, a file written by "
            "torch.save starts otherwise"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except Exception as error:
        text = str(error)
        found = re.search(r"GLOBAL ([\w.]+)", text)
        if found:
            raise ValueError(
                f"checkpoint: {path} refused: it asks to load the Python object "
                f"{found.group(1)}, which could run code; only tensors, numbers, text, lists and "
                "dicts are read (weights_only). Save the state dict alone, from a program you "
                "trust"
            ) from error
        if is_zip and isinstance(error, (RuntimeError, EOFError)):
            raise ValueError(
                f"checkpoint: {path} is damaged or was cut short while it was copied or written "
                f"({path.stat().st_size} bytes): {text.splitlines()[0][:120] if text else error!r}"
            ) from error
        raise ValueError(
            f"checkpoint: {path} cannot be read as a checkpoint: "
            f"{text.splitlines()[0][:160] if text else repr(error)}"
        ) from error


def strip_module(state: Any, what: str) -> dict[str, Tensor]:
    """A state dict without the "module." that DataParallel puts before every name."""
    good = isinstance(state, Mapping) and all(isinstance(k, str) for k in state)
    if not good or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"checkpoint: {what} wants a state dict (names with tensors), "
            f"got {type(state).__name__}"
        )
    if state and all(k.startswith("module.") for k in state):
        return {k[len("module.") :]: v for k, v in state.items()}
    return dict(state)


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> Checkpoint:
    """Read a denoiser checkpoint, ours or a published one (list), or a bare state dict.

    mmap: map the file instead of reading it, for loading a model without its optimizer's state.
    Raises ValueError in words if the file is no checkpoint, is damaged, or wants to run code.
    """
    value = _read_list(path, mmap=mmap)
    what = f"{path}"
    if isinstance(value, Mapping):
        return Checkpoint(Path(path), strip_module(_unwrapped(value), what))
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(
            f"checkpoint: {path} wants a list [state dict, optimizer state, epoch, step, ...], "
            f"got {type(value).__name__}"
        )
    result = Checkpoint(Path(path), strip_module(value[0], f"{what}, entry 0"))
    if len(value) > 1 and isinstance(value[1], dict):
        result.optimizer = dict(value[1])
        result.extras = result.optimizer.pop(_EXTRAS, {})
    for place, name in ((2, "epoch"), (3, "step")):
        if len(value) > place:
            if not isinstance(value[place], int):
                raise ValueError(
                    f"checkpoint: {path} wants a whole number as entry {place} ({name}), got "
                    f"{type(value[place]).__name__}"
                )
            setattr(result, name, value[place])
    if len(value) > 4 and value[4]:
        result.ema = strip_module(value[4], f"{what}, entry 4 (moving average)")
    return result


def _unwrapped(value: Any) -> Any:
    """What a file with the one key "state_dict" wraps, else the value itself."""
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        return value["state_dict"]
    return value


def read_guidance(path: str | Path, *, mmap: bool = False) -> dict[str, Tensor]:
    """The state dict of a guidance file, [state dict, optimizer state] or the state dict alone."""
    value = _read_list(path, mmap=mmap)
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return strip_module(_unwrapped(value), str(path))


def denoiser_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Classes, feature_dim and timesteps from the shapes of a denoiser's weights (spec 4)."""
    sizes: dict[str, int] = {}
    if "lin4.weight" in state and state["lin4.weight"].ndim == 2:
        sizes["classes"], sizes["feature_dim"] = state["lin4.weight"].shape
    if "lin1.embed.weight" in state:
        sizes["timesteps"] = state["lin1.embed.weight"].shape[0] - 1
    return sizes


def check_sizes(checkpoint: Checkpoint, config: DiffMICConfig) -> None:
    """Raise ValueError, with both numbers, if the file is of other sizes than `config`."""
    for key, found in checkpoint.sizes.items():
        wanted = getattr(config, key)
        if found != wanted:
            raise ValueError(
                f"checkpoint: {checkpoint.path} was trained with {key} {found}, the configuration "
                f"says {wanted}; use the configuration it was trained with (model.{key}={found})"
            )


def load_state(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load `state` strictly; ValueError listing keys that are missing, too many or misshapen."""
    check_state(module, state, what)
    module.load_state_dict(dict(state), strict=True)


def check_state(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError, as `load_state`, unless the names and shapes are the module's."""
    own = module.state_dict()
    shapes = [
        f"{k}: file {tuple(state[k].shape)}, model {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = []
    lists = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": shapes,
    }
    for title, names in lists.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{len(names)} {title} ({'; '.join(names[:4])}{more})")
    if problems:
        raise ValueError(
            f"checkpoint: {what} does not fit the model: {', '.join(problems)}; is it the same "
            "encoder and guidance trunk?"
        )


@torch.no_grad()
def apply_average(denoiser: nn.Module, ema: Mapping[str, Tensor], what: str) -> None:
    """Copy a moving average, by parameter name, into `denoiser`; buffers stay as they are."""
    names = dict(denoiser.named_parameters())
    missing = [k for k in names if k not in ema]
    extra = [k for k in ema if k not in names]
    if missing or extra:
        raise ValueError(
            f"checkpoint: the moving average of {what} does not fit the denoiser: "
            f"{len(missing)} missing {missing[:3]}, {len(extra)} unexpected {extra[:3]}"
        )
    for key, average in ema.items():
        names[key].copy_(average)


def load_model(
    checkpoint: str | Path,
    guidance: str | Path | None = None,
    config: DiffMICConfig | RunConfig | None = None,
    ema: bool = True,
) -> tuple[DiffMIC, tuple[str, ...] | None]:
    """A DiffMIC in eval mode, on the CPU, from our checkpoint or from published files.

    guidance: the guidance file; by default the state in `checkpoint` itself, or else the file
        aux_ckpt.pth (aux_ckpt_best.pth) beside a ckpt.pth (ckpt_best.pth).
    config: needed for a file without a configuration inside (a published one).
    ema: take the moving average of the weights if the file has one.
    Returns the model and the class names (None if the file has none).
    Raises ValueError if a file is no checkpoint or is of other sizes than `config`.
    """
    file = read_checkpoint(checkpoint, mmap=True)
    if config is None:
        config = file.config
        if config is None:
            sizes = ", ".join(f"{k} {v}" for k, v in file.sizes.items()) or "no known sizes"
            raise ValueError(
                f"checkpoint: {checkpoint} has no configuration inside (its weights say {sizes}); "
                "give the one it was trained with (--config)"
            )
    model_config = config.model if isinstance(config, RunConfig) else config
    check_sizes(file, model_config)
    model = DiffMIC(model_config, pretrained=False)
    load_state(model.denoiser, file.denoiser, f"{checkpoint}")
    if ema and file.ema:
        apply_average(model.denoiser, file.ema, str(checkpoint))
    if file.extras and file.step == 0:
        warnings.warn(
            f"checkpoint: {checkpoint} was written before the denoiser's first step; its "
            "diffusion is untrained (the guidance model may be trained)",
            UserWarning,
            stacklevel=2,
        )
    if guidance is not None:
        load_state(model.guidance, read_guidance(guidance, mmap=True), f"{guidance}")
    elif "guidance" in file.extras:
        state = strip_module(file.extras["guidance"], f"{checkpoint}, guidance")
        load_state(model.guidance, state, f"{checkpoint}, guidance")
    else:
        beside = Path(checkpoint).with_name(f"aux_{Path(checkpoint).name}")
        if not beside.is_file():
            raise ValueError(
                f"checkpoint: {checkpoint} holds the denoiser only and there is no {beside.name} "
                "beside it; name the guidance model's file (--guidance)"
            )
        load_state(model.guidance, read_guidance(beside, mmap=True), f"{beside}")
    model.eval()
    return model, file.class_names


def random_states(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators and of `generators`, as plain data."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position),
                  int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "generators": {key: g.get_state() for key, g in generators.items()},
    }  # fmt: skip
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(
    states: Mapping[str, Any], generators: Mapping[str, torch.Generator]
) -> None:
    """Set every generator back to what `random_states` recorded."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    for key, generator in generators.items():
        generator.set_state(states["generators"][key])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextlib.contextmanager
def keep_random_states() -> Iterator[None]:
    """Whatever is drawn inside, also by the first import of a library, is as if never drawn."""
    states = random_states({})
    try:
        yield
    finally:
        restore_random_states(states, {})


# Keys that change neither the weights nor the rows of the log: a resume may set them anew.
_FREE = ("data.workers", "data.cache", "data.root", "training.checkpoint_every",
         "training.tensorboard")  # fmt: skip


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """'section.key: stored -> current' for every entry that differs and matters to a resume."""

    def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key, value in tree.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping):
                entries.update(flat(value, f"{name}."))
            else:
                entries[name] = value
        return entries

    old, new = flat(stored), flat(current)
    return [
        f"{key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_FREE)
    ]


def check_resume(checkpoint: Checkpoint, config: RunConfig, processes: int = 1) -> None:
    """Raise ValueError unless `checkpoint` can be continued under `config` to the same numbers.

    By another number of processes between two epochs, if together they take as many images a step.
    """
    if "progress" not in checkpoint.extras:
        raise ValueError(
            f"resume: {checkpoint.path} has no training state beyond the denoiser (a published "
            "checkpoint?); it can be evaluated, not resumed"
        )
    check_sizes(checkpoint, config.model)
    stored = checkpoint.extras["config"]
    progress = checkpoint.extras["progress"]
    before = progress.get("processes", 1)
    if before != processes:
        size = config.training.batch_size
        images = stored["training"]["batch_size"] * before
        if images != size * processes or progress["position"]:
            raise ValueError(
                f"resume: {checkpoint.path} was trained by {before} processes with {images} images a step, these are "
                f"{processes} with {size * processes}; another number of processes can go on between two epochs, with "
                "training.batch_size such that a step has as many images"
            )
        stored = {**stored, "training": {**stored["training"], "batch_size": size}}
    changed = differences(stored, config.to_dict())
    if changed:
        raise ValueError(
            f"resume: the configuration differs from the one {checkpoint.path} was trained with: "
            f"{'; '.join(changed)}; resume with the stored one, or start anew in another folder"
        )
