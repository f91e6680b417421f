"""An extension of griffe, which reads the docstrings for the site (mkdocs.yml).

A line of a section may describe several names, `a, b: ...`. griffe takes what follows the first space as a type, so the
spaces become thin ones.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAMES = re.compile(r"^( +\w+(?:, \w+)+)(?=:)", re.M)


class CombinedNames(griffe.Extension):
    """Keeps names that share a line together."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = _NAMES.sub(
                lambda found: found[1].replace(", ", ",\N{THIN SPACE}"), obj.docstring.value
            )
