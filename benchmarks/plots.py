"""Pictures of the committed results: `python -m benchmarks --plot` draws benchmarks/results/*.json.

Nothing is measured here. Files written before sizes were kept by name are read by their titles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.harness import RESULTS

# Okabe and Ito's colours, which people of any colour vision tell apart.
_COLOURS = {
    "published way": "#000000",
    "reference": "#000000",
    "hoisted": "#CC79A7",
    "Gram": "#CC79A7",
    "hoisted, compiled": "#E69F00",
    "Gram, compiled": "#E69F00",
    "cdist": "#56B4E9",
    "geomloss": "#A08A00",
    "geomloss, online": "#A08A00",
    "pykeops": "#D55E00",
    "fp32": "#0072B2",
    "bf16": "#009E73",
    "int8": "#D55E00",
    "cpu": "#0072B2",
    # Of a precision in stock PyTorch: the colour of ours, broken.
    "stock fp32": "#0072B2",
    "stock bf16": "#009E73",
    "stock int8": "#D55E00",
}
_MEDIUM = "stock fp32, matmul precision medium"
_NAMES = {
    "reference": "published formula",
    "Gram": "Gram matrix",
    "Gram, compiled": "Gram matrix, compiled",
    "cdist": "torch.cdist",
    "cpu": "diffmic_fast",
    "hoisted": "encoder hoisted",
    "hoisted, compiled": "encoder hoisted, compiled",
    _MEDIUM: "compiled, precision medium",
}
# Products alone are no peer of a step, and a few steps no chain.
_NOT_DRAWN = re.compile(r"limit: |stock \w+ products|.*, \d+ steps$")
_OWN = ("cpu", "fp32", "bf16", "int8")  # drawn thicker, named in bold
_WIDEST = ("amx_tile", "avx512bf16", "avx512vnni", "avx512f", "avx2", "neon")
_TITLES = {
    "rows": re.compile(r"chain, (?P<steps>\d+) steps, (?P<rows>\d+) rows"),
    "steps": re.compile(r"(?P<rows>\d+) row, (?P<steps>\d+) steps, several at once"),
    "mmd": re.compile(r"mmd, .* \((?P<rows>\d+) rows each, d = (?P<width>\d+)\)"),
}


@dataclass
class Line:
    """Median seconds, and quartiles, over a size."""

    points: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    style: str = "-"
    limit: bool = False

    def columns(self) -> tuple[list[int], list[float], list[float], list[float]]:
        at = sorted(self.points)
        median, low, high = (list(part) for part in zip(*(self.points[x] for x in at), strict=True))
        return at, median, low, high


def draw(results: Path = RESULTS) -> list[Path]:
    """Draw what is there; returns the pictures' paths."""
    drawn = []
    for source, kind, make in (
        ("denoise", "rows", _over_rows),
        ("denoise", "steps", _over_steps),
        ("mmd", "mmd", _over_mmd_rows),
    ):
        path = results / f"{source}.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            cases = [
                (case, sizes)
                for case in content["cases"]
                if (sizes := _sizes(case, kind)) is not None
            ]
            name = "rows" if kind == "mmd" else kind
            drawn.append(make(cases, content["machine"], results / f"{source}_{name}.png"))
    return drawn


def _sizes(case: Mapping[str, Any], kind: str) -> dict[str, int] | None:
    """Those in the case's title, if it is of this kind."""
    found = _TITLES[kind].match(case["title"])
    return None if found is None else {key: int(value) for key, value in found.groupdict().items()}


Cases = list[tuple[dict[str, Any], dict[str, int]]]


def _over_rows(cases: Cases, machine: Mapping[str, Any], path: Path) -> Path:
    lines: dict[str, Line] = {}
    for case, sizes in cases:
        for peer, timing in case["timings"].items():
            once = peer.endswith(", one step")
            steps = 1 if once else sizes["steps"]
            if not _NOT_DRAWN.match(peer):
                _add(lines, peer.removesuffix(", one step"), sizes["rows"], timing, steps)
        _add_limits(lines, case, sizes["rows"], sizes["steps"])
    title = "One step of denoise, F = 6144, C = 5"
    return _picture(lines, title, "images in the batch, M", "time per step", machine, path)


def _over_steps(cases: Cases, machine: Mapping[str, Any], path: Path) -> Path:
    lines: dict[str, Line] = {}
    for case, sizes in cases:
        for peer, timing in case["timings"].items():
            # Of stock PyTorch's ways, those that are left out differ little or are slower.
            if _NOT_DRAWN.match(peer) or f"{peer}, compiled" in case["timings"] or peer == _MEDIUM:
                continue
            _add(lines, peer, sizes["steps"], timing, 1)
            if peer.endswith("one after the other"):
                lines[peer].style = "--"
            elif "windows, " in peer:  # with a tolerance
                lines[peer].style = "-."
    title = "denoise, one image: the steps of a chain"
    return _picture(lines, title, "timesteps of the chain, T", "time per chain", machine, path)


def _over_mmd_rows(cases: Cases, machine: Mapping[str, Any], path: Path) -> Path:
    lines: dict[str, Line] = {}
    for case, sizes in cases:
        if sizes["width"] != 64:
            continue
        for peer, timing in case["timings"].items():
            if not peer.startswith("limit: ") and peer != "cpu, 1 thread":
                _add(lines, peer, sizes["rows"], timing, 1)
                if peer.endswith(", online"):  # of geomloss, in its colour
                    lines[peer].style = "--"
        _add_limits(lines, case, sizes["rows"], 1)
    title = "mmd of two sets of n rows, d = 64: value and both gradients"
    return _picture(lines, title, "rows in each set, n", "time per call", machine, path)


def _add(lines: dict[str, Line], name: str, at: int, timing: Mapping[str, float], by: int) -> None:
    values = (timing[key] / by for key in ("median", "low", "high"))
    compiled = name.endswith(", compiled")
    style = ("-." if compiled else "--") if name.startswith("stock ") else "-"
    lines.setdefault(name, Line(style=style)).points[at] = tuple(values)  # type: ignore[assignment]


def _add_limits(lines: dict[str, Line], case: Mapping[str, Any], at: int, by: int) -> None:
    """What each bounded peer would need at least."""
    for peer, bounds in case.get("limits", {}).items():
        least = max(f * case["timings"][bound]["median"] for bound, f in bounds.items()) / by
        name = "limit" if peer == "cpu" else f"limit, {peer}"
        line = lines.setdefault(name, Line(limit=True))
        line.points[at] = (least, least, least)


def _picture(
    lines: Mapping[str, Line],
    title: str,
    x_label: str,
    y_label: str,
    machine: Mapping[str, Any],
    path: Path,
) -> Path:
    figure, axes = plt.subplots(figsize=(8.4, 5.4), layout="constrained")
    labels = []
    for name, line in lines.items():
        at, median, low, high = line.columns()
        colour, own = _colour(name), name.split(", ")[0] in _OWN
        width = 1.3 if line.limit else 2.6 if own else 1.6
        style = ":" if line.limit else line.style
        marker = "" if line.limit and len(at) > 1 else "o"
        axes.plot(at, median, style, color=colour, linewidth=width, marker=marker, markersize=4)
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        labels.append((at[-1], median[-1], _NAMES.get(name, name), colour, own))
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    sizes = sorted({x for line in lines.values() for x in line.points})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    least, most = axes.get_ylim()
    steps = (1.0,) if most / least > 300 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(_seconds))
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    figure.text(0.995, 0.005, _machine(machine), fontsize=7.5, color="#666666", ha="right")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))  # type: ignore[union-attr]
    _label(axes, labels, figure.canvas.draw)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _label(
    axes: Axes, labels: list[tuple[int, float, str, str, bool]], lay_out: Callable[[], object]
) -> None:
    """Names beside the ends of their lines, moved apart where they would lie on each other."""
    axes.margins(x=0.03, y=0.08)
    last = max(x for x, *_ in labels)
    for x, y, name, colour, _ in labels:
        if x < last:  # the line ends on the way: its name stands there
            offset = {"xytext": (7, 5), "textcoords": "offset points"}
            axes.annotate(name, (x, y), color=colour, fontsize=9.5, **offset)
    labels = [label for label in labels if label[0] == last]
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.42)  # room for the names
    lay_out()
    to_pixels, back = axes.transData, axes.transData.inverted()
    height = 0.155 * axes.figure.dpi  # type: ignore[union-attr]
    ends = sorted((to_pixels.transform((x, y))[1], x, *rest) for x, y, *rest in labels)
    places = [end[0] for end in ends]
    for _ in range(200):
        for i in range(1, len(places)):
            overlap = height - (places[i] - places[i - 1])
            if overlap > 0:
                places[i - 1] -= overlap / 2
                places[i] += overlap / 2
    right = to_pixels.transform((last, 1))[0] + 0.9 * height
    for place, (end, x, name, colour, own) in zip(places, ends, strict=True):
        start = to_pixels.transform((x, 1))[0]
        axes.annotate(
            name,
            back.transform((start, end)),
            back.transform((right, place)),
            color=colour,
            fontsize=9.5,
            fontweight="bold" if own else "normal",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def _colour(name: str) -> str:
    if name.startswith("limit"):
        name = name.removeprefix("limit, ")
    return _COLOURS.get(name, _COLOURS.get(name.split(", ")[0], "#555555"))


def _seconds(value: float, _: object = None) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size * 0.999:
            return f"{value / size:g} {unit}"
    return f"{value * 1e9:g} ns"


def _machine(facts: Mapping[str, Any]) -> str:
    sets = facts.get("instruction_sets", [])
    widest = next((name for name in _WIDEST if name in sets), "")
    words = [facts["processor"], widest, f"{facts['torch_threads']} threads"]
    words += [f"torch {facts['torch']}", "medians of interleaved rounds, quartiles shaded"]
    return " · ".join(word for word in words if word)
