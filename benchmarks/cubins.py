"""What `cuobjdump` reads from compiled CUDA kernels, and tables of it as CSV files."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar


def find_tool(name: str) -> str | None:
    """Path of a program: on the PATH, beside nvcc, or in Triton's wheel; None if it is not installed."""
    folders = [os.environ.get("PATH", os.defpath)]
    if nvcc := shutil.which("nvcc"):
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        folders += [str(Path(nvcc).resolve().parent), f"{home}/bin"]
    if triton := importlib.util.find_spec("triton"):
        packages = triton.submodule_search_locations or ()
        folders += [f"{package}/backends/nvidia/bin" for package in packages]
    return shutil.which(name, path=os.pathsep.join(folders))


def run_tool(command: Sequence[str], text: str | None = None) -> str:
    """Standard output of a command; RuntimeError with all of its output if it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def plain_name(demangled: str) -> str:
    """A kernel's name without parameters and namespaces: "denoise::ChainsKernel<BFloat16Product<4>>"."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for place, letter in enumerate(name):  # the parameters start outside of template arguments
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            name = name[:place]
            break
    namespace = re.match(r"diffmic::cuda::(\w+::)?", name)
    operation = namespace[1] or "" if namespace else ""
    name = name.replace(f"diffmic::cuda::{operation}", "").replace("diffmic::cuda::", "")
    return operation + re.sub(r"\(\w+\)(?=\d)", "", name).replace("> >", ">>").replace(", ", ",")


def read_cubin(cuobjdump: str, cubin: Path) -> dict[str, tuple[dict[str, int], Counter[str]]]:
    """Resource usage and counts of opcodes by the mangled names of kernels."""
    usage: dict[str, dict[str, int]] = {}
    name = ""
    for line in run_tool([cuobjdump, "-res-usage", str(cubin)]).splitlines():
        if function := re.match(r"\s*Function (\S+):", line):
            name = function[1]
        elif name and "REG:" in line:
            usage[name] = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
    opcodes: dict[str, Counter[str]] = {}
    for line in run_tool([cuobjdump, "-sass", str(cubin)]).splitlines():
        if function := re.match(r"\s*Function : (\S+)", line):
            name = function[1]
            opcodes[name] = Counter()
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            opcodes[name][found[1]] += 1
    return {name: (usage[name], opcodes[name]) for name in usage if name in opcodes}


RowType = TypeVar("RowType")


def read_rows(path: Path, kind: type[RowType]) -> list[RowType]:
    """Rows of a CSV file as dataclasses with fields of type int and str."""
    types = {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    with path.open(encoding="utf-8", newline="") as file:
        return [
            kind(**{k: int(v) if types[k] == "int" else v for k, v in row.items()})
            for row in csv.DictReader(file)
        ]


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write dataclasses of one type as a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, row in enumerate(map(dataclasses.asdict, rows)):
            if number == 0:
                writer.writerow(row)
            writer.writerow(row.values())
