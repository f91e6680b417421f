"""The stages of `make gpu`, on a machine with an NVIDIA GPU: each under eight minutes, and useful without the others.

    python -m benchmarks.gpu_stages [--out FOLDER] check time sanitize

    check     kernels against float64 at full size (`gpu_check`), then the tests marked gpu
    time      microseconds a step (`gpu_steps`), then `python -m benchmarks gpu`
    sanitize  memcheck, racecheck, synccheck and initcheck of compute-sanitizer on a few calls

A command that fails, or does not end in its time, does not prevent the next one; the exit status is 1 if one failed.
The folder receives the output of each command (NAME.log), copies of the results that it wrote, and per stage what
became of its commands, with the machine (STAGE.json).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import gpu_check, gpu_steps, harness
from build_support.plan import find_nvcc
from diffmic_fast import _native

SECONDS = 480  # of a stage, at most
# Reports of compute-sanitizer name kernels as C++ does. All CUDA kernels are in the namespace diffmic; in mangled
# names, which the filter compares, it is spelled the same.
_NAMESPACE = "diffmic"
_REPORT = re.compile(rf"^=+\s+(?:at|Device Frame:) .*\b{_NAMESPACE}::", re.MULTILINE)
_TESTS = Path(__file__).resolve().parents[1] / "tests"
_ON_A_GPU = re.compile(
    r"\bdevice_of\b|.gpu., CUDA_BACKENDS|\bTRITON\b|\.to\(TRITON_DEVICE\b|\bmark\.gpu\b"
)


@dataclass(frozen=True)
class Command:
    """One command of a stage.

    Attributes:
        name: of its log.
        arguments: of Python.
        seconds: after which it is stopped.
        results: name of the files in benchmarks/results that it writes; "" for none.
        tool: of compute-sanitizer, under which it runs; "" for none.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: int
    results: str = ""
    tool: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a command: its name, why it failed ("" if it did not), and its seconds."""

    name: str
    problem: str
    seconds: float


def gpu_test_files() -> list[Path]:
    """Files of tests that use a GPU; others may need packages that a machine with a GPU lacks."""
    return [
        path
        for path in sorted(_TESTS.rglob("test_*.py"))
        if _ON_A_GPU.search(path.read_text(encoding="utf-8"))
    ]


def _tests() -> tuple[str, ...]:
    arguments = ["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu"]
    # Without a package that one file needs, the tests of the other files run.
    arguments += ["--continue-on-collection-errors", *map(str, gpu_test_files())]
    if importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    return tuple(arguments)


def _sanitized(*arguments: str) -> tuple[str, ...]:
    check = ("-m", "benchmarks.gpu_check", "--in-process", "--backends", "cuda", "--side", "64")
    return (*check, *arguments)


def stages() -> dict[str, tuple[Command, ...]]:
    """The commands of each stage, those that matter most first."""
    small = _sanitized("--features", "300", "--rows", "1", "9")
    # Enough features that slots of shared memory are used again.
    ring = _sanitized("--operations", "denoise", "--features", "2601", "--rows", "8")
    return {
        "check": (
            Command("kernels", ("-m", "benchmarks.gpu_check", "--write"), 240, gpu_check.NAME),
            Command("tests", _tests(), 230),
        ),
        "time": (
            Command("steps", ("-m", "benchmarks.gpu_steps", "--write"), 180, gpu_steps.NAME),
            Command("table", ("-m", "benchmarks", "gpu", "--write", "--rounds", "10"), 290, "gpu"),
        ),
        "sanitize": (
            Command("memcheck", small, 90, tool="memcheck"),
            Command("racecheck", small, 90, tool="racecheck"),
            Command("racecheck_ring", ring, 90, tool="racecheck"),
            Command("synccheck", small, 90, tool="synccheck"),
            Command("initcheck", small, 110, tool="initcheck"),
        ),
    }


def obstacle() -> str:
    """Why nothing can run here; "" if it can."""
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    return _native.cuda_failure()


def compute_sanitizer() -> str | None:
    """The program, from the PATH or beside nvcc."""
    nvcc = find_nvcc(os.environ)
    beside = str(Path(nvcc).resolve().parent) if nvcc else None
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


def sanitizer_options(tool: str, help_text: str) -> tuple[str, ...]:
    """Options that restrict a tool of compute-sanitizer to this package's kernels.

    Args:
        tool: its name.
        help_text: the output of compute-sanitizer --help; earlier versions spell the filter --kernel-regex.
    """
    if tool == "initcheck":
        # It has to see what PyTorch's kernels write; reports of those are left out afterwards.
        return ("--tool", tool)
    option = "--kernel-name" if "--kernel-name" in help_text else "--kernel-regex"
    return ("--tool", tool, option, f"kernel_substring={_NAMESPACE}", "--error-exitcode", "1")


def _line(command: Command) -> list[str]:
    """The command line.

    Raises:
        FileNotFoundError: compute-sanitizer is not installed.
    """
    python = [sys.executable, *command.arguments]
    if not command.tool:
        return python
    program = compute_sanitizer()
    if program is None:
        raise FileNotFoundError("compute-sanitizer was found neither on the PATH nor beside nvcc")
    shown = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    return [program, *sanitizer_options(command.tool, shown.stdout), *python]


def run(command: Command, out: Path) -> Outcome:
    """Run a command, with its output on the terminal and in out/NAME.log."""
    begin, log = time.time(), out / f"{command.name}.log"
    try:
        status = _logged(_line(command), log, command)
    except OSError as error:
        return Outcome(command.name, str(error), time.time() - begin)
    problem = ""
    if time.time() - begin >= command.seconds:
        problem = f"stopped after {command.seconds} s"
    elif status:
        problem = f"exit status {status}"
    elif command.tool and (count := len(_REPORT.findall(log.read_text(encoding="utf-8")))):
        problem = f"{count} reports"
    for path in harness.RESULTS.glob(f"{command.results}.*"):
        if path.stat().st_mtime >= begin:
            shutil.copy(path, out)
    return Outcome(command.name, problem, time.time() - begin)


def _logged(line: Sequence[str], log: Path, command: Command) -> int:
    """The exit status of a command that is killed after its time, with its children."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if command.tool:  # an allocation each for every tensor: what lies beyond one is found
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment,
        start_new_session=True,
    )  # fmt: skip
    timer = threading.Timer(command.seconds, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        with log.open("w", encoding="utf-8") as file:
            for text in process.stdout or ():
                print(text, end="", flush=True)
                file.write(text)
        return process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def run_stage(name: str, commands: Sequence[Command], out: Path) -> list[Outcome]:
    """Run all commands of a stage, and write out/NAME.json."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for command in commands:
        print(f"== {name}: {command.name}, at most {command.seconds} s", flush=True)
        outcomes.append(run(command, out))
        content = {"machine": harness.machine(), "commands": [asdict(each) for each in outcomes]}
        (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit status."""
    known = stages()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_stages", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("stages", nargs="+", choices=tuple(known))
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    options = parser.parse_args(arguments)
    if reason := obstacle():
        print(f"make gpu: {reason}")
        return 1
    outcomes = {name: run_stage(name, known[name], options.out) for name in options.stages}
    print(f"\nmake gpu: results and logs are in {options.out}")
    for name, found in outcomes.items():
        for each in found:
            print(f"  {name} {each.name}: {each.problem or 'good'}, {each.seconds:.0f} s")
    return int(any(each.problem for found in outcomes.values() for each in found))


if __name__ == "__main__":
    sys.exit(main())
