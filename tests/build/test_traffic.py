"""What the CUDA kernels move, counted in the emulator: nothing twice that once would do. Needs the source tree."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffmic_fast import _native

SOURCE = Path(os.environ.get("DIFFMIC_SOURCE") or Path(__file__).parents[2])
if not (SOURCE / "benchmarks").is_dir():
    pytest.skip("no source tree: set DIFFMIC_SOURCE", allow_module_level=True)
if reason := _native.attempt_emulated()[1]:
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def traffic() -> Iterator[Any]:
    sys.path.append(str(SOURCE))  # last: an installed diffmic_fast comes before the sources
    try:
        from benchmarks import traffic

        yield traffic
    finally:
        sys.path.remove(str(SOURCE))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(("features", "rows", "blocks"), [(256, 8, 4), (512, 32, 8), (256, 64, 4)])
def test_denoise_reads_its_weights_once_a_step(traffic, features, rows, blocks, precision) -> None:
    classes = 5
    kernels = traffic.denoise_step(features, classes, rows, blocks, precision)
    (found,) = (kernel for name, kernel in kernels.items() if name.startswith("Chains"))
    formula = traffic.denoise_bytes(features, classes, rows, blocks, precision)
    activations = 2 * rows * features * 2  # of both products, bfloat16
    assert found["copy_bytes"] == formula["hidden weights"] + blocks * activations
    touched = found["load_unique_bytes"] + found["store_unique_bytes"]
    assert touched == pytest.approx(sum(formula.values()), rel=0.01)
    assert found["matrix_instructions"] == 2 * (features / 16) ** 2 * rows / 8
    assert found["shared_wavefronts"] <= 1.02 * found["shared_ideal"]


def test_all_else_of_a_published_step_is_little(traffic) -> None:
    step = traffic.denoise_bytes(6144, 5, 32, 132)
    weights = step.pop("hidden weights")
    assert weights == 2 * 6144 * 6144 * 2
    assert sum(step.values()) <= 0.03 * weights


def test_operations_touch_little_more_than_they_must(traffic) -> None:
    for count in [*traffic._conditioning(), *traffic._rois(), next(traffic._mmd())]:
        assert count.touched <= 1.05 * count.least, count.title
        assert count.conflicts <= 0.02, count.title


def test_counts_are_those_of_the_committed_table(traffic) -> None:
    """What is read again, a barrier more: nothing that changes no number goes unseen."""
    table = json.loads((traffic.RESULTS / "traffic.json").read_text())
    found = [dataclasses.asdict(count) for count in traffic.counts()]
    for here, there in zip(found, table, strict=True):
        for count in (here, there):  # their names are the compiler's
            count["kernels"] = list(count["kernels"].values())
        assert here == there, f"{here['title']}: see python -m benchmarks.traffic --write"
