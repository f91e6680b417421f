"""The stages of `make gpu`: no failure hides another command, and none takes longer than its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_stages, harness
from benchmarks.gpu_stages import Command

SOURCE = Path(__file__).resolve().parents[2]


def program(name: str, text: str, seconds: int = 60, **more: str) -> Command:
    return Command(name, ("-c", text), seconds, **more)


def test_every_stage_fits_into_its_time() -> None:
    stages = gpu_stages.stages()
    assert list(stages) == ["check", "time", "sanitize"]
    for commands in stages.values():
        assert sum(command.seconds for command in commands) <= gpu_stages.SECONDS
        names = [command.name for command in commands]
        assert len(set(names)) == len(names)
    tools = {command.tool for command in stages["sanitize"]}
    assert tools == {"memcheck", "racecheck", "synccheck", "initcheck"}


def test_a_failure_does_not_hide_the_other_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    known = {
        "check": (
            program("one", "print('first'); raise SystemExit(3)"),
            program("two", "print('second')"),
        ),
        "time": (program("three", "print('third')"),),
    }
    monkeypatch.setattr(gpu_stages, "stages", lambda: known)
    monkeypatch.setattr(gpu_stages, "obstacle", lambda: "")
    out = tmp_path / "new" / "folder"
    assert gpu_stages.main(["--out", str(out), "check", "time"]) == 1
    said = capfd.readouterr().out
    assert all(word in said for word in ("first", "second", "third"))
    assert "check one: exit status 3" in said and "check two: good" in said
    assert (out / "two.log").read_text() == "second\n"
    content = json.loads((out / "check.json").read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert [each["problem"] for each in content["commands"]] == ["exit status 3", ""]
    assert gpu_stages.main(["--out", str(out), "time"]) == 0


def test_a_command_that_does_not_end_is_stopped_with_its_children(tmp_path: Path) -> None:
    text = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
    begin = time.monotonic()
    found = gpu_stages.run(program("slow", text, seconds=3), tmp_path)
    assert found.problem == "stopped after 3 s" and time.monotonic() - begin < 30
    child = int((tmp_path / "slow.log").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("its child still runs")


def test_results_of_a_command_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    out.mkdir()
    monkeypatch.setattr(harness, "RESULTS", results)
    (results / "gpu.csv").write_text("old")
    os.utime(results / "gpu.csv", (1.0, 1.0))
    text = f"open({str(results / 'gpu.json')!r}, 'w').write('new')"
    assert gpu_stages.run(program("table", text, results="gpu"), out).problem == ""
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "table.log"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_stages.main(["--out", str(tmp_path), "check"]) == 1
    assert "make gpu: PyTorch finds no GPU" in capsys.readouterr().out


# ---- compute-sanitizer ------------------------------------------------------------------------

REPORT = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void {kernel}<float>(Problem)+0x1a0 in mmd.cu:42
=========     by thread (0,0,0) in block (0,0,0)
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: diffmic::cuda::mmd::Launch [0x1] in _C.so
========= ERROR SUMMARY: 1 error
"""


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH with a compute-sanitizer that prints the file `report` and runs its command."""
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "compute-sanitizer"
    path.write_text(
        f"""#!/bin/sh
if [ "$1" = --help ]; then echo '  -k [ --kernel-name ] arg'; exit 0; fi
echo "$@" >{folder}/arguments
cat {folder}/report
while [ "$1" != {sys.executable} ]; do shift; done
"$@"
"""
    )
    path.chmod(0o755)
    (folder / "report").write_text("")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def test_reports_of_this_packages_kernels_alone_count(sanitizer: Path, tmp_path: Path) -> None:
    def problem(tool: str) -> str:
        return gpu_stages.run(program("tool", "pass", tool=tool), tmp_path).problem

    assert problem("initcheck") == ""
    (sanitizer / "report").write_text(REPORT.format(kernel="at::native::vectorized_kernel"))
    assert problem("initcheck") == ""
    assert "--kernel" not in (sanitizer / "arguments").read_text()
    own = REPORT.format(kernel="diffmic::cuda::mmd::(anonymous namespace)::MmdKernel")
    (sanitizer / "report").write_text(own + own)
    assert problem("initcheck") == "2 reports"
    assert problem("racecheck") == "2 reports"
    arguments = (sanitizer / "arguments").read_text()
    assert "--tool racecheck --kernel-name kernel_substring=diffmic --error-exitcode 1" in arguments


def test_a_program_that_fails_under_the_sanitizer_fails(sanitizer: Path, tmp_path: Path) -> None:
    command = program("tool", "raise SystemExit(1)", tool="initcheck")
    assert gpu_stages.run(command, tmp_path).problem == "exit status 1"


def test_earlier_versions_spell_the_filter_in_another_way() -> None:
    options = gpu_stages.sanitizer_options("memcheck", "  --kernel-regex arg  Filter")
    assert options[2:4] == ("--kernel-regex", "kernel_substring=diffmic")


def test_a_missing_sanitizer_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "compute_sanitizer", lambda: None)
    found = gpu_stages.run(program("tool", "pass", tool="memcheck"), tmp_path)
    assert "compute-sanitizer was found neither" in found.problem


def test_all_cuda_kernels_are_in_the_namespace_of_the_filter() -> None:
    files = [path for path in SOURCE.glob("csrc/cuda/*/*.cu") if "__global__" in path.read_text()]
    assert files and all("namespace diffmic::cuda" in path.read_text() for path in files)


# ---- the tests --------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_tests_that_are_marked_gpu_are_in_the_selected_files() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    selected = {str(path.relative_to(SOURCE)) for path in gpu_stages.gpu_test_files()}
    assert files and files <= selected
