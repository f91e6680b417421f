"""Timing of peers in one run, interleaved: a slow moment of the machine falls on all of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import diffmic_fast
from diffmic_fast import _native

RESULTS = Path(__file__).parent / "results"
_SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are timed several at once


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, quartiles and best of all rounds.

    On a machine with other work the best round is the one that the others left alone.
    """

    best: float
    median: float
    low: float
    high: float
    calls: int


@dataclass(frozen=True)
class Case:
    """One table of a benchmark.

    Attributes:
        title: what is computed, with its sizes.
        timings: peer -> Timing.
        baseline: the peer that ratios are taken to.
        bytes_moved: bytes that one call has to read and write, 0 where that says nothing.
        bound: bytes a second that this machine copies, in the best of the same rounds.
        limits: peer -> {timing that bounds it: factor}. What the machine would need at least is the largest
            factor * timing; a peer's share of it is shown and kept.
    """

    title: str
    timings: dict[str, Timing]
    baseline: str
    bytes_moved: int = 0
    bound: float = 0.0
    limits: dict[str, dict[str, float]] = field(default_factory=dict)

    def share(self, name: str) -> float | None:
        """Least time over the peer's own, both the median of the same rounds."""
        if name not in self.limits:
            return None
        least = max(f * self.timings[bound].median for bound, f in self.limits[name].items())
        return least / self.timings[name].median


def measure(peers: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time every peer once a round, in turn, after two calls that are not counted."""
    repeats = {}
    for name, call in peers.items():
        call()
        begin = time.perf_counter()
        call()
        once = time.perf_counter() - begin
        repeats[name] = max(1, round(_SHORTEST_SAMPLE / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, call in peers.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - begin) / repeats[name])
    timings = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(min(values), median, low, high, rounds * repeats[name])
    return timings


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    extension = _native.extension()
    return {
        "processor": _processor_name(),
        "instruction_sets": extension.cpu_features(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffmic_fast": diffmic_fast.__version__,
        "compiler": extension.build_info()["compiler"],
        "flags": extension.build_info()["flags"],
    }


def show(cases: list[Case]) -> None:
    """Print the cases as tables."""
    console = Console()
    for case in cases:
        table = Table(title=case.title, title_justify="left", padding=(0, 0))
        columns = ["", "best", "median", "quartiles", f"{case.baseline} / it, best", "median"]
        columns += ["GB/s", "of a copy"] if case.bytes_moved else []
        columns += ["of the limit"] if case.limits else []
        for column in columns:
            table.add_column(column, justify="right")
        base = case.timings[case.baseline]
        for name, timing in case.timings.items():
            row = [
                name,
                _duration(timing.best),
                _duration(timing.median),
                f"{_duration(timing.low)} to {_duration(timing.high)}",
                f"{base.best / timing.best:.1f}",
                f"{base.median / timing.median:.1f}",
            ]
            if case.bytes_moved:
                speed = case.bytes_moved / timing.best
                row += [f"{speed / 1e9:.2f}", f"{speed / case.bound:.0%}"]
            if case.limits:
                share = case.share(name)
                row.append("" if share is None else f"{share:.0%}")
            table.add_row(*row)
        console.print(table)


def write(name: str, cases: list[Case]) -> Path:
    """Keep the cases with the machine they were measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"machine": machine(), "cases": [_with_ratios(case) for case in cases]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def _with_ratios(case: Case) -> dict[str, Any]:
    base = case.timings[case.baseline]
    ratios = {
        name: {"best": base.best / timing.best, "median": base.median / timing.median}
        for name, timing in case.timings.items()
    }
    shares = {name: case.share(name) for name in case.limits}
    return {**asdict(case), f"{case.baseline}_over": ratios, "share_of_limit": shares}


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
