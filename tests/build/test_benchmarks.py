"""What the benchmarks write and draw; nothing is timed."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_gpu, harness, plots
from benchmarks.__main__ import main

RESULTS = harness.RESULTS


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness writes into tmp_path."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)


def case(title: str, seconds: dict[str, float], **more: Any) -> Any:
    timings = {name: harness.Timing(t, t, t, t, 3) for name, t in seconds.items()}
    sizes: dict[str, int] = {}
    return harness.Case(title, timings, "cpu", sizes, 0, 0.0, more.get("limits", {}), {})


def test_results_hold_the_ratio_to_every_peer(tmp_path: Path) -> None:
    limits = {"cpu": {"limit": 0.5}}
    cases = [case("one", {"cpu": 1.0, "slow": 4.0, "limit": 0.5}, limits=limits)]
    cases.append(case("two", {"cpu": 1.0, "other": 3.0}))
    harness.write("made_up", cases)
    kept = json.loads((tmp_path / "made_up.json").read_text())["cases"]
    assert kept[0]["ratios"]["cpu"] == {"slow": 4.0, "limit": 0.5}
    assert kept[0]["ratios"]["slow"]["cpu"] == 0.25
    assert kept[0]["share_of_limit"] == {"cpu": 0.25}
    with (tmp_path / "made_up.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["peer"] for line in lines] == ["cpu", "slow", "limit", "cpu", "other"]
    assert lines[0]["times slow"] == "4" and lines[0]["times other"] == ""
    assert lines[3]["times other"] == "3" and lines[0]["share_of_limit"] == "0.2500"
    assert all(line["torch"] for line in lines)


def test_run_times_the_peers_of_a_setup() -> None:
    calls = []
    peers = {
        "a": lambda: lambda: calls.append("a"),
        "b": lambda: lambda: calls.append("b"),
    }
    made = harness.Setup("title", peers, "a", effort=0.5, copy=("b", 8), skipped={"c": "is away"})
    (found,) = harness.run([made], 6)
    assert list(found.timings) == ["a"] and found.bound > 0 and found.skipped == {"c": "is away"}
    assert calls.count("b") > 3


def test_a_peer_that_may_fail_is_skipped_with_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken() -> Any:
        raise RuntimeError("no compiler\nmore")

    def broken_call() -> Any:
        return broken

    peers = {"a": broken, "b": broken_call, "c": lambda: lambda: None}
    made = harness.Setup("title", peers, "a", skipped={"d": "is away"}, optional=("a", "b"))
    (found,) = harness.run([made], 2)
    assert list(found.timings) == ["c"] and found.baseline == "c"
    reason = "RuntimeError: no compiler"
    assert found.skipped == {"a": reason, "b": reason, "d": "is away"}
    harness.show([found])
    assert f"without a: {reason}\n" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no compiler"):
        harness.run([harness.Setup("title", peers, "c", optional=("b",))], 2)


def test_tables_are_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"cpu": {"limit": 0.5}}
    harness.show([case("sizes", {"cpu": 2e-3, "a long name": 1.0, "limit": 2e-3}, limits=limits)])
    _, title, columns, *rows = capsys.readouterr().out.splitlines()
    assert title == "sizes" and columns.split()[:2] == ["best", "median"]
    assert len({len(row) for row in (columns, *rows)}) == 1
    assert rows[0].split() == ["cpu", *["2.00", "ms"] * 3, "to", "2.00", "ms", "1.0", "1.0", "50%"]
    assert rows[1].split()[:3] == ["a", "long", "name"]


def test_results_are_written_after_every_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def setups() -> Any:
        yield harness.Setup("one", {"a": lambda: lambda: None}, "a")
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_gpu, "setups", setups)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "--rounds", "2", "--write"])
    with pytest.raises(KeyboardInterrupt):
        main()
    kept = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert [each["title"] for each in kept] == ["one"]


def test_stock_pytorch_on_a_gpu_may_fail_the_kernels_may_not() -> None:
    setup = next(bench_gpu.setups("cpu", rows=(1,), steps=2))
    assert set(setup.optional) == {"hoisted", "hoisted bf16"} < set(setup.peers)
    assert {"fp32", "bf16", "fp8"} <= set(setup.peers) - set(setup.optional)


def test_processors_with_a_generic_name_get_family_and_model() -> None:
    def named(name: str) -> str:
        first = f"processor\t: 0\nmodel name\t: {name}\ncpu family\t: 25\nmodel\t\t: 17\n"
        return harness.processor_name(first + "\nprocessor\t: 1\nmodel\t\t: 99\n")

    assert named("AMD EPYC") == "AMD EPYC (family 25, model 17)"
    assert named("Intel(R) Xeon(R) Processor @ 2.10GHz").endswith("2.10GHz (family 25, model 17)")
    assert named("AMD EPYC 9R14") == "AMD EPYC 9R14"
    arm = harness.processor_name("CPU implementer\t: 0x41\nCPU part\t: 0xd40\n")
    assert arm.endswith(" (implementer 0x41, part 0xd40)")
    assert harness.processor_name("")


def test_matrix_instruction_sets_come_from_the_system() -> None:
    cpuinfo = "flags\t\t: fpu avx2 amx_tile amx_bf16\n\nflags\t\t: amx_int8\n"
    assert harness.instruction_sets(["avx2"], cpuinfo) == ["avx2", "amx_tile", "amx_bf16"]
    assert harness.instruction_sets(["neon"], "Features\t: asimd i8mm\n") == ["neon", "i8mm"]
    assert harness.instruction_sets(["avx2"], "") == ["avx2"]


def test_cache_sizes(tmp_path: Path) -> None:
    kinds = [("Data", "1", "32K"), ("Instruction", "1", "32K"), ("Unified", "2", "1024K")]
    for i, facts in enumerate([*kinds, ("Unified", "3", "unknown")]):
        (tmp_path / f"index{i}").mkdir()
        for name, value in zip(("type", "level", "size"), facts, strict=True):
            (tmp_path / f"index{i}" / name).write_text(value + "\n")
    assert harness.caches(tmp_path) == {"L1d": 2**15, "L2": 2**20}
    assert harness.caches(tmp_path / "index0") == {}


def test_memory_on_large_pages_is_initialised_at_random() -> None:
    memory = harness.on_large_pages(2**20 + 1)
    assert memory.shape == (2**20 + 1,) and 0.49 < memory.double().mean() < 0.51


def test_the_matmul_precision_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    seen = []

    def call() -> None:
        seen.append(torch.get_float32_matmul_precision())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        harness.with_matmul_precision("medium", call)()
    assert seen == ["medium"] and torch.get_float32_matmul_precision() == before


def test_the_committed_results_can_be_drawn(tmp_path: Path) -> None:
    for name in ("denoise", "mmd"):
        content = (RESULTS / f"{name}.json").read_text()
        (tmp_path / f"{name}.json").write_text(content)
    drawn = plots.draw(tmp_path)
    assert [path.name for path in drawn] == [
        "denoise_rows.png",
        "denoise_steps.png",
        "mmd_rows.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
