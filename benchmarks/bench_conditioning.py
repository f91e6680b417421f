"""`conditioning` at the published size, F = 6144, C = 5, T = 1000.

Training: forward and backward of 3 branches of 32 rows, to x and all parameters. The gradient of gamma is dense, 25 MB
of zeros but for 32 rows, whoever computes it, so there is a table without it too. Evaluation mode: forward alone, for
32 rows and for one.

Peers: the reference as written, compiled, and with `torch.set_float32_matmul_precision("medium")`; the kernel on one
thread and on torch's threads. All but the compiled one through the public call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.harness import Maker, Setup, copying, on_one_thread, with_matmul_precision
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.conditioning import conditioning as reference

BRANCHES, BATCH, FEATURES, CLASSES, TIMESTEPS = 3, 32, 6144, 5, 1000

Call = Callable[[], object]
Conditioning = Callable[..., Tensor]


def setups() -> Iterator[Setup]:
    """A training step's forward and backward pass, and forward passes in evaluation mode."""
    by_reference = partial(conditioning, backend="reference")
    compiled = torch.compile(reference, dynamic=False)
    by_kernel = partial(conditioning, backend="cpu")
    copied = 2**21
    for title, make, moved in (
        ("training, 3 x 32 rows, forward and backward", partial(_training, True), _bytes(3, True, True)),
        ("the same without gamma's gradient", partial(_training, False), _bytes(3, True, False)),
        ("eval, 32 rows, forward", partial(_eval, BATCH), _bytes(1, False, False)),
        ("eval, 1 row, forward", partial(_eval, 1), 0),
    ):  # fmt: skip
        peers: dict[str, Maker] = {
            "reference": partial(make, by_reference),
            "reference, compiled": partial(make, compiled),
            "cpu": partial(make, by_kernel),
            "reference, precision medium": lambda make=make: with_matmul_precision(
                "medium", make(by_reference)
            ),
            "cpu, 1 thread": lambda make=make: on_one_thread(make(by_kernel)),
            "copy": partial(copying, copied),
        }
        yield Setup(
            f"conditioning, {title} (F = {FEATURES})",
            peers,
            "reference",
            bytes_moved=moved,
            copy=("copy", 8 * copied),
        )


def _bytes(branches: int, backward: bool, gamma: bool) -> int:
    """Bytes to be read and written at least: each array once."""
    rows, labels = BATCH, 2 * CLASSES + 1
    forward = 2 * rows + labels + branches * rows
    # x, the gradient of h1, that of x, gamma's rows, W and its gradient.
    back = 3 * rows + branches * rows + 2 * labels if backward else 0
    dense = TIMESTEPS + 1 + rows if gamma else 0
    return 4 * FEATURES * (forward + back + dense)


def _layer() -> ConditionalLayer:
    return ConditionalLayer(
        torch.randn(FEATURES, 2 * CLASSES) / 3,
        torch.randn(FEATURES) / 3,
        torch.rand(TIMESTEPS + 1, FEATURES),
        torch.rand(FEATURES) + 0.5,
        torch.randn(FEATURES),
        torch.zeros(FEATURES),
        torch.ones(FEATURES),
    )


@cache
def _training_inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, FEATURES).requires_grad_()
    y, guidance = torch.randn(BRANCHES, BATCH, CLASSES), torch.rand(BRANCHES, BATCH, CLASSES)
    grad = torch.randn(BRANCHES, BATCH, FEATURES)
    return x, y, guidance, torch.randint(0, TIMESTEPS, (BATCH,)), grad


@cache
def _trained_layer(gamma: bool) -> tuple[ConditionalLayer, list[Tensor]]:
    layer = _layer()
    learned = [part for i, part in enumerate(layer[:5]) if gamma or i != 2]
    return layer, [part.requires_grad_() for part in learned]


def _training(gamma: bool, call: Conditioning) -> Call:
    x, y, guidance, t, grad = _training_inputs()
    layer, learned = _trained_layer(gamma)
    return lambda: torch.autograd.grad(
        call(x, y, guidance, layer, t, training=True), (x, *learned), grad
    )


@cache
def _eval_inputs(rows: int) -> tuple[Tensor, Tensor, Tensor, ConditionalLayer, Tensor]:
    torch.manual_seed(0)
    x, t = torch.randn(rows, FEATURES), torch.randint(0, TIMESTEPS, (rows,))
    return x, torch.randn(rows, CLASSES), torch.rand(rows, CLASSES), _layer(), t


def _eval(rows: int, call: Conditioning) -> Call:
    inputs = _eval_inputs(rows)
    torch.testing.assert_close(call(*inputs), reference(*inputs), rtol=1e-4, atol=1e-5)
    return torch.no_grad()(partial(call, *inputs))
