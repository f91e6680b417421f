"""What the compiler says of the Triton kernels. Needs the source tree and Triton, no GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(os.environ.get("DIFFMIC_SOURCE") or Path(__file__).parents[2])
if not (SOURCE / "benchmarks").is_dir():
    pytest.skip("no source tree: set DIFFMIC_SOURCE", allow_module_level=True)


@pytest.fixture(scope="module")
def resources() -> Iterator[Any]:
    sys.path.append(str(SOURCE))  # last: an installed diffmic_fast comes before the sources
    try:
        from benchmarks import triton_resources

        yield triton_resources
    finally:
        sys.path.remove(str(SOURCE))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_no_kernel_lost_anything(architecture: int, tmp_path: Path) -> None:
    # A process of its own: this one may have the kernels in Triton's interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(SOURCE)}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.triton_resources", "--architectures", str(architecture)],
        capture_output=True, text=True, env=environment, cwd=SOURCE,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("nothing was lost against the table\n")


def test_the_table_has_every_architecture_and_no_spill(resources: Any) -> None:
    table = resources.read_table()
    variants = {row.key[:3] for row in table}
    assert {row.key for row in table} == {
        (*variant, architecture) for variant in variants for architecture in resources.ARCHITECTURES
    }
    assert not [row for row in table if row.stack_bytes]


def test_large_tiles_have_the_matrix_instructions_of_their_architecture(resources: Any) -> None:
    wanted = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
    rows = [row for row in resources.read_table() if "BLOCK_M=128" in row.configuration]
    assert {row.dtype for row in rows} == {"bf16", "fp16", "fp32"}
    for row in rows:
        # A product of float32 as such has no matrix instruction.
        ieee = row.dtype == "fp32" and "tf32" not in row.configuration
        assert row.instruction == ("none" if ieee else wanted[row.architecture])


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
def test_a_loss_is_told(resources: Any, changes: dict[str, Any], loss: str) -> None:
    row = resources.Row("layer", "bf16", "BLOCK_M=64", 90, 128, 0, 1024, "wgmma.mma_async", "3.8.0")
    losses = resources.compare([dataclasses.replace(row, **changes)], [row])
    assert any(loss in line for line in losses)


@pytest.mark.parametrize("changes", [{}, {"registers": 100}, {"triton": "4.0.0", "registers": 200}])
def test_what_is_no_loss(resources: Any, changes: dict[str, Any]) -> None:
    row = resources.Row("layer", "bf16", "BLOCK_M=64", 90, 128, 0, 1024, "wgmma.mma_async", "3.8.0")
    assert not resources.compare([dataclasses.replace(row, **changes)], [row])
