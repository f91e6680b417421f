"""Ctrl-C and SIGTERM as requests that a training loop answers at a step boundary."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A training run was asked to stop, and has saved; `signum` is the signal's number."""

    def __init__(self, signum: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.signum = signum


class Interruption:
    """Context in which SIGINT and SIGTERM set a flag instead of ending the process.

    `check()` raises Interrupted once the flag is set. A second Ctrl-C does what Ctrl-C always
    does, for the user who does not want to wait. Python delivers signals to the main thread only;
    in another thread the context leaves them alone.
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

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum)


def ignore_in_worker(worker: int) -> None:
    """For DataLoader workers: Ctrl-C in a terminal reaches them too, and the trainer decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
