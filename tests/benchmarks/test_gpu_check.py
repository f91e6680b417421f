"""The checks of GPU kernels at full size, on the CPU at a small one: in the emulator and in Triton's interpreter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_backends import CUDA_BACKENDS, TRITON

from benchmarks import gpu_cases, gpu_check, harness
from benchmarks.gpu_cases import OPERATIONS, Case, Sizes
from benchmarks.gpu_check import Check
from diffmic_fast.ops.denoise import PRECISIONS_OF

SMALL = Sizes(features=(21,), rows=(1, 9), side=28)
SOURCE = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("backend", ["cpu", *CUDA_BACKENDS, TRITON])
def test_every_operation_in_every_precision(backend: str) -> None:
    groups = gpu_check.groups([backend], tuple(OPERATIONS))
    found = [each for group in groups for each in gpu_check.checks(*group, SMALL)]
    assert [each.line() for each in found if not each.good] == []
    expected = {"denoise", "conditional_linear"} if backend == "triton" else set(OPERATIONS)
    assert {each.operation for each in found} == expected - {
        "" if backend == "triton" else "conditional_linear"
    }
    precisions = {each.precision for each in found if each.operation == "denoise"}
    assert precisions == set(PRECISIONS_OF[backend]) - {"int8"}
    alone = {each.alone for each in found if each.operation == "denoise"}
    assert alone == {None if backend == "triton" else True}


def test_the_first_backend_comes_first() -> None:
    groups = gpu_check.groups(gpu_check.BACKENDS, tuple(OPERATIONS))
    assert groups[0] == ("denoise", "cuda")
    assert groups[-2:] == [("denoise", "triton"), ("conditional_linear", "triton")]
    assert len(groups) == len(set(groups)) == 8


# ---- what must fail ---------------------------------------------------------------------------


def case(found: Callable[[], list[torch.Tensor]], **more: Any) -> Case:
    exact = [torch.tensor([1.0, -4.0], dtype=torch.float64)]
    return Case("2 numbers", "fp32", torch.float32, found, lambda: exact, lambda: [1e-6], **more)


def test_the_limit_is_that_of_pytorch_and_of_roundings() -> None:
    def of(error: float, **more: Any) -> Check:
        made = case(lambda: [torch.tensor([1.0, -4.0], dtype=torch.float64) + error], **more)
        return gpu_check.check("denoise", "cpu", made)

    limit = 4 * 1e-6 + 8 * 2.0**-24 * 4
    assert of(0.0).limit == pytest.approx(limit, rel=1e-6)
    assert of(0.99 * limit).good and not of(1.01 * limit).good
    assert of(1.01 * limit, units=(8.0,)).good
    assert not of(float("nan")).good and not of(float("inf")).good
    exact_bits = replace(case(lambda: [torch.tensor([1.0, -4.0])]), deviations=None)
    assert gpu_check.check("rois", "cpu", exact_bits).good
    other_bits = replace(exact_bits, found=lambda: [torch.tensor([1.0, -4.0 + 1e-6])])
    assert not gpu_check.check("rois", "cpu", other_bits).good


def test_bits_that_change_fail() -> None:
    calls = iter(range(10))
    found = gpu_check.check(
        "denoise", "cpu", case(lambda: [torch.tensor([1.0, -4.0 + next(calls) * 5e-7])])
    )
    assert not found.good and "other bits when repeated" in found.line()
    one = case(lambda: [torch.tensor([1.0, -4.0])], alone=lambda: torch.tensor(1.0 + 2e-7))
    found = gpu_check.check("denoise", "cpu", one)
    assert not found.good and "other bits without the other rows" in found.line()


def test_the_worst_result_of_a_call_is_reported() -> None:
    one, other = torch.ones(3), torch.ones(2)
    made = Case(
        "5 numbers", "fp32", torch.float32, lambda: [one, other + 0.5],
        lambda: [one.double(), other.double()], lambda: [1.0, 1e-3],
    )  # fmt: skip
    found = gpu_check.check("mmd", "cpu", made)
    assert found.error == 0.5 and not found.good
    found = gpu_check.check("mmd", "cpu", replace(made, found=lambda: [one * torch.nan, other]))
    assert not found.good
    found = gpu_check.check("mmd", "cpu", replace(made, found=lambda: [one[:2], other]))
    assert not found.good


def test_an_error_of_one_call_is_its_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, precision: str, **options: Any) -> torch.Tensor:
        if precision == "bf16":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nhint")
        return original(*arguments, precision=precision, **options)

    original = gpu_cases.denoise
    monkeypatch.setattr(gpu_cases, "denoise", broken)
    found = list(gpu_check.checks("denoise", "cpu", SMALL))
    assert {each.precision for each in found if each.good} == {"fp32"}
    (problem,) = {each.problem for each in found if not each.good}
    assert problem == "RuntimeError: CUDA error: an illegal memory access was encountered"


def crash(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_process_that_crashes_or_hangs_is_a_failed_check() -> None:
    arguments = ("mmd", "cpu", SMALL)
    (found,) = gpu_check.isolated(*arguments, target=crash)
    assert found.problem == f"the process ended with status {-signal.SIGSEGV}" and not found.good
    begin = time.monotonic()
    (found,) = gpu_check.isolated(*arguments, seconds=0.0)
    assert found.problem == "not finished after 0 s" and time.monotonic() - begin < 30


def test_an_operation_in_a_process_of_its_own() -> None:
    apart = list(gpu_check.isolated("noise_losses", "cpu", SMALL))
    here = list(gpu_check.checks("noise_losses", "cpu", SMALL))
    assert [each.line() for each in apart] == [each.line() for each in here]
    assert len(here) == 4 and all(each.good for each in here)


# ---- the command ------------------------------------------------------------------------------


def run(*more: str) -> int:
    sizes = ("--features", "9", "--rows", "1", "3", "--side", "21")
    return gpu_check.main(["--in-process", *sizes, *more])


def test_results_are_written_with_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert run("--backends", "cpu", "--operations", "denoise", "rois", "--write") == 0
    assert "14 checks, 0 failed" in capsys.readouterr().out
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert len(content["checks"]) == 14 and all(each["good"] for each in content["checks"])
    lines = (tmp_path / "gpu_check.csv").read_text().splitlines()
    assert lines[0].startswith("operation,backend,precision,sizes,error,limit")
    assert len(lines) == 15 and lines[1].startswith('denoise,cpu,fp32,"F 9, 1 rows",')


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_that_cannot_run_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--backends", "cuda", "--operations", "mmd") == 1
    assert "BAD  mmd cuda" in capsys.readouterr().out
    assert run("--backends", "triton", "--operations", "mmd") == 1
    assert "no such operation" in capsys.readouterr().out


def test_no_package_is_needed_but_torch_and_numpy() -> None:
    """For the checks, the timings, `info`, and for collecting the tests that run on a GPU."""
    program = f"""
import sys
for name in ("pydantic", "timm", "torchvision", "rich", "yaml", "sklearn", "tqdm", "matplotlib", "PIL"):
    sys.modules[name] = None  # importing it raises
sys.path.insert(0, {str(SOURCE)!r})
import pytest
from benchmarks import bench_gpu, gpu_check, gpu_stages, gpu_steps
from diffmic_fast import info
assert "pydantic" in bench_gpu._without_models()
assert "unknown" in info.report()["processor"]["bfloat16_convolutions"]
assert gpu_check.main(["--in-process", "--backends", "cpu", "--operations", "mmd", "--rows", "2"]) == 0
files = [str(path) for path in gpu_stages.gpu_test_files()]
options = ["-q", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu"]
sys.exit(pytest.main([*options, *files]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=SOURCE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/ops/test_denoise_cuda.py::test_states_match_the_reference" in done.stdout
