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
    variants = {row.key[:3] for row in table}
    assert {row.key for row in table} == {
        (*variant, architecture) for variant in variants for architecture in resources.ARCHITECTURES
    }
    assert not [row for row in table if row.stack_bytes]


def test_large_tiles_use_the_matrix_instructions_of_their_architecture() -> None:
    expected = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
    rows = [row for row in resources.read_table() if "BLOCK_M=128" in row.configuration]
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
