"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The programs of tests/native call the kernels directly: under Python a sanitizer would also report the
findings in other libraries. Needs a C++ compiler with the sanitizers.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from native_builds import (
    COMPILER,
    PROGRAMS,
    Unit,
    build_once,
    compile_units,
    emulated_flags,
    link_program,
    needs_simde,
    run_program,
    translation_units,
)

if COMPILER is None:
    pytest.skip("no C++ compiler", allow_module_level=True)
pytestmark = pytest.mark.slow


def sanitizer_flags(sanitizers: str, folder: Path) -> list[str]:
    """Compiler options under which a finding ends a program with a nonzero status. Skips if they do not work."""
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    try:
        subprocess.run([str(COMPILER), *flags, source, "-o", program], check=True)
        subprocess.run([program], check=True)
    except subprocess.CalledProcessError:
        pytest.skip(f"{COMPILER} has no working -fsanitize={sanitizers} here")
    return flags


def build_kernels(builds: Path, sanitizers: str, flags: list[str]) -> dict[Unit, Path]:
    """The object file of each unit of csrc/cpu, compiled with sanitizers."""

    def flags_of(unit: Unit) -> list[str]:
        kept = ("-m", "-ffp-contract", "-Wno-")
        return [*flags, *(flag for flag in unit.flags if flag.startswith(kept))]

    units = translation_units(str(COMPILER))
    folder = build_once(
        builds / sanitizers, lambda folder: compile_units(str(COMPILER), units, folder, flags_of)
    )
    return {unit: folder / f"{unit.path.stem}.o" for unit in units}


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels(tmp_path: Path, builds: Path, sanitizers: str) -> None:
    flags = sanitizer_flags(sanitizers, tmp_path)
    objects = build_kernels(builds, sanitizers, flags)
    for path in PROGRAMS:
        program = link_program(str(COMPILER), path, [*objects.values()], tmp_path, flags)
        assert "portable" in run_program(program)


@needs_simde
def test_emulated_kernels(tmp_path: Path, builds: Path) -> None:
    """The AVX-512 kernels on a processor with AVX2, with the hardware's bounds and arithmetic."""
    sanitizers = "address,undefined"
    flags = sanitizer_flags(sanitizers, tmp_path)
    objects = build_kernels(builds, sanitizers, flags)
    emulated = {unit: emulated_flags(unit) for unit in objects}
    units = [unit for unit in objects if emulated[unit] is not None]
    paths = compile_units(
        str(COMPILER), units, tmp_path, lambda unit: [*flags, *(emulated[unit] or [])]
    )
    objects |= dict(zip(units, paths, strict=True))
    for path in PROGRAMS:
        program = link_program(str(COMPILER), path, [*objects.values()], tmp_path, flags)
        sets = ["avx512", "avx512_bf16"] if path.stem == "kernels" else ["avx512"]
        assert run_program(program, "--quick", *sets) == sets
