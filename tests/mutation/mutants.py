"""Small faults planted in the CUDA kernels, one place at a time: what the tests have to notice.

A mutant is one line of one file of `csrc/cuda` with one thing changed that a hand could have got wrong: a barrier or a
wait that is missing, a bound or an index that is off by one, a lane mask that forgets a lane, two operands in each
other's place, another constant. They are found by their text, so the list follows the sources by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Host code and declarations: the files of the kernels are the others.
_NO_KERNELS = {"device_query.cu", "launch.cuh", "ptx.cuh"}


@dataclass(frozen=True)
class Mutant:
    """One changed line.

    Attributes:
        file: name in csrc/cuda.
        line: counted from 1.
        kind: which rule made it.
        before, after: the line's text, without its indentation.
    """

    file: str
    line: int
    kind: str
    before: str
    after: str

    @property
    def name(self) -> str:
        """Its key in the list of survivors: the text, so that it outlives an edit elsewhere in the file."""
        return f"{self.file}: {self.kind}: {self.before} -> {self.after}"


# (kind, what is looked for, what is put there). A rule applies to the first place in a line.
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
    # Without its last part. (One part too many is only work for nothing.)
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
    # Zeros that fill up are multiplied with others or left out: no matter.
    ("constant", r"(?<!: )(?<!\{)(?<!, )\b(\d+\.\d*)f\b", r"(\1f + 1.0f)"),
    ("condition", r"\bif \((?!constexpr)(.+)\) (?=[\w{+-])", r"if (!(\1)) "),
)
# Lines that are no part of what runs on the device, or that cannot compile when changed.
_LEFT_ALONE = re.compile(
    r"^(//|#|\*|using |template|namespace|struct |class |static_assert|constexpr|inline constexpr|"
    r"throw |Check\(|\}|public:|private:|LaunchShape|shape\.|launch\.|__launch_bounds__|"
    r"__global__|__device__|__host__|for \(\w+& |"
    # Declarations without a value.
    r"(const |unsigned |std::|static )*[\w:<>]+\*? [\w *]+(\[[\w<>]*\])*(, [\w *]+(\[[\w<>]*\])*)*;)"
)


def all_mutants(cuda: Path) -> list[Mutant]:
    """Every mutant of every kernel file in `cuda` (csrc/cuda), in the order of files, lines and rules."""
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
        # In a .cu file a function or class is of the host until it says otherwise.
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
    """`count` of them, spread evenly over files and kinds; always the same ones for the same list."""
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
            # From the middle outwards would favour neither head nor tail: steps of the golden section.
            order = sorted(range(len(group)), key=lambda i: (i * 0.618034) % 1.0)
            chosen.append(group[order[turn]])
        turn += 1
    return chosen
