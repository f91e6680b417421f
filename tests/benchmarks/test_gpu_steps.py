"""Microseconds a step of `denoise`: what is computed from timings, and the command on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from benchmarks import gpu_steps, harness
from benchmarks.gpu_steps import Plan
from benchmarks.harness import Timing

PLAN = Plan(classes=(3,), features=64, rows=(1, 5), steps=(60, 10), rounds=2)


def test_a_step_is_the_difference_of_two_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def measure(peers: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
        for call in peers.values():
            call()
        called.append((list(peers), rounds))
        seconds = {"60": 1.1e-3, "10": 0.6e-3, "copy": 2 * 2**26 / 1e9}  # 1 GB/s
        return {name: Timing(0.0, t, t, t, 3) for name, t in seconds.items()}

    monkeypatch.setattr(harness, "measure", measure)
    found = list(gpu_steps.measure(PLAN, "cpu", "bf16", 3))
    assert called == [(["60", "10", "copy"], 2)] * 2
    assert [each.rows for each in found] == [1, 5]
    for each in found:
        assert each.step_us == pytest.approx(10.0)
        assert each.call_us == pytest.approx(500.0)
        assert each.copy_tb_s == pytest.approx(1e-3)
        assert each.streaming_us == pytest.approx(2 * 64**2 * 2 / 1e9 * 1e6)
        assert each.ratio == pytest.approx(each.step_us / each.streaming_us)


def test_the_classes_come_in_the_order_of_the_plan() -> None:
    found = list(gpu_steps.groups(Plan(classes=(5, 2)), ("cuda", "triton")))
    assert found[:5] == [
        ("cuda", "fp32", 5),
        ("cuda", "bf16", 5),
        ("cuda", "fp8", 5),
        ("triton", "fp32", 5),
        ("triton", "bf16", 5),
    ]
    assert [classes for _, _, classes in found] == [5] * 5 + [2] * 5


def test_a_backend_that_is_missing_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.delenv("DIFFMIC_EMULATED", raising=False)
    monkeypatch.setattr(
        gpu_steps, "unavailable", lambda _, backend, __: "" if backend == "cpu" else "none"
    )
    options = [
        "--classes",
        "3",
        "--features",
        "33",
        "--rows",
        "1",
        "--steps",
        "9",
        "4",
        "--rounds",
        "2",
    ]
    assert gpu_steps.main(["--backends", "triton", "cpu", *options, "--write"]) == 1
    assert "BAD  triton fp32, C = 3: none" in capsys.readouterr().out
    content = json.loads((tmp_path / "gpu_steps.json").read_text())
    assert content["machine"]["processor"] and len(content["problems"]) == 2
    assert [each["precision"] for each in content["steps"]] == ["fp32", "bf16", "int8"]
    assert len((tmp_path / "gpu_steps.csv").read_text().splitlines()) == 4
