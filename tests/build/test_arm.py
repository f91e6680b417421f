"""64-bit Arm: csrc/cpu, compiled by a cross compiler with the options of CMake there, run by QEMU.

Needs Debian's packages g++-aarch64-linux-gnu and qemu-user.
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
pytestmark = pytest.mark.slow

if platform.machine() == "aarch64":
    pytest.skip("this machine is 64-bit Arm itself", allow_module_level=True)
if shutil.which(COMPILER) is None or QEMU is None:
    pytest.skip(f"needs {COMPILER} and qemu-aarch64", allow_module_level=True)


def test_portable_kernels_agree_with_this_machine(
    tmp_path: Path, kernel_objects: dict[Unit, Path]
) -> None:
    """Only the portable kernels are available, with the results of this machine within rounding."""
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
