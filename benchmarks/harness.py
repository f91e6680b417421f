"""Timing of peers in one run, interleaved: a slow moment of the machine falls on all of them."""

from __future__ import annotations

import contextlib
import csv
import json
import mmap
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import diffmic_fast
from diffmic_fast import _native

RESULTS = Path(__file__).parent / "results"
# What names a processor in /proc/cpuinfo beside, or instead of, its name: x86, then Arm.
_NUMBERS = {
    "family": "cpu family",
    "model": "model",
    "implementer": "CPU implementer",
    "part": "CPU part",
}
_FOR_PRODUCTS = ("amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "avx_vnni", "i8mm", "bf16")
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


Maker = Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Setup:
    """What one table of a benchmark times. Nothing is computed before a peer is made.

    Attributes:
        title: what is computed, with its sizes.
        peers: name -> what makes the call to be timed.
        baseline: the peer whose ratio to the others is shown.
        sizes: the same sizes by name, for plots.
        effort: a part of the rounds asked for, less where a round is long.
        limits: peer -> {peer that bounds it: factor}. What the machine would need at least is the
            largest factor * timing; a peer's share of it is shown and kept.
        bytes_moved: bytes that one call has to read and write, 0 where that says nothing.
        copy: the peer that copies, and the bytes that it reads and writes; not shown.
        skipped: peer -> why it is not here.
        totals: name -> {peer: times}, for what is too long to be timed whole: so many times each.
        memory: whether the most memory that a process with one peer takes is measured, too.
    """

    title: str
    peers: dict[str, Maker]
    baseline: str
    sizes: dict[str, int] = field(default_factory=dict)
    effort: float = 1.0
    limits: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes_moved: int = 0
    copy: tuple[str, int] | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    totals: dict[str, dict[str, int]] = field(default_factory=dict)
    memory: bool = False


@dataclass(frozen=True)
class Case:
    """A measured `Setup`: its attributes, and

    Attributes:
        timings: peer -> Timing.
        bound: bytes a second that this machine copies, in the best of the same rounds.
        peak_bytes: peer -> the most resident memory of a process that makes and calls it twice, beyond
            that of Python and the libraries.
    """

    title: str
    timings: dict[str, Timing]
    baseline: str
    sizes: dict[str, int]
    bytes_moved: int
    bound: float
    limits: dict[str, dict[str, float]]
    skipped: dict[str, str]
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def share(self, name: str) -> float | None:
        """Least time over the peer's own, both the median of the same rounds."""
        if name not in self.limits:
            return None
        least = max(f * self.timings[bound].median for bound, f in self.limits[name].items())
        return least / self.timings[name].median


def run(setups: Iterable[Setup], rounds: int) -> list[Case]:
    """Time the setups, one after the other."""
    return [_run(setup, max(2, round(rounds * setup.effort))) for setup in setups]


def _run(setup: Setup, rounds: int) -> Case:
    # Before anything is made here: a large process beside them could push the others out of memory.
    peaks = {name: peak_bytes(make) for name, make in setup.peers.items()} if setup.memory else {}
    timings = measure({name: make() for name, make in setup.peers.items()}, rounds)
    bound = 0.0
    if setup.copy is not None:
        name, moved = setup.copy
        bound = moved / timings.pop(name).best
    for name, parts in setup.totals.items():
        timings = {name: _total(parts, timings), **timings}
    return Case(
        setup.title,
        timings,
        setup.baseline,
        setup.sizes,
        setup.bytes_moved,
        bound,
        setup.limits,
        setup.skipped,
        {name: peak for name, peak in peaks.items() if peak},
    )


def peak_bytes(make: Maker) -> int:
    """The most resident memory that making the call and calling it twice adds to a new process; 0 where /proc is not.

    Args:
        make: what a new process can import, a function of a module or a `functools.partial` of one.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (make,))


def _peak_here(make: Maker) -> int:
    before = _resident("VmRSS")
    call = make()
    call()
    call()
    # Not getrusage's, which a process takes over from the one that started it.
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _total(parts: Mapping[str, int], timings: Mapping[str, Timing]) -> Timing:
    def add(key: str) -> float:
        return sum(times * getattr(timings[part], key) for part, times in parts.items())

    calls = min(timings[part].calls for part in parts)
    return Timing(add("best"), add("median"), add("low"), add("high"), calls)


def on_one_thread(call: Callable[[], object]) -> Callable[[], None]:
    """The call, with torch's number of threads at 1 meanwhile."""

    def run_it() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            call()
        finally:
            torch.set_num_threads(threads)

    return run_it


def on_large_pages(count: int) -> torch.Tensor:
    """Random float32 [count] on 2 MB pages where the system gives them, as kernels have their weights.

    Ordinary pages cost a reader a tenth to a fifth of its speed.
    """
    memory = mmap.mmap(-1, 4 * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).uniform_()


def with_matmul_precision(precision: str, call: Callable[[], object]) -> Callable[[], None]:
    """The call, with `torch.set_float32_matmul_precision(precision)` meanwhile."""

    def run_it() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            call()
        finally:
            torch.set_float32_matmul_precision(before)

    return run_it


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
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        timings[name] = Timing(min(values), median, low, high, rounds * repeats[name])
    return timings


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    extension = _native.extension()
    cpuinfo = _read(Path("/proc/cpuinfo"))
    return {
        "processor": processor_name(cpuinfo),
        "instruction_sets": instruction_sets(extension.cpu_features(), cpuinfo),
        "caches": caches(),
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
        columns += ["peak GB", "of its memory"] if case.peak_bytes else []
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
            if case.peak_bytes:
                peak, most = case.peak_bytes[name], case.peak_bytes[case.baseline]
                row += [f"{peak / 1e9:.2f}", f"{peak / most:.2f}"]
            table.add_row(*row)
        console.print(table)
        for name, reason in case.skipped.items():
            console.print(f"  without {name}: {reason}", markup=False)


def write(name: str, cases: list[Case]) -> tuple[Path, Path]:
    """Keep the cases with the machine they were measured on, as JSON and as a CSV table."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"machine": machine(), "cases": [_with_ratios(case) for case in cases]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path, _write_table(path.with_suffix(".csv"), cases, content["machine"])


def ratios(case: Case) -> dict[str, dict[str, float]]:
    """peer -> {other: the other's median over the peer's}: how many times as fast the peer is."""
    medians = {name: timing.median for name, timing in case.timings.items()}
    return {
        name: {other: medians[other] / own for other in medians if other != name}
        for name, own in medians.items()
    }


def _with_ratios(case: Case) -> dict[str, Any]:
    shares = {name: case.share(name) for name in case.limits}
    return {**asdict(case), "ratios": ratios(case), "share_of_limit": shares}


def _write_table(path: Path, cases: list[Case], facts: dict[str, Any]) -> Path:
    """A line a peer, and in it a column for the ratio to each other peer of the file."""
    names = list(dict.fromkeys(name for case in cases for name in case.timings))
    head = ["case", "peer", "best_s", "median_s", "low_s", "high_s", "calls", "share_of_limit"]
    peaks = any(case.peak_bytes for case in cases)
    head += ["peak_bytes"] if peaks else []
    versions = ("processor", "torch_threads", "python", "torch", "diffmic_fast")
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*head, *(f"times {name}" for name in names), *versions])
        for case in cases:
            to_others = ratios(case)
            for name, t in case.timings.items():
                share = case.share(name)
                numbers = [t.best, t.median, t.low, t.high]
                table.writerow(
                    [
                        *(case.title, name, *(f"{number:.6g}" for number in numbers), t.calls),
                        "" if share is None else f"{share:.4f}",
                        *([case.peak_bytes.get(name, "")] if peaks else []),
                        *_cells(to_others[name], names),
                        *(facts[version] for version in versions),
                    ]
                )
    return path


def _cells(found: Mapping[str, float], names: list[str]) -> list[str]:
    return [f"{found[name]:.4g}" if name in found else "" for name in names]


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def processor_name(cpuinfo: str) -> str:
    """The first processor's name in the text of /proc/cpuinfo, or the machine's architecture.

    A virtual machine may name a whole line of processors ("AMD EPYC"). Then family and model are added, by which its
    manufacturer's documents tell the microarchitecture.
    """
    facts: dict[str, str] = {}
    for line in cpuinfo.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    name = facts.get("model name", "")
    numbers = [f"{key} {facts[value]}" for key, value in _NUMBERS.items() if value in facts]
    if re.search(r"\d", name.split("@")[0]) is None and numbers:  # after "@" stands the clock
        return f"{name or platform.machine()} ({', '.join(numbers)})"
    return name or platform.processor() or platform.machine()


def instruction_sets(known: list[str], cpuinfo: str) -> list[str]:
    """Those that the extension looks for, and the newer ones for products that /proc/cpuinfo names."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = found.group(1).split() if found else []
    return known + [flag for flag in flags if flag in _FOR_PRODUCTS and flag not in known]


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of the first processor's caches of data: L1d, L2, L3. Empty where the system does not say."""
    sizes = {}
    for index in sorted(folder.glob("index*")):
        kind, level, size = (_read(index / name).strip() for name in ("type", "level", "size"))
        if kind in ("Data", "Unified") and re.fullmatch(r"\d+K", size):
            sizes[f"L{level}d" if kind == "Data" else f"L{level}"] = int(size[:-1]) * 1024
    return sizes


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
