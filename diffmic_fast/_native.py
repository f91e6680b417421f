"""The compiled extension ``diffmic_fast._C``, loaded on first use.

Importing the package succeeds without the extension. The reason of a failed load is kept:
`python -m diffmic_fast info` shows it, and errors about the backends ``cpu`` and ``cuda`` repeat it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from importlib import resources
from types import ModuleType
from typing import Any

_PROCESS = os.getpid()


@functools.cache
def build_record() -> dict[str, Any] | None:
    """What setup.py wrote about the build (``_build.json``); None if there is no such file.

    Returns:
        A dict with ``extension`` (bool), ``reason`` (why there is no extension, or ""), ``cuda`` (bool),
        ``cuda_reason``, and of a built extension its compilers, flags and CUDA architectures.
    """
    record = resources.files("diffmic_fast").joinpath("_build.json")
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@functools.cache
def attempt() -> tuple[ModuleType | None, str]:
    """Load the extension, once per process; returns (module, "") or (None, the reason)."""
    try:
        module = importlib.import_module("diffmic_fast._C")
        if os.getpid() != _PROCESS:
            # A forked child has none of the threads that its parent's PyTorch may have started.
            module.forked()
        return module, ""
    except ModuleNotFoundError as error:
        if error.name != "diffmic_fast._C":
            return None, f"loading diffmic_fast._C failed: {error}"
    except Exception as error:
        # Whatever the loader raises (a missing symbol, another libc) is the reason.
        return None, f"loading diffmic_fast._C failed: {error}"
    record = build_record()
    if record is not None and record.get("reason"):
        return None, f"it was left out when diffmic_fast was installed: {record['reason']}"
    return None, (
        "diffmic_fast._C has not been built: install the package with pip install ., "
        "or with pip install -e . to run it from its sources"
    )


def failure() -> str:
    """Why the extension is not available; empty if it is."""
    return attempt()[1]


def extension() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: the extension is not available; the message contains the reason.
    """
    module, reason = attempt()
    if module is None:
        raise RuntimeError(f"the compiled extension is not available: {reason}")
    return module


@functools.cache
def attempt_emulated() -> tuple[ModuleType | None, str]:
    """Load the emulated CUDA kernels, once per process; returns (module, "") or (None, the reason).

    The environment variable ``DIFFMIC_EMULATED`` names the module, which is built from tests/emulator and
    not part of an installation.
    """
    path = os.environ.get("DIFFMIC_EMULATED")
    if not path:
        return None, "DIFFMIC_EMULATED does not name a module built from tests/emulator"
    try:
        spec = importlib.util.spec_from_file_location("_emulated", path)
        if spec is None or spec.loader is None:
            return None, f"DIFFMIC_EMULATED={path} is not an extension module"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        return None, f"loading DIFFMIC_EMULATED={path} failed: {error}"
    return module, ""


def cuda_failure() -> str:
    """Why the CUDA kernels are not available; empty if they are."""
    module, reason = attempt()
    if module is None:
        return f"the compiled extension is not available: {reason}"
    if not hasattr(module, "cuda"):
        record = build_record() or {}
        why = record.get("cuda_reason") or "CUDA was off"
        return f"the extension was built without CUDA: {why}"
    return ""


def cuda(backend: str) -> ModuleType:
    """The module of CUDA kernels for the backend "cuda" or "cuda-emulated".

    Raises:
        RuntimeError: the kernels are not available; the message contains the reason.
    """
    if backend == "cuda-emulated":
        module, reason = attempt_emulated()
        if module is None:
            raise RuntimeError(f"the emulated CUDA kernels are not available: {reason}")
        return module
    if reason := cuda_failure():
        raise RuntimeError(f"the CUDA kernels are not available: {reason}")
    found: ModuleType = extension().cuda
    return found
