"""Collects the benchmarks with `pytest --benchmark-only`, and only then."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Timings are not tests: a test run leaves them out."""
    return None if config.getoption("benchmark_only", False) else True
