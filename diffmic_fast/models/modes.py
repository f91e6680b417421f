"""Evaluation mode and the handling of BatchNorm's running statistics, for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from diffmic_fast.models._torch_internals import AnyBatchNorm, add_each, assert_async


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """`module.eval()` in this block; afterwards every submodule is in its own mode again."""
    learning = [part for part in module.modules() if part.training]
    if learning:  # else nothing is written, which a traced graph would have to do too
        module.eval()
    try:
        yield
    finally:
        for part in learning:
            part.training = True


@contextmanager
def repeated_statistics(module: nn.Module, times: int) -> Iterator[None]:
    """One pass of a module in training updates BatchNorm's running statistics as `times` passes over the batch would.

    A pass updates a running statistic r with the batch's b to r + m (b - r); k passes over the same batch give
    r + (1 - (1 - m)^k) (b - r), which is one pass with another momentum. The result equals that of k passes up to
    rounding, `num_batches_tracked` included. Supports `torch.compile(fullgraph=True)`.

    Args:
        module: Runs once in the block.
        times: k >= 0; 0 leaves the running statistics as they are.

    Raises:
        RuntimeError: A BatchNorm layer ran more than once in the pass, whose updates do not compose so (k > 0).
    """
    norms = [
        part
        for part in module.modules()
        if isinstance(part, AnyBatchNorm) and part.training and part.num_batches_tracked is not None
    ]
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    momenta = [norm.momentum for norm in norms]
    before = torch.stack(counts) if counts else None
    try:
        for norm, count in zip(norms, counts, strict=True):
            if times == 0:
                norm.momentum = 0.0
            elif norm.momentum is None:
                # A cumulative average: b has the weight 1 / (n + 1) after n batches, k times b the weight k / (n + k).
                norm.momentum = times / (int(count) + times)
            else:
                norm.momentum = 1.0 - (1.0 - norm.momentum) ** times
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        if (
            times == 0 and before is not None
        ):  # activation checkpointing ends a pass by an exception
            for count, value in zip(counts, before, strict=True):
                count.copy_(value)
    if times == 0 or before is None:
        return
    passes = torch.stack(counts) - before
    assert_async(
        (passes <= 1).all(),
        "the image encoder runs a BatchNorm layer more than once in a pass, so one pass cannot stand for "
        f"{times}; call the denoiser once per branch instead",
    )
    add_each(counts, (passes * (times - 1)).unbind())
