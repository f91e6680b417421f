"""What the tests of `conditioning`'s kernels share: a call in any precision, and how far it may be off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cuda_backends import device_of
from rounding import assert_within_rounding
from torch import Tensor

from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.reference.conditional_linear import ConditionalLayer


class Case:
    """Arguments of a call in float64, whose values float32 holds."""

    def __init__(self, streams: int, batch: int, features: int, classes: int, rows: int = 9):
        generator = torch.Generator().manual_seed(1000 * features + 10 * batch + streams)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).double()

        labels = (streams, batch, classes) if streams else (batch, classes)
        self.inputs = [draw(batch, features), draw(*labels), draw(*labels).sigmoid().float()]
        self.inputs[2] = self.inputs[2].double()
        self.parameters = [
            draw(features, 2 * classes) / 2,
            draw(features) / 2,
            draw(rows, features),
            draw(features),
            draw(features),
        ]
        self.running = [draw(features), draw(features).square() + 0.5]
        self.timesteps = torch.randint(0, rows, (batch,), generator=generator)
        shape = (*labels[:-1], features)
        self.grad = draw(*shape)

    def run(
        self, dtype: torch.dtype, backend: str, *, training: bool, timesteps: Tensor | None = None
    ) -> list[Tensor]:
        """h, the running statistics behind the call, and all gradients of sum(h * grad)."""
        device = device_of(backend)
        leaves = [
            v.to(device, dtype, copy=True).requires_grad_()
            for v in (*self.inputs, *self.parameters)
        ]
        running = (v.to(device, dtype, copy=True) for v in self.running)
        layer = ConditionalLayer(*leaves[3:], *running)
        t = (self.timesteps if timesteps is None else timesteps).to(device)
        options: dict[str, Any] = {"training": training, "momentum": 0.3, "eps": 1e-4}
        h = conditioning(*leaves[:3], layer, t, backend=backend, **options)
        gradients = torch.autograd.grad(h, leaves, self.grad.to(device, dtype, copy=True))
        found = [h.detach(), layer.running_mean, layer.running_var, *gradients]
        return [value.cpu() for value in found]

    def check(
        self, found: Sequence[Tensor], *, training: bool, timesteps: Tensor | None = None
    ) -> None:
        """Asserts that `found`, results of `run` in float32, err no more than rounding explains."""

        def definition() -> list[Tensor]:
            return self.run(torch.float64, "reference", training=training, timesteps=timesteps)

        assert found[0].dtype == torch.float32
        assert_within_rounding(found, definition, NAMES)

    def floats(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return tuple(
            [value.float() for value in part]
            for part in (self.inputs, self.parameters, self.running)
        )  # type: ignore[return-value]


NAMES = (
    "h", "running_mean", "running_var", "x", "y_t", "guidance", "weight", "bias", "gamma",
    "norm_weight", "norm_bias",
)  # fmt: skip


def sliced(tensor: Tensor, *, rows_only: bool) -> tuple[Tensor, Tensor]:
    """A view with these values inside a buffer of not-a-numbers, and the buffer."""
    steps = [1 if rows_only and d == tensor.ndim - 1 else 2 for d in range(tensor.ndim)]
    shape = [step * size + 5 for step, size in zip(steps, tensor.shape, strict=True)]
    buffer = tensor.new_full(shape, torch.nan)
    view = buffer[tuple(slice(3, 3 + s * n, s) for s, n in zip(steps, tensor.shape, strict=True))]
    view.copy_(tensor)
    return view, buffer
