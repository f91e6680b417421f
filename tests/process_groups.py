"""Functions run by the processes of one group."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

_PATIENCE = timedelta(seconds=120)  # for a process that waits for another in vain


def in_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(rank, *arguments) in `count` new processes of a gloo group, one thread each; what each returned.

    Args:
        function: of a module that can be imported there; an exception there is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _run, (count, folder, function, arguments), nprocs=count, join=True
        )
        return [torch.load(Path(folder, str(r)), weights_only=False) for r in range(count)]


def _run(rank: int, count: int, folder: str, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=count, timeout=_PATIENCE
    )
    try:
        torch.save(function(rank, *arguments), Path(folder, str(rank)))
    finally:
        dist.destroy_process_group()
