"""Registers, shared memory and instructions of the Triton kernels. Needs Triton, no GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import triton_resources as resources
from benchmarks.gpu_limits import MULTIPROCESSORS

SOURCE = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_no_kernel_is_worse_than_the_table(architecture: int, tmp_path: Path) -> None:
    # A separate process, since this one may have loaded the kernels into Triton's interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.triton_resources", "--architectures", str(architecture)],
        capture_output=True, text=True, env=environment, cwd=SOURCE,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("no kernel is worse than the table\n")


def test_the_table_has_every_architecture_and_no_spill() -> None:
    table = resources.read_table()
    versions = {row.triton for row in table}
    for version in versions:
        rows = [row for row in table if row.triton == version]
        variants = {row.key[:3] for row in rows}
        assert sorted(row.key for row in rows) == sorted(
            (*variant, architecture)
            for variant in variants
            for architecture in resources.ARCHITECTURES
        )
    newest = max(versions, key=resources.version)
    assert not [row for row in table if row.stack_bytes and row.triton == newest]


def test_every_tile_fits_the_shared_memory_of_every_gpu() -> None:
    """The tile of a size is fixed, and none replaces it where it does not fit. sm_86 and 89 run the code of sm_80."""
    least = min(limits.block_shared_bytes for limits in MULTIPROCESSORS.values())
    for row in resources.read_table():
        assert row.architecture in (90, 100) or row.shared_bytes <= least


def test_large_tiles_use_the_matrix_instructions_of_their_architecture() -> None:
    expected = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
    table = resources.read_table()
    newest = max((row.triton for row in table), key=resources.version)
    rows = [row for row in table if row.triton == newest and "BLOCK_M=128" in row.configuration]
    assert {row.dtype for row in rows} == {"bf16", "fp16", "fp32"}
    for row in rows:
        # IEEE float32 has no matrix instruction.
        ieee = row.dtype == "fp32" and "tf32" not in row.configuration
        assert row.instruction == ("none" if ieee else expected[row.architecture])


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({"stack_bytes": 8}, "8 bytes of stack frame"),
        ({"shared_bytes": 240 * 1024}, "more than a block has"),
        ({"instruction": "mma.sync"}, "wgmma.mma_async -> mma.sync"),
        ({"registers": 129}, "registers 128 -> 129"),
        ({"configuration": "BLOCK_M=32"}, "not in the table"),
        ({"configuration": "BLOCK_M=32"}, "no longer there"),
        ({"triton": "4.0.0", "stack_bytes": 8}, "8 bytes of stack frame"),
    ],
)
def test_losses_are_reported(changes: dict[str, Any], loss: str) -> None:
    row = resources.Row("layer", "bf16", "BLOCK_M=64", 90, 128, 0, 1024, "wgmma.mma_async", "3.8.0")
    losses = resources.compare([dataclasses.replace(row, **changes)], [row])
    assert any(loss in line for line in losses)


@pytest.mark.parametrize("changes", [{}, {"registers": 100}, {"triton": "4.0.0", "registers": 200}])
def test_improvements_and_other_compilers_are_not_losses(changes: dict[str, Any]) -> None:
    row = resources.Row("layer", "bf16", "BLOCK_M=64", 90, 128, 0, 1024, "wgmma.mma_async", "3.8.0")
    assert not resources.compare([dataclasses.replace(row, **changes)], [row])


def test_a_version_is_compared_with_its_own_rows() -> None:
    base = resources.Row(
        "layer", "bf16", "BLOCK_M=64", 90, 128, 0, 1024, "wgmma.mma_async", "3.8.0"
    )
    older = dataclasses.replace(base, triton="3.6.0", registers=140, instruction="mma.sync")
    table = [older, base]
    assert not resources.compare([older], table) and not resources.compare([base], table)
    spilled = dataclasses.replace(older, stack_bytes=16)
    assert not resources.compare([spilled], [spilled, base])
    assert len(resources.compare([spilled], table)) == 1
    worse = dataclasses.replace(older, registers=141)
    assert resources.compare([worse], table) == [
        "sm_90 layer bf16 BLOCK_M=64: registers 140 -> 141"
    ]
    assert resources.expected_rows(table, "3.6.0") == ([older], "")


def test_an_unknown_version_is_compared_with_the_newest_and_said() -> None:
    base = resources.Row(
        "layer", "bf16", "BLOCK_M=64", 90, 128, 0, 1024, "wgmma.mma_async", "3.10.0"
    )
    older = dataclasses.replace(base, triton="3.9.0", configuration="BLOCK_M=32")
    rows, remark = resources.expected_rows([base, older], "4.0.0")
    assert rows == [base] and "no rows of Triton 4.0.0, only of 3.9.0, 3.10.0" in remark
    new = dataclasses.replace(base, triton="4.0.0", registers=200, instruction="mma.sync")
    assert not resources.compare([new], [base, older])
    new = dataclasses.replace(new, stack_bytes=8)
    assert len(resources.compare([new], [base, older])) == 1


def test_writing_replaces_the_rows_of_one_version() -> None:
    base = resources.Row(
        "layer", "bf16", "BLOCK_M=64", 90, 128, 0, 1024, "wgmma.mma_async", "3.8.0"
    )
    older, other = (
        dataclasses.replace(base, triton="3.6.0"),
        dataclasses.replace(base, architecture=80),
    )
    new = dataclasses.replace(base, registers=100)
    assert resources.updated([base, older, other], [new]) == [older, other, new]
