"""Functions run by several processes of one process group."""

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

_PATIENCE = timedelta(seconds=120)  # for a process that waits for one that has ended


def in_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results by rank of function(rank, *arguments) in `count` new processes of a gloo group, one thread each.

    Args:
        count: number of processes.
        function: importable by them; their exceptions are raised here.
        arguments: the same for all.
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
