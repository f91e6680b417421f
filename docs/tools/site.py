"""Hooks of the documentation site (mkdocs.yml).

- Files beside `docs/` that pages link to become pages of the site: see `INCLUDED`. Pictures of the benchmarks are
  copied. A link to any other file of the repository becomes plain text; one to a file that does not exist is a
  warning.
- Formulas become MathML.
- After the build, every page and style sheet is searched for what a browser would fetch from another host.

A warning is an error, since the site is built with `strict`.
"""

from __future__ import annotations

import html
import logging
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[2]
# Files of the repository that are pages of the site, as project/FILE.
INCLUDED = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "csrc/cuda/README.md",
    "tests/data/README.md",
)
PICTURES = "benchmarks/results"

log = logging.getLogger("mkdocs.hooks.site")

# A fenced or indented block, or an inline piece of code, in which nothing is a link; or a link.
_LINK = re.compile(
    r"(?P<code>^(?P<fence>```+)[^`]*\n(?:.*\n)*?(?P=fence)$|^(?: {4}.*\n)+"
    r"|(?P<tick>`+)(?!`)[^\n]*?(?<!`)(?P=tick)(?!`))"
    r"|(?P<bang>!?)\[(?P<text>(?:`[^`]*`|[^\[\]`]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)",
    re.M,
)
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\s*(?:\\\((.*?)\\\)|\\\[(.*?)\\\])\s*</\1>', re.S
)
# A heading of a page, as docstrings name it.
_REFERENCE = re.compile(r'docs/([\w/-]+\.md), (?:"|&quot;)([^"<&]+)(?:"|&quot;)')
# What a browser loads without being asked: attributes of these elements, and url() and @import of style sheets.
_LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?\s(?:src|srcset|data)\s*=\s*[\"']?([^\"'\s>]+)"
    r"|<link\b(?=[^>]*\brel\s*=\s*[\"']?(?:stylesheet|icon|preload|prefetch|modulepreload|preconnect|dns-prefetch))"
    r"[^>]*?\shref\s*=\s*[\"']?([^\"'\s>]+)"
    r"|url\(\s*[\"']?([^\"')\s]+)"
    r"|@import\s+[\"']([^\"']+)",
    re.I,
)


def site_path(file: str) -> str | None:
    """The source path in the site of a file of the repository, or None if the site has no such file."""
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    if file in INCLUDED or (file.startswith(PICTURES) and file.endswith(".png")):
        return f"project/{file}"
    return None


def repository_path(source: str) -> str:
    """The file of the repository of a source path in the site."""
    return source.removeprefix("project/") if source.startswith("project/") else f"docs/{source}"


def on_files(files: Any, config: Any) -> Any:
    """Add the files that are not below docs/."""
    from mkdocs.structure.files import File

    pictures = sorted((ROOT / PICTURES).glob("*.png"))
    for file in (*INCLUDED, *(path.relative_to(ROOT).as_posix() for path in pictures)):
        found = File.generated(config, f"project/{file}", abs_src_path=str(ROOT / file))
        files.append(found)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links that lead out of docs/ on GitHub."""
    return rewrite_links(markdown, page.file.src_uri)


def rewrite_links(markdown: str, source: str) -> str:
    """Lead the links of a page to pages of the site.

    Args:
        markdown: of the page.
        source: its path in the site.
    """
    here = repository_path(source)

    def rewritten(match: re.Match[str]) -> str:
        target = match["target"]
        if match["code"] or not target or re.match(r"[a-z]+:|#|<", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        if here.startswith("docs/") and file.startswith("docs/"):
            return match[0]  # mkdocs checks it
        if not (ROOT / file).exists():
            log.warning(f"{here}: there is no {target}")
            return match[0]
        goal = site_path(file)
        if goal is None:
            return match["text"]
        relative = posixpath.relpath(goal, posixpath.dirname(source) or ".")
        return f"{match['bang']}[{match['text']}]({relative}{hash_}{anchor})"

    return _LINK.sub(rewritten, markdown)


def on_page_content(content: str, page: Any, files: Any, **_: Any) -> str:
    """Replace formulas by MathML, and link the references of docstrings."""

    def linked(match: re.Match[str]) -> str:
        goal = files.get_file_from_path(match[1])
        if goal is None:
            log.warning(f"{page.file.src_uri}: there is no docs/{match[1]}")
            return match[0]
        anchor = match[2].lower().replace(" ", "-")
        return f'<a href="{goal.url_relative_to(page.file)}#{anchor}">{match[2]}</a>'

    if page.file.src_uri.startswith("api/"):
        content = _REFERENCE.sub(linked, content)
    return with_mathml(content, page.file.src_uri)


def with_mathml(text: str, source: str) -> str:
    """Replace the formulas of arithmatex by MathML; one that cannot be converted is a warning."""

    def converted(match: re.Match[str]) -> str:
        inline = match[2] is not None
        latex = html.unescape(match[2] if inline else match[3]).strip()
        try:
            mathml = convert(latex, display="inline" if inline else "block")
        except Exception as error:
            log.warning(f"{source}: {latex!r} is not converted: {error!r}")
            return match[0]
        if unknown := re.search(r"\\[a-zA-Z]+", mathml):
            log.warning(f"{source}: {unknown[0]} of {latex!r} is not converted")
        return mathml if inline else f'<div class="formula">{mathml}</div>'

    return _FORMULA.sub(converted, text)


def on_post_build(config: Any) -> None:
    """Look for what the site would load from other hosts."""
    for file, url in external_references(Path(config.site_dir)):
        log.warning(f"{file} would load {url}")


def external_references(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield file and address of everything that a browser would load from another host."""
    for base, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(base, name)
            if path.suffix not in {".html", ".css", ".svg"}:
                continue
            for groups in _LOADED.findall(path.read_text(encoding="utf-8")):
                url = html.unescape(next(filter(None, groups)))
                if re.match(r"([a-z][a-z0-9+.-]*:)?//", url, re.I):
                    yield path.relative_to(folder).as_posix(), url
