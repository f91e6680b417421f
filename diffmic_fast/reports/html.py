"""Pages of HTML from the templates of this package.

A page is one file: its style, script and pictures are inside, and its Content-Security-Policy lets nothing else be
loaded or run. All text is escaped by Jinja2; no value is written into a script or a style.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmic_fast import __version__
from diffmic_fast._optional import require
from diffmic_fast.atomic_files import atomic_file

if TYPE_CHECKING:
    from jinja2 import Environment

GENERATOR = "diffmic-fast"
DISCLAIMER = "For research. This is not a medical device, and nothing here has been validated for clinical use."
_UNDEFINED = "-"
_BEGINNING = 2048  # bytes of a page that contain its generator


def write_page(path: str | Path, template: str, values: Mapping[str, Any]) -> None:
    """Write a page; an interrupted write leaves no file. The page is written in parts, not built in memory.

    Args:
        path: of the page.
        template: name of a file in `templates`.
        values: of the template's variables; iterators are consumed while the page is written.
    """
    page = _environment().get_template(template)
    with atomic_file(path) as file:
        for text in page.generate(values):
            file.write(text.encode("utf-8", "replace"))


def is_own_page(path: Path) -> bool:
    """Whether a file is a page of this module."""
    with open(path, "rb") as file:
        return f'name="generator" content="{GENERATOR} '.encode() in file.read(_BEGINNING)


def shown(text: str) -> str:
    r"""A name as it is displayed: characters that are not printable become \xNN, \uNNNN or \UNNNNNNNN.

    These include control characters, marks of the writing direction, and bytes of a file name that are not text.
    """
    return "".join(c if c.isprintable() else _escape(ord(c)) for c in text)


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, as Python decodes it
        code -= 0xDC00
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in per cent; a dash where it is not defined."""
    if share is None or math.isnan(share):
        return _UNDEFINED
    return f"{100 * share:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    """A number with a fixed number of decimals; a dash where it is not defined."""
    return _UNDEFINED if value is None or math.isnan(value) else f"{value:.{digits}f}"


@functools.cache
def _environment() -> Environment:
    jinja2 = require("jinja2", extra="report", purpose="writing a report")
    environment: Environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffmic_fast.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=shown, percent=percent, number=number, whole="{:,}".format)
    style, script = _asset("report.css"), _asset("report.js")
    environment.globals.update(
        # Files of the package, without text of a user.
        style=jinja2.utils.markupsafe.Markup(style),
        script=jinja2.utils.markupsafe.Markup(script),
        policy="; ".join(
            (
                "default-src 'none'",
                "img-src data:",
                f"style-src '{_hash(style)}'",
                f"script-src '{_hash(script)}'",
                "base-uri 'none'",
                "form-action 'none'",
            )
        ),
        generator=f"{GENERATOR} {__version__}",
        version=__version__,
        disclaimer=DISCLAIMER,
    )
    return environment


def _asset(name: str) -> str:
    """A file of `templates`."""
    return resources.files("diffmic_fast.reports").joinpath("templates", name).read_text("utf-8")


def _hash(text: str) -> str:
    """The source expression of a Content-Security-Policy that allows an element with this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
