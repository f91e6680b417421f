"""The compiled extension ``diffmic_fast._C``, loaded at its first use.

Importing the package never fails for want of the extension. A failed load is remembered with its
reason, which `python -m diffmic_fast info` shows and which every error about the ``cpu`` backend
repeats.
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
    """What the installation wrote about its own build (``_build.json``), None where nothing did.

    Keys: ``extension`` (bool), ``reason`` (why there is no extension, or ""), ``cuda``
    (bool), ``cuda_reason``, and on success compilers, versions, architectures and flags.
    """
    record = resources.files("diffmic_fast").joinpath("_build.json")
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@functools.cache
def attempt() -> tuple[ModuleType | None, str]:
    """Try to load the extension, once a process: (module, "") or (None, the reason)."""
    try:
        module = importlib.import_module("diffmic_fast._C")
        if os.getpid() != _PROCESS:
            # A forked child has none of the threads that PyTorch may have started before.
            module.forked()
        return module, ""
    except ModuleNotFoundError as error:
        if error.name != "diffmic_fast._C":
            return None, f"loading diffmic_fast._C failed: {error}"
    except Exception as error:
        # Whatever the loader raises (a missing symbol, another libc) is the answer to "why not".
        return None, f"loading diffmic_fast._C failed: {error}"
    record = build_record()
    if record is not None and record.get("reason"):
        return None, f"it was left out when diffmic_fast was installed: {record['reason']}"
    return None, (
        "diffmic_fast._C is not beside the package's Python files: "
        "install the package (pip install .) instead of running it from its sources"
    )


def failure() -> str:
    """Why the extension cannot be used here; empty when it can."""
    return attempt()[1]


def extension() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it could not be loaded; the message says why.
    """
    module, reason = attempt()
    if module is None:
        raise RuntimeError(f"the compiled extension is not available: {reason}")
    return module


@functools.cache
def attempt_emulated() -> tuple[ModuleType | None, str]:
    """Try to load the emulated CUDA kernels, once a process: (module, "") or (None, the reason).

    The module is no part of an installation: `tests/emulator` of the sources builds it, and the
    variable ``DIFFMIC_EMULATED`` names the file.
    """
    path = os.environ.get("DIFFMIC_EMULATED")
    if not path:
        return None, "the variable DIFFMIC_EMULATED does not name what tests/emulator builds"
    try:
        spec = importlib.util.spec_from_file_location("_emulated", path)
        if spec is None or spec.loader is None:
            return None, f"DIFFMIC_EMULATED={path} is no extension module"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        return None, f"loading DIFFMIC_EMULATED={path} failed: {error}"
    return module, ""


def cuda_failure() -> str:
    """Why the CUDA kernels cannot be used here; empty when they can."""
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
        RuntimeError: it could not be loaded; the message says why.
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
