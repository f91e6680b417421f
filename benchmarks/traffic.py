"""`python -m benchmarks.traffic [--write]`: memory traffic of the CUDA kernels, counted in the emulator.

Each operation runs once in `tests/emulator`, which groups the accesses of a warp as a GPU does. The least
traffic is that of an operation's inputs and outputs, each once. It is compared with the 32-byte sectors that
a launch touches, each counted once, which memory delivers if the L2 cache holds what blocks share; and with
the sectors of all requests of all warps, which the L2 cache delivers without an L1 cache.

`denoise` is counted at a small F and extrapolated to the published one by the formula `denoise_bytes`, with
which the count agrees within 1 %. Predicted times are lower bounds, not measurements: bytes over the
published bandwidth or operations over the published rate, whichever takes longer.

Needs DIFFMIC_EMULATED (docs/emulator.md).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import RESULTS
from diffmic_fast import _native
from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.ops.mmd import kernel_matrix, mmd
from diffmic_fast.ops.noised_conditioning import noised_conditioning
from diffmic_fast.ops.rois import choose_windows, cut_crops
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.denoise import DenoiserWeights

BACKEND = "cuda-emulated"
# Memory bandwidth in GB/s, dense bfloat16 with float32 accumulation in TFLOP/s, multiprocessors:
# NVIDIA's data sheets of A100 80GB SXM, L4, H100 SXM and B200 (half of an eighth of a DGX B200), and the
# white paper of the Ada architecture (GeForce RTX 4090).
DEVICES = {
    "A100": (2039, 312, 108),
    "L4": (300, 121, 58),
    "H100": (3350, 989, 132),
    "B200": (8000, 2250, 148),
    "RTX 4090": (1008, 165, 128),
}
T = 20

# By kernel: numbers, and "intervals" of dependent loads (benchmarks/step_time.py).
Counters = dict[str, dict[str, Any]]


@dataclass
class Count:
    """One operation at one size.

    Attributes:
        title: operation and sizes.
        least: bytes of its inputs and outputs, each once.
        touched: bytes of the sectors that its launches touch.
        requested: bytes of the sectors of all requests.
        conflicts: share of the shared-memory wavefronts that bank conflicts cause.
        kernels: the emulator's counters by kernel.
        predicted: microseconds by device.
    """

    title: str
    least: int
    touched: int
    requested: int
    conflicts: float
    kernels: Counters
    predicted: dict[str, float] = field(default_factory=dict)


def counted(call: Callable[[], object], **settings: object) -> Counters:
    """The emulator's counters of a call, by kernel."""
    emulator = _native.cuda(BACKEND).emulator
    emulator.configure(mode="counted", **settings)
    emulator.reset_counters()
    try:
        with torch.no_grad():
            call()
    finally:
        emulator.configure(mode="checked")
    found: Counters = emulator.counters()
    return found


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _sum(kernels: Counters, *keys: str) -> int:
    return sum(kernel[key] for kernel in kernels.values() for key in keys)


def _count(title: str, least: int, kernels: Counters) -> Count:
    wavefronts, ideal = _sum(kernels, "shared_wavefronts"), _sum(kernels, "shared_ideal")
    touched = _sum(kernels, "load_unique_bytes", "store_unique_bytes")
    requested = _sum(kernels, "load_sector_bytes", "store_sector_bytes")
    predicted = {name: least / (gb * 1e3) for name, (gb, _, _) in DEVICES.items()}
    conflicts = 1 - ideal / max(wavefronts, 1)
    kernels = {
        name: {key: count for key, count in kernel.items() if key != "intervals"}
        for name, kernel in kernels.items()
    }
    return Count(title, least, touched, requested, conflicts, kernels, predicted)


# ---- denoise -----------------------------------------------------------------------------------


def denoise_bytes(
    features: int, classes: int, rows: int, blocks: int, precision: str = "bf16"
) -> dict[str, int]:
    """Bytes of a step, each counted once, though caches may deliver it several times.

    Args:
        features: F, a multiple of 256.
        classes: C.
        rows: M, one of 8, 16, 32, 64.
        blocks: blocks of the launch.
        precision: "bf16", or "fp8", whose activations are bfloat16 as well.
    """
    f = features
    record = 4 * ((12 + 3 * classes + 3) // 4 | 1)  # ChannelStride of denoise_layout.cuh
    return {
        "hidden weights": 2 * f * f * (1 if precision == "fp8" else 2),
        "first and last weights, BatchNorm, folded": f * record * 4,
        "features": rows * f * 4,
        "gamma of the timestep": 3 * f * 4,
        "activations, written and read": 2 * 2 * rows * f * 2,
        "parts of eps, written and read": 2 * ((rows * classes + 3) // 4) * 16 * blocks,
        "prior, guidance, state and result": 4 * rows * classes * 4,
    }


def _weights(features: int, classes: int) -> DenoiserWeights:
    def layer(width: int) -> ConditionalLayer:
        return ConditionalLayer(
            torch.randn(features, width) / width**0.5,
            *(torch.rand(n) for n in (features,)),
            torch.rand(T + 1, features),
            *(torch.rand(features) for _ in range(4)),
        )

    return DenoiserWeights(
        layer(2 * classes),
        (layer(features), layer(features)),
        torch.randn(classes, features) / features**0.5,
        torch.randn(classes),
    )


def denoise_step(
    features: int, classes: int, rows: int, blocks: int, precision: str = "bf16"
) -> Counters:
    """Counters of a chain of one step."""
    return denoise_chain(features, classes, rows, blocks, precision, steps=1)


def denoise_chain(
    features: int, classes: int, rows: int, blocks: int, precision: str, steps: int
) -> Counters:
    """Counters of a chain with one step per sweep."""
    weights, inputs = _weights(features, classes), torch.randn(rows, features)
    labels = torch.rand(rows, classes)
    table = make_steps(make_schedule("linear", T), "ddim", steps)
    return counted(
        lambda: denoise(inputs, labels, labels, weights, table, backend=BACKEND,
                        precision=precision, window=1),
        multiprocessors=blocks,
    )  # fmt: skip


def _denoise() -> Iterator[Count]:
    features, classes, rows, blocks = 512, 5, 32, 8
    kernels = denoise_step(features, classes, rows, blocks)
    # The other kernels pack the weights, once per run.
    kernels = {name: kernel for name, kernel in kernels.items() if name.startswith("Chains")}
    here = denoise_bytes(features, classes, rows, blocks)
    yield _count(f"denoise, a step of {rows} rows, F = {features}", sum(here.values()), kernels)
    for rows in (1, 32):
        padded = max(rows, 8)
        found = denoise_bytes(6144, classes, padded, 132)
        once = sum(found.values())
        # Every block reads all input activations of both products.
        again = (132 - 1) * found["activations, written and read"] // 2
        count = Count(
            f"denoise, a step of {rows} rows, F = 6144, by the formula",
            found["hidden weights"], once, once + again, 0.0, {},
        )  # fmt: skip
        operations = 2 * 2 * 6144 * 6144 * padded
        for name, (gb, tera, blocks) in DEVICES.items():
            moved = sum(denoise_bytes(6144, classes, padded, blocks).values())
            count.predicted[name] = max(moved / (gb * 1e3), operations / (tera * 1e6))
        yield count


# ---- other operations ------------------------------------------------------------------------------


def _conditioning() -> Iterator[Count]:
    streams, rows, features, classes = 3, 32, 512, 5
    x = torch.randn(rows, features)
    labels, guidance = torch.rand(2, streams, rows, classes)
    layer = ConditionalLayer(
        torch.randn(features, 2 * classes), torch.randn(features), torch.rand(T + 1, features),
        *(torch.rand(features) for _ in range(4)),
    )  # fmt: skip
    timesteps = torch.arange(rows) % T
    for training in (False, True):
        kernels = counted(
            lambda training=training: conditioning(
                x, labels, guidance, layer, timesteps, training=training, backend=BACKEND
            )
        )
        outputs = _bytes(x) * streams + (2 * (streams + 1) * features * 4 if training else 0)
        used = layer._replace(gamma=layer.gamma[timesteps.unique()])
        least = _bytes(x, labels, guidance, *used, timesteps) + outputs
        way = "training" if training else "eval"
        yield _count(f"conditioning, {way}, S = 3, B = {rows}, F = {features}", least, kernels)
    # In training noise and noisy labels are written and not read.
    y_0, tables = labels[0].clone(), (torch.rand(T), torch.rand(T))
    kernels = counted(
        lambda: noised_conditioning(
            x, y_0, guidance, layer, timesteps, *tables, training=True, backend=BACKEND
        )
    )
    least += _bytes(2 * y_0, *tables)
    yield _count(f"conditioning, noise made, S = 3, B = {rows}, F = {features}", least, kernels)


def _mmd() -> Iterator[Count]:
    for rows, width in ((32, 5), (48, 5), (256, 16)):
        x, y = torch.randn(2, rows, width)
        kernels = counted(lambda x=x, y=y: mmd(x, y, backend=BACKEND))
        yield _count(f"mmd, n = m = {rows}, d = {width}", _bytes(x, y) + 4, kernels)
    x, y = torch.randn(2, 70, 5)
    kernels = counted(lambda: kernel_matrix(x, y, backend=BACKEND))
    yield _count("mmd, kernel matrix of 70 x 70, d = 5", _bytes(x, y) + 70 * 70 * 4, kernels)


def _rois() -> Iterator[Count]:
    saliency, images = torch.rand(4, 3, 24, 24), torch.rand(4, 3, 96, 96)
    kernels = counted(lambda: choose_windows(saliency, (6, 6), 4, backend=BACKEND))
    yield _count("rois, windows of [4, 3, 24, 24]", _bytes(saliency) + 4 * 4 * 16, kernels)
    origins = torch.randint(0, 64, (4, 4, 2))
    kernels = counted(lambda: cut_crops(images, origins, (32, 32), "all", backend=BACKEND))
    crops = 4 * 4 * 3 * 32 * 32 * 4
    yield _count("rois, crops of 32 x 32, inside", 2 * crops + _bytes(origins), kernels)


def counts() -> list[Count]:
    """The counts of all operations."""
    torch.manual_seed(0)
    return [*_denoise(), *_conditioning(), *_mmd(), *_rois()]


def main() -> None:
    """Print the table and, with --write, write benchmarks/results/traffic.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/traffic.json"
    )
    options = parser.parse_args()
    found = counts()
    table = Table(title="bytes per call, and lower bounds of its time in microseconds")
    for column in ("", "least", "touched", "ratio", "requested", "conflicts", *DEVICES):
        table.add_column(column, justify="right" if column else "left")
    for count in found:
        table.add_row(
            count.title, f"{count.least:,}", f"{count.touched:,}",
            f"{count.touched / count.least:.3f}", f"{count.requested:,}",
            f"{100 * count.conflicts:.1f} %", *(f"{count.predicted[name]:.2f}" for name in DEVICES),
        )  # fmt: skip
    Console(width=170).print(table)
    if options.write:
        path = RESULTS / "traffic.json"
        path.write_text(json.dumps([asdict(count) for count in found], indent=1) + "\n")
        print("wrote", path)


if __name__ == "__main__":
    main()
