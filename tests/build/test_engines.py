"""The benchmark of the engines of `denoise` on a GPU, on the CPU at a small size; its timings mean nothing."""

from __future__ import annotations

import pytest

from benchmarks import bench_engines, harness
from diffmic_fast import triton
from diffmic_fast.ops import _engine as engine

H100 = engine.Card(3.35e12, 66.9e12, 989e12)


def case(
    title: str, sizes: dict[str, int], baseline: str, seconds: dict[str, float]
) -> harness.Case:
    timings = {name: harness.Timing(t, t, t, t, 3) for name, t in seconds.items()}
    return harness.Case(title, timings, baseline, sizes, 0, 0.0, {}, {})


def chain(rows: int, seconds: dict[str, float]) -> harness.Case:
    sizes = {"rows": rows, "features": 6144, "steps": 50}
    return case(f"{rows} rows", sizes, "fp32, cuda", seconds)


def test_a_rule_that_selects_the_slower_engine_is_reported() -> None:
    """At 256 rows an H100 is estimated to be faster with Triton in bf16, and with CUDA in fp32."""
    right = {"fp32, cuda": 1.0, "fp32, triton": 2.0, "bf16, cuda": 1.0, "bf16, triton": 0.5}
    wrong = {"fp32, cuda": 1.0, "fp32, triton": 0.5, "bf16, cuda": 0.4, "bf16, triton": 0.5}
    close = {"fp32, cuda": 1.0, "fp32, triton": 0.95, "bf16, cuda": 0.5, "bf16, triton": 0.52}
    for seconds in (right, close):
        assert "nearly" in bench_engines.summary([chain(256, seconds)], H100)
    assert bench_engines.summary([chain(256, wrong)], H100).splitlines() == [
        "256 rows: fp32, cuda takes 2.00 times as long as fp32, triton",
        "256 rows: bf16, triton takes 1.25 times as long as bf16, cuda",
    ]


def test_a_tile_that_is_slower_than_another_is_reported() -> None:
    sizes = {"rows": 64, "features": 6144}
    slow = case("a product", sizes, "32x64x128", {"32x64x128": 3.0, "64x64x64": 2.0})
    found = bench_engines.summary([slow], H100)
    assert found == "a product: 32x64x128 takes 1.50 times as long as 64x64x64"


@pytest.mark.emulated
def test_both_engines_and_every_tile_run(capsys: pytest.CaptureFixture[str]) -> None:
    if reason := triton.unavailable(bench_engines.torch.device("cpu")):
        pytest.skip(reason)
    made = list(bench_engines.setups("cpu", features=(40,), rows=(3,), steps=2))
    cases = harness.run(made, 2)
    assert [set(each.timings) for each in cases[:1]] == [
        {"fp32, cuda", "fp32, triton", "bf16, cuda", "bf16, triton"}
    ]
    assert [len(each.timings) for each in cases[1:]] == [6, 4]
    assert all(each.baseline in each.timings for each in cases)
    harness.show(cases)
    assert "16x64x128" in capsys.readouterr().out
    assert bench_engines.summary(cases, H100)
