"""Reading the pages of reports, for their tests."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

# Names that would be markup, run or break out where they are not escaped.
HOSTILE = (
    "</script><script>document.title='run'</script>",
    '"><img src=x onerror="document.title=1">',
    "' onmouseover='document.title=1' x='",
    "</title></style><svg onload=document.title=1>",
    "{{ 7 * 7 }} {% raw %} ${7*7} &lt;b&gt;",
    "javascript:document.title=1",
)


class Page(HTMLParser):
    """The elements and the text of a page.

    Attributes:
        elements: (tag, attributes) in their order.
        text: of everything but styles and scripts, with single spaces.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._raw = False
        self.feed(path.read_text("utf-8"))
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._raw = tag in ("style", "script")
        if tag in ("td", "th", "dd", "span"):
            self.text += " "

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.text += data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        """The attributes of elements with this tag and these attributes."""
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and wanted.items() <= attributes.items()
        ]


def assert_inert(page: Page) -> None:
    """Assert that nothing of a page can run or be loaded but its own script and style."""
    assert len(page.all("script")) == 1 and len(page.all("style")) == 1
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy["content"] and "unsafe" not in policy["content"]
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "link") or (
            tag == "link" and attributes["href"].startswith("data:")
        )
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style", (tag, attributes)
            if name == "src":
                assert value.startswith("data:image/"), value[:60]
            if name == "href":
                assert value.startswith(("#", "data:", "index.html", "page-")), value[:60]
