"""csrc/cpu, compiled by every C++ compiler that is installed, with the options of CMake.

No warnings, and no code of one instruction set that callers of another could reach.
"""

from __future__ import annotations

import collections
import re
import shutil
from pathlib import Path

import pytest
from native_builds import COMPILER, Unit, compile_units, run, translation_units

NAMES = ["g++", "clang++", *(f"g++-{n}" for n in range(11, 17))]
NAMES += [f"clang++-{n}" for n in range(14, 24)]
OWN = re.compile(r"diffmic::cpu::(avx2|avx512|avx512_bf16|amx|amx_emulated)::|^DW\.ref\.")


def compilers() -> list[str]:
    """The default compiler and those of NAMES that are installed, each program once."""
    found: dict[Path, str] = {}
    for name in [COMPILER, *NAMES]:
        path = name and shutil.which(name)
        if path:
            found.setdefault(Path(path).resolve(), str(name))
    return list(found.values())


def shared_symbols(objects: dict[Unit, Path]) -> list[str]:
    """Weak definitions in objects that are compiled for an instruction set, as "object: symbol".

    The linker keeps one copy of a function that several objects define weakly, such as an inline function of the
    standard library, and it may be the copy for an instruction set that the processor lacks. Names in the namespace of
    an instruction set have no other callers, and DW.ref symbols are data of exception handling.
    """
    where = collections.defaultdict(set)
    for unit, path in objects.items():
        for line in run(["nm", "-C", "--defined-only", path]).stdout.splitlines():
            found = re.match(r"[0-9a-f]* ?([WVu]) (.*)", line)
            if found:
                where[found[2]].add(unit)
    return [
        f"{unit.path.name}: {symbol}"
        for symbol, units in where.items()
        for unit in units
        if unit.instructions and not OWN.search(symbol)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", compilers())
def test_kernels_compile_without_warnings(
    compiler: str, builds: Path, kernel_objects: dict[Unit, Path]
) -> None:
    objects = kernel_objects
    if compiler != COMPILER:
        units = translation_units(compiler)
        assert all({"-Wall", "-Wextra", "-Werror"} <= set(unit.flags) for unit in units)
        paths = compile_units(compiler, units, builds / compiler)
        objects = dict(zip(units, paths, strict=True))
    assert shared_symbols(objects) == []
    # Static constructors run before any dispatch.
    for unit, path in objects.items():
        if unit.instructions:
            assert ".init_array" not in run(["objdump", "-h", path]).stdout, unit.path.name


@pytest.mark.slow
def test_shared_symbols_are_found(tmp_path: Path, kernel_objects: dict[Unit, Path]) -> None:
    """An inline function that is not inlined is a weak definition."""
    source = tmp_path / "leak_avx2.cpp"
    source.write_text(
        "[[gnu::noinline]] inline int leak(int x) { return x + 1; }\n"
        "int caller(int x) { return leak(x); }\n"
    )
    unit = Unit(source, ("-O2", "-mavx2"))
    objects = compile_units(str(COMPILER), [unit], tmp_path)
    assert shared_symbols({**kernel_objects, unit: objects[0]}) == ["leak_avx2.cpp: leak(int)"]
