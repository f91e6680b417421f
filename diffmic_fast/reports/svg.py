"""Figures of matplotlib as SVG elements of a page, which take their colours from its style."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from diffmic_fast._optional import require
from diffmic_fast.reports.html import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of a figure, which `to_svg` replaces by variables of `report.css`.
INK, MUTED, LINE = "#010203", "#040506", "#070809"
SERIES = ("#0a0b00", "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"} | {
    colour: f"var(--s{number})" for number, colour in enumerate(SERIES)
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diffmic-fast",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_PROPERTIES = frozenset(
    ("fill", "fill-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-linecap", "stroke-linejoin",
     "stroke-dasharray", "stroke-dashoffset", "opacity", "text-anchor", "font-size", "font-weight")
)  # fmt: skip


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """A block that draws a figure of this size in inches, in the colours of this module."""
    matplotlib = require("matplotlib", extra="report", purpose="writing a report")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        yield Figure(figsize=(width, height), layout="constrained")


def style(number: int) -> dict[str, Any]:
    """Colour and dashes of the line of a class or method."""
    return {
        "color": SERIES[number % len(SERIES)],
        "linestyle": _DASHES[number // len(SERIES) % len(_DASHES)],
    }


def label(text: str, length: int = 24) -> str:
    """A name as matplotlib draws it: the end of a long one, dollars as they are, control characters escaped."""
    text = shown(text)
    text = text if len(text) <= length else f"…{text[1 - length :]}"
    return text.replace("$", r"\$")


def to_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an SVG element without style sheets, whose text is text.

    Called within the block of `new_figure`.

    Args:
        figure: of `new_figure`.
        name: a prefix that makes the identifiers unique on the page.
        title: accessible name of the figure.
    """
    file = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=empty)
    root = ET.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        _adapt(element, name)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    heading = ET.Element("title", {"id": f"{name}-title"})
    heading.text = shown(title)
    root.insert(0, heading)
    root.attrib.update(
        {"viewBox": box, "role": "img", "aria-labelledby": f"{name}-title", "class": "plot"}
    )
    return ET.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _adapt(element: ET.Element, name: str) -> None:
    """Attributes in place of styles, unique identifiers, no namespaces, as HTML and the page's policy require."""
    element.tag = _local(element.tag)
    given = {_local(key): value for key, value in element.attrib.items()}
    for part in given.pop("style", "").split(";"):
        key, _, value = (text.strip() for text in part.partition(":"))
        if key == "font":  # the family is that of the page
            size = re.search(r"([\d.]+)px", value)
            key, value = "font-size", size[1] if size else "9"
        if key in _PROPERTIES:
            given[key] = value.removesuffix("px") if key == "font-size" else value
    if "id" in given:
        given["id"] = f"{name}-{given['id']}"
    for key, value in given.items():
        if key == "href" and value.startswith("#"):
            given[key] = f"#{name}-{value[1:]}"
        given[key] = re.sub(r"url\(#", f"url(#{name}-", given[key])
        given[key] = _VARIABLES.get(given[key], given[key])
    element.attrib.clear()
    element.attrib.update(given)
