"""`python -m benchmarks NAME [--write]`: run one benchmark, and keep its results."""

from __future__ import annotations

import argparse
import importlib

from benchmarks import harness

NAMES = ("conditioning", "denoise", "mmd", "predict", "rois")


def main() -> None:
    """Run `benchmarks.bench_NAME`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--rounds", type=int, default=40, help="times that each peer is timed")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    benchmark = importlib.import_module(f"benchmarks.bench_{options.name}")
    results = benchmark.run(options.rounds)
    harness.show(results)
    if options.write:
        print(f"written to {harness.write(options.name, results)}")


if __name__ == "__main__":
    main()
