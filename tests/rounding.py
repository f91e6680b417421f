"""How far rounding may move a result: the condition of what a test compares, measured on its definition in float64.

An error is large or small only relative to the condition of the quantity. A gradient that is what remains of large
terms has few correct digits in any arithmetic of 24 bits; how many of them another library happens to have depends on
the processor. The bound therefore comes from the definition alone: it is evaluated in float64 several times, the output
of every operation multiplied elementwise by 1 + d with d = +-unit roundoff of the tested dtype, drawn from fixed seeds.
The largest deviation from the undisturbed evaluation is what one rounding per operation does to the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# By dtype: how many times that deviation an error may be, and how many roundings of the largest element beside it.
# Kernels for float32 add in float32, in another order than the definition, and their exponential may err by 1.5 units
# in the last place. Kernels for half types compute in float32 and round what they store.
ALLOWED = {torch.float32: (4.0, 8.0), torch.bfloat16: (1.0, 2.0), torch.float16: (1.0, 2.0)}


def assert_within_rounding(
    found: Sequence[Tensor],
    definition: Callable[[], Iterable[Tensor]],
    names: Sequence[str],
    *,
    runs: int = 8,
    factor: float | None = None,
) -> None:
    """The errors of `found` are explained by rounding.

    Args:
        found: tensors of one dtype.
        definition: computes in float64 what they should be, from copies of its arguments that it makes itself, so that
            these are rounded too.
        names: of the tensors, for the message.
        runs: disturbed evaluations. Few suffice for a tensor of many elements of one kind.
        factor: instead of that in `ALLOWED`; 0 allows for roundings of the largest element alone.
    """
    dtype = found[0].dtype
    usual, floor = ALLOWED[dtype]
    factor = usual if factor is None else factor
    exact = [value.detach() for value in definition()]
    for name, a, c, deviation in zip(
        names, found, exact, deviations(definition, exact, dtype, runs), strict=True
    ):
        assert a.dtype == dtype and a.shape == c.shape, name
        if not a.numel():
            continue
        error, largest = float((a.double() - c).abs().max()), float(c.abs().max())
        assert error <= factor * deviation + floor * unit_roundoff(dtype) * largest, (
            f"{name}: error {error:.1e} of {largest:.1e}, roundings make {deviation:.1e}"
        )


def deviations(
    definition: Callable[[], Iterable[Tensor]],
    exact: Sequence[Tensor],
    dtype: torch.dtype,
    runs: int,
) -> list[float]:
    """The largest deviation of an element of each tensor, in its own unit, that roundings of `dtype` cause."""
    largest = [0.0] * len(exact)
    for seed in range(runs):
        with _Rounding(unit_roundoff(dtype), seed):
            disturbed = list(definition())
        for i, (value, wanted) in enumerate(zip(disturbed, exact, strict=True)):
            assert value.dtype == wanted.dtype == torch.float64
            if value.numel():
                largest[i] = max(largest[i], float((value.detach() - wanted).abs().max()))
    return largest


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next larger number."""
    return torch.finfo(dtype).eps / 2


class _Rounding(TorchDispatchMode):
    """Multiplies the outputs of every operation by 1 +- roundoff; views and what is written in place stay."""

    def __init__(self, roundoff: float, seed: int) -> None:
        super().__init__()
        self._roundoff = roundoff
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(result.alias_info is not None for result in func._schema.returns):
            return found
        return tree_map(self._disturbed, found)

    def _disturbed(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        signs = torch.randint(0, 2, value.shape, generator=self._generator) * 2 - 1
        return value * (1.0 + self._roundoff * signs)
