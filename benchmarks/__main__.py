"""`python -m benchmarks NAME [--write]`: run one benchmark, and keep its results.

`python -m benchmarks --plot` draws the committed results.
"""

from __future__ import annotations

import argparse
import importlib

from benchmarks import NAMES, harness


def main() -> None:
    """Run `benchmarks.bench_NAME`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES, nargs="?")
    parser.add_argument("--rounds", type=int, default=40, help="times that each peer is timed")
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/NAME.json and NAME.csv"
    )
    parser.add_argument(
        "--plot", action="store_true", help="draw benchmarks/results/*.json as they are then"
    )
    options = parser.parse_args()
    if options.name is None and not options.plot:
        parser.error(f"a benchmark ({', '.join(NAMES)}) or --plot is needed")
    if options.name is not None:
        benchmark = importlib.import_module(f"benchmarks.bench_{options.name}")
        results: list[harness.Case] = []
        for setup in benchmark.setups():
            found = harness.run([setup], options.rounds)
            harness.show(found)
            results += found
            if options.write:  # as they come: the run may be stopped
                print("written to", *harness.write(options.name, results), flush=True)
        if hasattr(benchmark, "summary"):
            print(benchmark.summary(results))
    if options.plot:
        from benchmarks import plots

        print("drawn to", *plots.draw())


if __name__ == "__main__":
    main()
