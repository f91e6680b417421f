"""Shows the progress of a build to a user of pip, which hides a build's output."""

from __future__ import annotations

import os
import re
import subprocess
import time


def run_showing_progress(command: list[str], path: str) -> int:
    """Run a build by Ninja, and write to `path` which file of how many has been compiled.

    Args:
        command: its output goes to standard output as well.
        path: a terminal, where one line is rewritten, or a file; "" or one that cannot be opened
            (no controlling terminal) for none.

    Returns:
        The exit status.
    """
    begin = time.monotonic()
    try:
        shown = open(path, "a", encoding="utf-8")  # noqa: SIM115
    except OSError:
        shown = open(os.devnull, "a", encoding="utf-8")  # noqa: SIM115
    # pip's spinner overwrites the last character of the line, a blank.
    line_format = "\r\033[K{} " if shown.isatty() else "{}\n"

    def show(text: str) -> None:
        shown.write(line_format.format(text))
        shown.flush()

    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    with shown, subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as build:  # fmt: skip
        if shown.isatty():
            shown.write("\n")
        show("diffmic_fast: compiling the extension")
        for line in build.stdout or ():
            print(line, end="", flush=True)
            if found := re.match(r"\[(\d+)/(\d+)\] Building .*?(csrc/\S+)\.o\b", line):
                show(f"diffmic_fast: {found[1]} of {found[2]} done, {found[3]}")
        status = build.wait()
        outcome = "failed" if status else "compiled"
        show(f"diffmic_fast: {outcome} after {time.monotonic() - begin:.0f} s")
    return status
