"""Progress of a command: a bar on a terminal, lines where standard error goes to a file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

INTERVAL = 30.0  # seconds between lines


class ProgressBar:
    """Shows how many images are done, how fast, and how long the rest will take.

    On a terminal this is the bar of tqdm. Otherwise a line is written at most every `INTERVAL` seconds, so that a log
    file has few lines, and none of a command that ends earlier.
    """

    def __init__(self, title: str, total: int, done: int = 0, *, quiet: bool = False) -> None:
        """Start.

        Args:
            title: name of the work.
            total: number of images, including `done`.
            done: images that were done before.
            quiet: show nothing.
        """
        self._title, self._total, self._done, self._before = title, total, done, done
        self._quiet = quiet
        self._began = self._last = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit="img",
            leave=False,
            disable=True if quiet else None,
        )

    def update(self, images: int) -> None:
        """Count further images."""
        self._done += images
        self._bar.update(images)
        now = time.monotonic()
        if self._quiet or not self._bar.disable or now - self._last < INTERVAL:
            return
        self._last = now
        print(self._line(now), file=sys.stderr, flush=True)

    def set_postfix(self, **values: Any) -> None:
        """Show values after the bar of a terminal, from its next refresh on."""
        self._bar.set_postfix(refresh=False, **values)

    @staticmethod
    def write(text: str) -> None:
        """Write a line to standard error, above the bars of a terminal."""
        tqdm.write(text, file=sys.stderr)

    def _line(self, now: float) -> str:
        speed = (self._done - self._before) / (now - self._began)
        left = max(self._total - self._done, 0) / speed if speed > 0 else 0.0
        return (
            f"{self._title}: {self._done:,} of {self._total:,} images, {speed:.1f} images/s, "
            f"{tqdm.format_interval(round(left))} left"
        )

    def __enter__(self) -> ProgressBar:
        """The bar, which is removed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        self._bar.close()
