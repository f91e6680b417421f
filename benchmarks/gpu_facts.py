"""The GPU of a benchmark: its name, driver and clocks, as PyTorch and nvidia-smi report them."""

from __future__ import annotations

import csv
import shutil
import subprocess
from typing import Any

import torch

# What is recorded, by its name in `nvidia-smi --query-gpu`.
_QUERIES = {
    "driver": "driver_version",
    "sm_clock": "clocks.sm",
    "sm_clock_max": "clocks.max.sm",
    "memory_clock": "clocks.mem",
    "memory_clock_max": "clocks.max.mem",
    "temperature": "temperature.gpu",
    "power_limit": "power.limit",
    "ecc": "ecc.mode.current",
    "mig": "mig.mode.current",
}
_SECONDS = 20  # a driver that was not running yet takes some to answer


def facts() -> dict[str, Any] | None:
    """The current CUDA device, its driver and its clocks at this moment; None without one.

    Returns:
        A dict with name, compute_capability ("9.0"), multiprocessors, memory_bytes, cuda (the version that PyTorch was
        built with), and as text with units what nvidia-smi reports: driver, sm_clock, memory_clock, their _max,
        temperature (degrees Celsius), power_limit, ecc and mig. Without nvidia-smi, `nvidia_smi` says why.
    """
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    found: dict[str, Any] = {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
    # PyTorch counts the devices of CUDA_VISIBLE_DEVICES, nvidia-smi all of them.
    uuid = getattr(properties, "uuid", None)
    return found | _queried(str(index) if uuid is None else f"GPU-{uuid}")


def _queried(device: str) -> dict[str, str]:
    """What nvidia-smi reports of a device, an index or a UUID; fields that the device lacks are left out."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"nvidia_smi": "not installed"}
    query = f"--query-gpu={','.join(_QUERIES.values())}"
    command = [program, query, "--format=csv,noheader", f"--id={device}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"nvidia_smi": f"failed: {error}"}
    values = [value.strip() for row in csv.reader(done.stdout.splitlines()[:1]) for value in row]
    if done.returncode or len(values) != len(_QUERIES):
        return {"nvidia_smi": f"failed: {(done.stdout + done.stderr).strip()}"}
    reported = dict(zip(_QUERIES, values, strict=True))
    return {name: value for name, value in reported.items() if value.strip("[]") != "N/A"}
