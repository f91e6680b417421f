"""Faults that can be planted in the CUDA kernels.

A mutant is one line of a file of `csrc/cuda` with a likely mistake: a missing barrier or wait, a bound or index that is
off by one, a lane mask without a lane, exchanged operands, another constant. Rules find the lines by their text, so
that the list follows the sources.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Files without kernels: host code and declarations.
_NO_KERNELS = {"device_query.cu", "launch.cuh", "loads.cuh", "ptx.cuh"}


@dataclass(frozen=True)
class Mutant:
    """One changed line.

    Attributes:
        file: name in csrc/cuda.
        line: counted from 1.
        kind: of the rule.
        before, after: text of the line without indentation.
    """

    file: str
    line: int
    kind: str
    before: str
    after: str

    @property
    def name(self) -> str:
        """Key in survivors.txt, which is independent of edits elsewhere in the file."""
        return f"{self.file}: {self.kind}: {self.before} -> {self.after}"


# (kind, pattern, replacement) of the first match in a line.
_RULES: tuple[tuple[str, str, str], ...] = (
    ("barrier removed", r"^__sync(threads|warp)\([^)]*\);", ";"),
    ("barrier removed", r"^barrier_\.(Sync|Arrive|Wait)\(\);", ";"),
    ("commit removed", r"\bCommitCopies\(\);", ";"),
    ("wait removed", r"\bWaitCopies<[^>]+>\(\);", ";"),
    ("wait too short", r"\bWaitCopies<([^>]+)>\(\)", r"WaitCopies<(\1) + 1>()"),
    ("release removed", r"\bAddRelease\(", "atomicAdd("),
    ("acquire removed", r"\bLoadAcquire\((\w+)\)", r"(*\1)"),
    ("mask", r"0x[Ff]{8}u?", "0x7FFFFFFFu"),
    ("bound", r"(?<=[\w)\]] )<(?= [\w(-])", "<="),
    ("bound", r"(?<=[\w)\]] )>=(?= [\w(-])", ">"),
    ("bound", r"(?<=[\w)\]] )>(?= [\w(-])", ">="),
    ("off by one", r" \+ 1(?=[;)\],<])", " + 2"),
    ("off by one", r" - 1(?=[;)\],<])(?!\) / )", ""),
    # One part too few. (One too many is only superfluous work.)
    ("rounded down", r"\(([\w.]+) \+ (\w+) - 1\) / \2", r"\1 / \2"),
    ("index", r"\[(?=[\w(])([^\[\]]+)\](?! *\{)", r"[(\1) + 1]"),
    ("stride", r"(\b[\w.]*stride\w*)", r"(\1 + 1)"),
    ("lane", r"\b(lane_?)\b(?= [*/%&+])", r"(\1 + 1)"),
    ("sign", r"(?<=[\w)\]]) \+ (?=[\w(])", " - "),
    ("sign", r"(?<=[\w)\]]) - (?=[\w(])(?!1\) / )", " + "),
    ("operands", r"([\w.\[\]]+) / ([\w.\[\]]+)", r"\2 / \1"),
    ("operands", r"\bselect\((\w+), (\w+), (\w+)\)", r"select(\1, \3, \2)"),
    ("min and max", r"\bmin\(", "max("),
    ("min and max", r"\bmax\(", "min("),
    # Not zeros of padding, which do not affect results.
    ("constant", r"(?<!: )(?<!\{)(?<!, )\b(\d+\.\d*)f\b", r"(\1f + 1.0f)"),
    ("condition", r"\bif \((?!constexpr)(.+)\) (?=[\w{+-])", r"if (!(\1)) "),
)
# Lines that do not run on the device or would not compile.
_LEFT_ALONE = re.compile(
    r"^(//|#|\*|using |template|namespace|struct |class |static_assert|constexpr|inline constexpr|"
    r"throw |Check\(|\}|public:|private:|LaunchShape|shape\.|launch\.|__launch_bounds__|"
    r"__global__|__device__|__host__|for \(\w+& |"
    # Declarations without a value.
    r"(const |unsigned |std::|static )*[\w:<>]+\*? [\w *]+(\[[\w<>]*\])*(, [\w *]+(\[[\w<>]*\])*)*;)"
)


def all_mutants(cuda: Path) -> list[Mutant]:
    """All mutants of the kernel files in `cuda` (csrc/cuda), in the order of files, lines and rules."""
    found = []
    for path in sorted(cuda.rglob("*.cu*"), key=lambda path: path.name):
        if path.name not in _NO_KERNELS:
            found += _of_file(path)
    return found


def _of_file(path: Path) -> list[Mutant]:
    found = []
    on_host = path.suffix == ".cu"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        # In a .cu file functions and classes are host code unless they are marked.
        if line.startswith("}") and path.suffix == ".cu":
            on_host = True
        if re.search(r"__(global|device)__", text):
            on_host = False
        if on_host or not text or _LEFT_ALONE.match(text):
            continue
        for kind, pattern, replacement in _RULES:
            code, comment, rest = text.partition("  //")
            after = re.sub(pattern, replacement, code, count=1)
            if after != code:
                found.append(Mutant(path.name, number, kind, text, after + comment + rest))
    return found


def sample(mutants: list[Mutant], count: int) -> list[Mutant]:
    """A sample of `count` mutants, spread evenly over files and kinds, the same for the same list."""
    groups: dict[tuple[str, str], list[Mutant]] = {}
    for mutant in mutants:
        groups.setdefault((mutant.file, mutant.kind), []).append(mutant)
    chosen: list[Mutant] = []
    turn = 0
    while len(chosen) < min(count, len(mutants)):
        left = count - len(chosen)
        having = [group for group in groups.values() if turn < len(group)]
        if len(having) > left:
            having = [having[i * len(having) // left] for i in range(left)]
        for group in having:
            # Multiples of the golden ratio, which favour no part of the file.
            order = sorted(range(len(group)), key=lambda i: (i * 0.618034) % 1.0)
            chosen.append(group[order[turn]])
        turn += 1
    return chosen
