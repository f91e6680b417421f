"""Microseconds that a step of `denoise` takes on a GPU, over rows, precision and classes, beside streaming the weights.

    python -m benchmarks.gpu_steps [--write] [--backends cuda triton] [--rows 1 8 64] [--classes 5] [--features 6144]

The time of a step is the difference between a long and a short chain, one step per sweep, divided by the difference of
their steps. What the short chain takes beyond its steps is paid once a call: packing of weights, launches. Streaming is
the time in which a copy on the device, in the same rounds, moves as many bytes, read or written, as the two hidden
weights have. `make gpu-time` runs it.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.gpu_chain import device_of, make_inputs, make_weights
from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.ops._backend import unavailable
from diffmic_fast.ops.denoise import PRECISIONS_OF, denoise

NAME = "gpu_steps"
BACKENDS = ("cuda", "triton")
BYTES = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1}  # of a hidden weight
T = 1000
_COPIED = 2**30  # bytes on a GPU, more than its caches hold
_COPIED_ON_CPU = 2**26


@dataclass(frozen=True)
class Step:
    """A step of one kind of chain.

    Attributes:
        backend, precision, classes, features, rows: the chain.
        step_us: microseconds a step.
        streaming_us: microseconds for reading the hidden weights once.
        ratio: step_us / streaming_us.
        call_us: microseconds once a call.
        copy_tb_s: 10^12 bytes a second of the copy, read and written.
    """

    backend: str
    precision: str
    classes: int
    features: int
    rows: int
    step_us: float
    streaming_us: float
    ratio: float
    call_us: float
    copy_tb_s: float

    def line(self) -> str:
        """The measurement on one line."""
        return (
            f"{self.backend} {self.precision}, C = {self.classes}, {self.rows:3d} rows: {self.step_us:8.1f} us a step, "
            f"streaming {self.streaming_us:6.1f} us, ratio {self.ratio:.2f}; {self.call_us:.0f} us once a call"
        )


@dataclass(frozen=True)
class Plan:
    """What is timed.

    Attributes:
        classes, features, rows: of the chains.
        steps: of the long and of the short chain.
        rounds: how often each is timed.
    """

    classes: tuple[int, ...] = (5, 2, 10)
    features: int = 6144
    rows: tuple[int, ...] = (1, 8, 16, 32, 64, 65, 128, 256)
    steps: tuple[int, int] = (600, 100)
    rounds: int = 5


def groups(plan: Plan, backends: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """(backend, precision, classes) of the chains, those that matter most first."""
    for classes in plan.classes:
        for backend in backends:
            for precision in PRECISIONS_OF[backend]:
                yield backend, precision, classes


def measure(plan: Plan, backend: str, precision: str, classes: int) -> Iterator[Step]:
    """Time chains over the number of rows.

    Raises:
        RuntimeError: the backend is not available.
    """
    if reason := unavailable("denoise", backend, device_of(backend)):
        raise RuntimeError(reason)
    for rows in plan.rows:
        yield _measure(plan, backend, precision, classes, rows)


def _measure(plan: Plan, backend: str, precision: str, classes: int, rows: int) -> Step:
    device, (long, short) = device_of(backend), plan.steps
    peers = {str(n): _chain(plan, backend, precision, classes, rows, n) for n in plan.steps}
    copied = _COPIED if device.type == "cuda" else _COPIED_ON_CPU
    timings = harness.measure({**peers, "copy": _copy(device, copied)}, plan.rounds)
    times = {name: timing.median for name, timing in timings.items()}
    step = (times[str(long)] - times[str(short)]) / (long - short)
    rate = 2 * copied / times["copy"]
    streaming = 2 * plan.features**2 * BYTES[precision] / rate
    return Step(
        backend, precision, classes, plan.features, rows, step * 1e6, streaming * 1e6, step / streaming,
        (times[str(short)] - short * step) * 1e6, rate / 1e12,
    )  # fmt: skip


_weights = lru_cache(maxsize=1)(make_weights)


def _chain(
    plan: Plan, backend: str, precision: str, classes: int, rows: int, steps: int
) -> Callable[[], None]:
    device = device_of(backend)
    inputs = make_inputs(rows, plan.features, classes, device)
    table = make_steps(make_schedule("linear", T), "ddim", steps)
    weights = _weights(plan.features, classes, device, T)
    call = partial(denoise, *inputs, weights, table, precision=precision, backend=backend, window=1)
    return harness.finished(device, call)


def _copy(device: torch.device, count: int) -> Callable[[], None]:
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    return harness.finished(device, partial(torch.empty_like(source).copy_, source))


def write(found: Sequence[Step], problems: Sequence[str]) -> tuple[Path, Path]:
    """Write the steps, and the machine, as JSON and as a CSV table; returns both paths."""
    harness.RESULTS.mkdir(exist_ok=True)
    path = harness.RESULTS / f"{NAME}.json"
    content = {
        "machine": harness.machine(),
        "problems": list(problems),
        "steps": [asdict(each) for each in found],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = path.with_suffix(".csv")
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Step))
        for each in found:
            writer.writerow(f"{v:.4g}" if isinstance(v, float) else v for v in astuple(each))
    return path, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the chains; returns the exit status, 1 if a backend could not be timed."""
    usual = Plan()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_steps", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--classes", type=int, nargs="+", default=usual.classes)
    parser.add_argument("--features", type=int, default=usual.features)
    parser.add_argument("--rows", type=int, nargs="+", default=usual.rows)
    parser.add_argument(
        "--steps", type=int, nargs=2, default=usual.steps, metavar=("LONG", "SHORT")
    )
    parser.add_argument("--rounds", type=int, default=usual.rounds)
    parser.add_argument("--write", action="store_true", help=f"write benchmarks/results/{NAME}.*")
    options = parser.parse_args(arguments)
    plan = Plan(
        tuple(options.classes), options.features, tuple(options.rows), tuple(options.steps),
        options.rounds,
    )  # fmt: skip
    found: list[Step] = []
    problems: list[str] = []
    for group in groups(plan, options.backends):
        try:
            for each in measure(plan, *group):
                print(each.line(), flush=True)
                found.append(each)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            problems.append("{} {}, C = {}: ".format(*group) + reason)
            print(f"BAD  {problems[-1]}", flush=True)
        if options.write:  # as they come: the run may be stopped
            write(found, problems)
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
