"""How convolutional layers run in inference: BatchNorm folded, fused in bfloat16, or compiled.

`Trunk` and `ImageEncoder` run their layers by `run_layers`. In training, with gradients, or while the layers are being
traced, they run as they are. Precision and compilation are chosen for a `with` block of the current thread, as by
`torch.autocast`, so that they reach the networks through modules that a user may have replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from diffmic_fast.cpu_capabilities import bfloat16_instructions
from diffmic_fast.models._torch_internals import convolution_operators_exist, mark_batch_dynamic
from diffmic_fast.models.folding import folded
from diffmic_fast.models.fused_layers import fused

# Pixels of a batch from which folding is faster: two images of 224 x 224. (AVX2, one thread: ResNet-50 6 % at 8 images,
# nothing at one; EfficientNet-Lite0, 128 px, 6 % at 32 images, 3 ms slower at one.)
_LEAST_PIXELS = 100_000

_bfloat16: ContextVar[bool] = ContextVar("bfloat16", default=False)
_compile: ContextVar[bool] = ContextVar("compile", default=False)


@contextmanager
def inference(*, bfloat16: bool = False, compile: bool = False) -> Iterator[None]:
    """Choose how layers run in this block.

    Args:
        bfloat16: Run convolutions and the layers between them in bfloat16 where the device has such instructions
            (`bfloat16_obstacle`). Results are float32.
        compile: Run the layers through `torch.compile`, compiled once per network and kind of input.
    """
    tokens = _bfloat16.set(bfloat16), _compile.set(compile)
    try:
        yield
    finally:
        _bfloat16.reset(tokens[0])
        _compile.reset(tokens[1])


def bfloat16_obstacle(device: torch.device) -> str:
    """Why convolutions on a device stay in float32 when bfloat16 is requested; empty where they do not.

    Without bfloat16 instructions such a convolution is emulated: a ResNet-50 took eight times as long as in float32
    (AVX2, oneDNN 3.12).
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ""
        return "this GPU has no bfloat16 instructions"
    if device.type != "cpu":
        return f"bfloat16 convolutions are not known to be faster on {device.type}"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "bfloat16 convolutions need oneDNN, which this torch lacks or has disabled"
    return "" if bfloat16_instructions() else "this processor has no bfloat16 instructions"


def bfloat16_convolutions() -> str:
    """How `precision="bf16"` runs convolutions on the CPU, or why it does not; shown by `info`."""
    obstacle = bfloat16_obstacle(torch.device("cpu"))
    if obstacle:
        return f"no: {obstacle}"
    how = "fused with BatchNorm, sum and activation" if _fuses() else "under autocast"
    return f"yes, with {bfloat16_instructions()}, {how}"


def _fuses() -> bool:
    """Whether oneDNN computes fused convolutions in bfloat16: on x86 (on Arm they were not measured)."""
    return (
        bool(torch.backends.mkldnn.enabled)
        and convolution_operators_exist()
        and bfloat16_instructions() in ("AMX", "AVX-512")
    )


def run_layers(layers: nn.Module, images: Tensor) -> Tensor:
    """layers(images), run as the surrounding `inference` or autocast block says.

    Args:
        layers: A network, or part of one.
        images: [B, 3, H, W].

    Returns:
        float32 where an `inference` block asks for bfloat16; bfloat16 under such an autocast.
    """
    if (
        torch.is_grad_enabled()
        or layers.training
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not isinstance(images, Tensor)
        or images.ndim != 4
    ):
        return layers(images)
    device = images.device.type
    half = _bfloat16.get() and not bfloat16_obstacle(images.device)
    # The guidance model of a training step in bfloat16 runs under autocast.
    ambient = (
        device == "cpu"
        and torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device) == torch.bfloat16
    )
    if (
        (half or ambient)
        and device == "cpu"
        and images.dtype == torch.float32
        and not _compile.get()
        and not _are_few(images)
        and _fuses()
        and (network := fused(layers)) is not None
    ):
        result = network(images)
        return result.float() if half else result
    if not half:
        return _run(layers, images)
    # Weights are cast when they are used; a cache would hold all of them to the end of the block.
    with torch.autocast(device, torch.bfloat16, cache_enabled=False):
        return _run(layers, images).float()


def _run(layers: nn.Module, images: Tensor) -> Tensor:
    if _compile.get():
        images = images.detach()  # the mark is set on a tensor of our own
        mark_batch_dynamic(images)
        return _compiled()(layers, images)
    return (layers if _are_few(images) else folded(layers))(images)


def _are_few(images: Tensor) -> bool:
    height, width = images.shape[2:]
    return images.shape[0] * height * width < _LEAST_PIXELS


@functools.cache
def _compiled() -> Callable[[nn.Module, Tensor], Tensor]:
    """Compile the layers, which take the weights as inputs and are never stale.

    Folding first gained nothing: BatchNorm is fused with addition and activation anyway. On request, because compiling
    takes long. AVX2, one thread, 8 images of 224 x 224, folded and compiled: ResNet-50 926 and 854 ms, after 44 s of
    compiling; ResNet-18 392 and 376 ms, after 34 s. The time is regained after 5,000 and 17,000 images, and later with
    more threads.
    """
    return torch.compile(lambda layers, images: layers(images))
