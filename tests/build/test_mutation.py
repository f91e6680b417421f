"""Faults planted in the CUDA kernels: a few of those that `python -m mutation` plants. Needs the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutation.__main__ import known_survivors
from mutation.mutants import all_mutants, sample

SOURCE = Path(os.environ.get("DIFFMIC_SOURCE") or Path(__file__).parents[2])
if not (SOURCE / "benchmarks").is_dir():
    pytest.skip("no source tree: set DIFFMIC_SOURCE", allow_module_level=True)


def test_known_survivors_are_still_planted() -> None:
    names = {mutant.name for mutant in all_mutants(SOURCE / "csrc/cuda")}
    assert known_survivors()
    for name, reason in known_survivors().items():
        assert name in names, f"{name}: not in the sources any more ({reason})"


def test_a_sample_is_spread_over_files_and_kinds() -> None:
    mutants = all_mutants(SOURCE / "csrc/cuda")
    chosen = sample(mutants, 170)
    assert chosen == sample(mutants, 170) and len(set(chosen)) == 170
    assert {m.file for m in chosen} == {m.file for m in mutants}
    assert {m.kind for m in chosen} == {m.kind for m in mutants}


@pytest.mark.skipif(not os.environ.get("DIFFMIC_EMULATED"), reason="no emulated module was built")
def test_planted_faults_are_caught() -> None:
    # One at a time: a second place to build in would cost more than these few tests.
    options = ["--count", "170", "--every", "16", "--jobs", "1", "--patience", "600"]
    command = [sys.executable, "-m", "mutation", *options]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " of " in done.stdout.splitlines()[-1] and "caught: " in done.stdout
