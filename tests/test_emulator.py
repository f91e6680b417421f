"""The emulator of CUDA kernels reports every kind of fault, and none in correct kernels.

The kernels are in `tests/emulator/selftest`, each in a correct version and in faulty ones. Under each of 20 schedules,
a faulty version must be reported and a correct one must give the expected result.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from emulated_module import SOURCE, build, obstacle
from torch import Tensor

SEEDS = range(20)

# The expected report, by (kernel, fault).
REPORTS = {
    ("product", "no barrier after writes"): r"race.* on shared memory",
    ("product", "no barrier after reads"): r"race.* on shared memory",
    ("reverse warp", "no warp barrier"): r"race.* on shared memory",
    ("reverse block", "warp barrier for a block"): r"race.* on shared memory",
    ("broadcast", "no barrier after reads"): r"race.* on shared memory",
    ("meet", "early exit"): r"a barrier after a thread of the block has exited",
    ("meet", "two barriers"): r"threads of a block wait at different barriers",
    ("add one", "read past the end"): r"a read out of bounds.*byte 256 of in, which has 256",
    ("add one", "read before the begin"): r"a read out of bounds.*byte -4 of in, which has 256",
    ("add one", "read elsewhere"): r"a read out of bounds",
    ("add one", "write past the end"): r"a write out of bounds.*byte 256 of out, which has 256",
    ("add one", "write to an input"): r"a write to an input.*thread \(7, 0, 0\).*byte 28 of in",
    ("copy vectors", "misaligned read"): r"a misaligned access.*thread \(2, 0, 0\) to .*float4",
    ("copy vectors", "misaligned write"): r"a misaligned access.*thread \(2, 0, 0\) to .*float4",
    ("through dynamic", "past the end"): r"out of bounds of dynamic shared memory.*byte 256 of 256",
    ("through dynamic", "unwritten"): r"a read of uninitialized shared memory",
    ("through static", "past the end"): r"an index out of bounds.*thread \(63, 0, 0\).*64",
    ("through static", "past a row"): r"an index out of bounds.*thread \(7, 0, 0\).*8",
    ("workspace", "unwritten"): r"a read of uninitialized global memory",
    ("own shared", "of another block"): r"a read of uninitialized shared memory",
    ("pipeline", "wait too short"): r"an access to memory with an asynchronous copy in flight",
    ("pipeline", "no commit"): r"an access to memory with an asynchronous copy in flight",
    (
        "pipeline",
        "reads before the wait",
    ): r"an access to memory with an asynchronous copy in flight",
    ("pipeline", "no barrier after the wait"): r"race|asynchronous copy in flight",
    ("pipeline", "no barrier after reads"): r"race",
    ("pipeline", "copy at exit"): r"an asynchronous copy was never waited for",
    ("pipeline", "open copy at exit"): r"an asynchronous copy was never committed",
    ("pipeline", "misaligned"): r"a misaligned access.*thread \(17, 0, 0\) of 16 bytes",
    ("pipeline", "past the end"): r"reads out of bounds",
    ("pipeline", "store under way"): r"an access to memory with an asynchronous copy in flight",
    ("swap", "no barrier"): r"race.* on global memory",
    ("swap", "no release"): r"race.* on global memory",
    ("swap", "no acquire"): r"race.* on global memory",
    ("swap", "no barrier before it counts"): r"race.* on global memory",
    ("swap", "no barrier after the wait"): r"race.* on global memory",
    ("swap", "nobody counts"): r"deadlock.*(\n.*)*waits for another block",
    ("swap", "not cooperative"): r"deadlock.*(\n.*)*waits for another block",
    ("last sums", "no fence"): r"race.* on global memory",
    ("count all", "plain sum"): r"race.* on global memory",
    ("parts", "overlap"): r"two writes race.* on global memory",
    ("neighbours", "no barrier"): r"race.* on global memory",
    ("prefetched", "past the end"): r"a prefetch out of bounds.*byte \d+ of in, which has 256",
    ("sum halves", "lane not in its mask"): r"a lane is not in its own mask",
    ("sum halves", "lane does not come"): r"deadlock.*(\n.*)*waits for __shfl_xor_sync",
    ("sum halves", "another operation"): r"lanes of a warp execute different collectives",
    ("sum halves", "another mask"): r"lanes of a warp execute different collectives",
    ("sum shared", "exchange for a barrier"): r"a read races a write.* on shared memory",
}


def _product(x: Tensor) -> Tensor:
    return (x.view(16, 16) @ x.view(16, 16)).flatten()


def _pipeline(x: Tensor) -> Tensor:
    stages = x.view(torch.bfloat16).float().view(-1, 2, 16, 16)
    return sum(a @ b.T for a, b in stages).flatten()  # type: ignore[union-attr]


def _rounds(x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + x.roll(-16)
    return x


def _relay(x: Tensor) -> Tensor:
    return x.view(2, 4, 8)[:, :, 0].sum(1, keepdim=True).expand(2, 32).flatten()


# The expected output of a correct kernel.
RESULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": _product,
    "reverse warp": lambda x: x.view(2, 32).flip(1).flatten(),
    "reverse block": lambda x: x.flip(0),
    "meet": lambda x: x + 1,
    "broadcast": lambda x: (x[0] + x[1]).expand(256),
    "add one": lambda x: x + 1,
    "copy vectors": lambda x: x,
    "through dynamic": lambda x: x.flip(0),
    "through static": lambda x: x.flip(0),
    "workspace": lambda x: x + 1,
    "own shared": lambda x: x[:32].repeat(2),
    "pipeline": _pipeline,
    "swap": lambda x: 2 * x.roll(-16),
    "rounds": _rounds,
    "last sums": lambda x: x.flip(0),
    "count all": torch.ones_like,
    "parts": lambda x: x,
    "neighbours": lambda x: x.view(4, 16).roll(-1, 1).flatten(),
    "in turn": lambda x: x + x.roll(-16) + x.roll(-32),
    "together": lambda x: x + x.roll(-16) + x.roll(-32),
    "chase": lambda x: x[(x.long() + 16) % 64],
    "relay": _relay,
    "relay by shuffles": _relay,
    "prefetched": lambda x: x,
    "sum halves": lambda x: x.view(4, 16).sum(1, keepdim=True).expand(4, 16).flatten(),
    "sum shared": lambda x: x.view(2, 32).sum(1, keepdim=True).expand(2, 32).flatten(),
}


@pytest.fixture(scope="module")
def selftest() -> ModuleType:
    """The module of the emulator's own kernels, built here."""
    if reason := obstacle():
        pytest.skip(reason)
    path = build(target="_selftest")
    spec = importlib.util.spec_from_file_location("_selftest", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def settings(selftest: ModuleType) -> Iterator[None]:
    """Every test starts with the same settings."""
    selftest.emulator.configure(seed=1, preempt=24, mode="checked", multiprocessors=4)
    selftest.emulator.reset_counters()
    yield


def numbers(kernel: str) -> Tensor:
    """The input: small integers, whose sums do not depend on the order of additions."""
    generator = torch.Generator().manual_seed(len(kernel))
    if kernel == "pipeline":  # three stages of two matrices
        words = torch.randint(-4, 5, (3 * 512,), generator=generator).to(torch.bfloat16)
        return words.view(torch.float32)
    count = {"product": 256, "broadcast": 256}.get(kernel, 64)
    return torch.randint(-9, 10, (count,), generator=generator).float()


def apart(x: Tensor) -> Tensor:
    """A copy without another array next to it, so that accesses past its end are out of bounds."""
    around = x.new_zeros(len(x) + 8192)
    around[4096:-4096] = x
    return around[4096:-4096]


def run(selftest: ModuleType, kernel: str, fault: str) -> Tensor:
    """The output of a case, initialised with NaN."""
    before = numbers(kernel)
    x = apart(before)
    out = apart(torch.full((256 if kernel == "pipeline" else len(x),), float("nan")))
    workspace = apart(torch.empty(16 + 64, dtype=torch.int32))
    selftest.run(kernel, fault, x, out, workspace)
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))
    return out


def test_every_case_has_an_expectation(selftest: ModuleType) -> None:
    cases = set(selftest.cases())
    assert {case for case in cases if case[1]} == set(REPORTS)
    assert {kernel for kernel, fault in cases if not fault} == set(RESULTS)


@pytest.mark.parametrize("kernel", RESULTS)
@pytest.mark.parametrize("mode", ["plain", "checked", "counted"])
def test_correct_kernels_report_no_fault(selftest: ModuleType, kernel: str, mode: str) -> None:
    expected = RESULTS[kernel](numbers(kernel))
    for seed in SEEDS:
        selftest.emulator.configure(seed=seed, mode=mode, preempt=(0, 1, 5, 24)[seed % 4])
        assert torch.equal(run(selftest, kernel, ""), expected), seed


@pytest.mark.parametrize(("kernel", "fault"), REPORTS)
def test_faults_are_reported_under_every_schedule(
    selftest: ModuleType, kernel: str, fault: str
) -> None:
    for seed in SEEDS:
        selftest.emulator.configure(seed=seed, preempt=(0, 1, 5, 24)[seed % 4])
        with pytest.raises(selftest.EmulatorFault, match=REPORTS[kernel, fault]):
            run(selftest, kernel, fault)
    # A fault does not affect later launches.
    assert torch.equal(run(selftest, kernel, ""), RESULTS[kernel](numbers(kernel)))


def test_reports_name_kernel_line_block_and_thread(selftest: ModuleType) -> None:
    with pytest.raises(selftest.EmulatorFault) as caught:
        run(selftest, "add one", "write to an input")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("AddOne<") and lines[0].endswith(">:")
    source = (SOURCE / "tests/emulator/selftest/bounds.cu").read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(source) if "const_cast<float*>(in)[i] =" in text)
    assert lines[1] == (
        f"  a write to an input at bounds.cu:{line}, block (0, 0, 0) thread (7, 0, 0)"
        ", byte 28 of in, which has 256"
    )
    assert len(lines) == 2


def test_a_seed_determines_the_schedule(selftest: ModuleType) -> None:
    def report(seed: int) -> str:
        selftest.emulator.configure(seed=seed)
        with pytest.raises(selftest.EmulatorFault) as caught:
            run(selftest, "product", "no barrier after writes")
        return str(caught.value)

    assert report(3) == report(3)
    assert len({report(seed) for seed in SEEDS}) > 5


def test_invalid_launches_and_settings(selftest: ModuleType) -> None:
    selftest.emulator.configure(multiprocessors=1, shared_per_block=128)
    try:
        with pytest.raises(selftest.EmulatorFault, match="256 bytes of shared memory"):
            run(selftest, "reverse block", "")
    finally:
        selftest.emulator.configure(shared_per_block=227 * 1024)
    with pytest.raises(ValueError, match="mode must be plain, checked or counted, got fast"):
        selftest.emulator.configure(mode="fast")
    with pytest.raises(ValueError, match="settings must be positive"):
        selftest.emulator.configure(multiprocessors=0)
    selftest.emulator.configure(multiprocessors=4)


# ---- single instructions -------------------------------------------------------------------------


def instruction(selftest: ModuleType, name: str, words: Tensor, count: int) -> Tensor:
    """The output of an instruction's kernel, `count` int32 words, initialised with 0."""
    out = torch.zeros(count, dtype=torch.int32)
    selftest.instruction(name, words.contiguous().view(torch.int32).flatten(), out)
    return out


def random_words(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)


def test_mma_fragments_follow_the_ptx_isa(selftest: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, d = (
        torch.randint(-8, 9, shape, generator=generator).float() for shape in ((16, 16), (16, 8), (16, 8))
    )  # fmt: skip
    words = torch.empty(32, 10, dtype=torch.int32)
    expected = torch.empty(32, 4)
    for lane in range(32):
        group, pair = lane // 4, lane % 4
        # PTX ISA: row = groupID for a0, a1, a4, a5, groupID + 8 for the others;
        # column = 2 threadID_in_group + (i & 1), plus 8 from a4 on.
        for i in range(4):
            row, column = group + 8 * (i % 2), 2 * pair + 8 * (i // 2)
            words[lane, i] = a[row, column : column + 2].bfloat16().view(torch.int32)
            words[lane, 6 + i] = d[group + 8 * (i // 2), 2 * pair + i % 2].view(torch.int32)
            expected[lane, i] = (a @ b + d)[group + 8 * (i // 2), 2 * pair + i % 2]
        for i in range(2):
            row = 2 * pair + 8 * i
            words[lane, 4 + i] = b[row : row + 2, group].contiguous().bfloat16().view(torch.int32)
    found = instruction(selftest, "mma", words, 128).view(torch.float32).view(32, 4)
    assert torch.equal(found, expected)


def test_shuffles(selftest: ModuleType) -> None:
    words = torch.arange(100, 132, dtype=torch.int32)
    found = instruction(selftest, "shuffles", words, 320).view(10, 32)
    lane = torch.arange(32)
    sources = [
        torch.full((32,), 5),
        lane // 8 * 8 + 5,
        lane ^ 9,
        lane,  # lane ^ 8 is outside the segment of 8
        torch.where(lane + 3 < 32, lane + 3, lane),
        torch.where(lane % 16 + 3 < 16, lane + 3, lane),
        torch.where(lane >= 2, lane - 2, lane),
        torch.where(lane % 4 >= 2, lane - 2, lane),
    ]
    for row, source in zip(found, sources, strict=False):
        assert row.tolist() == words[source].tolist()
    assert found[8].tolist() == (2 * words[lane ^ 1] + 1).tolist()
    down = torch.where(lane < 31, lane + 1, lane)
    assert found[9].tolist() == (words[down] ^ down).tolist()


def test_votes_and_reductions(selftest: ModuleType) -> None:
    words = torch.randint(0, 100, (32,), generator=torch.Generator().manual_seed(5)).int()
    found = instruction(selftest, "votes", words, 224).view(7, 32).tolist()
    lanes = {parity: range(parity, 32, 2) for parity in (0, 1)}
    bits = [(1 << lane) * (int(words[lane]) % 3 == 0) for lane in range(32)]
    signed = lambda word: word - (word >> 31 << 32)  # noqa: E731
    for lane in range(32):
        mates = lanes[lane % 2]
        assert [row[lane] for row in found] == [
            signed(sum(bits)),
            signed(sum(bits[mate] for mate in mates)),
            int(6 in mates),
            lane % 2,
            int(words.sum()),
            min(int(words[mate]) for mate in mates),
            max(int(words[mate]) for mate in mates),
        ]


def test_conversions_to_narrow_types_match_torch(selftest: ModuleType) -> None:
    values = random_words(5000).view(torch.float32)
    special = torch.tensor([0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 65519.0, 65520.0, 1e-8, 3e38])
    values = torch.cat([values[values.isfinite()], special, torch.tensor([float("inf")])])
    words = instruction(selftest, "narrow", values, 5 * len(values)).view(5, -1)
    found = words.view(torch.float32)
    assert torch.equal(found[0], values.bfloat16().float())
    assert torch.equal(found[1], values.half().float())
    # Values in the range of float8, subnormals included; larger ones saturate.
    coarse = torch.cat(
        [values.clamp(-448, 448), torch.arange(-4480, 4481) / 10, torch.arange(4096) / 2**14]
    )
    bytes_ = instruction(selftest, "narrow", coarse, 5 * len(coarse)).view(5, -1)[2]
    assert torch.equal(bytes_, coarse.to(torch.float8_e4m3fn).view(torch.uint8).int())
    assert torch.equal(
        words[2], values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).int()
    )
    for row, factor in ((3, 1.0), (4, 2.0)):
        product = (factor * values).bfloat16() * torch.tensor(1.7).bfloat16()
        assert torch.equal(found[row], product.float())


def test_integer_intrinsics(selftest: ModuleType) -> None:
    words = torch.cat([random_words(100), torch.tensor([0, 1, -1, 1 << 30], dtype=torch.int32)])
    found = instruction(selftest, "bits", words, 5 * len(words)).numpy().view(np.uint32)
    unsigned = words.numpy().view(np.uint32).tolist()
    for word, row in zip(unsigned, found.reshape(5, -1).T, strict=True):
        assert row.tolist() == [
            word.bit_count(),
            32 - word.bit_length(),
            (word & -word).bit_length(),
            word * 0x9E3779B9 >> 32,
            int(f"{word:032b}"[::-1], 2),
        ]


def test_atomics(selftest: ModuleType) -> None:
    values = torch.arange(64, dtype=torch.int32) % 7
    for seed in SEEDS:
        selftest.emulator.configure(seed=seed)
        found = instruction(selftest, "atomics", torch.arange(64, dtype=torch.int32), 8)
        assert found[:6].tolist() == [4 * int(values.sum()), 6, 0, 0x7F, 0, 36]
        assert int(found[6:].view(torch.int64)) == 256 << 31


# ---- counters ------------------------------------------------------------------------------------


def traffic(selftest: ModuleType, name: str, words: int, out: int) -> dict[str, Any]:
    """The counters of one launch."""
    selftest.emulator.configure(mode="counted")
    selftest.emulator.reset_counters()
    instruction(selftest, name, random_words(words), out)
    (counted,) = selftest.emulator.counters().values()
    return counted


def test_traffic_of_global_memory(selftest: ModuleType) -> None:
    for name, words, loads in (
        ("move words", 32, (128, 128, 128)),
        ("move every eighth", 256, (128, 1024, 1024)),
        ("move vectors", 128, (512, 512, 512)),
    ):
        counted = traffic(selftest, name, words, words)
        stored = 512 if name == "move vectors" else 128
        names = ("load_bytes", "load_sector_bytes", "load_unique_bytes")
        # torch aligns to 64 bytes: arrays start at sectors.
        assert tuple(counted[key] for key in names) == loads, name
        assert counted["store_bytes"] == counted["store_sector_bytes"] == stored, name
        assert counted["launches"] == 1 and counted["shared_wavefronts"] == 0


def test_traffic_of_shared_memory(selftest: ModuleType) -> None:
    conflicts = traffic(selftest, "transpose", 1024, 1024)
    assert conflicts["shared_ideal"] == 32 + 32
    assert conflicts["shared_wavefronts"] == 32 + 32 * 32
    padded = traffic(selftest, "transpose padded", 1024, 1024)
    assert padded["shared_wavefronts"] == padded["shared_ideal"] == 64
    assert padded["barriers"] == 1
    assert padded["load_sector_bytes"] == padded["store_sector_bytes"] == 4096


def test_traffic_of_copies_and_matrix_instructions(selftest: ModuleType) -> None:
    counted = traffic(selftest, "move copies", 128, 128)
    assert counted["copy_bytes"] == counted["load_bytes"] == counted["load_sector_bytes"] == 512
    assert counted["shared_wavefronts"] == counted["shared_ideal"] == 4 + 4
    assert traffic(selftest, "mma", 320, 128)["matrix_instructions"] == 1
    assert traffic(selftest, "shuffles", 32, 320)["shuffles"] == 10


# The longest chains of loads from the L2 cache and from DRAM and of groups of copies, between releases.
@pytest.mark.parametrize(
    ("kernel", "intervals"),
    [
        ("in turn", [(2, 1, 0)]),
        ("together", [(1, 1, 0)]),
        ("chase", [(2, 0, 0)]),
        ("prefetched", [(1, 0, 0)]),
        ("relay", [(0, 4, 0)]),
        ("relay by shuffles", [(0, 4, 0)]),
        ("pipeline", [(0, 0, 2)]),
        ("rounds", [(0, 1, 0), (1, 0, 0), (0, 0, 0), (1, 0, 0), (0, 0, 0), (1, 0, 0), (0, 0, 0)]),
    ],
)
def test_chains_of_loads(
    selftest: ModuleType, kernel: str, intervals: list[tuple[int, int, int]]
) -> None:
    for seed in SEEDS:
        selftest.emulator.configure(seed=seed, mode="counted", preempt=(0, 1, 5, 24)[seed % 4])
        selftest.emulator.reset_counters()
        run(selftest, kernel, "")
        (counted,) = selftest.emulator.counters().values()
        assert counted["intervals"] == intervals, seed
