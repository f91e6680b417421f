"""`python -m mutation`, in `tests`: plants faults in the CUDA kernels and counts those that the tests catch.

Each mutant is compiled into an emulated module of its own, with which the tests of its operation run. A mutant that
no test catches is a survivor. `survivors.txt` lists the known ones with the reason why they change no result; any other
makes the exit status 1.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from emulated_module import SOURCE, build

from mutation.mutants import Mutant, all_mutants, sample

TESTS = Path(__file__).resolve().parents[1]
SURVIVORS = Path(__file__).with_name("survivors.txt")
# Without the tests of 50 schedules, which take long and catch nothing that one checked schedule does not.
_SELECTED = "(cuda-emulated or counts_are or rounds_are or shared_memory) and not schedule"
# Memory traffic, which every mutant may change.
_COUNTS = "build/test_traffic.py"
# A mutant whose tests take this many times as long as those of all operations is considered to hang.
PATIENCE = 2

# Tests by the beginning of a kernel file's name.
_TESTS = {
    "conditioning": ["ops/test_conditioning_cuda.py", "ops/test_noised_conditioning.py"],
    "denoise": [
        "ops/test_denoise_cuda.py",
        "ops/test_denoise_weight_ring.py",
        "build/test_step_time.py",
    ],
    "grid_barrier": ["ops/test_denoise_cuda.py"],
    "image_ids": ["ops/test_image_ids.py"],
    "mmd": ["ops/test_mmd_cuda.py", "ops/test_mmd.py", "ops/test_noise_losses.py"],
    "reduce": ["ops/test_mmd_cuda.py", "ops/test_rois_cuda.py"],
    "shared_memory": ["test_shared_memory_limit.py"],
    "softplus": ["ops/test_conditioning_cuda.py", "ops/test_denoise_cuda.py"],
    "rois": ["ops/test_rois_cuda.py", "ops/test_rois.py"],
    "upload": ["test_gpu_calls.py"],
}


def tests_of(mutant: Mutant) -> list[str]:
    """Test files, relative to `tests`, that have to catch a mutant."""
    for beginning, files in _TESTS.items():
        if mutant.file.startswith(beginning):
            return [*files, _COUNTS]
    raise SystemExit(f"mutation: _TESTS must name the tests of {mutant.file}")


class Workplace:
    """A copy of the sources with its own build of the emulated module."""

    def __init__(self, folder: Path) -> None:
        self.csrc = folder / "csrc"
        shutil.copytree(SOURCE / "csrc", self.csrc)
        shutil.copytree(TESTS / "emulator", folder / "tests/emulator")
        self.folder = folder
        self.module = build(folder / "build", source=folder)
        self.patience = 3600.0  # seconds

    def make(self) -> bool:
        """Build what has changed; returns whether it compiles."""
        try:
            build(self.folder / "build", source=self.folder)
        except subprocess.CalledProcessError:
            return False
        return True

    def judge(self, mutant: Mutant) -> str:
        """Plant a mutant and run its tests; returns "caught", "survived" or "not compiled"."""
        (path,) = (self.csrc / "cuda").rglob(mutant.file)
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")
        line = lines[mutant.line - 1]
        lines[mutant.line - 1] = line.replace(mutant.before, mutant.after)
        path.write_text("\n".join(lines), encoding="utf-8")
        try:
            if not self.make():
                return "not compiled"
            return "caught" if self.fails(tests_of(mutant)) else "survived"
        finally:
            path.write_text(text, encoding="utf-8")

    def fails(self, tests: list[str]) -> bool:
        """Whether tests fail with the module that was built."""
        environment = {**os.environ, "DIFFMIC_EMULATED": str(self.module), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "", "-k",
                   _SELECTED, *tests]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=TESTS, env=environment, timeout=self.patience, check=False,
                capture_output=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return True
        if done.returncode == 5:
            raise SystemExit(f"mutation: no test of {tests} was selected: {done.stdout.decode()}")
        return done.returncode != 0


def known_survivors() -> dict[str, str]:
    """Reasons by mutant of survivors.txt, which has a name in one line and the reason in the next."""
    known = {}
    lines = SURVIVORS.read_text(encoding="utf-8").splitlines()
    for name, reason in itertools.pairwise(lines):
        if name and not name.startswith(("#", " ")) and reason.startswith("    "):
            known[name] = reason.strip()
    return known


def main() -> int:
    """Test a sample of mutants, print every verdict and the counts; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mutation", description=__doc__)
    parser.add_argument("--count", type=int, default=160, help="size of the sample (default 160)")
    parser.add_argument(
        "--every", type=int, default=1, help="only every Nth of the sample (default 1: all)"
    )
    parser.add_argument(
        "--patience", type=float,
        help="seconds after which tests count as failed (default: twice as many as without a fault)",
    )  # fmt: skip
    parser.add_argument("--files", default="", help="only files whose names begin with this")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at once (default 2)")
    options = parser.parse_args()
    mutants = [m for m in all_mutants(SOURCE / "csrc/cuda") if m.file.startswith(options.files)]
    known = known_survivors()
    begin = time.monotonic()
    verdicts: dict[str, list[Mutant]] = {"caught": [], "survived": [], "not compiled": []}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        places: Queue[Workplace] = Queue()
        patience = options.patience or 0.0
        for place in pool.map(Workplace, [Path(folder, str(job)) for job in range(options.jobs)]):
            if patience == 0.0:
                started = time.monotonic()
                if place.fails(sorted({file for m in mutants for file in tests_of(m)})):
                    raise SystemExit("mutation: the tests fail without a fault")
                patience = PATIENCE * (time.monotonic() - started)
            place.patience = patience
            places.put(place)

        def judge(mutant: Mutant) -> tuple[Mutant, str]:
            place = places.get()
            try:
                return mutant, place.judge(mutant)
            finally:
                places.put(place)

        chosen = sample(mutants, options.count)[:: options.every]
        for mutant, verdict in pool.map(judge, chosen):
            verdicts[verdict].append(mutant)
            remark = f" (known: {known[mutant.name]})" if mutant.name in known else ""
            print(f"{verdict}: {mutant.name}, line {mutant.line}{remark}", flush=True)
    caught, survived = len(verdicts["caught"]), len(verdicts["survived"])
    new = [m for m in verdicts["survived"] if m.name not in known]
    print(
        f"{caught} of {caught + survived} caught, {survived} survived, {len(new)} of them not listed; "
        f"{len(verdicts['not compiled'])} did not compile; {time.monotonic() - begin:.0f} s"
    )
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
