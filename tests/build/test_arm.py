"""64-bit Arm: csrc/cpu by a cross compiler, with the flags that CMake gives there, run by QEMU.

Needs the source tree; Debian: g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from native_builds import COMPILER as HOST
from native_builds import (
    PROGRAMS,
    SOURCE,
    Unit,
    assert_within_rounding,
    compile_units,
    link_program,
    program_results,
    run,
    translation_units,
)

COMPILER = "aarch64-linux-gnu-g++"
QEMU = shutil.which("qemu-aarch64")

if not (SOURCE / "csrc").is_dir():
    pytest.skip("no source tree: set DIFFMIC_SOURCE", allow_module_level=True)
if platform.machine() == "aarch64":
    pytest.skip("all other tests run on 64-bit Arm here", allow_module_level=True)
if shutil.which(COMPILER) is None or QEMU is None:
    pytest.skip(f"needs {COMPILER} and qemu-aarch64", allow_module_level=True)


def test_kernels(tmp_path: Path, kernel_objects: dict[Unit, Path]) -> None:
    """Every program runs with the portable kernels alone, whose results are those of this machine within rounding."""
    units = translation_units(COMPILER, "aarch64")
    assert not any(unit.instructions for unit in units)
    objects = compile_units(COMPILER, units, tmp_path / "arm")
    kernels = {path.stem: path for path in objects}["denoise_portable"]
    listing = run(["aarch64-linux-gnu-objdump", "-d", kernels]).stdout
    assert re.search(r"\tfmla\tv\d+\.4s", listing) is not None
    (tmp_path / "host").mkdir()
    launcher = [str(QEMU), "-L", "/usr/aarch64-linux-gnu"]
    for source in PROGRAMS:
        program = link_program(COMPILER, source, objects, tmp_path / "arm", ["-O2"])
        for name in ("avx2", "neon"):
            done = subprocess.run([*launcher, program, name], capture_output=True, check=False)
            assert done.returncode == 1
        found = program_results(program, "portable", launcher)
        here = link_program(
            str(HOST), source, [*kernel_objects.values()], tmp_path / "host", ["-O2"]
        )
        assert_within_rounding(source.stem, found, program_results(here, "portable"))
