"""Triton's interpreter with NumPy 2.4 and later."""

from __future__ import annotations

import importlib
import os
from typing import Any


def repair() -> None:
    """Make loops over a run-time bound work in the interpreter of Triton 3.6 and earlier.

    There `range(n)` of a kernel calls `int` on an array of one element with one dimension, which NumPy 2.4 rejects;
    Triton 3.7 removed the dimension first. Without the interpreter or without Triton nothing is done.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        return
    try:
        interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch(
            tensor, *scope
        )  # from Triton 3.5 on with a scope, which restores the attributes at its end
        index = lambda self: int(self.handle.data.item())  # noqa: E731
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch_lang_tensor
