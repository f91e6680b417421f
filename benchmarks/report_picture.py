"""Picture of a report of predictions, for the README: the first image of each class, in headless Chromium.

    diffmic-fast demo --out demo
    python -m benchmarks.report_picture demo/report/index.html docs/pictures/report.png

Needs selenium (in the extra `test`), chromium and chromedriver (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import sys
from pathlib import Path

from PIL import Image

_SIZE = (1320, 1000)  # of the window, in CSS pixels
_CLASSES = 3  # as many images
_COLOURS = 200  # of the picture
# Hides all images but the first of each of the first predicted classes, and scrolls to the last of these: what was
# never visible is not laid out.
_SHOW = """
const seen = new Set();
for (const card of document.querySelectorAll("[data-name]")) {
  card.hidden = seen.has(card.dataset.label) || seen.size >= arguments[0];
  if (!card.hidden) card.scrollIntoView();
  seen.add(card.dataset.label);
}
"""
# After the next frame: the rectangle of the images.
_RECTANGLE = """
const [done] = arguments;
requestAnimationFrame(() => requestAnimationFrame(() => {
const shown = [...document.querySelectorAll("[data-name]:not([hidden])")];
const first = shown[0].getBoundingClientRect(), last = shown.at(-1).getBoundingClientRect();
done({x: 0, y: first.top + scrollY, width: innerWidth, height: last.bottom - first.top, scale: 1});
}));
"""


def draw(page: Path, picture: Path) -> None:
    """Write a PNG of the first images in a page of `predict --report`.

    Raises:
        FileNotFoundError: there is no chromium or chromedriver, or no page.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver or not page.is_file():
        raise FileNotFoundError(f"report_picture: chromium, chromedriver and {page} must exist")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument("--window-size={},{}".format(*_SIZE))
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser.get(page.resolve().as_uri())
        browser.execute_script(_SHOW, _CLASSES)
        clip = browser.execute_async_script(_RECTANGLE)
        shot = browser.execute_cdp_cmd(
            "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
        )
        pixels = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
        pixels.quantize(_COLOURS).save(picture, optimize=True)
    finally:
        browser.quit()


def main() -> int:
    """Draw the picture of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report_picture", description=__doc__
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(options.page, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
