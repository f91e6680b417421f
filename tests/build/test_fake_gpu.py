"""The tests for a GPU on a fake one: none fails because of where its arguments lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated_module
import pytest

pytestmark = pytest.mark.slow
_TESTS = Path(__file__).resolve().parents[1]
# PyTorch's tracing, operator checks and autocast do not know the fake GPU, and one schedule is enough.
_LEFT_OUT = "opcheck or compiles or half_precision or the_model_uses_it or schedule"
_FILES = [
    f"ops/test_{name}.py"
    for name in (
        "conditioning_cuda", "denoise_cuda", "image_ids", "mmd_cuda", "noise_losses", "noised_conditioning",
        "rois_cuda",
    )
]  # fmt: skip


def test_no_test_for_a_gpu_fails_before_its_launch() -> None:
    if reason := emulated_module.prepare():
        pytest.skip(reason)
    environment = {**os.environ, "DIFFMIC_FAKE_GPU": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", f"not ({_LEFT_OUT})",
        "-W", "ignore::RuntimeWarning", *_FILES,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=_TESTS, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]
