"""Faults planted in the CUDA kernels: a few of those that `python -m mutation` plants."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mutation.__main__ import SOURCE, TESTS, known_survivors
from mutation.mutants import all_mutants, sample


def test_known_survivors_can_still_be_planted() -> None:
    names = {mutant.name for mutant in all_mutants(SOURCE / "csrc/cuda")}
    for name, reason in known_survivors().items():
        assert name in names, f"{name}: remove it from survivors.txt ({reason})"


def test_a_sample_is_spread_over_files_and_kinds() -> None:
    mutants = all_mutants(SOURCE / "csrc/cuda")
    chosen = sample(mutants, 170)
    assert chosen == sample(mutants, 170) and len(set(chosen)) == 170
    assert {m.file for m in chosen} == {m.file for m in mutants}
    assert {m.kind for m in chosen} == {m.kind for m in mutants}


@pytest.mark.slow
@pytest.mark.emulated
def test_planted_faults_are_caught() -> None:
    # One job: a second build of the emulator would cost more time than it saves.
    options = ["--count", "170", "--every", "16", "--jobs", "1", "--patience", "600"]
    command = [sys.executable, "-m", "mutation", *options]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " of " in done.stdout.splitlines()[-1] and "caught: " in done.stdout
