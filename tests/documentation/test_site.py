"""The site of the documentation is built without a broken link, and loads nothing from other hosts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import diffmic_fast
from diffmic_fast import compat

SOURCE = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (SOURCE / "mkdocs.yml").is_file() or importlib.util.find_spec("mkdocs") is None,
    reason="mkdocs.yml is not beside the tests, or mkdocs is not installed (pip install '.[docs]')",
)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/tools/site.py."""
    spec = importlib.util.spec_from_file_location("site_hooks", SOURCE / "docs/tools/site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """The outcome of `mkdocs build` into a folder, strictly, as the configuration says."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--config-file",
            str(config),
            "--site-dir",
            str(out),
        ],
        cwd=SOURCE,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path: Path, hooks: ModuleType) -> None:
    done = build(SOURCE / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(hooks.external_references(tmp_path)) == []
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")
    }
    for path in (SOURCE / "docs").rglob("*.md"):
        name = path.relative_to(SOURCE / "docs").with_suffix(".html").as_posix()
        assert name.replace("README", "index") in pages
    assert "<math" in pages["algorithm.html"] and "arithmatex" not in "".join(pages.values())

    # Every public name is documented.
    api = pages["api/models.html"]
    for name in set(diffmic_fast.__all__) - {"__version__"}:
        assert f'id="diffmic_fast.{name}"' in api, name
    for name in compat.__all__:
        assert f'id="diffmic_fast.compat.{name}"' in pages["api/compat.html"], name
    operations = SOURCE.glob("diffmic_fast/ops/[a-z]*.py")
    for name in (path.stem for path in operations):
        assert f'id="diffmic_fast.ops.{name}.{name}"' in pages["api/ops.html"], name

    words = json.loads((tmp_path / "search/search_index.json").read_text())["docs"]
    assert any(
        "race" in entry["text"] for entry in words if entry["location"].startswith("emulator")
    )


@pytest.mark.slow
def test_faults_of_pages_stop_the_build(tmp_path: Path) -> None:
    """With the settings of mkdocs.yml, beside a page without faults."""
    text = (SOURCE / "mkdocs.yml").read_text()
    head = text.split("\nnav:\n")[0]
    hook = tmp_path / "docs/tools/site.py"
    hook.parent.mkdir(parents=True)
    hook.symlink_to(SOURCE / "docs/tools/site.py")
    config = tmp_path / "mkdocs.yml"
    config.write_text(head + "\nnav: [README.md]\n")
    (tmp_path / "docs/style").mkdir()
    (tmp_path / "docs/README.md").write_text(
        "# Here\n\n[a](#nowhere) [b](nothing.md) [c](../no-such-file.md) $\\nosuch x$\n\n"
        "![d](https://example.org/a.png)\n"
    )
    (tmp_path / "docs/lost.md").write_text("# A page that no menu has\n")
    done = build(config, tmp_path / "site")
    assert done.returncode != 0
    for fault in ("'#nowhere'", "'nothing.md'", "there is no ../no-such-file.md", "nosuch of", "lost.md",
                  "would load https://example.org/a.png"):  # fmt: skip
        assert fault in done.stderr, fault


def test_links_lead_to_pages_of_the_site(hooks: ModuleType) -> None:
    assert hooks.rewrite_links("[a](usage.md#images) `[b](../x)`", "kernels.md") == (
        "[a](usage.md#images) `[b](../x)`"
    )
    assert hooks.rewrite_links("[a](../CONTRIBUTING.md#style)", "kernels.md") == (
        "[a](project/CONTRIBUTING.md#style)"
    )
    assert hooks.rewrite_links("![a](../../benchmarks/results/mmd_rows.png)", "kernels/mmd.md") == (
        "![a](../project/benchmarks/results/mmd_rows.png)"
    )
    assert hooks.rewrite_links("[`ops/`](../diffmic_fast/ops)", "kernels.md") == "`ops/`"
    assert (
        hooks.rewrite_links("[a](docs/usage.md)", "project/CONTRIBUTING.md") == "[a](../usage.md)"
    )
    code = "```sh\n[a](../no)\n```\n\n    [a](../no)\n"
    assert hooks.rewrite_links(code, "kernels.md") == code


def test_formulas_become_mathml(hooks: ModuleType) -> None:
    found = hooks.with_mathml(r'<p><span class="arithmatex">\(a &lt; b\)</span></p>', "page.md")
    assert "<math" in found and 'display="inline"' in found and "<mo>&#x0003C;</mo>" in found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<script src="https://example.org/a.js"></script>'),
        ("a.html", "<script async src=//example.org/a.js></script>"),
        ("a.html", '<link href="https://example.org/a.css" rel="stylesheet">'),
        ("a.html", '<link rel="preconnect" href="https://example.org">'),
        ("a.html", '<img alt="" src="http://example.org/a.png">'),
        ("a.css", "@font-face{src:url(https://example.org/a.woff2)}"),
        ("a.css", '@import "https://example.org/a.css";'),
    ],
)
def test_what_would_be_loaded_is_found(
    hooks: ModuleType, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    ((file, url),) = hooks.external_references(tmp_path)
    assert file == name and "example.org" in url


def test_links_and_own_files_are_not_loaded(hooks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="https://example.org">a</a><link rel="canonical" href="https://example.org">'
        '<script src="../a.js"></script><img src="data:image/png;base64,AA//BB">'
    )
    (tmp_path / "a.css").write_text(":root{--icon:url('data:image/svg+xml;charset=utf-8,<svg/>')}")
    assert list(hooks.external_references(tmp_path)) == []


def test_references_of_sources_are_headings() -> None:
    """A page of docs, then headings in double quotes, in docstrings and comments."""
    found = set()
    for folder in ("diffmic_fast", "csrc", "tests", "benchmarks", "CMakeLists.txt"):
        path = SOURCE / folder
        for file in [path] if path.is_file() else path.rglob("*.*"):
            if file.suffix in {".py", ".h", ".cpp", ".cu", ".cuh", ".txt", ".md"}:
                text = re.sub(r"\n *(//|#)? *", " ", file.read_text(encoding="utf-8"))
                for page, headings in re.findall(
                    r'\b(docs/[\w/-]+\.md), ("[^"\n]+"(?: and "[^"\n]+")*)', text
                ):
                    found |= {(page, heading) for heading in re.findall('"(.*?)"', headings)}
    assert len(found) > 10
    for page, heading in found:
        text = (SOURCE / page).read_text(encoding="utf-8")
        assert re.search(rf"^#+ {re.escape(heading)}$", text, re.M), (page, heading)
