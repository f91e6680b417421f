"""Work done in a forked child, which has none of its parent's threads."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable


def ends_in_a_child(work: Callable[[], None], seconds: float = 30) -> bool:
    """Whether the work comes to its end in a forked child, without an exception and in time."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    for _ in range(round(seconds / 0.05)):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False
