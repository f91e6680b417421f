"""Which kernels run a chain on a GPU: the CUDA kernel for few rows, Triton for many.

The CUDA kernel (`csrc/cuda/denoise`) takes up to 64 rows per launch, 32 per reading of the weights in float32; more
rows are launched one after the other, and read the weights again. Triton computes all rows in one matrix product, with
five launches per step.

`choose` compares the estimated time of a step. An estimate is an argument on traffic and operations, from the card's
data sheet and the constants below; no GPU has confirmed it. `python -m benchmarks engines --write` measures both
engines and lists where the rule was wrong; its file is `benchmarks/results/engines.json`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from diffmic_fast.ops._backend import asked_by_name, unavailable

ENGINES = ("cuda", "triton")
PRECISIONS = ("fp32", "bf16")  # those of both
# Rows per reading of the weights by the CUDA kernel.
ROWS_PER_PASS = {"fp32": 32, "bf16": 64}
_WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
# Seconds of a step beside its products. CUDA, per pass: three grid barriers and the sums between them. Triton: gaps of
# five launches, the first layer, the output layer.
_CUDA_SECONDS, _TRITON_SECONDS = 15e-6, 30e-6
# Shares of the data sheet's bandwidth and arithmetic that a product reaches.
_STREAMING, _ARITHMETIC = 0.8, 0.5
# Triton must be estimated to be faster by this factor: with it the last bits of a row depend on the number of rows.
_MARGIN = 1.25


class Card(NamedTuple):
    """What the estimate needs to know of a GPU.

    Attributes:
        bandwidth: of its memory, bytes/s.
        fp32: of float32 fused multiply-adds, operations/s (two each).
        bf16: of dense bfloat16 matrix products with float32 sums, operations/s.
    """

    bandwidth: float
    fp32: float
    bf16: float


# Data sheets by compute capability: the card, then its multiprocessors.
_DATA_SHEETS = {
    (8, 0): (Card(2.04e12, 19.5e12, 312e12), 108),  # A100 80 GB
    (8, 6): (Card(0.94e12, 35.6e12, 71e12), 82),  # RTX 3090
    (8, 9): (Card(1.01e12, 82.6e12, 165e12), 128),  # RTX 4090
    (9, 0): (Card(3.35e12, 66.9e12, 989e12), 132),  # H100 SXM
    (10, 0): (Card(8.0e12, 80e12, 2250e12), 148),  # B200
    (12, 0): (Card(1.79e12, 104.8e12, 209e12), 170),  # RTX 5090
}


def selectable(backend: str, device: torch.device) -> bool:
    """Whether "auto", which has selected "cuda", may select "triton" for many rows."""
    return not asked_by_name("denoise", backend) and not unavailable("denoise", "triton", device)


selectable._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as _backend.resolve


@functools.cache
def card_of(index: int) -> Card:
    """The GPU of an index: the data sheet of its compute capability, scaled to its multiprocessors.

    The bandwidth is that of its memory clock and bus where PyTorch reports them.
    """
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    older = [known for known in _DATA_SHEETS if known <= capability]
    sheet, multiprocessors = _DATA_SHEETS[max(older, default=min(_DATA_SHEETS))]
    scale = properties.multi_processor_count / multiprocessors
    kilohertz = getattr(properties, "memory_clock_rate", 0)
    bits = getattr(properties, "memory_bus_width", 0)
    measured = 2 * 1e3 * kilohertz * bits / 8  # two transfers per cycle
    return Card(measured or sheet.bandwidth, scale * sheet.fp32, scale * sheet.bf16)


def step_seconds(engine: str, passes: int, features: int, precision: str, card: Card) -> float:
    """Estimated time of a step of the chain.

    Args:
        engine: one of `ENGINES`.
        passes: rows over `ROWS_PER_PASS`, at least 1.
        features: F.
        precision: one of `PRECISIONS`.
        card: the GPU.
    """
    rows = passes * ROWS_PER_PASS[precision]
    reading = 2 * features**2 * _WEIGHT_BYTES[precision] / (_STREAMING * card.bandwidth)
    arithmetic = 4 * rows * features**2 / (_ARITHMETIC * getattr(card, precision))
    if engine == "triton":
        return _TRITON_SECONDS + max(reading, arithmetic)
    return passes * _CUDA_SECONDS + max(passes * reading, arithmetic)


def choose(rows: int, features: int, precision: str, card: Card) -> str:
    """The engine of a chain that both can run: "triton" where its estimate is clearly lower.

    It is never lower for one pass, and if it is for some rows, it is for more.
    """
    passes = -(-rows // ROWS_PER_PASS[precision])
    cuda, triton = (step_seconds(each, passes, features, precision, card) for each in ENGINES)
    return "triton" if _MARGIN * triton < cuda else "cuda"
