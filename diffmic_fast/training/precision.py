"""The precision of a training run: the choice behind "auto", and forward passes in bfloat16."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffmic_fast.checkpoint import Checkpoint
from diffmic_fast.config.run import RunConfig
from diffmic_fast.cpu_capabilities import bfloat16_instructions
from diffmic_fast.distributed.processes import Processes
from diffmic_fast.models.execution import bfloat16_obstacle
from diffmic_fast.training.depthwise import depthwise_conv2d, has_fast_backward


def resolve_precision(
    config: RunConfig, device: torch.device, processes: Processes, resumed: Checkpoint | None
) -> RunConfig:
    """Collective: the configuration with "auto" replaced by a precision.

    A resumed run keeps that of its checkpoint, on any processor, and so the numbers of an unbroken run. A new run uses
    bfloat16 on CPUs with AMX or the bfloat16 instructions of AVX-512 if all processes have them, otherwise float32; on
    GPUs float32, because bfloat16 was not measured there.

    Args:
        config: of the run.
        device: where the run trains.
        processes: of the run.
        resumed: checkpoint that the run resumes from, or None.
    """
    if config.training.precision != "auto":
        return config
    stored = {} if resumed is None else resumed.extras.get("config", {}).get("training", {})
    native = (
        device.type == "cpu"
        and not bfloat16_obstacle(device)
        and bfloat16_instructions() in ("AMX", "AVX-512")
    )
    chosen = "bf16" if all(processes.all_gather(native)) else "fp32"
    training = dataclasses.replace(config.training, precision=stored.get("precision", chosen))
    return dataclasses.replace(config, training=training)


@contextlib.contextmanager
def bfloat16_passes(device: torch.device) -> Iterator[None]:
    """A block of forward passes under autocast to bfloat16."""
    with torch.autocast(device.type, torch.bfloat16), _Convolutions():
        yield


class _Convolutions(TorchFunctionMode):
    """On CPUs, replaces convolutions whose bfloat16 backward pass by oneDNN is wrong or slow.

    - Input and output are single pixels: stride 1, which gives the same numbers. With a larger stride the weight
      gradient is wrong and differs from call to call (torch 2.14, AVX-512: 3 x 3, stride 2, padding 1, as in a
      ResNet's last stage for patches of 16 pixels).
    - Depthwise convolutions with a stride or a wide kernel: `training.depthwise`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace calls of `conv2d`; other functions are called unchanged."""
        if func is F.conv2d and not kwargs and len(args) == 7:  # as nn.Conv2d calls it
            images, weight, bias, stride, padding, dilation, groups = args
            if _is_one_pixel(images, weight, padding, dilation):
                args = (images, weight, bias, (1, 1), padding, dilation, groups)
            elif has_fast_backward(images, weight, bias, stride, padding, dilation, groups):
                return depthwise_conv2d(images, weight, stride, padding)
        return func(*args, **(kwargs or {}))


def _is_one_pixel(images: Tensor, weight: Tensor, padding: Any, dilation: Any) -> bool:
    """Whether input and output of a convolution are single pixels, for any stride."""
    return (
        images.device.type == "cpu"
        and images.shape[2:] == (1, 1)
        and not isinstance(padding, str)
        and all(
            2 * p == d * (k - 1)
            for p, d, k in zip(padding, dilation, weight.shape[2:], strict=True)
        )
    )
