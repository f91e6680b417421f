"""Timing of peers in one run, interleaved, so that a slow moment of the machine falls on all of them."""

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
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

import diffmic_fast
from benchmarks import gpu_facts
from diffmic_fast import _native

RESULTS = Path(__file__).parent / "results"
# Keys of /proc/cpuinfo that identify a processor beside, or instead of, its name: x86, then Arm.
_NUMBERS = {
    "family": "cpu family",
    "model": "model",
    "implementer": "CPU implementer",
    "part": "CPU part",
}
_FOR_PRODUCTS = ("amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "avx_vnni", "i8mm", "bf16")
_OF_SETUP = ("title", "baseline", "sizes", "bytes_moved", "limits", "skipped")
_SHORTEST_SAMPLE = 2e-3  # seconds; several shorter calls make one sample
_T = TypeVar("_T")


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
        best: the fastest round, the least disturbed one on a machine with other work.
        median, low, high: median and quartiles of all rounds.
        calls: number of calls timed.
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
        peers: name -> function that makes the call to be timed.
        baseline: the peer whose ratio to the others is shown.
        sizes: the same sizes by name, for plots.
        effort: fraction of the requested rounds to run, less where a round is long.
        limits: peer -> {limiting peer: factor}. The largest factor * timing is the least time that the machine needs;
            a peer's share of it is shown and kept.
        bytes_moved: bytes that a call must read and write, 0 where that is not meaningful.
        copy: the peer that copies, and the bytes that it reads and writes; not shown.
        skipped: peer -> why it is missing.
        totals: name -> {peer: count}, for what is too long to be timed whole: the sum of count times each peer.
        memory: measure the peak memory of a process with one peer, too.
        optional: peers that may fail, such as those that torch.compile must compile; they are then skipped.
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
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A measured `Setup`.

    Attributes:
        title, baseline, sizes, bytes_moved, limits, skipped: of the setup.
        timings: peer -> Timing.
        bound: bytes per second that this machine copies, in the best of the same rounds.
        peak_bytes: peer -> peak resident memory of a process that makes it and calls it twice, beyond that of Python
            and the libraries.
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
        """Least time over the peer's own, both medians of the same rounds; None for a peer without limits."""
        if name not in self.limits:
            return None
        least = max(f * self.timings[bound].median for bound, f in self.limits[name].items())
        return least / self.timings[name].median

    def ratios(self) -> dict[str, dict[str, float]]:
        """peer -> {other: the other's median over the peer's}: how many times as fast the peer is."""
        medians = {name: timing.median for name, timing in self.timings.items()}
        return {
            name: {other: medians[other] / own for other in medians if other != name}
            for name, own in medians.items()
        }


def run(setups: Iterable[Setup], rounds: int) -> list[Case]:
    """Time the setups, one after the other."""
    return [_run(setup, max(2, round(rounds * setup.effort))) for setup in setups]


def _run(setup: Setup, rounds: int) -> Case:
    # Memory first: a large process beside these could push them out.
    peaks = {name: peak_bytes(make) for name, make in setup.peers.items()} if setup.memory else {}
    calls, failed = _make(setup)
    timings = measure(calls, rounds)
    bound = 0.0
    if setup.copy is not None:
        name, moved = setup.copy
        bound = moved / timings.pop(name).best
    for name, parts in setup.totals.items():
        timings = {name: _total(parts, timings), **timings}
    peaks = {name: peak for name, peak in peaks.items() if peak}
    of_setup = {name: getattr(setup, name) for name in _OF_SETUP}
    of_setup["skipped"] = {**setup.skipped, **failed}
    if setup.baseline in failed:
        of_setup["baseline"] = next(iter(timings))
    return Case(timings=timings, bound=bound, peak_bytes=peaks, **of_setup)


def _make(setup: Setup) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The calls of a setup, and why optional ones are missing."""
    calls, failed = {}, {}
    for name, make in setup.peers.items():
        try:
            call = make()
            if name in setup.optional:
                call()
        except Exception as error:
            if name not in setup.optional:
                raise
            failed[name] = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        else:
            calls[name] = call
    return calls, failed


def _total(parts: Mapping[str, int], timings: Mapping[str, Timing]) -> Timing:
    def add(key: str) -> float:
        return sum(count * getattr(timings[part], key) for part, count in parts.items())

    calls = min(timings[part].calls for part in parts)
    return Timing(add("best"), add("median"), add("low"), add("high"), calls)


def peak_bytes(make: Maker) -> int:
    """Peak resident memory that making a call and calling it twice adds to a new process; 0 without /proc.

    Args:
        make: importable by a new process: a function of a module, or a `functools.partial` of one.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (make,))


def _peak_here(make: Maker) -> int:
    before = _resident("VmRSS")
    call = make()
    call()
    call()
    # Not getrusage's maximum, which a process inherits from its parent.
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    lines = _read(Path("/proc/self/status")).splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def _with_setting(
    call: Callable[[], object], value: _T, get: Callable[[], _T], set_value: Callable[[_T], None]
) -> Callable[[], None]:
    def run_it() -> None:
        before = get()
        set_value(value)
        try:
            call()
        finally:
            set_value(before)

    return run_it


def on_one_thread(call: Callable[[], object]) -> Callable[[], None]:
    """The call with one torch thread."""
    return _with_setting(call, 1, torch.get_num_threads, torch.set_num_threads)


def with_matmul_precision(precision: str, call: Callable[[], object]) -> Callable[[], None]:
    """The call under `torch.set_float32_matmul_precision(precision)`."""
    return _with_setting(
        call,
        precision,
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    )


def on_large_pages(count: int) -> torch.Tensor:
    """Random float32 [count] on 2 MB pages where the system offers them, as the kernels' packed weights are.

    Ordinary pages cost a reader a tenth to a fifth of its speed.
    """
    memory = mmap.mmap(-1, 4 * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).uniform_()


def copying(count: int) -> Callable[[], object]:
    """A copy of `count` float32 numbers."""
    source = torch.randn(count)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(peers: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time every peer once per round, in turn, after two calls that are not counted."""
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


def finished(device: str | torch.device, call: Callable[[], object]) -> Callable[[], None]:
    """The call without gradients, until the device has finished."""
    waits = torch.device(device).type == "cuda"

    def run() -> None:
        with torch.no_grad():
            call()
        if waits:
            torch.cuda.synchronize(device)

    return run


def machine() -> dict[str, Any]:
    """The machine, its software and this build; "gpu" is that of `gpu_facts.facts`, at this moment."""
    extension = _native.extension()
    cpuinfo = _read(Path("/proc/cpuinfo"))
    build = extension.build_info()
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
        "compiler": build["compiler"],
        "flags": build["flags"],
        "cuda_compiler": build["cuda_compiler"],
        "cuda_architectures": build["cuda_architectures"],
        "triton": _version("triton"),
        "gpu": gpu_facts.facts(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def show(cases: list[Case]) -> None:
    """Print the cases as tables."""
    for case in cases:
        columns = ["", "best", "median", "quartiles", f"{case.baseline} / it, best", "median"]
        columns += ["GB/s", "of a copy"] if case.bytes_moved else []
        columns += ["of the limit"] if case.limits else []
        columns += ["peak GB", "of its memory"] if case.peak_bytes else []
        table = [columns]
        base = case.timings[case.baseline]
        for name, timing in case.timings.items():
            row = [name, _duration(timing.best), _duration(timing.median)]
            row += [f"{_duration(timing.low)} to {_duration(timing.high)}"]
            row += [f"{base.best / timing.best:.1f}", f"{base.median / timing.median:.1f}"]
            if case.bytes_moved:
                speed = case.bytes_moved / timing.best
                row += [f"{speed / 1e9:.2f}", f"{speed / case.bound:.0%}"]
            if case.limits:
                share = case.share(name)
                row.append("" if share is None else f"{share:.0%}")
            if case.peak_bytes:
                peak, most = case.peak_bytes[name], case.peak_bytes[case.baseline]
                row += [f"{peak / 1e9:.2f}", f"{peak / most:.2f}"]
            table.append(row)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print(f"\n{case.title}")
        for row in table:
            print("  ".join(text.rjust(n) for text, n in zip(row, widths, strict=True)))
        for name, reason in case.skipped.items():
            print(f"  without {name}: {reason}")


def write(name: str, cases: list[Case]) -> tuple[Path, Path]:
    """Write the cases and the machine as JSON and as a CSV table; returns both paths."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    kept = []
    for case in cases:
        shares = {peer: case.share(peer) for peer in case.limits}
        kept.append({**asdict(case), "ratios": case.ratios(), "share_of_limit": shares})
    content = {"machine": machine(), "cases": kept}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path, _write_table(path.with_suffix(".csv"), cases, content["machine"])


def _write_table(path: Path, cases: list[Case], facts: dict[str, Any]) -> Path:
    """One line per peer, with a column for the ratio to each other peer of the file."""
    names = dict.fromkeys(name for case in cases for name in case.timings)
    columns = ["case", "peer", "best_s", "median_s", "low_s", "high_s", "calls", "share_of_limit"]
    columns += ["peak_bytes"] if any(case.peak_bytes for case in cases) else []
    columns += [f"times {name}" for name in names]
    columns += ["processor", "torch_threads", "python", "torch", "diffmic_fast"]
    if facts["gpu"] is not None:
        columns.append("gpu")
        facts = facts | {"gpu": facts["gpu"]["name"]}
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for case in cases:
            for name, timing in case.timings.items():
                share, ratios = case.share(name), case.ratios()[name]
                line: dict[str, object] = {"case": case.title, "peer": name, "calls": timing.calls}
                for key in ("best", "median", "low", "high"):
                    line[f"{key}_s"] = f"{getattr(timing, key):.6g}"
                line["share_of_limit"] = "" if share is None else f"{share:.4f}"
                line["peak_bytes"] = case.peak_bytes.get(name, "")
                line |= {f"times {other}": f"{ratio:.4g}" for other, ratio in ratios.items()}
                table.writerow(line | facts)
    return path


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def processor_name(cpuinfo: str) -> str:
    """Name of the first processor in the text of /proc/cpuinfo, or the machine's architecture.

    A virtual machine may give the name of a product line ("AMD EPYC"). Family and model, which identify the
    microarchitecture, are then added.
    """
    facts: dict[str, str] = {}
    for line in cpuinfo.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    name = facts.get("model name", "")
    numbers = [f"{key} {facts[value]}" for key, value in _NUMBERS.items() if value in facts]
    if re.search(r"\d", name.split("@")[0]) is None and numbers:  # the clock follows "@"
        return f"{name or platform.machine()} ({', '.join(numbers)})"
    return name or platform.processor() or platform.machine()


def instruction_sets(known: list[str], cpuinfo: str) -> list[str]:
    """Instruction sets that the extension knows, and newer ones for matrix products listed in /proc/cpuinfo."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = found.group(1).split() if found else []
    return known + [flag for flag in flags if flag in _FOR_PRODUCTS and flag not in known]


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of the first processor's data caches: L1d, L2, L3. Empty where the system does not report them."""
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
