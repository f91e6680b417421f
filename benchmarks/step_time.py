"""`python -m benchmarks.step_time [--write]`: microseconds of a step of `denoise` on a GPU, predicted by arithmetic.

No GPU is needed, and nothing here is a measurement. A step takes the longer of two streams,

- weights from DRAM, but for the stages that stay in shared memory,
- weights and activations from the L2 cache to the multiprocessors,

and what of its latency these streams do not hide. Between two grid barriers the blocks wait for loads one after the
other: the emulator counts these rounds (tests/emulator/rounds.cpp), `rounds` is the formula that agrees with the
count. Meanwhile the copies in flight go on: as many stages of weights as of activations, since groups of copies
complete in order. For the same reason a pass over the activations starts with no copy of weights in flight, which
costs a latency of DRAM. Arithmetic, shared memory and barriers of a block are not counted.

Needs DIFFMIC_EMULATED (docs/emulator.md), for the launch configuration.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS
from benchmarks.traffic import BACKEND, denoise_bytes
from diffmic_fast import _native

THREADS, WARPS = 256, 8  # csrc/cuda/denoise/denoise_layout.cuh
TILE_UNITS, TILE_ROWS = 16, 8
PARTS_AHEAD = 10  # csrc/cuda/denoise/denoise_kernel.cuh, SumParts
FEATURES, CLASSES = 6144, 5
ROWS = (1, 8, 32, 64)
TARGETS = {"bf16": 1.15, "fp8": 1.25, "fp32": 1.25}  # times the stream of all weights


class Chip(NamedTuple):
    """A GPU.

    Attributes:
        multiprocessors: of which each runs one block.
        shared: bytes of shared memory of a block.
        dram, l2: bandwidth in bytes per microsecond.
        l2_latency, dram_latency: of a load, in microseconds.
    """

    multiprocessors: int
    shared: int
    dram: float
    l2: float
    l2_latency: float
    dram_latency: float

    @property
    def barrier(self) -> float:
        """Of the grid, in microseconds: six rounds are assumed, for fence, atomic operations on one address, polls."""
        return 6 * self.l2_latency


# The multiprocessors of an H100 SXM, and 90 % of its data sheet's 3.35 TB/s. L2 cache and latencies as measured on an
# H100 PCIe, which has 114 multiprocessors, at 1.755 GHz (github.com/te42kyfo/gpu-benches, h100_pcie.txt of gpu-l2-cache
# and gpu-latency): 6.9 TB/s; 475 cycles for the far half of the L2 cache (266 for the near one), 650 for DRAM. The chip
# was idle otherwise; what the stream of weights adds to a latency is not known.
H100 = Chip(132, 227 * 1024, 0.9 * 3.35e6, 6.9e6, 475 / 1755, 650 / 1755)


class Rounds(NamedTuple):
    """Loads that a block waits for one after the other, from the L2 cache and from DRAM."""

    l2: int
    dram: int

    def latency(self, chip: Chip) -> float:
        """In microseconds."""
        return self.l2 * chip.l2_latency + self.dram * chip.dram_latency


def rounds(tiles: int, row_tiles: int, rows: int, classes: int, blocks: int) -> dict[str, Rounds]:
    """Rounds of a step in each interval between grid barriers, one step of each chain per sweep.

    Args:
        tiles: tiles of 16 output channels of a block, the most of any.
        row_tiles: tiles of 8 rows.
        rows: rows of the launch.
        classes: C.
        blocks: blocks of the launch.
    """
    labels = rows * classes
    parts = _up(_up(labels, 4), 16) * _up(_up(blocks, 16), PARTS_AHEAD)
    condition = _up(tiles * row_tiles, WARPS)
    return {
        "first product": Rounds(tiles, 0),
        "second product": Rounds(tiles + _up(labels, THREADS), 0),  # and the bias
        "states and first layer": Rounds(parts + condition, 1),  # and the step table
    }


def _up(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


@dataclass(frozen=True)
class Prediction:
    """A step of all rows.

    Attributes:
        precision, rows: of the step.
        launches: one after the other; each takes up to 64 rows, in fp32 32.
        dram, l2: microseconds of the two streams.
        latency: microseconds of each interval between grid barriers.
        hidden: microseconds of latency that copies in flight hide in each.
        step: microseconds.
        streaming: microseconds that all weights take from DRAM, read once.
    """

    precision: str
    rows: int
    launches: int
    dram: float
    l2: float
    latency: dict[str, float]
    hidden: float
    step: float
    streaming: float

    @property
    def ratio(self) -> float:
        """To `streaming`."""
        return self.step / self.streaming


def predict(
    precision: str, rows: int, chip: Chip = H100, features: int = FEATURES, classes: int = CLASSES
) -> Prediction:
    """Predict a step of M rows with F a multiple of 256."""
    cuda = _native.cuda(BACKEND)
    cuda.emulator.configure(multiprocessors=chip.multiprocessors, shared_per_block=chip.shared)
    try:
        plan = cuda.denoise_plan(features, classes, rows, 1000, 1, precision, 0)
    finally:
        cuda.emulator.configure(multiprocessors=4, shared_per_block=227 * 1024)
    blocks, padded = plan["blocks"], plan["row_tiles"] * TILE_ROWS
    tiles = _up(_up(features, TILE_UNITS), blocks)
    size = {"fp32": 4, "bf16": 2, "fp8": 1}[precision]
    weights = 2 * features * features * size
    read = weights * (1 - plan["resident"] / plan["step_stages"])
    if plan["shared_channels"] == 0:
        raise ValueError(f"step_time: records of {classes} classes must fit into shared memory")
    passes = _up(tiles, plan["pass_tiles"])
    # Each block reads all input activations of both products, and all partial sums.
    activations = 2 * padded * features * max(size, 2) * blocks * passes
    parts = 4 * plan["chains"] * classes * blocks * blocks
    others = denoise_bytes(features, classes, padded, blocks, "bf16")
    small = others["features"] + others["gamma of the timestep"]
    counted = rounds(tiles, plan["row_tiles"], plan["chains"], classes, blocks)
    latency = {name: found.latency(chip) + chip.barrier for name, found in counted.items()}
    for name in ("first product", "second product"):  # the first activations of a pass
        latency[name] += passes * chip.l2_latency
    latency["states and first layer"] += parts / chip.l2
    # Stages in flight when a product ends, of weights as many as of activations.
    ahead = min(4 if plan["row_tiles"] < 8 else 2, plan["slots"] - plan["resident"])
    hidden = ahead * weights / plan["step_stages"] / chip.dram
    dram = (read + small) / chip.dram + 2 * passes * chip.dram_latency
    l2 = (read + activations) / chip.l2
    exposed = sum(max(0.0, each - hidden) for each in latency.values())
    launches = _up(rows, plan["chains"])
    return Prediction(
        precision, rows, launches, dram, l2, latency, hidden,
        launches * (max(dram, l2) + exposed), weights / chip.dram,
    )  # fmt: skip


def predictions() -> list[Prediction]:
    """An H100, F = 6144, C = 5."""
    return [predict(precision, rows) for precision in TARGETS for rows in ROWS]


def main() -> None:
    """Print the table and, with --write, write benchmarks/results/step_time.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/step_time.json"
    )
    options = parser.parse_args()
    found = predictions()
    table = Table(title="predicted microseconds of a step on an H100, F = 6144, C = 5")
    names = list(found[0].latency)
    for column in ("", "rows", "DRAM", "L2", *names, "hidden", "step", "streaming", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for each in found:
        numbers = [each.dram, each.l2, *each.latency.values(), each.hidden, each.step]
        table.add_row(
            each.precision, str(each.rows), *(f"{number:.1f}" for number in numbers),
            f"{each.streaming:.1f}", f"{each.ratio:.2f} (≤ {TARGETS[each.precision]})",
        )  # fmt: skip
    Console(width=150).print(table)
    if options.write:
        path = RESULTS / "step_time.json"
        path.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")
        print("wrote", path)


if __name__ == "__main__":
    main()
