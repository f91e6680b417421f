"""Registers, spills, shared memory and instructions of the CUDA kernels on every architecture."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_resources as resources
from benchmarks.cubins import find_tool, plain_name, read_cubin
from benchmarks.gpu_limits import resident_warps

SOURCE = Path(__file__).resolve().parents[2]
needs_nvcc = pytest.mark.skipif(
    bool(resources.missing_tools()), reason=resources.missing_tools() or "nvcc is installed"
)


# ---- the committed table ---------------------------------------------------------------------


@pytest.mark.slow
@needs_nvcc
def test_no_kernel_is_worse_than_the_table(tmp_path: Path) -> None:
    # Compiling all takes sixteen minutes of a core. One architecture is measured whole, the installed one or else
    # sm_90, and of the others what has changed since the table.
    built = resources.built_architecture()
    whole = built if built in resources.ARCHITECTURES else 90
    known = [row for row in resources.read_table() if row.architecture != whole]
    rows = resources.measure(resources.ARCHITECTURES, tmp_path, known=known, built=built)
    assert {row.file for row in rows if row.architecture == whole} == {
        file.stem for file in resources.sources()
    }
    losses, improvements = resources.compare(rows, resources.read_table())
    for line in improvements:
        print(f"python -m benchmarks.kernel_resources --write: {line}")
    assert not losses, "\n".join(losses)


def test_changed_files_are_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of an included header or of an option counts, a comment does not."""
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    file, header, deep = folder / "a.cu", folder / "a.h", tmp_path / "csrc" / "deep.h"
    file.write_text('#include "cuda/a.h"\n__global__ void K() {}\n')
    header.write_text('#include "deep.h"\n#include <cstdint>\n')
    deep.write_text('#include "cuda/a.h"\nint x = 1;\n')
    monkeypatch.setattr(resources, "SOURCE", tmp_path)
    first = resources.digest(file)
    deep.write_text('#include "cuda/a.h"  // again\n\nint x = 1;  // one\n')
    assert resources.digest(file) == first
    deep.write_text('#include "cuda/a.h"\nint x = 2;\n')
    second = resources.digest(file)
    monkeypatch.setattr(resources, "_FLAGS", ("-O1",))
    assert len({first, second, resources.digest(file)}) == 3
    compiled: list[tuple[int, str]] = []
    monkeypatch.setattr(resources, "find_tool", lambda name: name)
    monkeypatch.setattr(resources, "compiler_version", lambda: "13.0")

    def compile_all(work: Any, *_: Any, **__: Any) -> dict[tuple[int, str], Path]:
        compiled.extend((architecture, file.stem) for architecture, file in work)
        return {}

    monkeypatch.setattr(resources, "compile_all", compile_all)
    same = row(file="a", sources=resources.digest(file))
    stale = [dataclasses.replace(same, architecture=80, sources=second),
             dataclasses.replace(same, architecture=86, compiler="12.9")]  # fmt: skip
    resources.measure((80, 86, 89, 90), tmp_path, known=[same, *stale])
    assert compiled == [(80, "a"), (86, "a"), (89, "a")]


def test_the_table_has_every_kernel_on_every_architecture() -> None:
    table = resources.read_table()
    files = {file.stem for file in resources.sources()}
    assert {row.file for row in table} == files
    kernels = {(row.file, row.kernel) for row in table}
    assert len(table) == len(kernels) * len(resources.ARCHITECTURES)
    assert not [row for row in table if row.spill_bytes]


# ---- rounding --------------------------------------------------------------------------------


def options_of(file: Path, variable: str) -> list[str]:
    """The words of `set(variable ...)` in a file of CMake."""
    found = re.search(rf"set\({variable}\s+([^)]*)\)", file.read_text(encoding="utf-8"))
    assert found is not None
    return found[1].split()


def test_kernels_and_emulator_round_alike() -> None:
    """Multiply-adds are fused where the source says so, in what is installed, in the table and in the emulator."""
    installed = options_of(SOURCE / "CMakeLists.txt", "cuda_options")
    assert "-fmad=false" in installed
    assert sorted(installed) == sorted(set(resources._FLAGS) - {"-std=c++20"})
    assert "-ffp-contract=off" in options_of(SOURCE / "CMakeLists.txt", "cxx_options")
    emulated = options_of(SOURCE / "tests" / "emulator" / "CMakeLists.txt", "options")
    assert "-ffp-contract=off" in emulated
    for options in (installed, emulated):
        assert not [word for word in options if "fast" in word or "ftz" in word]


@needs_nvcc
@pytest.mark.parametrize("number", ["float", "double"])
def test_the_compiler_fuses_only_what_the_source_fuses(tmp_path: Path, number: str) -> None:
    fused = {"float": "FFMA", "double": "DFMA"}[number]
    source = tmp_path / "kernels.cu"
    source.write_text(
        f"""#include <math.h>
__global__ void Separate({number}* x) {{ x[0] = x[1] * x[2] + x[3]; x[4] = x[5] - x[6] * x[7]; }}
__global__ void Fused({number}* x) {{ x[0] = fma(x[1], x[2], x[3]); }}
"""
    )
    cubin = tmp_path / "kernels.cubin"
    subprocess.run([*resources._nvcc(source, 90), "-cubin", "-o", str(cubin)], check=True)
    counts = {}
    for name, (_, opcodes) in read_cubin(str(find_tool("cuobjdump")), cubin).items():
        counts["Separate" in name] = sum(n for code, n in opcodes.items() if code.startswith(fused))
    assert counts == {True: 0, False: 1}


# ---- how it is read and compared -------------------------------------------------------------


def row(**changes: Any) -> Any:
    base = resources.Row(90, "mmd", "mmd::Tile<4>", 64, 0, 1024, 32, "HMMA:8 LDG.E.128:4", "13.0")
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({"spill_bytes": 16}, "16 bytes of stack frame"),
        ({"warps": 24}, "resident warps 32 -> 24"),
        ({"shared_bytes": 2048}, "static shared memory 1024 -> 2048"),
        ({"instructions": "HMMA:8 LDG.E.128:3"}, "LDG.E.128 4 -> 3"),
        ({"instructions": "HMMA:0 LDG.E.128:4", "compiler": "12.9"}, "no HMMA in the machine code"),
        ({"spill_bytes": 8, "compiler": "12.9"}, "8 bytes of stack frame"),
        ({"kernel": "mmd::Tile<8>"}, "not in the table"),
    ],
)
def test_losses_are_reported(changes: dict[str, Any], loss: str) -> None:
    losses, _ = resources.compare([row(**changes)], [row()])
    assert any(loss in line for line in losses)


@pytest.mark.parametrize(
    ("changes", "better"),
    [
        ({}, None),
        ({"registers": 70}, None),  # without fewer warps
        ({"warps": 24, "compiler": "12.9"}, None),  # another compiler's numbers
        ({"warps": 40}, "resident warps 32 -> 40"),
        ({"shared_bytes": 0}, "static shared memory 1024 -> 0"),
        ({"instructions": "HMMA:9 LDG.E.128:4"}, "HMMA 8 -> 9"),
    ],
)
def test_improvements_and_other_compilers_are_not_losses(
    changes: dict[str, Any], better: str | None
) -> None:
    losses, improvements = resources.compare([row(**changes)], [row()])
    assert not losses
    assert bool(improvements) == bool(better) and (not better or better in improvements[0])


def test_removed_kernels_are_losses() -> None:
    other = row(kernel="mmd::Tile<8>")
    losses, _ = resources.compare([row()], [row(), other])
    assert losses == ["sm_90 mmd::Tile<8>: in the table, but no longer in mmd.cu"]


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "dynamic", "block", "warps"),
    [  # computed by hand from the limits in the programming guide
        (80, 32, 0, 0, 256, 64),
        (80, 64, 0, 0, 256, 32),
        (80, 72, 0, 0, 256, 24),
        (90, 255, 1024, "most", 256, 8),
        (86, 32, 0, 0, 32, 16),
        (89, 32, 0, 48 * 1024, 128, 8),
    ],
)
def test_resident_warps(
    architecture: int,
    registers: int,
    shared: int,
    dynamic: int | str,
    block: int,
    warps: int,
) -> None:
    assert resident_warps(architecture, registers, shared, dynamic, block) == warps


def test_plain_names() -> None:
    name = (
        "void diffmic::cuda::rois::(anonymous namespace)::CutCropsKernel<diffmic::cuda::rois::"
        "Float32, 4>(diffmic::cuda::rois::(anonymous namespace)::CutProblem)"
    )
    assert plain_name(name) == "rois::CutCropsKernel<Float32,4>"


@pytest.mark.slow
@needs_nvcc
def test_a_spill_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a source with a spill and without a claimed instruction to the reported losses."""
    source = tmp_path / "spilling.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) Spill(float* x) {\n"
        "  float kept[64];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) kept[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) x[(i ^ 5) * 1024 + threadIdx.x] = kept[i] + kept[63 - i];\n"
        "}\n"
    )
    claims = tmp_path / "claims.json"
    entry = {"kernel": "Spill", "block": 1024, "dynamic_shared": 0, "instructions": {"HMMA": "-"}}
    claims.write_text(json.dumps([entry]))
    monkeypatch.setattr(resources, "CLAIMS", claims)
    (found,) = resources.measure([80], tmp_path, files=[source])
    losses, _ = resources.compare([found], [dataclasses.replace(found)])
    assert found.spill_bytes > 0 and len(losses) == 2
    assert "stack frame" in losses[0] and "no HMMA" in losses[1]


# ---- SentryWard ------------------------------------------------------------------------------


def u64(offset: int, value: int, parameter: int = 0) -> dict[str, Any]:
    return {"parameter": parameter, "offset": offset, "type": "u64", "value": value}


def u64s(values: dict[int, int]) -> list[dict[str, Any]]:
    return [u64(offset, value) for offset, value in values.items()]


# The bytes of struct Choice of rois: 2 classes of 4 x 4 cells, windows of one cell, one choice, no
# origins, no workspace.
CHOICE = {8: 1, 16: 2, 24: 4, 32: 4, 40: 32, 48: 16, 56: 4, 64: 1, 72: 1, 80: 1, 88: 1}
CHOICE |= {104: 0, 112: 8, 120: 8, 128: 1, 136: 0, 144: 0, 152: 0}
# The bytes of struct Problem of mmd: 4 rows and 4 of one element each, no weights, the scale 1/2, both gradients.
# Pointers are 1 MiB apart.
PROBLEM = {
    0: 1 << 20,
    8: 2 << 20,
    16: 4,
    24: 4,
    32: 1,
    40: 1,
    48: 1,
    56: 1,
    64: 1,
    72: 0,
    80: 0,
    88: 0,
    96: 0,
    104: 0,
}
PROBLEM |= {
    112: 0,
    120: 1 | 0x3F000000 << 32,
    1152: 0,
    1160: 3 << 20,
    1168: 4 << 20,
    1176: 1 | 1 << 32,
    1184: 4,
}
PROBLEM |= {1192: 8, 1200: 1, 1208: 0, 1216: 5 << 20, 1224: 0}


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
    ("file", "kernel", "arguments", "verdict"),
    [
        ("rois_windows", "ChooseKernel.*7Float32ELb1", u64s(CHOICE), None),
        ("mmd", "12FinishKernelIf", [*u64s(PROBLEM), u64(0, 1, parameter=1)], "race_free"),
    ],
    ids=["rois choice", "mmd finish"],
)
def test_threads_meet_at_the_same_barriers(
    tmp_path: Path, file: str, kernel: str, arguments: list[Any], verdict: str | None
) -> None:
    """SentryWard, on one representative path of the branches that depend on data.

    It proves that all threads meet at the same barriers and shuffles, and for one kernel that there is no race. It
    cannot decide that where addresses depend on data or pointers must be numbers; the emulator checks those kernels.
    """
    program = shutil.which(
        "sentryward", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if program is None:
        pytest.skip("sentryward is not installed")
    (source,) = (SOURCE / "csrc" / "cuda").rglob(f"{file}.cu")
    ptx = resources.compile_ptx(source, 80, tmp_path / "kernels.ptx")
    entries = re.findall(r"\.entry (\S+)\(", ptx.read_text())
    (entry,) = (name for name in entries if re.search(kernel, name))
    configuration = {
        "schema": "spverify.kernel-input/v1",
        "entry": entry,
        "launch": {"grid_dim": [1, 1, 1], "block_dim": [256, 1, 1], "dynamic_shared_bytes": 49152},
        "arguments": arguments,
        "assumptions": {"representative_branches": True, "bounded_computation_loops": True},
    }
    path = tmp_path / "input.json"
    path.write_text(json.dumps(configuration))
    command = [program, str(ptx), "--input", str(path), "--timeout", "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout)
    assert result["checks"]["synchronization"] == "passed", result["diagnostics"]
    assert result["result"] != "potential_race", result["diagnostics"]
    assert verdict in (None, result["result"]), result["diagnostics"]
