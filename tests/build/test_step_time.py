"""The prediction of a step's time counts what the emulator counts, and the committed table is the program's."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import step_time, traffic
from benchmarks.step_time import H100, Rounds, predict, predictions, rounds

STEPS = 6


def counted(
    features: int, classes: int, rows: int, blocks: int, precision: str, steps: int = STEPS
) -> list[tuple[int, int, int]]:
    """The emulator's intervals of a chain."""
    kernels = traffic.denoise_chain(features, classes, rows, blocks, precision, steps)
    (found,) = (kernel for name, kernel in kernels.items() if name.startswith("Chains"))
    return found["intervals"]


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("features", "classes", "rows", "blocks", "precision", "row_tiles"),
    [
        (256, 5, 8, 16, "bf16", 1),
        (384, 5, 32, 8, "bf16", 4),
        (384, 5, 64, 8, "fp8", 8),
        (256, 9, 8, 16, "fp32", 1),
        (384, 5, 1, 4, "bf16", 1),
    ],
)
def test_rounds_are_those_that_the_emulator_counts(
    features: int, classes: int, rows: int, blocks: int, precision: str, row_tiles: int
) -> None:
    """In the second step and later, when gamma and features have been prefetched."""
    expected = rounds(features // 16 // blocks, row_tiles, rows, classes, blocks)
    found = counted(features, classes, rows, blocks, precision)
    assert len(found) == 3 * STEPS + 1  # a grid barrier after each interval but the last
    # The launch begins with the first layer, and ends after the states.
    for first, name in ((4, "first product"), (5, "second product"), (6, "states and first layer")):
        intervals = [Rounds(l2, dram) for l2, dram, _ in found[first:-1:3]]
        assert max(intervals, key=lambda one: one.latency(H100)) == expected[name], name


@pytest.mark.emulated
def test_copies_of_a_product_are_as_far_ahead_as_the_ring_holds() -> None:
    """Rounds of asynchronous copies: stages of activations over stages in flight."""
    # 1024 columns of float32 are 8 stages of a warp, 4 of them in flight.
    assert [copies for _, _, copies in counted(1024, 5, 1, 64, "fp32", steps=1)[1:3]] == [2, 2]


@pytest.mark.emulated
def test_predictions_are_those_of_the_committed_table() -> None:
    table = json.loads((step_time.RESULTS / "step_time.json").read_text())
    assert [dataclasses.asdict(each) for each in predictions()] == table


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("precision", "rows"),
    [
        ("bf16", 1),
        ("bf16", 8),
        ("bf16", 32),
        ("fp8", 1),
        ("fp8", 8),
        ("fp8", 32),
        ("fp32", 1),
        ("fp32", 8),
        ("fp32", 32),
    ],
)
def test_what_meets_the_target(precision: str, rows: int) -> None:
    assert predict(precision, rows).ratio <= step_time.TARGETS[precision]


@pytest.mark.emulated
def test_what_64_rows_miss() -> None:
    """Partial sums in bf16, activations in fp8, a second launch in fp32."""
    bf16, fp8, fp32 = (predict(precision, 64) for precision in ("bf16", "fp8", "fp32"))
    exposed = bf16.latency["states and first layer"] - bf16.hidden
    assert (bf16.step - exposed) / bf16.streaming < step_time.TARGETS["bf16"] < bf16.ratio
    assert fp8.l2 / fp8.streaming > step_time.TARGETS["fp8"]
    assert fp32.launches == 2 and fp32.ratio / 2 < step_time.TARGETS["fp32"]


@pytest.mark.emulated
def test_records_outside_of_shared_memory_are_not_predicted() -> None:
    with pytest.raises(ValueError, match="records of 300 classes must fit"):
        predict("bf16", 1, classes=300)
