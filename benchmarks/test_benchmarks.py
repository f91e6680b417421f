"""The cases of `python -m benchmarks` under pytest-benchmark: `pytest --benchmark-only [-k mmd]`.

Peers are timed one after another. `python -m benchmarks` interleaves them, and its ratios are reliable.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import NAMES
from benchmarks.harness import Maker


def _peers() -> Iterator[Any]:
    for name in NAMES:
        if name in ("engines", "gpu") and not torch.cuda.is_available():
            continue
        for setup in importlib.import_module(f"benchmarks.bench_{name}").setups():
            for peer, make in setup.peers.items():
                yield pytest.param(setup.title, make, id=f"{setup.title}: {peer}")
            for peer, reason in setup.skipped.items():
                mark = pytest.mark.skip(reason=reason)
                yield pytest.param("", None, id=f"{setup.title}: {peer}", marks=mark)


@pytest.mark.parametrize(("group", "make"), list(_peers()))
def test_peer(benchmark: Any, group: str, make: Maker) -> None:
    benchmark.group = group
    benchmark(make())
