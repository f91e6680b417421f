"""`conditioning` of the published size, F = 6144, C = 5, T = 1000: a training step's part, and eval mode's.

Training is forward and backward of 3 streams of 32 rows, to x and all parameters as in a model. The
gradient of gamma is dense, 25 MB of zeros but for 32 rows, whoever computes it, so there is a table
without it too. Eval mode is forward alone, for 32 rows and for one.

Peers: the reference, as written, compiled, and with
`torch.set_float32_matmul_precision("medium")`; the kernel on one thread and on torch's threads. All
but the compiled one through the public call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.harness import Maker, Setup, on_one_thread, with_matmul_precision
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.reference.conditional_linear import ConditionalLayer
from diffmic_fast.reference.conditioning import conditioning as reference

STREAMS, BATCH, FEATURES, CLASSES, TIMESTEPS = 3, 32, 6144, 5, 1000

Call = Callable[[], object]


def setups() -> Iterator[Setup]:
    """A training step's forward and backward pass, and forward passes in eval mode."""
    peers: dict[str, Callable[..., Tensor]] = {
        "reference": partial(conditioning, backend="reference"),
        "reference, compiled": torch.compile(reference, dynamic=False),
        "cpu": partial(conditioning, backend="cpu"),
    }
    copied = 2**21
    for title, make, moved in (
        (
            "training, 3 x 32 rows, forward and backward",
            partial(_training, True),
            _bytes(3, True, True),
        ),
        ("the same without gamma's gradient", partial(_training, False), _bytes(3, True, False)),
        ("eval, 32 rows, forward", partial(_eval, BATCH), _bytes(1, False, False)),
        ("eval, 1 row, forward", partial(_eval, 1), 0),
    ):
        makers: dict[str, Maker] = {
            name: partial(_make, make, call) for name, call in peers.items()
        }
        makers["reference, precision medium"] = partial(_medium, make, peers["reference"])
        makers["cpu, 1 thread"] = partial(_on_one_thread, make, peers["cpu"])
        makers["copy"] = partial(_copy, copied)
        yield Setup(
            f"conditioning, {title} (F = {FEATURES})",
            makers,
            "reference",
            bytes_moved=moved,
            copy=("copy", 8 * copied),
        )


def _make(make: Callable[[], Callable[..., Call]], call: Callable[..., Tensor]) -> Call:
    return make()(call)


def _on_one_thread(make: Callable[[], Callable[..., Call]], call: Callable[..., Tensor]) -> Call:
    return on_one_thread(make()(call))


def _medium(make: Callable[[], Callable[..., Call]], call: Callable[..., Tensor]) -> Call:
    return with_matmul_precision("medium", make()(call))


def _copy(count: int) -> Call:
    source = torch.randn(count)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _bytes(streams: int, backward: bool, gamma: bool) -> int:
    """What has to be read and written at least: each array once."""
    rows, labels = BATCH, 2 * CLASSES + 1
    forward = 2 * rows + labels + streams * rows
    # x, the gradient of h1, that of x, gamma's rows, W and its gradient.
    back = 3 * rows + streams * rows + 2 * labels if backward else 0
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
def _training(gamma: bool) -> Callable[[Callable[..., Tensor]], Call]:
    torch.manual_seed(0)
    layer = _layer()
    x = torch.randn(BATCH, FEATURES).requires_grad_()
    y, guidance = torch.randn(STREAMS, BATCH, CLASSES), torch.rand(STREAMS, BATCH, CLASSES)
    grad = torch.randn(STREAMS, BATCH, FEATURES)
    t = torch.randint(0, TIMESTEPS, (BATCH,))
    learned = [part for i, part in enumerate(layer[:5]) if gamma or i != 2]
    for part in learned:
        part.requires_grad_()

    def make(call: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(
            call(x, y, guidance, layer, t, training=True), (x, *learned), grad
        )

    return make


@cache
def _eval(rows: int) -> Callable[[Callable[..., Tensor]], Call]:
    torch.manual_seed(0)
    layer = _layer()
    x, t = torch.randn(rows, FEATURES), torch.randint(0, TIMESTEPS, (rows,))
    y, guidance = torch.randn(rows, CLASSES), torch.rand(rows, CLASSES)

    def make(call: Callable[..., Tensor]) -> Call:
        def once() -> None:
            with torch.no_grad():
                call(x, y, guidance, layer, t)

        torch.testing.assert_close(
            call(x, y, guidance, layer, t),
            reference(x, y, guidance, layer, t),
            rtol=1e-4,
            atol=1e-5,
        )
        return once

    return make
