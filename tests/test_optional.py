"""Optional packages: an error names the extra that installs a missing one, and extras exist."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from diffmic_fast._optional import MissingPackageError, require

SOURCE = Path(__file__).resolve().parents[1]


def test_require_imports_modules() -> None:
    assert require("math", extra="train", purpose="a test") is math


def test_missing_packages_are_named_with_their_extra() -> None:
    message = r"drawing needs nowhere\.figure, which cannot be imported .*diffmic_fast\[figures\]'"
    with pytest.raises(MissingPackageError, match=message):
        require("nowhere.figure", extra="figures", purpose="drawing")


def test_every_extra_that_errors_name_exists() -> None:
    extras = re.findall(r"^(\w+) = \[", (SOURCE / "pyproject.toml").read_text(), re.MULTILINE)
    for path in (SOURCE / "diffmic_fast").rglob("*.py"):
        for extra in re.findall(r'require\(.*extra="(\w+)"', path.read_text(encoding="utf-8")):
            assert extra in extras, path
