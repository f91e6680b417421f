"""Every operation with drawn shapes, memory layouts, dtypes and backends: what the definition gives, or a clear error.

DIFFMIC_EXAMPLES multiplies the number of examples, which are then other ones in each run (default 1: always the same).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cuda_backends import CUDA_BACKENDS, TRITON, device_of
from denoise_cases import INSTRUCTIONS
from drawn_arguments import FLOATS, OPERATIONS, Drawn, Tensors, draw_chain, place
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import deviations, unit_roundoff
from torch import Tensor

from diffmic_fast.ops._backend import IMPLEMENTATIONS, BackendError

pytestmark = [
    pytest.mark.usefixtures("auto_backend"),
    # From the branch of a `tl.where` that is not taken: Triton's interpreter computes both.
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered"),
]

SCALE = int(os.environ.get("DIFFMIC_EXAMPLES", "1"))
EXAMPLES = {"reference": 8, "auto": 8, "cpu": 25, "cuda": 25, "cuda-emulated": 6, "triton": 4}
KERNELS = {
    name: IMPLEMENTATIONS[
        {"noised_conditioning": "conditioning", "kernel_matrix": "mmd", "noise_losses": "mmd",
         "choose_windows": "rois", "cut_crops": "rois"}.get(name, name)
    ]
    for name in OPERATIONS
}  # fmt: skip
BACKENDS = ["reference", "auto", "cpu", *CUDA_BACKENDS, TRITON]
CASES = [
    pytest.param(operation, *parameter.values, marks=parameter.marks)
    for operation, having in KERNELS.items()
    for parameter in (b if not isinstance(b, str) else pytest.param(b) for b in BACKENDS)
    if parameter.values[0] in (*having, "auto")
]


def examples(backend: str, share: float = 1.0) -> settings:
    return settings(
        max_examples=max(int(EXAMPLES[backend] * SCALE * share), 2),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=SCALE == 1,
    )


def cast(
    tensors: Tensors, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """The tensors on a device, floating ones of a dtype."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in tensors.items()
    }


def copied(tensors: Tensors) -> dict[str, Tensor]:
    """The same values, contiguous, in memory of their own."""
    return {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }


def outcome(drawn: Drawn, tensors: Tensors, backend: str) -> list[Tensor]:
    """Results, arguments written in place, and gradients of a weighted sum of all results."""
    tensors = {name: t.detach() if t.is_floating_point() else t for name, t in tensors.items()}
    leaves = {name: tensors[name].requires_grad_() for name in drawn.leaves}
    results = drawn.run(tensors, backend)
    found = [result.detach() for result in results] + [tensors[name] for name in drawn.written]
    smooth = [result for result in results if result.requires_grad]
    if smooth:
        generator = torch.Generator().manual_seed(7)
        cotangents = [
            torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device, r.dtype) for r in smooth
        ]  # fmt: skip
        gradients = torch.autograd.grad(smooth, list(leaves.values()), cotangents)
        found += gradients
    return [value.cpu() for value in found]


def assert_near(
    found: Sequence[Tensor], drawn: Drawn, exact_arguments: Tensors, dtype: torch.dtype
) -> None:
    """Errors are a few times what one rounding of every operation of the definition explains."""

    def definition() -> list[Tensor]:
        return outcome(drawn, copied(exact_arguments), "reference")

    exact = definition()
    floating = [i for i, value in enumerate(exact) if value.is_floating_point()]
    # Roundings of float64 cannot be simulated in float64: those of float32, in proportion.
    simulated = torch.float32 if dtype == torch.float64 else dtype
    ratio = unit_roundoff(dtype) / unit_roundoff(simulated)
    moved = deviations(
        lambda: [definition()[i] for i in floating], [exact[i] for i in floating], simulated, runs=2
    )
    for i, deviation in zip(floating, (ratio * each for each in moved), strict=True):
        assert found[i].shape == exact[i].shape
        if not exact[i].numel():
            continue
        error = float((found[i].double() - exact[i]).abs().max())
        largest = max(float(exact[i].abs().max()), drawn.terms)
        assert error <= 32 * deviation + 16 * unit_roundoff(dtype) * largest, (
            i,
            error,
            deviation,
            largest,
        )
    for i, value in enumerate(exact):
        if i not in floating:
            assert torch.equal(found[i], value), i


def _bytes(tensor: Tensor) -> Tensor:
    values = tensor.cpu().resolve_neg().clone(memory_format=torch.contiguous_format)
    return values.flatten().view(torch.uint8)


def raised_by(drawn: Drawn, tensors: Tensors, backend: str) -> Exception | None:
    try:
        outcome(drawn, tensors, backend)
    except (ValueError, TypeError, BackendError) as error:
        assert str(error).startswith(drawn.operation.split(".")[0]), error
        return error
    return None


@pytest.mark.parametrize(("operation", "backend"), CASES)
def test_layouts_and_dtypes(operation: str, backend: str) -> None:
    """The definition's values, the bits of contiguous arguments, and nothing else in memory read or written."""
    device = device_of(backend)

    @examples(backend)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        drawn = OPERATIONS[operation](data)
        dtype = data.draw(st.sampled_from([torch.float32, torch.float32, *FLOATS]), label="dtype")
        placed = {
            name: place(data, value, writable=name in drawn.written)
            for name, value in cast(drawn.tensors, dtype, device).items()
        }
        views = {name: p.view for name, p in placed.items()}
        before = {name: p.buffer.clone() for name, p in placed.items()}
        contiguous = copied(views)
        exact = cast(contiguous, torch.float64)
        refused = raised_by(drawn, copied(exact), "reference")
        try:
            found = outcome(drawn, views, backend)
        except BackendError as error:
            assert dtype != torch.float32, error
            return
        except (ValueError, TypeError):
            assert refused is not None
            return
        if refused is not None:  # a kernel on a GPU cannot report values, only mark its results
            assert device.type == "cuda" or backend == "cuda-emulated", refused
            assert all(value.isnan().all() for value in found)
            return
        for name, p in placed.items():
            if name not in drawn.written:
                assert torch.equal(_bytes(p.buffer), _bytes(before[name])), name
        if backend not in ("reference", "auto", "triton") and operation != "conditional_linear":
            again = outcome(drawn, contiguous, backend)
            for a, b in zip(found, again, strict=True):
                assert torch.equal(_bytes(a), _bytes(b))
        if drawn.operation.startswith("rois"):
            wanted = outcome(drawn, cast(contiguous, dtype), "reference")
            results = len(wanted) - len(drawn.leaves)
            for a, b in zip(found[:results], wanted[:results], strict=True):
                assert torch.equal(a, b)
        if "saliency" not in drawn.tensors:  # the choice between nearly equal means is discrete
            assert_near(found, drawn, exact, dtype)

    run()


# Changes of one argument that no operation takes.
WRONG: dict[str, Any] = {
    "a dimension more": lambda t: t[None],
    "a dimension less": lambda t: t[0] if len(t) else t.flatten().sum(),
    "an integer dtype": lambda t: t.to(torch.int32),
    "a complex dtype": lambda t: t.to(torch.complex64),
    "booleans": lambda t: t.bool(),
    "a list": lambda t: t.tolist(),
    "an array": lambda t: t.numpy(),
    "a name": lambda t: "x",
    "the meta device": lambda t: t.to("meta"),
}


@pytest.mark.parametrize(("operation", "backend"), [c for c in CASES if "cuda" not in c.values])
def test_a_wrong_argument_is_named(operation: str, backend: str) -> None:
    """ValueError, TypeError or BackendError that begins with the operation, and no other."""

    @examples(backend)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        drawn = OPERATIONS[operation](data)
        tensors: dict[str, Any] = cast(drawn.tensors, torch.float32)
        name = data.draw(st.sampled_from(sorted(tensors)), label="argument")
        # A call whose tensors are all on the meta device has no values, and no fault.
        changes = sorted(WRONG) if len(tensors) > 1 else sorted(WRONG.keys() - {"the meta device"})
        change = data.draw(st.sampled_from(changes), label="change")
        tensors[name] = WRONG[change](tensors[name])
        with pytest.raises(
            (ValueError, TypeError, BackendError), match=f"^{drawn.operation.split('.')[0]}"
        ):
            drawn.run(tensors, backend)

    run()


@pytest.mark.parametrize(("operation", "backend"), [c for c in CASES if "cuda" not in c.values])
def test_another_size_is_refused_or_right(operation: str, backend: str) -> None:
    """One argument has an entry more or less along one dimension: every backend judges it as the definition does."""

    @examples(backend)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        drawn = OPERATIONS[operation](data)
        tensors = cast(drawn.tensors, torch.float32, device_of(backend))
        name = data.draw(st.sampled_from(sorted(tensors)), label="argument")
        value = tensors[name]
        dimension = data.draw(st.integers(0, value.ndim - 1), label="dimension")
        if data.draw(st.booleans()):
            tensors[name] = torch.cat(
                [value, value.narrow(dimension, 0, min(1, value.shape[dimension]))], dimension
            )
        else:
            tensors[name] = value.narrow(dimension, 0, max(value.shape[dimension] - 1, 0))
        exact = cast(tensors, torch.float64)
        refused = raised_by(drawn, copied(exact), "reference")
        if refused is None:
            assert_near(outcome(drawn, tensors, backend), drawn, exact, torch.float32)
        elif backend in ("reference", "auto", "cpu"):
            assert type(raised_by(drawn, tensors, backend)) is type(refused)
        else:
            assert raised_by(drawn, tensors, backend) is not None

    run()


@pytest.mark.parametrize("instructions", [*INSTRUCTIONS, "amx_emulated"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_chains_have_the_bits_of_contiguous_arguments(precision: str, instructions: str) -> None:
    @examples("cpu", 0.6)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        drawn = draw_chain(data, {"precision": precision, "instructions": instructions})
        placed = {
            name: place(data, value) for name, value in cast(drawn.tensors, torch.float32).items()
        }
        before = {name: p.buffer.clone() for name, p in placed.items()}
        views = {name: p.view for name, p in placed.items()}
        (found,), (again,) = outcome(drawn, views, "cpu"), outcome(drawn, copied(views), "cpu")
        assert found.isfinite().all()
        assert torch.equal(_bytes(found), _bytes(again))
        for name, p in placed.items():
            assert torch.equal(_bytes(p.buffer), _bytes(before[name])), name

    if precision == "fp32" and instructions == "amx_emulated":
        pytest.skip("AMX has no float32")
    run()
