"""Native builds that test files and the workers of pytest-xdist share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from native_builds import (
    COMPILER,
    Unit,
    build_once,
    compile_units,
    installed_objects,
    translation_units,
)


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of pytest-xdist have in common."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "builds"


@pytest.fixture(scope="session")
def kernel_objects(builds: Path) -> dict[Unit, Path]:
    """The object file of each unit of csrc/cpu, compiled with the options of CMake."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    units = translation_units(COMPILER)
    if installed := installed_objects(COMPILER, units):
        return installed
    folder = build_once(
        builds / "default", lambda folder: compile_units(str(COMPILER), units, folder)
    )
    return {unit: folder / f"{unit.path.stem}.o" for unit in units}
