"""The compiled extension ``diffmic_fast._C``, loaded at its first use.

Importing the package never fails for want of the extension. A failed load is remembered with its
reason, which `python -m diffmic_fast info` shows and which every error about the ``cpu`` backend
repeats.
"""

from __future__ import annotations

import functools
import importlib
import json
from importlib import resources
from types import ModuleType
from typing import Any


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
        return importlib.import_module("diffmic_fast._C"), ""
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
