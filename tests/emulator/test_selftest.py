"""The emulator on small kernels: each planted fault found in every schedule, and the right ones never blamed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulated_module import build
from torch import Tensor

SEEDS = 20
if not os.environ.get("DIFFMIC_EMULATED"):
    pytest.skip("the variable DIFFMIC_EMULATED is not set", allow_module_level=True)


@pytest.fixture(scope="session")
def module() -> ModuleType:
    path = build(Path(os.environ["DIFFMIC_EMULATED"]).parent, "_selftest")
    spec = importlib.util.spec_from_file_location("_selftest", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def run(module: ModuleType, name: str, seed: int, values: Tensor, **settings: object) -> Tensor:
    module.emulator.configure(seed=seed, **settings)
    output = torch.full((1024,), -1.0)
    module.run(name, values, output, torch.empty(1024), torch.zeros(1, dtype=torch.int32))
    return output


def pairs(values: Tensor) -> Tensor:
    """The bfloat16 numbers that float32 memory holds."""
    return values.view(torch.bfloat16).float()


def mma(values: Tensor) -> Tensor:
    """What "pipeline" computes: 4 stages of [16, 16] by [8, 16]^T."""
    numbers = pairs(values)
    left = numbers[:1024].view(4, 16, 16)
    right = numbers[1024:1536].view(4, 8, 16)
    return sum(a @ b.T for a, b in zip(left, right, strict=True))  # type: ignore[return-value]


# What the right kernels put at the beginning of their outputs.
EXPECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: x[:256].view(16, 16) @ x[256:512].view(16, 16),
    "sum": lambda x: x[:128].sum(),
    "neighbours": lambda x: x[:64].view(32, 2).flip(1),
    "pipeline": mma,
    "exchange": lambda x: 2 * x[:256].flip(0),
    "last block": lambda x: x[:160].view(5, 32).sum(dim=0),
    "copy": lambda x: x[:64].repeat_interleave(4),
}
# A word that the report of each fault has to hold.
WORDS = {
    "product: no barrier before the reading": "race",
    "product: no barrier before the next writing": "race",
    "sum: a lane is not in its mask": "not in the mask",
    "sum: a lane exchanges otherwise": "different exchanges",
    "sum: some threads skip a barrier": "barrier",
    "sum: two barriers for one": "different barriers",
    "sum: threads leave before a barrier": "left without",
    "neighbours: no barrier of the warp": "race",
    "pipeline: a wait that is too short": "asynchronous copy",
    "pipeline: a commit is missing": "asynchronous copy",
    "pipeline: a copy is never waited for": "never waited for",
    "pipeline: read before the wait": "asynchronous copy",
    "pipeline: no barrier before the next copy": "race",
    "exchange: no barrier": "global memory",
    "exchange: no release": "global memory",
    "exchange: no acquire": "global memory",
    "exchange: no barrier of the block before": "global memory",
    "exchange: no barrier of the block behind": "global memory",
    "exchange: the others are not waited for": "global memory",
    "exchange: a block never comes": "deadlock",
    "last block: no fence": "global memory",
    "copy: reads behind the end": "a read out of bounds",
    "copy: reads before the beginning": "a read out of bounds",
    "copy: writes behind the end": "a write out of bounds",
    "copy: writes its input": "a write to an input",
    "copy: misaligned": "misaligned",
    "copy: scratch that nothing was written to": "nothing was written to",
    "copy: shared memory that nothing was written to": "nothing was written to",
    "copy: dynamic shared memory behind its end": "dynamic shared memory",
}


@pytest.fixture
def values() -> Tensor:
    # Small whole numbers, whose sums are exact in any order, as float32 and as two bfloat16 each.
    numbers = torch.randint(-4, 5, (2048,), generator=torch.Generator().manual_seed(0))
    return numbers.bfloat16().view(torch.float32)


@pytest.fixture
def floats() -> Tensor:
    return torch.randint(-9, 10, (1024,), generator=torch.Generator().manual_seed(1)).float()


@pytest.mark.parametrize("name", EXPECTED)
def test_right_kernels_are_never_blamed(module, name, values, floats) -> None:
    assert list(module.right) == list(EXPECTED)
    data = values if name == "pipeline" else floats
    expected = EXPECTED[name](data).reshape(-1)
    for seed in range(SEEDS):
        for mode in ("checked", "plain"):
            found = run(module, name, seed, data, mode=mode)
            assert torch.equal(found[: expected.numel()], expected), (seed, mode)
    module.emulator.configure(mode="checked")


@pytest.mark.parametrize("name", WORDS)
def test_wrong_kernels_are_found_in_every_schedule(module, name, values, floats) -> None:
    assert list(module.wrong) == list(WORDS)
    for seed in range(SEEDS):
        with pytest.raises(module.EmulatorFault, match=WORDS[name]) as caught:
            run(
                module,
                name,
                seed,
                values if name.startswith("pipeline") else floats,
                mode="checked",
            )
        assert "block (" in str(caught.value), seed
    if WORDS[name] not in ("deadlock", "never waited for"):
        assert "kernels.cu:" in str(caught.value) or "grid_barrier.h:" in str(caught.value)


def test_a_schedule_can_be_had_again(module, floats) -> None:
    def said() -> str:
        with pytest.raises(module.EmulatorFault) as caught:
            run(module, "exchange: no barrier", 5, floats)
        return str(caught.value)

    assert said() == said()


def test_traffic_is_counted_by_warps(module, values, floats) -> None:
    module.emulator.reset_counters()
    run(module, "copy", 0, floats, mode="counted")
    run(module, "pipeline", 0, values, mode="counted")
    module.emulator.configure(mode="checked")
    counters = module.emulator.counters()
    assert set(counters) == {"Copy", "Pipeline"}
    copy, pipeline = counters["Copy"], counters["Pipeline"]
    # 64 threads read 4 bytes and write 16; 32 numbers of shared memory are one wavefront.
    assert (copy["load_bytes"], copy["load_sector_bytes"], copy["load_unique_bytes"]) == (
        256,
        256,
        256,
    )
    assert (copy["store_bytes"], copy["store_sector_bytes"]) == (1024, 1024)
    assert (copy["shared_wavefronts"], copy["shared_ideal"], copy["barriers"]) == (4, 4, 2)
    assert pipeline["matrix_instructions"] == 4
    assert pipeline["copy_bytes"] == pipeline["load_bytes"] == 4 * (512 + 256)


def test_settings_are_checked(module) -> None:
    with pytest.raises(ValueError, match="mode must be plain, checked or counted, got fast"):
        module.emulator.configure(mode="fast")
    with pytest.raises(ValueError, match="not positive"):
        module.emulator.configure(multiprocessors=0)
    module.emulator.configure(multiprocessors=4)
