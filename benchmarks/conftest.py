"""Lets pytest find the benchmarks with `--benchmark-only`, and not without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# For `benchmarks` itself; last, so that an installed diffmic_fast comes before the sources.
sys.path.append(str(Path(__file__).parents[1]))


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Timings are no tests: a run of the tests does not wait for them."""
    return None if config.getoption("benchmark_only", False) else True
