"""Registers, spills, shared memory and matrix instructions of the Triton kernels. Needs no GPU.

    python -m benchmarks.triton_resources            compile and compare with the committed table
    python -m benchmarks.triton_resources --write    compile and write the table

Compiles every configuration that `triton/conditional_linear.py` may select, and the kernels of
`triton/conditional_norm.py` and `triton/denoise.py` with their smallest and largest tiles, for each
architecture, with Triton's own assembler. The table, `tests/data/triton_resources.csv`, has the kernels of
each version of Triton that wrote them; `--write` replaces the rows of the running version. Losses against
the rows of that version are a larger stack frame (spilled registers; none with the newest version), more
shared memory than a block may have, other matrix instructions, more registers or shared memory, and a
kernel that is not in the table. If the table lacks the version, the newest one's kernels are expected, and
registers and instructions are not compared. One configuration represents float16, whose code differs from
that of bfloat16 only in the opcodes' type.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cubins import find_tool, read_rows, run_tool, write_rows
from benchmarks.gpu_limits import MULTIPROCESSORS

SOURCE = Path(__file__).resolve().parents[1]
TABLE = SOURCE / "tests" / "data" / "triton_resources.csv"
ARCHITECTURES = (80, 90, 100, 120)
# Matrix instructions, in the order of the architectures that introduced them.
_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
_SIZES = ("rows", "batch", "features", "width", "branches", "classes", "noise_steps")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: one kernel in one configuration on one architecture."""

    kernel: str
    dtype: str
    configuration: str
    architecture: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instruction: str
    triton: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Identifies the row in another table."""
        return self.kernel, self.dtype, self.configuration, self.architecture


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel, the type of its activations as Triton writes it ("bf16"), and its constants."""

    kernel: Any
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def configuration(self) -> str:
        """The constants, warps and stages: "BLOCK_M=64 warps=4 stages=3"."""
        words = [f"{k}={v}" for k, v in self.constants.items() if not k.endswith("_column")]
        return " ".join([*words, f"warps={self.warps}", f"stages={self.stages}"])


def variants() -> Iterator[Variant]:
    """Everything that is compiled for each architecture."""
    from diffmic_fast.triton import conditional_linear as layer
    from diffmic_fast.triton import conditional_norm as norm
    from diffmic_fast.triton import denoise

    for kind, configs in layer.CONFIGS.items():
        precision = "tf32" if kind == "tf32" else "ieee"
        for config in configs:
            constants = {"h_column": 1, "weight_column": 1, "PRECISION": precision, **config.kwargs}
            types = ["bf16" if kind == "half" else "fp32"]
            if kind == "half" and config is configs[-1]:
                types.append("fp16")
            for dtype in types:
                yield Variant(
                    layer.layer_kernel, dtype, constants, config.num_warps, config.num_stages
                )
    for kernel in (norm.forward_kernel, norm.backward_kernel):
        for dtype in ("fp32", "bf16"):
            for rows, whole in ((32, True), (norm.WHOLE_ROWS, True), (norm.WHOLE_ROWS, False)):
                down, across = norm.blocks(rows, norm.WHOLE_ROWS)
                constants = {"TRAINING": True, "WHOLE": whole, "BLOCK_B": down, "BLOCK_F": across}
                yield Variant(kernel, dtype, constants, 4, 3)
    yield Variant(norm.gamma_kernel, "fp32", {"BLOCK_B": 128, "BLOCK_F": 128}, 4, 3)
    for dtype in ("fp32", "bf16"):
        yield Variant(denoise.first_kernel, dtype, {"BLOCK_M": 16, "BLOCK_N": 128}, 4, 3)
    for classes in (16, 32, denoise.MOST_CLASSES):
        constants = {"TRAJECTORY": True, **denoise.step_blocks(classes)}
        yield Variant(denoise.step_kernel, "fp32", constants, 4, 3)


_ACTIVATIONS = {
    "layer_kernel": ("h", "weight", "out"),
    "forward_kernel": ("product", "h"),
    "backward_kernel": ("grad", "product", "grad_product"),
    "first_kernel": ("h",),
}


def _type(kernel: str, name: str, dtype: str) -> str:
    """Type of a kernel's argument, as Triton writes it."""
    if name in ("eps", "momentum"):
        return "fp32"
    if name in ("timesteps", "timestep", "position"):
        return "*i64"
    if name in _ACTIVATIONS.get(kernel, ()):
        return f"*{dtype}"
    if name in _SIZES or re.search("_(row|branch|stride|column)$", name):
        return "i32"
    return "*fp32"


def compile_variant(variant: Variant, architecture: int) -> Row:
    """Compile a variant for one architecture and read the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    types = {
        name: "constexpr"
        if name in variant.constants
        else _type(variant.kernel.__name__, name.removesuffix("_ptr"), variant.dtype)
        for name in names
    }
    # As in actual use: pointers, widths and row strides are multiples of 16.
    aligned = [
        i
        for i, name in enumerate(names)
        if types[name].startswith("*")
        or name in ("features", "width")
        or re.search("_(row|branch)$", name)
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )
    registers, stack = _registers(compiled.asm["cubin"])
    found = [name for name in _INSTRUCTIONS if name in compiled.asm["ptx"]]
    return Row(
        variant.kernel.__name__,
        variant.dtype,
        variant.configuration,
        architecture,
        registers,
        stack,
        compiled.metadata.shared,
        " ".join(found) or "none",
        triton.__version__,
    )


def _registers(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of the stack frame per thread."""
    tool = find_tool("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = run_tool([str(tool), "-res-usage", file.name])
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no registers: {text}")
    return int(match[1]), int(match[2])


def measure(architectures: Sequence[int] = ARCHITECTURES) -> list[Row]:
    """Compile all variants."""
    return [compile_variant(v, architecture) for v in variants() for architecture in architectures]


def read_table() -> list[Row]:
    """The committed table."""
    return read_rows(TABLE, Row)


def version(text: str) -> tuple[int, ...]:
    """A version as numbers that can be compared: "3.8.0" is (3, 8, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0]))


def expected_rows(table: Sequence[Row], triton: str) -> tuple[list[Row], str]:
    """The rows of the table that a version of Triton is compared with, and a remark if they are another version's."""
    own = [row for row in table if row.triton == triton]
    if own or not table:
        return own, ""
    versions = sorted({row.triton for row in table}, key=version)
    remark = (
        f"the table has no rows of Triton {triton}, only of {', '.join(versions)}: registers and instructions are not "
        "compared (add them with --write)"
    )
    return [row for row in table if row.triton == versions[-1]], remark


def compare(rows: Sequence[Row], table: Sequence[Row]) -> list[str]:
    """Losses against the table, one line each.

    Args:
        rows: measured, of one version of Triton.
        table: rows of any versions.
    """
    expected, remark = expected_rows(table, rows[0].triton if rows else "")
    known = {row.key: row for row in expected}
    losses = []
    for row in rows:
        name = f"sm_{row.architecture} {row.kernel} {row.dtype} {row.configuration}"
        before = known.get(row.key)
        accepted = before.stack_bytes if before and not remark else 0
        if row.stack_bytes > accepted:
            losses.append(f"{name}: {row.stack_bytes} bytes of stack frame")
        if row.shared_bytes > MULTIPROCESSORS[row.architecture].block_shared_bytes:
            losses.append(
                f"{name}: {row.shared_bytes} bytes of shared memory, more than a block has"
            )
        if before is None:
            losses.append(f"{name}: not in the table")
            continue
        if remark:
            continue
        if row.instruction != before.instruction:
            losses.append(f"{name}: {before.instruction} -> {row.instruction}")
        for field in ("registers", "shared_bytes"):
            was, now = getattr(before, field), getattr(row, field)
            if now > was:
                losses.append(f"{name}: {field} {was} -> {now}")
    measured = {row.key for row in rows}
    compiled_for = {row.architecture for row in rows}
    for row in expected:
        if row.key not in measured and row.architecture in compiled_for:
            losses.append(
                f"sm_{row.architecture} {row.kernel} {row.configuration}: no longer there"
            )
    return losses


def updated(table: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The table with measured rows in place of those of their version and architectures."""
    replaced = {(row.triton, row.architecture) for row in rows}
    kept = [row for row in table if (row.triton, row.architecture) not in replaced]
    return sorted([*kept, *rows], key=lambda row: version(row.triton))  # stable


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and compare, or write the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_resources")
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    options = parser.parse_args(arguments)
    if os.environ.pop("TRITON_INTERPRET", None):
        print("TRITON_INTERPRET is ignored: the kernels are compiled", file=sys.stderr)
    rows = measure(options.architectures)
    for row in rows:
        print(
            f"sm_{row.architecture:<3} {row.kernel:16} {row.dtype} {row.registers:3} registers "
            f"{row.stack_bytes:4} stack {row.shared_bytes:6} shared  {row.instruction:16} {row.configuration}"
        )
    if options.write:
        write_rows(TABLE, updated(read_table(), rows))
        return 0
    losses = compare(rows, read_table())
    if remark := expected_rows(read_table(), rows[0].triton)[1]:
        print(remark)
    print("\n".join(losses) or "no kernel is worse than the table")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
