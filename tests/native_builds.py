"""Builds csrc/cpu and the programs of tests/native with the compiler options of CMakeLists.txt.

The options come from a CMake configuration for the compiler in question, so that they exist once.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).resolve().parents[1]
NATIVE = Path(__file__).parent / "native"
PROGRAMS = tuple(NATIVE / f"{name}.cpp" for name in ("conditioning", "kernels", "mmd"))
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

# Shares of the largest result, for results of float32, and of `kernels` also for bfloat16 and int8, which
# may round a sum of another order to the neighbouring value.
TOLERANCES = {"conditioning": [1e-6], "kernels": [1e-6, 1e-3, 1e-2], "mmd": [1e-6]}


@dataclass(frozen=True)
class Unit:
    """A translation unit of csrc/cpu.

    Attributes:
        path: the source file.
        flags: its compiler options, without include directories.
    """

    path: Path
    flags: tuple[str, ...]

    @property
    def instructions(self) -> tuple[str, ...]:
        """Its -m options."""
        return tuple(flag for flag in self.flags if flag.startswith("-m"))


@functools.cache
def translation_units(compiler: str, processor: str | None = None) -> tuple[Unit, ...]:
    """The files of csrc/cpu that CMake compiles, in CMake's order.

    Args:
        compiler: the C++ compiler's name or path.
        processor: CMAKE_SYSTEM_PROCESSOR of a cross compiler's Linux; by default, this machine's.
    """
    pybind11 = pytest.importorskip("pybind11")
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    cmake, ninja = shutil.which("cmake", path=search), shutil.which("ninja", path=search)
    if cmake is None or ninja is None:
        pytest.skip("cmake or ninja is not installed")
    definitions = {
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    if processor is not None:
        definitions |= {
            "CMAKE_SYSTEM_NAME": "Linux",
            "CMAKE_SYSTEM_PROCESSOR": processor,
            "Python_INCLUDE_DIR": sysconfig.get_path("include"),
        }
    with tempfile.TemporaryDirectory() as folder:
        run(
            [
                *(cmake, "-G", "Ninja", "-S", str(SOURCE), "-B", folder),
                *(f"-D{name}={value}" for name, value in definitions.items()),
            ]
        )
        entries = json.loads((Path(folder) / "compile_commands.json").read_text())
    units = []
    for entry in entries:
        path = Path(entry["file"])
        if not path.is_relative_to(SOURCE / "csrc" / "cpu"):
            continue
        flags = [
            word
            for word in shlex.split(entry["command"])[1:]
            if word.startswith(("-O", "-std=", "-f", "-m", "-W"))
        ]
        units.append(Unit(path, tuple(flags)))
    assert {unit.path.stem for unit in units} >= {"denoise", "conditioning", "mmd", "rois"}
    return tuple(units)


def run(command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a command; fails the test with the command's output if its status is not 0."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        words = " ".join(str(word) for word in command)
        pytest.fail(f"{words}\nstatus {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)
    return done


def build_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """Calls build(folder) in one worker of this session, for which the others wait; returns folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            build(folder)
            (folder / "complete").touch()
    return folder


def compile_units(
    compiler: str,
    units: Iterable[Unit],
    folder: Path,
    flags: Callable[[Unit], Sequence[str]] = lambda unit: unit.flags,
) -> list[Path]:
    """Compiles units in parallel.

    Args:
        compiler: the C++ compiler.
        units: what to compile.
        folder: folder of the object files, which are named after their sources.
        flags: a unit's compiler options; by default, those of CMake.

    Returns:
        The object files, in the order of the units.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def compile_unit(unit: Unit) -> Path:
        target = folder / f"{unit.path.stem}.o"
        include = f"-I{SOURCE / 'csrc'}"
        run([compiler, *flags(unit), include, "-c", unit.path, "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_unit, units))


def installed_objects(compiler: str, units: Iterable[Unit]) -> dict[Unit, Path] | None:
    """Object files of an editable installation by the same compiler, if all are newer than the sources."""
    folder = SOURCE / "build/editable"
    objects = {
        unit: folder / f"CMakeFiles/_C.dir/{unit.path.relative_to(SOURCE)}.o" for unit in units
    }
    try:
        options, _ = json.loads((folder / "configured.json").read_text(encoding="utf-8"))
        oldest = min(path.stat().st_mtime for path in objects.values())
    except OSError:
        return None
    newest = max(path.stat().st_mtime for path in (SOURCE / "csrc").rglob("*.[ch]*"))
    same = options.get("CMAKE_CXX_COMPILER") == shutil.which(compiler)
    return objects if same and oldest > newest else None


def link_program(
    compiler: str, source: Path, objects: Sequence[Path], folder: Path, flags: Sequence[str]
) -> Path:
    """Compiles a program of tests/native with `flags` and links it with objects of csrc/cpu."""
    program = folder / source.stem
    include = f"-I{SOURCE / 'csrc'}"
    run([compiler, "-std=c++20", *flags, include, source, *objects, "-pthread", "-o", program])
    return program


def run_program(program: Path, *arguments: str, launcher: Sequence[str] = ()) -> list[str]:
    """Runs a program of tests/native.

    Args:
        program: the executable.
        arguments: `[--quick] [--results FILE] [INSTRUCTION_SET ...]`.
        launcher: a command that runs the program, such as QEMU.

    Returns:
        The instruction sets that it ran.
    """
    last = run([*launcher, program, *arguments]).stdout.splitlines()[-1]
    name, _, sets = last.partition(" ran:")
    assert name == program.name, last
    return sets.split()


def program_results(program: Path, name: str, launcher: Sequence[str] = ()) -> np.ndarray:
    """Results [N] float64 of a program's smallest sizes with the instruction set `name`."""
    path = program.with_suffix(".results")
    assert run_program(program, "--quick", "--results", str(path), name, launcher=launcher) == [
        name
    ]
    return np.fromfile(path)


def assert_within_rounding(program: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Compares results of two instruction sets, which sum in a different order.

    A program has equally many results for each of its TOLERANCES.
    """
    tolerances = TOLERANCES[program]
    assert found.size == expected.size > 300
    assert found.size % len(tolerances) == 0
    parts = (np.split(values, len(tolerances)) for values in (found, expected))
    for tolerance, a, b in zip(tolerances, *parts, strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def emulated_flags(unit: Unit) -> list[str] | None:
    """Compiler options that compile a unit of AVX-512 kernels for AVX2, with tests/native/avx512_on_avx2.h.

    cpu_capabilities.cpp is one: it decides which kernels run. Nothing is fused but where the source says so. Compilers
    choose differently at other vector sizes.

    Returns:
        The options, or None for a unit that is not emulated. All emulated units must be linked together: the
        calling convention of vectors in their inline functions differs from that of other builds.
    """
    emulated = "-mavx512f" in unit.instructions or unit.path.stem == "cpu_capabilities"
    if not emulated or any(flag.startswith("-mamx") for flag in unit.instructions):
        return None
    header = str(NATIVE / "avx512_on_avx2.h")
    return [
        # -O1 compiles seven times as long, and the programs are hardly faster.
        *("-Og", "-std=c++20", "-w", "-mavx2", "-mfma", "-ffp-contract=off", "-fno-tree-sra"),
        *("-include", header),
    ]


def cpu_features() -> set[str]:
    """The processor's features as Linux on x86 names them; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    found = info.is_file() and re.search(r"^flags\s*:(.*)$", info.read_text(), re.MULTILINE)
    return set(found[1].split()) if found else set()


@functools.cache
def has_simde() -> bool:
    """Whether tests/native/avx512_on_avx2.h can be compiled (SIMDe) and run (AVX2)."""
    text = "#if __has_include(<simde/x86/avx512.h>)\nfound\n#endif\n"
    preprocess = [str(COMPILER), "-E", "-x", "c++", "-"]
    return (
        COMPILER is not None
        and cpu_features() >= {"avx2", "fma"}
        and "found" in run(preprocess, input=text).stdout.split()
    )


needs_simde = pytest.mark.skipif(
    not has_simde(), reason="needs AVX2 and SIMDe (Debian: libsimde-dev)"
)
