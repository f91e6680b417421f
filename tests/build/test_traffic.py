"""Memory traffic of the CUDA kernels, counted in the emulator and compared with the least possible."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import traffic


@pytest.mark.emulated
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(("features", "rows", "blocks"), [(256, 8, 4), (512, 32, 8), (256, 64, 4)])
def test_denoise_reads_its_weights_once_per_step(features, rows, blocks, precision) -> None:
    classes = 5
    kernels = traffic.denoise_step(features, classes, rows, blocks, precision)
    (found,) = (kernel for name, kernel in kernels.items() if name.startswith("Chains"))
    formula = traffic.denoise_bytes(features, classes, rows, blocks, precision)
    activations = 2 * rows * features * 2  # bytes of both products' inputs, bfloat16
    assert found["copy_bytes"] == formula["hidden weights"] + blocks * activations
    touched = found["load_unique_bytes"] + found["store_unique_bytes"]
    assert touched == pytest.approx(sum(formula.values()), rel=0.01)
    assert found["matrix_instructions"] == 2 * (features / 16) ** 2 * rows / 8
    assert found["shared_wavefronts"] <= 1.02 * found["shared_ideal"]


def test_weights_are_almost_all_traffic_at_the_published_size() -> None:
    step = traffic.denoise_bytes(6144, 5, 32, 132)
    weights = step.pop("hidden weights")
    assert weights == 2 * 6144 * 6144 * 2
    assert sum(step.values()) <= 0.03 * weights


@pytest.mark.emulated
def test_operations_touch_little_more_than_their_arguments() -> None:
    for count in [*traffic._conditioning(), *traffic._rois(), next(traffic._mmd())]:
        assert count.touched <= 1.05 * count.least, count.title
        assert count.conflicts <= 0.02, count.title


@pytest.mark.emulated
def test_counts_are_those_of_the_committed_table() -> None:
    """Finds repeated reads and additional barriers, which change no result."""
    table = json.loads((traffic.RESULTS / "traffic.json").read_text())
    found = [dataclasses.asdict(count) for count in traffic.counts()]
    for here, there in zip(found, table, strict=True):
        for count in (here, there):  # their names depend on the compiler
            count["kernels"] = list(count["kernels"].values())
        assert here == there, f"{here['title']}: see python -m benchmarks.traffic --write"
