"""The device of a command."""

from __future__ import annotations

import torch


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is CUDA where there is a GPU, otherwise the CPU.

    Raises:
        ValueError: not a device, or a GPU where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no GPU here; use cpu")
    return device
