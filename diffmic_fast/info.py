"""`python -m diffmic_fast info`: what is installed, what was built, and what could not be loaded.

Nothing here raises for a missing or broken part: the report names it with the reason.
"""

from __future__ import annotations

import json as json_format
import os
import platform
from importlib import metadata
from typing import Any

import numpy as np
import torch

import diffmic_fast
from diffmic_fast import _native
from diffmic_fast.ops import _engine as engine
from diffmic_fast.ops._backend import IMPLEMENTATIONS, decide

_PACKAGES = (
    "diffmic_fast",
    "torch",
    "torchvision",
    "timm",
    "triton",
    "numpy",
    "pillow",
    "pydicom",
    "scikit-learn",
    "matplotlib",
    "tensorboard",
)


def report() -> dict[str, Any]:
    """Everything that `info` shows, as values that JSON can hold.

    Returns:
        A dict with the keys

        - versions: version by package, None where it is not installed.
        - extension: loaded (bool) and reason, or file and what the extension says of its build.
        - installed: what the installation recorded about its build, or None.
        - processor: architecture, instruction_sets, amx ("yes", or why not), torch_uses, cores,
          threads (of torch), bfloat16_convolutions (instructions and how, or why not).
        - gpu: torch_cuda, torch_devices, driver, devices, reason (why there are none).
        - backends: by device and operation, the backend that "auto" selects, or why none can serve;
          variable (DIFFMIC_BACKEND).
    """
    return {
        "versions": _versions(),
        "extension": _extension(),
        "installed": _native.build_record(),
        "processor": _processor(),
        "gpu": _gpu(),
        "backends": _backends(),
    }


def main(json: bool = False) -> int:
    """Print the report as text or as JSON; returns the exit status."""
    found = report()
    print(json_format.dumps(found, indent=2) if json else render(found))
    return 0


def render(found: dict[str, Any]) -> str:
    """A report as text, one line a fact."""
    lines = []
    for title, rows in (
        ("versions", list(found["versions"].items())),
        ("extension", _extension_rows(found)),
        ("processor", _rows(found["processor"])),
        ("gpu", _gpu_rows(found["gpu"])),
        ("backends", _backend_rows(found["backends"])),
    ):
        width = max(len(name) for name, _ in rows)
        lines += [title, *(f"  {name:<{width}}  {_text(value)}" for name, value in rows), ""]
    return "\n".join(lines[:-1])


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    # A source tree and packages of a system may have no metadata.
    versions["diffmic_fast"] = diffmic_fast.__version__
    versions["torch"], versions["numpy"] = torch.__version__, np.__version__
    versions["system"] = platform.platform()
    return versions


def _extension() -> dict[str, Any]:
    module, reason = _native.attempt()
    if module is None:
        return {"loaded": False, "reason": reason}
    return {"loaded": True, "reason": "", "file": module.__file__, **module.build_info()}


def _processor() -> dict[str, Any]:
    module, _ = _native.attempt()
    obstacle = module.why_no_amx() if module else "the extension was not loaded"
    return {
        "architecture": platform.machine(),
        "instruction_sets": module.cpu_features() if module else ["unknown without the extension"],
        "amx": f"no: {obstacle}" if obstacle else "yes",
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16_convolutions": _bfloat16_convolutions(),
    }


def _bfloat16_convolutions() -> str:
    try:  # the models need torchvision and pydantic
        from diffmic_fast.models.execution import bfloat16_convolutions
    except ImportError as error:
        return f"unknown, the models cannot be imported: {error}"
    return bfloat16_convolutions()


def _gpu() -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch_cuda": torch.version.cuda,
        "torch_devices": torch.cuda.device_count(),
        "driver": None,
        "devices": [],
    }
    module, reason = _native.attempt()
    if module is None:
        found["reason"] = f"the extension was not loaded: {reason}"
    elif not hasattr(module, "cuda_state"):
        found["reason"] = _native.cuda_failure()
    else:
        try:
            state = module.cuda_state()
        except module.CudaError as error:
            found["reason"] = str(error)
        else:
            found.update(reason=state["reason"], devices=state["devices"])
            if state["driver_version"]:
                version = state["driver_version"]
                found["driver"] = f"supports CUDA {version // 1000}.{version % 1000 // 10}"
    return found


def _backends() -> dict[str, Any]:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    found: dict[str, Any] = {"variable": os.environ.get("DIFFMIC_BACKEND")}
    for device in devices:
        found[device] = {name: _backend(name, torch.device(device)) for name in IMPLEMENTATIONS}
    return found


def _backend(operation: str, device: torch.device) -> str:
    try:
        name, remark = decide(operation, "auto", device)
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"
    if operation == "denoise" and name == "cuda" and engine.selectable("auto", device):
        name = "cuda; triton for many rows"
    return f"{name} ({remark})" if remark else name


def _rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name.replace("_", " "), value) for name, value in facts.items()]


def _extension_rows(found: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = _rows(found["extension"])
    if found["installed"] and found["installed"].get("cuda_reason"):
        rows.append(("without CUDA because", found["installed"]["cuda_reason"]))
    return rows


def _gpu_rows(gpu: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = _rows({name: value for name, value in gpu.items() if name != "devices"})
    for device in gpu["devices"]:
        major, minor = device["compute_capability"]
        served = "" if device["served"] else ", for which this build has no code"
        rows.append(
            (
                f"device {device['index']}",
                f"{device['name']}, sm_{major}{minor}{served}, {device['multiprocessors']} "
                f"multiprocessors, {device['memory_bytes'] / 2**30:.0f} GiB",
            )
        )
    return rows


def _backend_rows(backends: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = [("DIFFMIC_BACKEND", backends["variable"])]
    for device, operations in backends.items():
        if device != "variable":
            rows += [(f"{name} on {device}", backend) for name, backend in operations.items()]
    return rows


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value) or "-"
