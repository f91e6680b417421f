"""Ctrl-C and SIGTERM as requests that a training loop honours between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A training run was asked to stop and has written a checkpoint.

    Attributes:
        signum: number of the signal.
    """

    def __init__(self, signum: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.signum = signum


class Interruption:
    """A block in which SIGINT and SIGTERM set a flag instead of ending the process.

    A second Ctrl-C raises KeyboardInterrupt at once. Python delivers signals to the main thread only; in other threads
    the block changes nothing.

    Attributes:
        signum: number of the signal received, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
