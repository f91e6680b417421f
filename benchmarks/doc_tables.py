"""`python -m benchmarks.doc_tables [--write]`: tables of the documentation that are made of committed results.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. Without `--write` the exit status is 1 if a
file has another table than the results give.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

DOCS = Path(__file__).resolve().parents[1] / "docs"
_TABLE = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end of table -->)", re.S)


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def traffic(operation: str) -> str:
    """Memory traffic of an operation's CUDA kernels, counted in the emulator."""
    lines = [
        "Bytes that the CUDA kernels move, counted in the emulator ([what the columns mean](../emulator.md#counters),",
        "`traffic.json`):",
        "",
        "| call | least, KB | touched, KB | requested, KB | conflicts |",
        "|---|---|---|---|---|",
    ]
    for case in _read("traffic.json"):
        name, _, call = case["title"].partition(", ")
        if name == operation:
            numbers = [f"{case[key] / 1000:,.1f}" for key in ("least", "touched", "requested")]
            # A case by the formula has no counters of shared memory.
            numbers.append(f"{case['conflicts']:.1%}".replace("%", " %") if case["kernels"] else "")
            lines.append(f"| {call.replace('of 1 rows', 'of 1 row')} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def chains() -> str:
    """Seconds of a chain by rows, steps and precision: steps times the measured time of one."""
    precisions, counts = ("fp32", "bf16", "int8"), (20, 50)
    heads = [f"{steps} steps, `{precision}`" for steps in counts for precision in precisions]
    lines = [
        f"| rows (images x samples) | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for case in _read("denoise.json")["cases"]:
        if found := re.fullmatch(r"chain, (\d+) steps, (\d+) rows, F = 6144", case["title"]):
            step = {p: case["timings"][p]["median"] / int(found[1]) for p in precisions}
            cells = [f"{count * step[p]:#.2g} s" for count in counts for p in precisions]
            lines.append(f"| {found[2]} | {' | '.join(cells)} |")
    lines += [
        "",
        "Steps times the median time of a step (Zen 4, `denoise.json`). Long chains of 1 to 4 rows can be faster: they",
        "take [several steps per reading of the weights](benchmarks.md#a-chain-of-one-row).",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "chains": chains,
    **{
        f"traffic {name}": lambda name=name: traffic(name)  # type: ignore[misc]
        for name in ("denoise", "conditioning", "mmd", "rois")
    },
}


def with_tables(text: str) -> str:
    """The text of a page, its tables made anew.

    Raises:
        KeyError: there is no table of a name.
    """
    return _TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[4]}", text)


def main() -> int:
    """Compare or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.doc_tables")
    parser.add_argument(
        "--write", action="store_true", help="replace the tables of the documentation"
    )
    write = parser.parse_args().write
    stale = []
    for path in sorted(DOCS.rglob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            stale.append(path)
            if write:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'written' if write else 'another table than the results give'}")
    return int(bool(stale) and not write)


if __name__ == "__main__":
    sys.exit(main())
