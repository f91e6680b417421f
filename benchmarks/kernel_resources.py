"""Registers, spills, shared memory, occupancy and instructions of the CUDA kernels.

    python -m benchmarks.kernel_resources             compile and compare with the committed table
    python -m benchmarks.kernel_resources --changed   leave out files that are unchanged since the table
    python -m benchmarks.kernel_resources --write     compile and write the table
    python -m benchmarks.kernel_resources --keep DIR  keep the cubins (and PTX, with --ptx) there

Compiles each `csrc/cuda/*/*.cu` for each architecture with warnings as errors and reads the cubin with
`cuobjdump`; no GPU is needed. Losses against `tests/data/kernel_resources.csv` are a spill, a stack
frame, fewer resident warps, more static shared memory, fewer of the instructions that
`tests/data/kernel_claims.json` requires, and a kernel without an entry there. Another number of registers
is a loss only if it costs a warp. Improvements ask for `--write`. The numbers depend on the compiler:
with another than the table's, only spills and missing instructions are losses.

An entry of the claims has a regular expression for names of kernels, the block that they are launched
with, their dynamic shared memory in bytes ("most": as much as a block may have) at the size they are
designed for, and beginnings of opcodes that must occur at least once, with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.cubins import find_tool, plain_name, read_cubin, read_rows, run_tool, write_rows
from benchmarks.gpu_limits import resident_warps

SOURCE = Path(__file__).resolve().parents[1]
TABLE = SOURCE / "tests" / "data" / "kernel_resources.csv"
CLAIMS = SOURCE / "tests" / "data" / "kernel_claims.json"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Of an editable installation; CMake puts the object file of csrc/cuda/mmd/mmd.cu below csrc/cuda/mmd.
_OBJECTS = SOURCE / "build/editable/CMakeFiles/_C.dir"

# As in CMakeLists.txt.
_FLAGS = (
    "-std=c++20",
    "-fmad=false",
    "-Werror=all-warnings",
    "-Xcompiler=-Wall,-Wextra,-Werror,-ffp-contract=off",
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """An entry of the claims."""

    kernel: str
    block: int
    dynamic_shared: int | str
    instructions: dict[str, str]  # beginning of an opcode: reason


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: one kernel on one architecture.

    Attributes:
        registers: per thread.
        spill_bytes: stack frame and local memory per thread.
        shared_bytes: static shared memory per block.
        warps: resident on a multiprocessor.
        instructions: counts of the claimed ones, "HMMA.16816:240 LDG.E.128:84".
        sources: digest of what was compiled.
    """

    architecture: int
    file: str
    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    instructions: str
    compiler: str
    sources: str = ""

    @property
    def key(self) -> tuple[int, str, str]:
        """Identifies the row in another table."""
        return self.architecture, self.file, self.kernel

    @property
    def counts(self) -> dict[str, int]:
        """The number of each required instruction."""
        pairs = (word.rsplit(":", 1) for word in self.instructions.split())
        return {name: int(count) for name, count in pairs}


# ---- tools -----------------------------------------------------------------------------------


def missing_tools() -> str:
    """Why kernels cannot be compiled and read here; empty if they can."""
    missing = [name for name in ("nvcc", "cuobjdump", "c++filt") if find_tool(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def compiler_version() -> str:
    """Release of nvcc, for example "13.0"."""
    found = re.search(r"release (\d+\.\d+)", run_tool(["nvcc", "--version"]))
    return found[1] if found else "unknown"


def sources() -> list[Path]:
    """The files that contain kernels."""
    files = sorted((SOURCE / "csrc" / "cuda").rglob("*.cu"))
    return [file for file in files if "__global__" in file.read_text(encoding="utf-8")]


def digest(file: Path) -> str:
    """Digest of a file, the headers of csrc that it includes and the options, without comments."""
    csrc = SOURCE / "csrc"
    name = file.relative_to(csrc).as_posix() if file.is_relative_to(csrc) else file.name
    waiting = [(name, file)]
    texts: dict[str, str] = {}
    while waiting:
        known_as, path = waiting.pop()
        text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
        texts[known_as] = " ".join(text.split())
        for name in re.findall(r'#\s*include\s*"([^"]+)"', text):
            if not (csrc / name).exists():
                raise RuntimeError(f"{path}: {name} is not a file of csrc")
            if name not in texts:
                waiting.append((name, csrc / name))
    parts = [*_FLAGS, *(f"{name} {text}" for name, text in sorted(texts.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _nvcc(file: Path, architecture: int) -> list[str]:
    return ["nvcc", *_FLAGS, f"-I{SOURCE / 'csrc'}", f"-arch=sm_{architecture}", str(file)]


def compile_ptx(file: Path, architecture: int, target: Path) -> Path:
    """Compile a file to PTX; returns `target`."""
    run_tool([*_nvcc(file, architecture), "-ptx", "-o", str(target)])
    return target


def _object_file(file: Path) -> Path:
    return _OBJECTS / f"{file.relative_to(SOURCE)}.o"


def built_architecture() -> int | None:
    """The one architecture for which an editable installation has up-to-date object files, if any."""
    try:
        record = json.loads((SOURCE / "diffmic_fast/_build.json").read_text(encoding="utf-8"))
        oldest = min(_object_file(file).stat().st_mtime for file in sources())
    except OSError:
        return None
    newest = max(path.stat().st_mtime for path in (SOURCE / "csrc").rglob("*.[ch]*"))
    compiler = record.get("cuda_compiler", "").startswith(f"NVIDIA {compiler_version()}.")
    found = re.fullmatch(r"(\d+)(\+PTX)?", record.get("cuda_architectures", ""))
    return int(found[1]) if found and compiler and oldest > newest else None


def compile_all(
    work: Sequence[tuple[int, Path]], folder: Path, *, built: int | None, ptx: bool, jobs: int
) -> dict[tuple[int, str], Path]:
    """Compile pairs of architecture and file; returns the cubins by architecture and the file's stem.

    Raises:
        RuntimeError: the compiler failed; the message contains its output.
    """

    def compile_one(job: tuple[int, Path]) -> tuple[tuple[int, str], Path]:
        architecture, file = job
        if architecture == built:
            return (architecture, file.stem), _object_file(file)
        target = folder / f"{file.stem}.sm_{architecture}.cubin"
        run_tool([*_nvcc(file, architecture), "-cubin", "-o", str(target)])
        if ptx:
            compile_ptx(file, architecture, target.with_suffix(".ptx"))
        return (architecture, file.stem), target

    # The longest first, so that no core idles at the end.
    with ThreadPoolExecutor(jobs) as pool:
        return dict(pool.map(compile_one, sorted(work, key=lambda job: -_weight(job[1]))))


def _weight(file: Path) -> int:
    """Bytes of a file and of those that share the beginning of its name, which it includes."""
    headers = file.parent.glob(f"{file.stem.split('_')[0]}*")
    return sum(part.stat().st_size for part in headers) + file.stat().st_size


# ---- measuring -------------------------------------------------------------------------------


def read_claims() -> list[Claim]:
    """Read the committed claims."""
    entries: list[dict[str, Any]] = json.loads(CLAIMS.read_text(encoding="utf-8"))
    return [Claim(**entry) for entry in entries]


def claim_of(kernel: str, claims: Sequence[Claim]) -> Claim:
    """The claim that matches a kernel's name; RuntimeError unless there is exactly one."""
    found = [claim for claim in claims if re.fullmatch(claim.kernel, kernel)]
    if len(found) != 1:
        raise RuntimeError(
            f"{kernel}: must match one entry of {CLAIMS.name}, got {len(found)} matches"
        )
    return found[0]


def measure(
    architectures: Sequence[int],
    folder: Path,
    *,
    files: Sequence[Path] | None = None,
    known: Sequence[Row] = (),
    built: int | None = None,
    ptx: bool = False,
    jobs: int = 2,
) -> list[Row]:
    """Compile into `folder` and read all kernels, in the order of the table.

    Args:
        architectures, files: what to compile; all files by default.
        known: rows that are valid unless their sources or the compiler have changed.
        built: an architecture to read from the object files of an editable installation.
        ptx: whether to write PTX too.
        jobs: processes of nvcc.
    """
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        raise RuntimeError(missing_tools())
    claims, compiler = read_claims(), compiler_version()
    digests = {file: digest(file) for file in files or sources()}
    done = {(row.architecture, row.file, row.compiler, row.sources) for row in known}
    work = [
        (architecture, file)
        for file in digests
        for architecture in architectures
        if (architecture, file.stem, compiler, digests[file]) not in done
    ]
    of_names = {file.stem: text for file, text in digests.items()}
    cubins = compile_all(work, folder, built=built, ptx=ptx, jobs=jobs)
    rows = []
    for (architecture, file), cubin in cubins.items():
        kernels = read_cubin(cuobjdump, cubin)
        names = run_tool(["c++filt"], "\n".join(kernels)).splitlines()
        for demangled, (usage, opcodes) in zip(names, kernels.values(), strict=True):
            kernel = plain_name(demangled)
            claim = claim_of(kernel, claims)
            counts = {
                start: sum(count for name, count in opcodes.items() if name.startswith(start))
                for start in sorted(claim.instructions)
            }
            warps = resident_warps(
                architecture, usage["REG"], usage["SHARED"], claim.dynamic_shared, claim.block
            )
            rows.append(
                Row(
                    architecture,
                    file,
                    kernel,
                    registers=usage["REG"],
                    spill_bytes=usage["STACK"] + usage["LOCAL"],
                    shared_bytes=usage["SHARED"],
                    warps=warps,
                    instructions=" ".join(f"{name}:{count}" for name, count in counts.items()),
                    compiler=compiler,
                    sources=of_names[file],
                )
            )
    return sorted(rows, key=lambda row: row.key)


# ---- the table -------------------------------------------------------------------------------


def read_table() -> list[Row]:
    """The committed table."""
    return read_rows(TABLE, Row)


def compare(found: Sequence[Row], table: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Losses and improvements against the table, one line each.

    Only rows of the table for architectures and files that were compiled are compared.
    """
    losses: list[str] = []
    improvements: list[str] = []
    known = {row.key: row for row in table}
    compiled = {(row.architecture, row.file) for row in found}
    for row in found:
        label = f"sm_{row.architecture} {row.kernel}"
        if row.spill_bytes:
            losses.append(f"{label}: {row.spill_bytes} bytes of stack frame and local memory")
        losses += [
            f"{label}: no {name} in the machine code" for name, n in row.counts.items() if n == 0
        ]
        before = known.pop(row.key, None)
        if before is None:
            losses.append(f"{label}: not in the table")
        elif before.compiler == row.compiler:
            changes = [
                ("resident warps", before.warps, row.warps, True),
                ("bytes of static shared memory", before.shared_bytes, row.shared_bytes, False),
                *(
                    (name, before.counts.get(name, 0), count, True)
                    for name, count in row.counts.items()
                ),
            ]
            for what, then, now, more_is_better in changes:
                if then != now:
                    better = (now > then) == more_is_better
                    (improvements if better else losses).append(f"{label}: {what} {then} -> {now}")
    losses += [
        f"sm_{row.architecture} {row.kernel}: in the table, but no longer in {row.file}.cu"
        for row in known.values()
        if (row.architecture, row.file) in compiled
    ]
    return losses, improvements


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and compare, or write the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_resources")
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--files", nargs="+", help="names without .cu; all by default")
    parser.add_argument("--keep", type=Path, help="folder for the cubins")
    parser.add_argument("--changed", action="store_true", help="leave out unchanged files")
    parser.add_argument("--ptx", action="store_true", help="write PTX too")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(arguments)
    if reason := missing_tools():
        parser.error(reason)
    files = [file for file in sources() if not args.files or file.stem in args.files]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        known = read_table() if args.changed else ()
        rows = measure(
            args.architectures, folder, files=files, known=known, ptx=args.ptx, jobs=args.jobs
        )
    if args.write:
        measured = {(row.architecture, row.file) for row in rows}
        names = {file.stem for file in sources()}
        kept = [
            row
            for row in read_table()
            if (row.architecture, row.file) not in measured and row.file in names
        ]
        write_rows(TABLE, sorted([*rows, *kept], key=lambda row: row.key))
        return 0
    losses, improvements = compare(rows, read_table())
    for line in losses:
        print(f"loss: {line}")
    for line in improvements:
        print(f"better than the table, write it with --write: {line}")
    print(f"{len(rows)} kernels: {len(losses)} losses, {len(improvements)} improvements")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
