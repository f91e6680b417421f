"""`denoise` in CUDA with more weights than shared memory holds: slots are used again and again, and by many blocks.

A block has stages of weights that stay in shared memory, and a ring of slots for the others (denoise_weights.cuh). The
emulator gets a GPU on which small layers need the ring; a GPU gets layers that need it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from cuda_backends import CUDA_BACKENDS, device_of, restore_emulator, schedule
from denoise_cases import (
    SCHEDULE,
    assert_states,
    make_inputs,
    make_weights,
    one_rounded_step,
    to_bfloat16,
    to_float8,
    weights_on,
)
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.diffusion import make_steps
from diffmic_fast.ops import denoise as ops
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.reference.denoise import DenoiserWeights

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EMULATED, GPU = CUDA_BACKENDS
CLASSES = 3
_AMPLE = 227 * 1024


class Case(NamedTuple):
    """Layers and a GPU on which they need the ring.

    Attributes:
        precision: Of the products.
        features: F.
        blocks: Multiprocessors of the emulated GPU, each with one block.
        kilobytes: Shared memory of its blocks.
        resident: Stages of weights that stay in shared memory there.
    """

    precision: str
    features: int
    blocks: int
    kilobytes: int
    resident: int


_FAST = [
    Case("fp32", 561, 36, 92, 1),
    Case("bf16", 561, 36, 56, 0),
    Case("fp8", 561, 36, 37, 0),
]
# Resident stages and a ring in the other precisions; an H100's multiprocessors and shared memory.
_SLOW = [
    Case("bf16", 1291, 81, 100, 2),
    Case("fp8", 1291, 81, 56, 1),
    Case("bf16", 2601, 132, 227, 4),
]
CASES = [
    *(pytest.param("cuda-emulated", case, marks=EMULATED.marks) for case in _FAST),
    *(
        pytest.param("cuda-emulated", case, marks=[*EMULATED.marks, pytest.mark.slow])
        for case in _SLOW
    ),
    *(
        pytest.param("cuda", Case(precision, features, 0, 0, 0), marks=GPU.marks)
        for precision, features in (("fp32", 1801), ("bf16", 2601), ("fp8", 3601))
    ),
]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    yield
    restore_emulator()


def configure(backend: str, case: Case, kilobytes: int) -> None:
    """Set the emulated GPU's multiprocessors and shared memory."""
    if backend == "cuda-emulated":
        _native.cuda(backend).emulator.configure(
            multiprocessors=case.blocks, shared_per_block=kilobytes * 1024
        )


def plan(backend: str, case: Case, rows: int) -> dict[str, int]:
    found: dict[str, int] = _native.cuda(backend).denoise_plan(
        case.features, CLASSES, rows, 3, 1, case.precision, 0
    )
    return found


def arguments(backend: str, case: Case, rows: int) -> tuple[DenoiserWeights, list[Tensor]]:
    device = device_of(backend)
    weights = weights_on(device, make_weights(case.features, CLASSES))
    return weights, [tensor.to(device) for tensor in make_inputs(rows, case.features, CLASSES)]


@pytest.mark.parametrize(("backend", "case"), CASES)
def test_values(backend: str, case: Case) -> None:
    """One step against float64, with the roundings of the precision."""
    rows = 3
    configure(backend, case, case.kilobytes)
    shape = plan(backend, case, rows)
    assert shape["slots"] < shape["step_stages"] and shape["blocks"] > 33
    if case.blocks:
        assert (shape["blocks"], shape["resident"]) == (case.blocks, case.resident)
    steps = make_steps(SCHEDULE, "ddpm_truncated", 1)
    noise = torch.randn(1, rows, CLASSES, generator=torch.Generator().manual_seed(1))
    weights, inputs = (
        make_weights(case.features, CLASSES),
        make_inputs(rows, case.features, CLASSES),
    )
    there, moved = arguments(backend, case, rows)
    found = denoise(
        *moved, there, steps, noise=noise.to(moved[0].device), backend=backend,
        precision=case.precision, trajectory=True,
    ).cpu()  # fmt: skip
    if case.precision == "fp32":
        assert_states(found, inputs, weights, steps, noise)
        return
    of_weights = to_bfloat16 if case.precision == "bf16" else to_float8
    expected = one_rounded_step(inputs, weights, steps, noise, to_bfloat16, of_weights)
    assert float((found[-1] - expected).square().mean().sqrt()) < 1e-4


@pytest.mark.parametrize(("backend", "case"), CASES)
def test_slots_do_not_change_the_bits(
    backend: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two steps in one launch and in two, with the ring and with more slots or, on a GPU, fewer."""
    steps = make_steps(SCHEDULE, "ddim", 2, 0.5)
    weights, inputs = arguments(backend, case, 2)
    if backend == "cuda-emulated":
        # Which checks no accesses; `test_values` does.
        _native.cuda(backend).emulator.configure(mode="plain", preempt=100)

    def run(rows: list[Tensor], sweeps: int, kilobytes: int) -> Tensor:
        configure(backend, case, kilobytes)
        schedule(backend, sweeps)
        monkeypatch.setattr(ops, "_SWEEPS_PER_LAUNCH", sweeps)
        return denoise(
            *rows, weights, steps, seed=3, backend=backend, precision=case.precision, window=1
        )

    ring = run(inputs, 2, case.kilobytes)
    shape = plan(backend, case, 2)
    assert shape["slots"] < shape["step_stages"]
    if backend == "cuda-emulated":
        assert torch.equal(run(inputs, 1, _AMPLE // 1024), ring)
        return
    # Rows are batch invariant, and more of them leave less memory for the weights.
    many = [tensor.repeat(17, 1)[:33] for tensor in inputs]
    assert plan(backend, case, 33)["slots"] < shape["slots"]
    assert torch.equal(run(many, 1, 0)[:2], ring)


@pytest.mark.emulated
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_every_call_fits_into_the_least_shared_memory(precision: str) -> None:
    """99 KB, of sm_86, 89 and 120, at the published F: fewer rows per launch where many do not fit."""
    module = _native.cuda("cuda-emulated")
    module.emulator.configure(multiprocessors=128, shared_per_block=99 * 1024)
    for classes in (1, 2, 5, 8, 10, 60, 512):
        for rows, window in [*((rows, 1) for rows in range(1, 66)), (1, 32), (3, 24), (7, 4)]:
            shape = module.denoise_plan(6144, classes, rows, 1000, window, precision, 0)
            assert shape["shared_bytes"] <= 99 * 1024
            assert 1 <= shape["chains"] <= rows and 1 <= shape["window"] <= window
            assert shape["slots"] >= (2 if shape["row_tiles"] == 8 else 4)


@pytest.mark.emulated
def test_less_shared_memory_does_not_change_the_bits() -> None:
    """40 rows in one launch and in five, with the channels' records in shared memory and outside of it."""
    weights, inputs = make_weights(300, CLASSES), make_inputs(40, 300, CLASSES)
    steps = make_steps(SCHEDULE, "ddim", 2, 0.5)
    module = _native.cuda("cuda-emulated")

    def run(kilobytes: int, chains: int, shared_channels: int) -> Tensor:
        module.emulator.configure(multiprocessors=19, shared_per_block=kilobytes * 1024)
        shape = module.denoise_plan(300, CLASSES, 40, 2, 1, "bf16", 0)
        assert (shape["chains"], shape["shared_channels"]) == (chains, shared_channels)
        return denoise(
            *inputs, weights, steps, seed=3, backend="cuda-emulated", precision="bf16", window=1
        )

    ample = run(_AMPLE // 1024, 40, 16)
    assert torch.equal(run(60, 8, 16), ample)
    assert torch.equal(run(50, 8, 0), ample)
