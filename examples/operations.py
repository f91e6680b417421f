"""The operations without the model: from PyTorch, and from NumPy and CuPy through DLPack.

    python examples/operations.py

An operation takes and returns tensors. Arrays of other libraries become tensors without a copy, on the device where
they are (`torch.from_dlpack`), and results go back the same way. The part for CuPy needs a CUDA GPU and the package
cupy, and is left out with the reason otherwise. `diffmic-fast info` lists which kernels serve each operation here.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.ops.conditional_linear import ConditionalLayer
from diffmic_fast.ops.denoise import DenoiserWeights, denoise
from diffmic_fast.ops.mmd import mmd
from diffmic_fast.ops.rois import rois


def discrepancy() -> tuple[Tensor, Tensor]:
    """The maximum mean discrepancy of two sets of rows, as a term of any loss, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator)
    y = (torch.randn(300, 8, generator=generator) + 0.5).requires_grad_()
    loss = mmd(x, y, bandwidth="median", estimator="unbiased")
    (gradient,) = torch.autograd.grad(loss, y)
    return loss.detach(), gradient


def salient_crops() -> tuple[Tensor, Tensor]:
    """The two most salient windows of an image, and the pixels under them."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    saliency = torch.zeros(1, 1, 8, 8)  # cells of 8 x 8 pixels
    saliency[..., 5:7, 1:3] = 1.0
    saliency[..., 0:2, 4:6] = 0.5
    found = rois(saliency, images, crop=(16, 16), count=2, channels="all")
    return found.origins, found.crops


def layer(inputs: int, outputs: int, timesteps: int) -> ConditionalLayer:
    """A conditional layer with random weights, in evaluation mode."""
    zeros, ones = torch.zeros(outputs), torch.ones(outputs)
    weight = torch.randn(outputs, inputs) / inputs**0.5
    return ConditionalLayer(
        weight, zeros, torch.rand(timesteps + 1, outputs), ones, zeros, zeros, ones
    )


def label_chain() -> Tensor:
    """Probabilities [M, C] at the end of reverse chains of a denoiser with random weights."""
    torch.manual_seed(0)
    rows, classes, width, timesteps = 4, 3, 64, 100
    weights = DenoiserWeights(
        layer(2 * classes, width, timesteps),
        (layer(width, width, timesteps), layer(width, width, timesteps)),
        torch.randn(classes, width) / width,
        torch.zeros(classes),
    )
    prior = torch.full((rows, classes), 1 / classes)  # of a guidance model that knows nothing
    steps = make_steps(make_schedule("linear", timesteps), "ddim", 10)
    y_0 = denoise(torch.randn(rows, width), prior, prior, weights, steps, seed=1)
    return y_0.softmax(dim=1)


def through_dlpack(xp: ModuleType) -> Any:
    """The discrepancy of two arrays of NumPy or CuPy, as an array of the same library."""
    x = xp.linspace(-1, 1, 300, dtype=xp.float32).reshape(100, 3)
    y = (x + 0.25).astype(xp.float32)
    value = mmd(torch.from_dlpack(x), torch.from_dlpack(y))
    return xp.from_dlpack(value)


def cupy_or_reason() -> ModuleType | str:
    """The module cupy, or why it cannot be used here."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        return f"cupy cannot be imported: {error}"


def main() -> None:
    """Run the example."""
    value, gradient = discrepancy()
    print(f"PyTorch: mmd {value:.4f}, norm of its gradient {gradient.norm():.4f}")
    origins, _ = salient_crops()
    print(f"PyTorch: rois, upper-left pixels {origins[0].tolist()}")
    print(f"PyTorch: denoise, probabilities of the first row {label_chain()[0].tolist()}")
    print(f"NumPy:   mmd {float(through_dlpack(np)):.4f}")
    cupy = cupy_or_reason()
    if isinstance(cupy, str):
        print(f"CuPy:    left out: {cupy}")
    else:
        print(f"CuPy:    mmd {float(through_dlpack(cupy)):.4f}, computed on the GPU")


if __name__ == "__main__":
    main()
