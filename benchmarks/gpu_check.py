"""The GPU kernels against float64 at the sizes of a real model, where weights stream through shared memory.

    python -m benchmarks.gpu_check [--write] [--backends cuda triton] [--features 3001 6144] [--rows 1 8 65] ...

Every operation of every backend, in every precision. A result may err a few times as much (`FACTORS`) as PyTorch's own
arithmetic of that precision does on the same values, both against the definition in float64, plus some roundings; it
must have the same bits when the call is repeated and, where the operation is batch-invariant, without the other rows.

Each operation runs in a process of its own, so that a fault or a hang of one kernel costs the checks of that operation
alone. The exit status is 1 if a check failed. `make gpu-check` runs it on a GPU;
`--backends cuda-emulated --features 37 --rows 1 9 --side 35` runs the same on the CPU, in the emulator.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.gpu_cases import IMPLEMENTED_AS, OPERATIONS, Case, Sizes, errors
from benchmarks.gpu_chain import device_of
from diffmic_fast.ops._backend import IMPLEMENTATIONS, unavailable

NAME = "gpu_check"
BACKENDS = ("cuda", "triton")
# By dtype: how many times the error of PyTorch's arithmetic, and how many roundings of the magnitude beside it.
# Kernels for 32 and 64 bits add in another order; those for half types compute in float32 and round once.
FACTORS = {
    torch.float64: (4.0, 8.0),
    torch.float32: (4.0, 8.0),
    torch.bfloat16: (2.0, 2.0),
    torch.float16: (2.0, 2.0),
}
_GROUP_SECONDS = 120.0


@dataclass(frozen=True)
class Check:
    """One call that was compared.

    Attributes:
        operation, backend, precision, sizes: the call.
        error, limit: of the result whose error is largest relative to its limit.
        repeated: whether a second call gave the same bits.
        alone: whether the first row has the same bits without the others; None where it need not.
        seconds: of the whole comparison.
        problem: why there is no result; "" if there is one.
    """

    operation: str
    backend: str
    precision: str
    sizes: str
    error: float = float("nan")
    limit: float = float("nan")
    repeated: bool = False
    alone: bool | None = None
    seconds: float = 0.0
    problem: str = ""

    @property
    def good(self) -> bool:
        """Whether the check passed; an error that is NaN fails."""
        within = self.error <= self.limit
        return within and self.repeated and self.alone is not False and not self.problem

    def line(self) -> str:
        """The check on one line."""
        call = f"{self.operation} {self.backend} {self.precision}, {self.sizes}"
        if self.problem:
            return f"BAD  {call}: {self.problem}"
        found = [f"error {self.error:.1e} of {self.limit:.1e}"]
        found += [] if self.repeated else ["other bits when repeated"]
        found += ["other bits without the other rows"] if self.alone is False else []
        return f"{'ok  ' if self.good else 'BAD '} {call}: {', '.join(found)}"


def check(operation: str, backend: str, case: Case) -> Check:
    """Run a case and compare it; what it raises is the problem of the check."""
    begin = time.perf_counter()
    call = (operation, backend, case.precision, case.sizes)
    try:
        found, again, exact = case.found(), case.found(), case.exact()
        repeated = all(map(torch.equal, found, again))
        alone = None if case.alone is None else torch.equal(case.alone(), found[0][0])
        error, limit = _worst(case, errors(found, exact), exact)
    except Exception as raised:  # an error of the device, too
        reason = str(raised).strip().split("\n")[0]
        return Check(*call, problem=f"{type(raised).__name__}: {reason}")
    return Check(*call, error, limit, repeated, alone, time.perf_counter() - begin)


def _worst(
    case: Case, found: Sequence[float], exact: Sequence[torch.Tensor]
) -> tuple[float, float]:
    if case.deviations is None:
        return max(found), 0.0
    factor, roundings = FACTORS[case.dtype]
    rounding = roundings * torch.finfo(case.dtype).eps / 2
    units = case.units or (0.0,) * len(found)
    limits = [
        factor * deviation + rounding * max(unit, float(value.abs().max()))
        for deviation, unit, value in zip(case.deviations(), units, exact, strict=True)
    ]
    pairs = list(zip(found, limits, strict=True))
    # An error that is NaN is the worst.
    return max(pairs, key=lambda pair: (not pair[0] <= pair[1], pair[0] / max(pair[1], 1e-300)))


def checks(operation: str, backend: str, sizes: Sizes) -> Iterator[Check]:
    """The checks of an operation, or one that says why its backend is not available."""
    reason = unavailable(IMPLEMENTED_AS.get(operation, operation), backend, device_of(backend))
    if reason:
        yield Check(operation, backend, "", "", problem=reason)
        return
    for case in OPERATIONS[operation](backend, sizes):
        yield check(operation, backend, case)


def send(sender: Connection, operation: str, backend: str, sizes: Sizes) -> None:
    """Send the checks of an operation to another process, each when it is done."""
    for found in checks(operation, backend, sizes):
        sender.send(found)


def isolated(
    operation: str,
    backend: str,
    sizes: Sizes,
    seconds: float = _GROUP_SECONDS,
    target: Callable[[Connection, str, str, Sizes], None] = send,
) -> Iterator[Check]:
    """`checks` in a process of its own.

    Args:
        operation, backend, sizes: as in `checks`.
        seconds: after which the process is killed. This, or that it ended with an error, is the last check's problem.
        target: what the process calls.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(sender, operation, backend, sizes))
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    problem = f"not finished after {seconds:.0f} s"
    try:
        while receiver.poll(max(deadline - time.monotonic(), 0.0)):
            yield receiver.recv()
    except EOFError:  # all has been sent, or the process has crashed
        process.join()
        problem = f"the process ended with status {process.exitcode}" if process.exitcode else ""
    finally:
        process.kill()
        process.join()
    if problem:
        yield Check(operation, backend, "", "", problem=problem)


def groups(backends: Sequence[str], operations: Sequence[str]) -> list[tuple[str, str]]:
    """(operation, backend) for all that exist, the first backend's first."""
    return [
        (operation, backend)
        for backend in backends
        for operation in operations
        if backend in IMPLEMENTATIONS[IMPLEMENTED_AS.get(operation, operation)]
    ]


def write(found: Sequence[Check]) -> tuple[Path, Path]:
    """Write the checks, and the machine that they ran on, as JSON and as a CSV table; returns both paths."""
    harness.RESULTS.mkdir(exist_ok=True)
    path = harness.RESULTS / f"{NAME}.json"
    rows = [{**asdict(each), "good": each.good} for each in found]
    content = {"machine": harness.machine(), "checks": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = path.with_suffix(".csv")
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(field.name for field in fields(Check)), "good"])
        writer.writerows([*astuple(each), each.good] for each in found)
    return path, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit status."""
    usual = Sizes()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=tuple(OPERATIONS))
    parser.add_argument("--features", type=int, nargs="+", default=usual.features)
    parser.add_argument("--rows", type=int, nargs="+", default=usual.rows)
    parser.add_argument("--side", type=int, default=usual.side, help="pixels of an image of rois")
    parser.add_argument("--in-process", action="store_true", help="all in this process")
    parser.add_argument("--write", action="store_true", help=f"write benchmarks/results/{NAME}.*")
    options = parser.parse_args(arguments)
    sizes = Sizes(tuple(options.features), tuple(options.rows), side=options.side)
    run = checks if options.in_process else isolated
    found: list[Check] = []
    for operation, backend in groups(options.backends, options.operations):
        for each in run(operation, backend, sizes):
            print(each.line(), flush=True)
            found.append(each)
        if options.write:
            write(found)
    bad = sum(not each.good for each in found)
    print(f"{len(found)} checks, {bad} failed" if found else "no such operation of these backends")
    return int(bad > 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
