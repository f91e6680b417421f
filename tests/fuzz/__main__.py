"""Fuzzing with atheris (libFuzzer): `python -m tests.fuzz image --inputs 50000`.

Needs `pip install atheris` and the sources; several targets run one after the other. An input that raises anything but
a clear error, takes longer than 10 seconds or more than 2 GiB is kept in tests/fuzz/found/TARGET, where the test suite
reads it from then on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["diffmic_fast"]):
    from tests.fuzz.targets import TARGETS, Target

SECONDS = 10
MEBIBYTES = 2048
FOUND = Path(__file__).parent / "found"


def fuzz(name: str, inputs: int, seed: int) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    target: Target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix="diffmic-fuzz-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(target.seeds()):
        (corpus / str(number)).write_bytes(content)
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    path = folder / f"input{target.suffix}"
    warnings.simplefilter("ignore")

    def one(content: bytes) -> None:
        path.write_bytes(content)
        try:
            target.read(path)
        except (ValueError, OSError) as error:
            if not str(error).strip():
                raise AssertionError("an error without a message") from error

    options = {
        "runs": inputs, "timeout": SECONDS, "rss_limit_mb": MEBIBYTES, "seed": seed,
        "max_len": max(4096, 2 * max(len(content) for content in target.seeds())),
    }  # fmt: skip
    flags = [f"-{key}={value}" for key, value in options.items()]
    atheris.Setup([sys.argv[0], *flags, f"-artifact_prefix={found}/", str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    """Fuzz the targets that are named, by default all; 1 if an input found a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "targets", nargs="*", default=list(TARGETS), metavar=f"{{{','.join(TARGETS)}}}"
    )
    parser.add_argument("--inputs", type=int, default=20000, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = sorted(set(options.targets) - set(TARGETS))
    if unknown:
        parser.error(f"targets must be of {', '.join(TARGETS)}, got {', '.join(unknown)}")
    if options.here:
        fuzz(options.targets[0], options.inputs, options.seed)
    status = 0
    for name in options.targets:
        began = time.perf_counter()
        command = [sys.executable, "-m", "tests.fuzz", name, "--here", f"--inputs={options.inputs}"]
        done = subprocess.run(
            [*command, f"--seed={options.seed}"],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            status = 1
            print(done.stderr[-4000:], file=sys.stderr)
        state = "a fault" if done.returncode else "no fault"
        print(f"{name}: {state}, at most {options.inputs} inputs, {seconds:.0f} s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
