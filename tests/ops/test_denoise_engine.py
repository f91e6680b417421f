"""Which kernels "auto" runs on a GPU, by the number of rows; with fakes, no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from denoise_cases import SCHEDULE, make_inputs, make_weights

from diffmic_fast import _native, info
from diffmic_fast.diffusion import make_steps
from diffmic_fast.ops import _engine as engine
from diffmic_fast.ops import denoise as ops
from diffmic_fast.ops.denoise import denoise

H100, RTX4090 = engine.Card(3.35e12, 66.9e12, 989e12), engine.Card(1.01e12, 82.6e12, 165e12)


def fewest(features: int, precision: str, card: engine.Card, most: int = 4096) -> int:
    """The fewest rows that "triton" computes."""
    chosen = [engine.choose(rows, features, precision, card) for rows in range(1, most)]
    count = chosen.index("triton") if "triton" in chosen else len(chosen)
    assert set(chosen[count:]) <= {"triton"}  # from there on always
    return count + 1


@pytest.mark.parametrize("card", [H100, RTX4090])
@pytest.mark.parametrize("precision", engine.PRECISIONS)
@pytest.mark.parametrize("features", [16, 512, 6144, 20000])
def test_one_pass_over_the_weights_is_never_triton(
    card: engine.Card, precision: str, features: int
) -> None:
    assert fewest(features, precision, card, 700) > engine.ROWS_PER_PASS[precision]


@pytest.mark.parametrize(
    ("capability", "bf16", "fp32"),
    [((8, 0), 65, None), ((8, 9), 65, 33), ((9, 0), 65, None), ((10, 0), 65, None)],
)
def test_many_rows_are_triton_where_the_weights_would_be_read_again(
    capability: tuple[int, int], bf16: int, fp32: int | None
) -> None:
    """The table of docs/kernels/denoise.md. Without a gain, both are bound by float32 multiply-adds."""
    card, _ = engine._DATA_SHEETS[capability]
    assert fewest(6144, "bf16", card) == bf16
    assert fewest(6144, "fp32", card) == (fp32 or 4096)


def test_few_features_need_more_rows() -> None:
    """The launches cost more than another pass over small weights."""
    assert fewest(1024, "bf16", H100) > 65


def test_an_estimate_is_the_larger_of_traffic_and_arithmetic() -> None:
    slow, fast = engine.Card(1e12, 1e12, 1e12), engine.Card(1e12, 1e15, 1e15)
    reading = 2 * 1000**2 * 2 / 0.8e12
    for passes in (1, 3):
        arithmetic = passes * 64 * 4 * 1000**2 / 0.5e12
        found = [engine.step_seconds(name, passes, 1000, "bf16", slow) for name in engine.ENGINES]
        assert found == pytest.approx([passes * 15e-6 + arithmetic, 30e-6 + arithmetic])
        found = [engine.step_seconds(name, passes, 1000, "bf16", fast) for name in engine.ENGINES]
        assert found == pytest.approx([passes * (15e-6 + reading), 30e-6 + reading])


def properties(**facts: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"major": 9, "minor": 0, "multi_processor_count": 132} | facts))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, H100),
        (
            {"memory_clock_rate": 2619000, "memory_bus_width": 5120},
            H100._replace(bandwidth=3.35232e12),
        ),
        ({"multi_processor_count": 66}, engine.Card(3.35e12, 66.9e12 / 2, 989e12 / 2)),
        ({"minor": 3}, H100),  # the newest that is not newer
        ({"major": 13}, engine.Card(1.79e12, 132 / 170 * 104.8e12, 132 / 170 * 209e12)),
        ({"major": 7, "minor": 5}, engine.Card(2.04e12, 132 / 108 * 19.5e12, 132 / 108 * 312e12)),
    ],
)
def test_cards(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], expected: engine.Card
) -> None:
    engine.card_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties(**facts))
    found = engine.card_of(0)
    engine.card_of.cache_clear()
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other)


# ---- dispatch: CPU tensors that stand for those of a GPU, and kernels that record their call ---


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engines that ran. Both are available, on the CPU, beside a card that reads slowly."""
    monkeypatch.delenv("DIFFMIC_BACKEND", raising=False)
    names: list[str] = []

    def resolve(operation: str, backend: str, device: torch.device) -> str:
        return "cuda" if backend == "auto" else backend

    class Module:
        def denoise_workspace(self, *_: Any) -> int:
            return 0

        def denoise(self, call: Any, out: torch.Tensor, *_: Any) -> None:
            names.append(call.backend)
            out.zero_()

    def kernel(call: Any, out: torch.Tensor, *_: Any) -> None:
        names.append(call.backend)
        out.zero_()

    monkeypatch.setattr(ops, "resolve", resolve)
    monkeypatch.setattr(engine, "unavailable", lambda *_: "")
    monkeypatch.setattr(_native, "cuda", lambda backend: Module())
    monkeypatch.setattr(engine, "card_of", lambda index: engine.Card(1e6, 1e15, 1e15))
    kernels = pytest.importorskip("diffmic_fast.triton.denoise")
    monkeypatch.setattr(kernels, "denoise", kernel)
    return names


def run(rows: int, classes: int = 3, **options: Any) -> torch.Tensor:
    inputs, weights = make_inputs(rows, 20, classes), make_weights(20, classes)
    with torch.no_grad():
        return denoise(*inputs, weights, make_steps(SCHEDULE, "ddim", 3), **options)


@pytest.mark.parametrize(("precision", "most"), [("fp32", 32), ("bf16", 64)])
def test_auto_takes_triton_beyond_one_pass(ran: list[str], precision: str, most: int) -> None:
    for rows in (1, most, most + 1, 300):
        assert run(rows, precision=precision).shape == (rows, 3)
    assert ran == ["cuda", "cuda", "triton", "triton"]


def test_what_triton_lacks_stays_with_cuda(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(300, precision="fp8")
    run(300, tolerance=1e-5)
    run(300, classes=129)
    run(300, backend="cuda")
    monkeypatch.setenv("DIFFMIC_BACKEND", "cuda")
    run(300)
    monkeypatch.delenv("DIFFMIC_BACKEND")
    monkeypatch.setattr(engine, "unavailable", lambda *_: "there is no Triton")
    run(300)
    assert ran == ["cuda"] * 6


def test_info_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "decide", lambda *_: ("cuda", ""))
    monkeypatch.setattr(engine, "selectable", lambda *_: True)
    device = torch.device("cuda")
    assert info._backend("denoise", device) == "cuda; triton for many rows"
    assert info._backend("mmd", device) == "cuda"
    monkeypatch.setattr(engine, "selectable", lambda *_: False)
    assert info._backend("denoise", device) == "cuda"


def test_a_compiled_graph_chooses_when_it_runs(ran: list[str]) -> None:
    weights, steps = make_weights(20, 3), make_steps(SCHEDULE, "ddim", 3)

    def chain(*inputs: torch.Tensor) -> torch.Tensor:
        return denoise(*inputs, weights, steps)

    torch.compiler.reset()
    compiled = torch.compile(chain, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (7, 40):
            compiled(*make_inputs(rows, 20, 3))
    assert ran == ["cuda", "triton"]
