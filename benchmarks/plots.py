"""Pictures of the committed results: `python -m benchmarks --plot` draws benchmarks/results/*.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.harness import RESULTS

# Peer, or the first word of its name: label and colour, of Okabe and Ito's palette for all kinds of colour vision.
# Stock PyTorch in a precision has the colour of this package's kernel in it, with a broken line.
_PEERS = {
    "published way": ("published way, re-implemented", "#000000"),
    "reference": ("published formula", "#000000"),
    "hoisted": ("PyTorch fp32", "#CC79A7"),
    "hoisted, compiled": ("PyTorch fp32, compiled", "#E69F00"),
    "stock fp32": ("PyTorch fp32", "#0072B2"),
    "stock bf16": ("PyTorch bf16", "#009E73"),
    "stock int8": ("PyTorch int8", "#D55E00"),
    "Gram": ("Gram matrix", "#CC79A7"),
    "Gram, compiled": ("Gram matrix, compiled", "#E69F00"),
    "cdist": ("torch.cdist", "#56B4E9"),
    "geomloss": ("geomloss", "#A08A00"),
    "pykeops": ("pykeops", "#D55E00"),
    "cpu": ("diffmic_fast", "#0072B2"),
    "fp32": ("diffmic_fast fp32", "#0072B2"),
    "bf16": ("diffmic_fast bf16", "#009E73"),
    "int8": ("diffmic_fast int8", "#D55E00"),
}
_DETAILS = {
    "matmul precision medium": "compiled, medium",
    "one after the other": "sequential",
    "windows, 1e-05": "tolerance 1e-5",
}
# Of a step neither its matrix products alone nor the limits; of a chain no part of it.
_NOT_DRAWN = re.compile(r"limit: |stock \w+ products|.*, \d+ steps$")
_OWN = ("cpu", "fp32", "bf16", "int8")  # drawn thicker
_WIDEST = ("amx_tile", "avx512bf16", "avx512vnni", "avx512f", "avx2", "neon")

Content = Mapping[str, Any]


@dataclass
class Line:
    """Median seconds and quartiles over a size."""

    points: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    style: str = "-"
    limit: bool = False

    @property
    def last(self) -> float:
        """The median at the largest size."""
        return self.points[max(self.points)][0]


class _Lines(dict[str, Line]):
    def add(self, name: str, at: int, timing: Content, steps: int, style: str = "-") -> None:
        """Seconds of one of `steps` steps, at a size."""
        median, low, high = (timing[key] / steps for key in ("median", "low", "high"))
        self.setdefault(name, Line(style=style)).points[at] = (median, low, high)

    def add_limits(self, case: Content, at: int, steps: int) -> None:
        """The least time of each peer that has limits."""
        for peer, bounds in case["limits"].items():
            least = max(f * case["timings"][bound]["median"] for bound, f in bounds.items()) / steps
            name = "limit" if peer == "cpu" else f"limit, {peer}"
            self.setdefault(name, Line(limit=True)).points[at] = (least, least, least)


def draw(results: Path = RESULTS) -> list[Path]:
    """Draw the results that are there; returns the paths of the pictures."""
    drawn = []
    for source, kind, make in (
        ("denoise", "rows", _over_rows),
        ("denoise", "steps", _over_steps),
        ("mmd", "rows", _over_mmd_rows),
    ):
        path = results / f"{source}.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            figure = make(content)
            drawn.append(results / f"{source}_{kind}.png")
            figure.savefig(drawn[-1], dpi=150)
            plt.close(figure)
    return drawn


def _over_rows(content: Content) -> plt.Figure:
    lines = _Lines()
    for case in content["cases"]:
        if not case["title"].startswith("chain, "):
            continue
        rows, steps = case["sizes"]["rows"], case["sizes"]["steps"]
        for peer, timing in case["timings"].items():
            name = peer.removesuffix(", one step")
            if not _NOT_DRAWN.match(peer):
                lines.add(name, rows, timing, steps if name == peer else 1, _style(name))
        lines.add_limits(case, rows, steps)
    title = "Time of one denoising step, F = 6144, C = 5"
    return _picture(lines, title, "rows denoised together", "time per step", content["machine"])


def _over_steps(content: Content) -> plt.Figure:
    lines = _Lines()
    for case in content["cases"]:
        if not case["title"].startswith("1 row, "):
            continue
        for peer, timing in case["timings"].items():
            # Of PyTorch's ways the fastest of each precision.
            compiled = f"{peer}, compiled" in case["timings"]
            if not (_NOT_DRAWN.match(peer) or compiled or peer.endswith("medium")):
                lines.add(peer, case["sizes"]["steps"], timing, 1, _style(peer))
    title = "Time of a chain of one row, F = 6144, C = 5"
    return _picture(lines, title, "timesteps of the chain", "time per chain", content["machine"])


def _over_mmd_rows(content: Content) -> plt.Figure:
    lines = _Lines()
    for case in content["cases"]:
        if case["sizes"]["width"] != 64:
            continue
        rows = case["sizes"]["rows"]
        for peer, timing in case["timings"].items():
            if not peer.startswith("limit: ") and peer != "cpu, 1 thread":
                lines.add(peer, rows, timing, 1, _style(peer))
        lines.add_limits(case, rows, 1)
    title = "mmd of two sets of n rows, d = 64: value and both gradients"
    return _picture(lines, title, "rows in each set, n", "time per call", content["machine"])


def _style(name: str) -> str:
    if name.startswith("stock "):
        return "-." if name.endswith(", compiled") else "--"
    if name.endswith((", one after the other", ", online")):
        return "--"
    return "-." if "windows, " in name else "-"  # windows with a tolerance


def _label_of(name: str) -> tuple[str, str]:
    """Text and colour of a line."""
    if name.startswith("limit"):
        return name, _label_of(name.removeprefix("limit, "))[1] if ", " in name else "#0072B2"
    if name in _PEERS:
        return _PEERS[name]
    first, _, detail = name.partition(", ")
    text, colour = _PEERS.get(first, (first, "#555555"))
    return f"{text}, {_DETAILS.get(detail, detail)}" if detail else text, colour


def _picture(
    lines: Mapping[str, Line], title: str, x_label: str, y_label: str, machine: Content
) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(9.6, 5.2), layout="constrained")
    for name, line in sorted(lines.items(), key=lambda item: -item[1].last):
        at = sorted(line.points)
        median, low, high = zip(*(line.points[x] for x in at), strict=True)
        (text, colour), own = _label_of(name), name.split(", ")[0] in _OWN
        width = 1.3 if line.limit else 2.6 if own else 1.6
        style = ":" if line.limit else line.style
        marker = "" if line.limit and len(at) > 1 else "o"
        axes.plot(
            at,
            median,
            style,
            label=text,
            color=colour,
            linewidth=width,
            marker=marker,
            markersize=4,
        )
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    sizes = sorted({x for line in lines.values() for x in line.points})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    least, most = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if most / least > 300 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(_seconds))
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    figure.text(0.995, 0.005, _machine(machine), fontsize=7.5, color="#666666", ha="right")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))  # type: ignore[union-attr]
    # In the order of the lines' right ends.
    legend = figure.legend(
        loc="outside right center", frameon=False, labelcolor="linecolor", handlelength=2.6
    )
    for label in legend.get_texts():
        label.set_fontweight("bold" if label.get_text().startswith("diffmic_fast") else "normal")
    return figure


def _seconds(value: float, _: object = None) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size * 0.999:
            return f"{value / size:g} {unit}"
    return f"{value * 1e9:g} ns"


def _machine(facts: Content) -> str:
    sets = facts.get("instruction_sets", [])
    widest = next((name for name in _WIDEST if name in sets), "")
    words = [facts["processor"], widest, f"{facts['torch_threads']} threads"]
    words += [f"torch {facts['torch']}", "medians of interleaved rounds, quartiles shaded"]
    return " · ".join(word for word in words if word)
