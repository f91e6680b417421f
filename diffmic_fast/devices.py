"""The device of a command."""

from __future__ import annotations

import torch


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is CUDA where there is a GPU, otherwise the CPU.

    Raises:
        ValueError: not a device, a device of another kind than CPU and CUDA, or a GPU where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"PyTorch's device type {device.type} is not supported")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} was asked for, but torch sees no GPU here; use cpu")
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise ValueError(
                f"device must be from cuda:0 to cuda:{count - 1}, the GPUs of this machine, got {name!r}"
            )
    return device
