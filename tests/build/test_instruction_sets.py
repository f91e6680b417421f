"""Instruction sets that this machine lacks: AVX-512 on AVX2 by SIMDe, and older processors by QEMU."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from native_builds import (
    COMPILER,
    NATIVE,
    PROGRAMS,
    Unit,
    assert_within_rounding,
    build_once,
    compile_units,
    cpu_features,
    emulated_flags,
    link_program,
    needs_simde,
    program_results,
    run,
    run_program,
    translation_units,
)

if (platform.system(), platform.machine()) != ("Linux", "x86_64") or COMPILER is None:
    pytest.skip("needs Linux on x86-64 and a C++ compiler", allow_module_level=True)

pytestmark = pytest.mark.slow
DATA = Path(__file__).parents[1] / "data"
AVX512_BF16 = [
    *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
    *("-mavx512vnni", "-mavx512bf16"),
]
# Emulated instruction sets by program.
EMULATED = {
    "conditioning": ["avx512"],
    "kernels": ["avx512", "avx512_bf16"],
    "mmd": ["avx512"],
}


HARDWARE = {"avx512f", "avx512dq", "avx512vl", "avx512bw", "avx512_vnni", "avx512_bf16"}
has_avx512 = cpu_features() >= HARDWARE


# ---- AVX-512 on AVX2


@needs_simde
def test_emulated_operations_are_those_of_the_hardware(tmp_path: Path) -> None:
    """Each operation of simd.h has the digest that AVX-512 hardware gave for the same random bit patterns."""
    recorded = (DATA / "avx512_operations.txt").read_text()
    source = NATIVE / "operations.cpp"
    flags = ["-O1", "-w", "-ffp-contract=off"]
    header = ["-include", str(NATIVE / "avx512_on_avx2.h")]
    emulated = link_program(
        str(COMPILER), source, [], tmp_path, [*flags, "-mavx2", "-mfma", *header]
    )
    assert run([emulated]).stdout == recorded
    if has_avx512:
        hardware = link_program(str(COMPILER), source, [], tmp_path, [*flags, *AVX512_BF16])
        assert run([hardware]).stdout == recorded


@pytest.fixture(scope="module")
def emulated_objects(builds: Path, kernel_objects: dict[Unit, Path]) -> list[Path]:
    """csrc/cpu with emulated AVX-512 kernels, which report themselves as available."""
    flags = {unit: emulated_flags(unit) for unit in kernel_objects}
    units = [unit for unit in kernel_objects if flags[unit] is not None]
    assert {unit.path.stem for unit in units} >= {
        *("cpu_capabilities", "conditioning_avx512", "mmd_avx512"),
        *("denoise_avx512", "denoise_avx512_bf16"),
    }
    folder = build_once(
        builds / "emulated",
        lambda folder: compile_units(str(COMPILER), units, folder, lambda unit: flags[unit] or []),
    )
    return list(replace_objects(kernel_objects, folder).values())


@pytest.fixture(scope="module")
def hardware_objects(builds: Path, kernel_objects: dict[Unit, Path]) -> list[Path]:
    """csrc/cpu without multiply-adds that the compiler fuses by itself."""
    units = [unit for unit in kernel_objects if "-ffp-contract=fast" in unit.flags]
    folder = build_once(
        builds / "unfused",
        lambda folder: compile_units(
            str(COMPILER), units, folder, lambda unit: [*unit.flags, "-ffp-contract=off"]
        ),
    )
    return list(replace_objects(kernel_objects, folder).values())


def replace_objects(objects: dict[Unit, Path], folder: Path) -> dict[Unit, Path]:
    """The object files, replaced by those of `folder` for the same units."""
    others = {unit: folder / f"{unit.path.stem}.o" for unit in objects}
    return {unit: others[unit] if others[unit].exists() else objects[unit] for unit in objects}


@needs_simde
@pytest.mark.parametrize("source", PROGRAMS, ids=lambda path: path.stem)
def test_emulated_kernels(
    source: Path, emulated_objects: list[Path], hardware_objects: list[Path], tmp_path: Path
) -> None:
    """Emulated kernels agree with AVX2 within rounding, and with AVX-512 hardware, if available, bit for bit."""
    programs = []
    for name, objects in (("emulated", emulated_objects), ("hardware", hardware_objects)):
        folder = tmp_path / name
        folder.mkdir()
        programs.append(link_program(str(COMPILER), source, objects, folder, ["-O1"]))
    emulated, hardware = programs
    # In 64-bit code, instructions of AVX-512 and no others begin with the byte 62.
    listing = run(["objdump", "-d", "--insn-width=16", emulated]).stdout
    assert re.search(r"^ *[0-9a-f]+:\t(62 |.*%zmm)", listing, re.MULTILINE) is None
    avx2 = program_results(emulated, "avx2")
    for name in EMULATED[source.stem]:
        found = program_results(emulated, name)
        assert_within_rounding(source.stem, found, avx2)
        if has_avx512:
            np.testing.assert_array_equal(found, program_results(hardware, name), name)


# ---- AMX


@pytest.mark.skipif(not cpu_features() >= {"avx2", "fma"}, reason="needs AVX2")
@pytest.mark.parametrize(
    "sanitizers", [[], ["-fsanitize=address,undefined"]], ids=["", "sanitized"]
)
def test_amx_tiles(sanitizers: list[str], tmp_path: Path) -> None:
    """Emulated tiles equal the instructions' definitions bit for bit, and products sum in the documented order.

    On a processor with AMX its tiles are compared with the same definitions.
    """
    name = "cpu_capabilities"
    units = [unit for unit in translation_units(str(COMPILER)) if unit.path.stem == name]
    flags = ["-O1", "-g", "-mavx2", "-mfma", "-ffp-contract=off", *sanitizers]
    objects = compile_units(str(COMPILER), units, tmp_path)
    program = link_program(str(COMPILER), NATIVE / "amx.cpp", objects, tmp_path, flags)
    assert run_program(program) == ["amx_emulated"]
    if cpu_features() >= {"amx_tile", "amx_bf16", "amx_int8"}:
        assert run_program(program, "--hardware") == ["amx"]
    else:
        done = subprocess.run([program, "--hardware"], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "amx: the processor has no AMX" in done.stderr


# ---- processors without an instruction set

QEMU = shutil.which("qemu-x86_64")


def qemu_version() -> tuple[int, ...]:
    if QEMU is None:
        return (0,)
    text = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", text)
    return tuple(int(part) for part in found.groups()) if found else (0,)


@pytest.mark.skipif(
    qemu_version() < (7, 2), reason="needs QEMU 7.2, which has AVX2 (Debian: qemu-user)"
)
@pytest.mark.parametrize(
    ("model", "sets"),
    [
        ("qemu64", ["portable"]),  # SSE3
        ("Nehalem", ["portable"]),  # SSE4.2
        ("Haswell,-fma", ["portable"]),  # AVX2 alone is not enough
        ("Haswell", ["avx2", "portable"]),
    ],
)
def test_processors_without_an_instruction_set(
    model: str, sets: list[str], kernel_objects: dict[Unit, Path], builds: Path
) -> None:
    """Every operation runs with "auto" and with the processor's sets, and rejects other sets."""

    def link(folder: Path) -> None:
        for source in PROGRAMS:
            link_program(str(COMPILER), source, [*kernel_objects.values()], folder, ["-O2"])

    folder = build_once(builds / "programs", link)
    launcher = [str(QEMU), "-cpu", model]
    for source in PROGRAMS:
        program = folder / source.stem
        # The emulation of AMX needs AVX2; only `denoise` has it.
        emulated = ["amx_emulated"] if program.stem == "kernels" and "avx2" in sets else []
        having = [*sets, *emulated]
        assert run_program(program, "--quick", launcher=launcher) == having
        for name in {"amx", "avx512_bf16", "avx512", "avx2", "amx_emulated"} - set(having):
            done = subprocess.run(
                [*launcher, program, name], capture_output=True, text=True, check=False
            )
            assert done.returncode == 1
            assert f"no instruction set {name} on this processor" in done.stderr
