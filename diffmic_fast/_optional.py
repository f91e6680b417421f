"""Packages that only some commands need, which extras of diffmic_fast install."""

from __future__ import annotations

import importlib
from typing import Any


class MissingPackageError(ImportError):
    """A package is not installed that an extra of diffmic_fast installs."""


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: its dotted name, for example "matplotlib.figure".
        extra: the extra of pyproject.toml that installs the package.
        purpose: what needs the package, the beginning of the error message.

    Raises:
        MissingPackageError: the package is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{purpose} needs {module}, which cannot be imported ({error}): "
            f"pip install 'diffmic_fast[{extra}]'"
        ) from error
