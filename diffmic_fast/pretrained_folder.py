"""Folders of `DiffMIC.save_pretrained`: safetensors and JSON, read without running code, written atomically.

    config.json              description of the model, calibration without its arrays, checksums of the files
    model.safetensors        the state dict of `DiffMIC`
    calibration.safetensors  arrays of the calibration, where there is one
    README.md                model card

config.json has a digest of its other entries, and the size and SHA-256 of the safetensors files. These detect damage,
truncation and files of two different folders. The model card has no checksum and may be edited.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmic_fast import __version__
from diffmic_fast._optional import require
from diffmic_fast.atomic_files import atomic_folder, check_target
from diffmic_fast.calibration import Calibration
from diffmic_fast.config.description import ModelDescription

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CALIBRATION_NAME = "calibration.safetensors"
CARD_NAME = "README.md"
NAMES = (CONFIG_NAME, WEIGHTS_NAME, CALIBRATION_NAME, CARD_NAME)

FORMAT = "diffmic_fast"
FORMAT_VERSION = 1
_DTYPES = (torch.float32, torch.int64)  # of parameters and statistics, and of counters
_KEYS = ("format", "format_version", "versions", "description", "calibration", "files", "digest")
_BLOCK = 2**20


@dataclass(frozen=True)
class PretrainedFolder:
    """The content of a folder.

    Attributes:
        description: of the model.
        weights: state dict of `DiffMIC`, on the CPU.
        calibration: as `Calibration.to_state`, or None.
    """

    description: ModelDescription
    weights: dict[str, Tensor]
    calibration: dict[str, Any] | None = None


def is_pretrained_folder(path: str | Path) -> bool:
    """Whether a path is a folder with a config.json of this format."""
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        return False
    try:
        tree = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return True  # damaged: `read_folder` raises with the reason
    return isinstance(tree, dict) and tree.get("format") == FORMAT


def write_folder(
    path: str | Path, content: PretrainedFolder, card: str, *, overwrite: bool = False
) -> None:
    """Write a folder atomically: after an interruption there is none, or with `overwrite` the previous one.

    Args:
        path: of the folder, which must not exist or be empty.
        content: of the model.
        card: content of README.md.
        overwrite: replace a folder that has files of this format and no others.

    Raises:
        ValueError: the folder exists and may not be replaced; weights of another dtype; NaN in a description.
        OSError: it cannot be written.
    """
    path = Path(path)
    check_target("save_pretrained", path, NAMES, overwrite=overwrite)
    if path.is_dir() and any(path.iterdir()) and not is_pretrained_folder(path):
        raise ValueError(
            f"save_pretrained: {path} must be a folder of save_pretrained to be overwritten, got another "
            f"{CONFIG_NAME} or none"
        )
    save_file = require("safetensors.torch", extra="hub", purpose="save_pretrained").save_file
    _check_dtypes(content.weights, "the model")
    calibration, arrays = _split(content.calibration)
    with atomic_folder(path, overwrite=overwrite) as folder:
        for name, tensors in ((WEIGHTS_NAME, content.weights), (CALIBRATION_NAME, arrays)):
            if tensors:
                # A copy of each, since views may share memory, which the format has no way to express.
                plain = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format)
                         for key, t in tensors.items()}  # fmt: skip
                save_file(plain, folder / name, metadata={"format": "pt"})
        tree: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "versions": {"diffmic_fast": __version__, "torch": torch.__version__},
            "description": content.description.to_dict(),
            "calibration": calibration,
            "files": {file.name: _record(file) for file in sorted(folder.iterdir())},
        }
        tree["digest"] = _digest(tree)
        text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        (folder / CARD_NAME).write_text(card, encoding="utf-8")


def read_folder(path: str | Path) -> PretrainedFolder:
    """Read a folder.

    Raises:
        ValueError: a file is missing, damaged, truncated or of another folder; config.json has unknown or missing keys,
            values out of range or a later version; the weights have another dtype.
    """
    folder = Path(path)
    tree = _read_config(folder / CONFIG_NAME)
    for name, record in tree["files"].items():
        _check_file(folder / name, record)
    try:
        description = ModelDescription.from_dict(tree["description"])
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    weights = _load(folder / WEIGHTS_NAME)
    _check_dtypes(weights, str(folder / WEIGHTS_NAME))
    if tree["calibration"] is None:
        return PretrainedFolder(description, weights)
    arrays = _load(folder / CALIBRATION_NAME)
    try:
        state = _joined(tree["calibration"], arrays)
        Calibration.from_state(state, description.model.classes)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return PretrainedFolder(description, weights, state)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise ValueError(f"from_pretrained: there is no folder {path.parent}")
    if not path.is_file():
        raise ValueError(
            f"from_pretrained: {path.parent} must be a folder of save_pretrained, got one without {path.name}"
        )
    try:
        tree = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not JSON: {error}") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"{path}: format must be {FORMAT!r}, got {found!r}")
    version = tree.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        hint = (
            f"; it was written by diffmic_fast {tree.get('versions')}, a later version"
            if newer
            else ""
        )
        raise ValueError(f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}{hint}")
    if tree.keys() != set(_KEYS):
        differing = ", ".join(sorted(tree.keys() ^ set(_KEYS)))
        raise ValueError(f"{path}: entries are missing or unknown: {differing}")
    if tree["digest"] != _digest(tree):
        raise ValueError(
            f"{path} has been damaged or changed since it was written: its digest must be {_digest(tree)}, got "
            f"{tree['digest']!r}; save the model again to change what it says"
        )
    calibrated = tree["calibration"] is not None
    wanted = {WEIGHTS_NAME} | ({CALIBRATION_NAME} if calibrated else set())
    if not isinstance(tree["files"], dict) or tree["files"].keys() != wanted:
        raise ValueError(f"{path}: files must be {', '.join(sorted(wanted))}, got {tree['files']}")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError(f"a key is given twice, among {', '.join(key for key, _ in pairs[:4])}")
    return tree


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _digest(tree: Mapping[str, Any]) -> str:
    """SHA-256 of all entries but the digest, as sorted JSON."""
    others = {key: value for key, value in tree.items() if key != "digest"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _record(path: Path) -> dict[str, Any]:
    path = path.resolve()
    status = path.stat()
    identity = (status.st_size, status.st_mtime_ns, status.st_ino)
    return {"bytes": status.st_size, "sha256": _sha256(path, identity)}


def _check_file(path: Path, record: Any) -> None:
    if not path.is_file():
        raise ValueError(f"from_pretrained: there is no file {path}")
    found = _record(path)
    if not isinstance(record, dict) or found["bytes"] != record.get("bytes"):
        wanted = record.get("bytes") if isinstance(record, dict) else record
        raise ValueError(
            f"{path} is truncated or of another model: it must have {wanted} bytes, got {found['bytes']}"
        )
    if found != record:
        raise ValueError(
            f"{path} is damaged or of another model: its SHA-256 must be {record.get('sha256')}, got {found['sha256']}"
        )


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, identity: tuple[int, int, int]) -> str:
    """Of a file, with size, modification time and inode, so that it is read once."""
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            hashed.update(block)
    return hashed.hexdigest()


def _load(path: Path) -> dict[str, Tensor]:
    safetensors = require("safetensors.torch", extra="hub", purpose="from_pretrained")
    try:
        tensors: dict[str, Tensor] = safetensors.load_file(path, device="cpu")
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError, of the reader in Rust
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    return tensors


def _check_dtypes(weights: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in weights.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{what}: tensors must be torch.float32, and counters torch.int64, got {tensor.dtype} for {name}"
            )


def _split(state: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """A calibration's state without its tensors, and these by their dotted names."""
    if state is None:
        return None, {}
    plain: dict[str, Any] = {}
    arrays: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            arrays[key] = value
        elif isinstance(value, Mapping):
            plain[key], inner = _split(value)
            arrays |= {f"{key}.{name}": tensor for name, tensor in inner.items()}
        else:
            plain[key] = value
    return plain, arrays


def _joined(plain: Any, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `_split`; raises ValueError if they do not fit together."""
    if not isinstance(plain, dict):
        raise ValueError(f"calibration must be a mapping or null, got {plain!r}")
    state = {key: dict(value) if isinstance(value, dict) else value for key, value in plain.items()}
    for name, tensor in arrays.items():
        section, _, key = name.rpartition(".")
        target = state.get(section) if section else state
        if not isinstance(target, dict) or key in target:
            raise ValueError(f"calibration: there must be no array {name}")
        target[key] = tensor
    return state
