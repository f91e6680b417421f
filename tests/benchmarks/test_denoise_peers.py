"""The stock peers of the benchmark of `denoise`, at small sizes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from denoise_cases import SCHEDULE, make_inputs, make_weights

from diffmic_fast.diffusion import make_steps
from diffmic_fast.reference.denoise import denoise

SOURCE = Path(__file__).parents[2]
FEATURES, CLASSES, ROWS = 65, 3, 7


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    """The module, from its file: an installed package comes without the benchmarks."""
    path = SOURCE / "benchmarks" / "denoise_peers.py"
    if not path.exists():
        pytest.skip("the benchmarks are not beside the tests")
    spec = importlib.util.spec_from_file_location("denoise_peers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def chain() -> tuple:
    """Features, prior, weights and steps of a small chain, and what the reference makes of it."""
    x, prior, _ = make_inputs(ROWS, FEATURES, CLASSES)
    weights, steps = make_weights(FEATURES, CLASSES), make_steps(SCHEDULE, "ddim", 5)
    return (x, prior, weights, steps), denoise(x, prior, prior, weights, steps)


def test_float32_is_the_reference(peers: ModuleType, chain: tuple) -> None:
    arguments, expected = chain
    assert torch.equal(peers.floating(*arguments)(), expected)


def test_bfloat16_rounds_everything_but_the_states(peers: ModuleType, chain: tuple) -> None:
    (x, prior, weights, steps), expected = chain
    half = peers.cast(weights, torch.bfloat16)
    assert {part.dtype for part in (*half.conditioning, *half.hidden[1], half.output_bias)} == {
        torch.bfloat16
    }
    found = peers.floating(x, prior, half, steps)()
    assert found.dtype == torch.float32
    error = (found - expected).abs().max()
    assert 1e-4 < error < 0.3


def test_int8_is_near_the_reference(peers: ModuleType, chain: tuple) -> None:
    if missing := peers.skipped():
        pytest.skip(missing["stock int8"])
    arguments, expected = chain
    error = (peers.int8(*arguments)() - expected).abs().max()
    assert 1e-4 < error < 0.5
    assert arguments[2].hidden[0].weight.dtype == torch.float32


def test_products_take_one_pass_over_each_hidden_weight(
    peers: ModuleType, chain: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = chain[0][2]
    taken = []
    monkeypatch.setattr(peers.F, "linear", lambda h, weight: taken.append((h.shape, weight)))
    peers.products(ROWS, weights, 2)()
    assert [shape for shape, _ in taken] == [(ROWS, FEATURES)] * 4
    assert taken[0][1] is weights.hidden[0].weight and taken[1][1] is weights.hidden[1].weight
