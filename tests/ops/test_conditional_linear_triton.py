"""`conditional_linear` in Triton: numerical results in every precision, forward and backward, and its errors."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from conditioning_cases import sliced
from cuda_backends import NO_TRITON, TRITON_DEVICE
from rounding import assert_within_rounding
from torch import Tensor

from diffmic_fast.ops._backend import BackendError
from diffmic_fast.ops.conditional_linear import ConditionalLayer, conditional_linear
from diffmic_fast.reference import conditional_linear as reference

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from diffmic_fast.triton import conditional_linear as whole
from diffmic_fast.triton import conditional_norm as norm
from diffmic_fast.triton.scalar import INTERPRETED

# From the branch of a `tl.where` that is not taken: the interpreter computes both.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Branches (0: no such dimension), rows, width, features: below, at and above the sizes of tiles.
SIZES = [
    (0, 1, 1, 1),
    (3, 5, 33, 37),
    (0, 17, 16, 64),
    (2, 64, 20, 65),
    (1, 65, 70, 129),
    (3, 130, 9, 7),
]
NAMES = (
    "out",
    "running_mean",
    "running_var",
    "h",
    "weight",
    "bias",
    "gamma",
    "norm_weight",
    "norm_bias",
)


class Case:
    """Arguments in float64 whose values are exact in `dtype`."""

    def __init__(self, streams: int, batch: int, width: int, features: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(1000 * features + 10 * batch + streams)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).double()

        self.dtype = dtype
        rows = (streams, batch) if streams else (batch,)
        self.h = draw(*rows, width)
        self.parameters = [
            draw(features, width) / 4,
            draw(features) / 2,
            draw(7, features),
            draw(features),
            draw(features),
        ]
        self.running = [draw(features), (draw(features).square() + 0.5).to(dtype).double()]
        self.timesteps = torch.randint(0, 7, (batch,), generator=generator)
        self.grad = draw(*rows, features)

    def layer(self, dtype: torch.dtype, device: torch.device) -> ConditionalLayer:
        parts = (v.to(device, dtype, copy=True) for v in (*self.parameters, *self.running))
        return ConditionalLayer(*parts)

    def run(
        self, dtype: torch.dtype, backend: str, *, training: bool, timesteps: Tensor | None = None
    ) -> list[Tensor]:
        """The output, the running statistics after the call, and all gradients of sum(out * grad)."""
        device = TRITON_DEVICE if backend == "triton" else torch.device("cpu")
        h = self.h.to(device, dtype, copy=True).requires_grad_()
        layer = self.layer(dtype, device)
        leaves = [h, *(part.requires_grad_() for part in layer[:5])]
        t = (self.timesteps if timesteps is None else timesteps).to(device)
        options: dict[str, Any] = {"training": training, "momentum": 0.3, "eps": 1e-4}
        out = conditional_linear(h, layer, t, backend=backend, **options)
        gradients = torch.autograd.grad(out, leaves, self.grad.to(device, dtype, copy=True))
        found = [out.detach(), layer.running_mean, layer.running_var, *gradients]
        return [value.cpu() for value in found]

    def definition(self, *, training: bool, timesteps: Tensor | None = None) -> list[Tensor]:
        return self.run(torch.float64, "reference", training=training, timesteps=timesteps)


# ---- the whole layer in evaluation mode -------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shared", [False, True])
def test_evaluation_mode_matches_the_reference(
    size: tuple[int, ...], dtype: torch.dtype, shared: bool
) -> None:
    case = Case(*size, dtype)
    t = torch.tensor([4]) if shared else case.timesteps
    found = conditional_linear(
        case.h.to(TRITON_DEVICE, dtype),
        case.layer(dtype, TRITON_DEVICE),
        t.to(TRITON_DEVICE),
        backend="triton",
    )
    assert found.dtype == dtype

    def definition() -> list[Tensor]:
        h = case.h.clone()
        return [reference.conditional_linear(h, case.layer(torch.float64, h.device), t)]

    assert_within_rounding([found.cpu()], definition, NAMES[:1])


@pytest.mark.parametrize(
    ("kind", "number"),
    [(kind, i) for kind, some in whole.CONFIGS.items() for i in range(len(some))],
)
def test_every_configuration(kind: str, number: int) -> None:
    # Two or more tiles along each dimension, with a partial one.
    config = whole.CONFIGS[kind][number]
    m, n, k = (config.kwargs[f"BLOCK_{axis}"] for axis in "MNK")
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    case = Case(0, m + 3, 2 * k + 5, n + 9, dtype)
    layer = case.layer(dtype, TRITON_DEVICE)
    found = whole.conditional_linear(
        case.h.to(TRITON_DEVICE, dtype), layer, case.timesteps.to(TRITON_DEVICE),
        eps=1e-5, tf32=kind == "tf32", config=config,
    )  # fmt: skip
    exact = reference.conditional_linear(
        case.h, case.layer(torch.float64, case.h.device), case.timesteps
    )
    # The interpreter multiplies TF32 in float32.
    bound = 4e-3 if kind == "half" else 1e-6 if kind == "ieee" or INTERPRETED else 2e-3
    error = (found.cpu().double() - exact).abs().max() / exact.abs().max()
    assert float(error) < bound


def tile(kind: str, rows: int, features: int) -> tuple[int, int]:
    sizes = whole.configuration(kind, rows, features).kwargs
    return sizes["BLOCK_M"], sizes["BLOCK_N"]


def test_tiles_of_the_published_size() -> None:
    """A tile has no more rows than the product, and there are enough of it for a GPU of some 128 multiprocessors."""
    found = [tile("half", rows, 6144) for rows in (1, 16, 64, 256, 512, 1024, 4096)]
    expected = [(16, 64), (16, 64), (32, 64), (64, 128), (128, 128), (128, 256), (128, 256)]
    assert found == expected
    assert [tile("tf32", rows, 6144) for rows in (1, 128, 512)] == [(16, 64), (64, 64), (128, 128)]
    assert [tile("ieee", rows, 6144) for rows in (1, 64, 512)] == [(16, 64), (32, 64), (128, 64)]
    assert tile("half", 4096, 64) == (32, 64)  # one column of tiles
    assert tile("half", 5, 7) == (16, 64)


@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
def test_tiles_do_not_shrink_with_more_rows(kind: str) -> None:
    for features in (64, 512, 6144):
        rows = [tile(kind, count, features) for count in range(1, 3000, 7)]
        assert rows == sorted(rows)


def test_the_tile_of_a_size_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile determines the order of sums, and so the bits: it is the same in every run and for every input."""
    launched: list[dict[str, int]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *arguments, **sizes: launched.append({"grid": grid[0], **sizes})

    monkeypatch.setattr(whole, "layer_kernel", Kernel())
    for rows in (3, 40, 300):
        for seed in range(2):
            case = Case(0, rows, 5, 200, torch.float32)
            h = case.h.float().to(TRITON_DEVICE) + seed
            t = case.timesteps.to(TRITON_DEVICE)
            conditional_linear(h, case.layer(torch.float32, TRITON_DEVICE), t, backend="triton")
    assert launched[::2] == launched[1::2] and len(launched) == 6
    for count, sizes in zip((3, 40, 300), launched[::2], strict=True):
        config = whole.configuration("ieee", count, 200)
        m, n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
        assert sizes == {
            "grid": -(-count // m) * -(-200 // n), **config.kwargs, "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }  # fmt: skip


def test_strides_and_surrounding_memory() -> None:
    case = Case(2, 19, 21, 35, torch.float32)
    values = [case.h, *case.layer(torch.float64, case.h.device)]
    pairs = [sliced(v.to(TRITON_DEVICE, torch.float32), rows_only=False) for v in values]
    before = [buffer.clone() for _, buffer in pairs]
    views = [view for view, _ in pairs]
    t = case.timesteps.to(TRITON_DEVICE).repeat_interleave(2)[::2]
    plain = [view.contiguous() for view in views]
    found = conditional_linear(views[0], ConditionalLayer(*views[1:]), t, backend="triton")
    expected = conditional_linear(
        plain[0], ConditionalLayer(*plain[1:]), t.contiguous(), backend="triton"
    )
    assert t.stride(0) == 2 and torch.equal(found, expected)
    transposed = conditional_linear(
        plain[0].mT.contiguous().mT,
        ConditionalLayer(plain[1].T.contiguous().T, *plain[2:]),
        t,
        backend="triton",
    )
    assert torch.equal(found, transposed)
    for (_, buffer), kept in zip(pairs, before, strict=True):
        assert torch.equal(buffer.nan_to_num(7.0), kept.nan_to_num(7.0))


@pytest.mark.parametrize("rows", [1, 15, 16, 40])
def test_no_writes_beyond_the_rows(rows: int) -> None:
    case = Case(0, rows, 20, 70, torch.float32)
    buffer = torch.full((rows + 70, 70), torch.nan, device=TRITON_DEVICE)
    for config in whole.CONFIGS["ieee"]:
        whole.launch(
            case.h.float().to(TRITON_DEVICE), case.layer(torch.float32, TRITON_DEVICE),
            case.timesteps.to(TRITON_DEVICE), buffer[:rows], 1e-5, config=config,
        )  # fmt: skip
        assert not buffer[:rows].isnan().any() and buffer[rows:].isnan().all()


def test_relative_accuracy_of_softplus_of_large_negative_numbers() -> None:
    features = 80
    case = Case(0, 3, 4, features, torch.float32)
    case.parameters[4] = -torch.arange(features).double()
    layer = case.layer(torch.float32, TRITON_DEVICE)
    h, t = case.h.float().to(TRITON_DEVICE), case.timesteps.to(TRITON_DEVICE)
    found = conditional_linear(h, layer, t, backend="triton")
    exact = reference.conditional_linear(
        case.h, case.layer(torch.float64, case.h.device), case.timesteps
    )
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-4, atol=0)


# ---- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("training", [False, True])
def test_gradients_and_statistics(
    size: tuple[int, ...], dtype: torch.dtype, training: bool
) -> None:
    if training and size[1] < 2:
        pytest.skip("one row has no batch statistics")
    case = Case(*size, dtype)
    found = case.run(dtype, "triton", training=training)
    assert found[0].dtype == dtype
    assert_within_rounding(found, partial(case.definition, training=training), NAMES)


@pytest.mark.parametrize("rows", [40, 130])
@pytest.mark.parametrize(
    "timesteps", ["shared", "all the same", "all but one the same", "none the same"]
)
def test_gradient_of_gamma_sums_rows_of_equal_timestep(rows: int, timesteps: str) -> None:
    case = Case(3, rows, 4, 9, torch.float32)
    t = torch.full((1 if timesteps == "shared" else rows,), 3)
    if timesteps == "all but one the same":
        t[rows // 2] = 5
    if timesteps == "none the same":
        case.parameters[2] = torch.randn(rows, 9).double()
        t = torch.randperm(rows)
    exact = case.definition(training=True, timesteps=t)
    found = case.run(torch.float32, "triton", training=True, timesteps=t)
    # If all rows have one timestep, its gradient is a difference of large sums that nearly cancel.
    torch.testing.assert_close(found[6].double(), exact[6], rtol=1e-5, atol=1e-4)
    untouched = torch.ones(len(found[6]), dtype=torch.bool).index_fill(0, t, False)
    assert not found[6][untouched].any()


@pytest.mark.parametrize("limit", [16, 32, 64])
def test_tiles_of_any_number_of_rows(limit: int) -> None:
    streams, rows, features = 2, 50, 33
    case = Case(streams, rows, features, features, torch.float32)
    layer = case.layer(torch.float32, TRITON_DEVICE)
    product = case.h.float().to(TRITON_DEVICE)
    t, grad = case.timesteps.to(TRITON_DEVICE), case.grad.float().to(TRITON_DEVICE)

    def run(limit: int) -> list[Tensor]:
        def new(*shape: int) -> Tensor:
            return torch.full(shape, torch.nan, device=TRITON_DEVICE)

        h, statistics, mean, variance = (
            new(streams, rows, features), new(2, streams, features), new(features), new(features),
        )  # fmt: skip
        norm.forward(
            product,
            t,
            *layer[1:],
            h,
            statistics,
            mean,
            variance,
            momentum=0.1,
            eps=1e-5,
            limit=limit,
        )
        gradients = [
            new(streams, rows, features), new(features), torch.zeros_like(layer.gamma), new(features),
            new(features),
        ]  # fmt: skip
        norm.backward(
            grad,
            product,
            t,
            *layer[1:5],
            statistics,
            gradients,
            training=True,
            eps=1e-5,
            limit=limit,
        )
        return [h, statistics, mean, variance, *gradients]

    for found, expected in zip(run(limit), run(64), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for found, again in zip(run(limit), run(limit), strict=True):
        assert torch.equal(found, again)


def test_statistics_far_from_zero() -> None:
    """A mean of a thousand standard deviations: E[z^2] - E[z]^2 would lose the variance."""
    case = Case(1, 70, 4, 5, torch.float32)
    case.parameters[0] = (case.parameters[0] / 100).float().double()
    case.parameters[1] = case.parameters[1] + 100
    case.parameters[2] = torch.ones(7, 5).double()
    exact = case.definition(training=True)
    found = case.run(torch.float32, "triton", training=True)
    torch.testing.assert_close(found[2].double(), exact[2], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-2, atol=1e-2)


def test_second_derivatives() -> None:
    case = Case(2, 6, 3, 4, torch.float32)

    def run(backend: str) -> list[Tensor]:
        device = TRITON_DEVICE if backend == "triton" else torch.device("cpu")
        layer = case.layer(torch.float32, device)
        leaves = [case.h.float().to(device), *layer[:5]]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        t = case.timesteps.to(device)
        out = conditional_linear(leaves[0], layer, t, training=True, backend=backend)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [value.detach().cpu() for value in (*first, *second)]

    for found, expected in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- operator registration, torch.compile and autocast ----------------------------------------


@pytest.mark.parametrize("streams", [0, 2])
@pytest.mark.parametrize("training", [False, True])
def test_opcheck(streams: int, training: bool) -> None:
    case = Case(streams, 5, 3, 4, torch.float32)
    layer = case.layer(torch.float32, TRITON_DEVICE)
    t = case.timesteps.to(TRITON_DEVICE)
    product = case.grad.float().to(TRITON_DEVICE).requires_grad_()
    parameters = [*(part.requires_grad_() for part in layer[1:5]), *layer[5:]]
    torch.library.opcheck(
        torch.ops.diffmic_fast.conditional_norm.default,
        (product, t, *parameters, training, 0.1, 1e-5),
    )
    torch.library.opcheck(
        torch.ops.diffmic_fast.conditional_linear.default,
        (case.h.float().to(TRITON_DEVICE), t, *(p.detach() for p in layer), 1e-5, False),
    )


@pytest.mark.parametrize("training", [False, True])
def test_compiled(training: bool) -> None:
    case = Case(2, 6, 3, 4, torch.float32)

    def run(compiled: bool) -> list[Tensor]:
        torch.compiler.reset()
        layer = case.layer(torch.float32, TRITON_DEVICE)
        leaves = [case.h.float().to(TRITON_DEVICE).requires_grad_(), *layer[:5]]
        function = (
            torch.compile(conditional_linear, fullgraph=True) if compiled else conditional_linear
        )
        out = function(
            leaves[0], layer, case.timesteps.to(TRITON_DEVICE), training=training, backend="triton"
        )
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves[:1]), *layer[5:]]

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(training: bool, dtype: torch.dtype) -> None:
    """The matrix product in autocast's dtype, the rest in float32, running statistics and gradients included."""
    case = Case(3, 33, 40, 20, torch.float32)
    layer = case.layer(torch.float32, TRITON_DEVICE)
    leaves = [case.h.float().to(TRITON_DEVICE), *layer[:5]]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with torch.autocast(TRITON_DEVICE.type, dtype):
        out = conditional_linear(
            leaves[0], layer, case.timesteps.to(TRITON_DEVICE), training=training, momentum=0.3, eps=1e-4,
            backend="triton",
        )  # fmt: skip
        with torch.no_grad():
            eval_again = conditional_linear(
                leaves[0], layer, case.timesteps.to(TRITON_DEVICE), eps=1e-4, backend="triton"
            )
    assert out.dtype == eval_again.dtype == dtype
    gradients = torch.autograd.grad(out, leaves, case.grad.to(TRITON_DEVICE, dtype))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    exact = case.run(torch.float64, "reference", training=training)
    found = [out.detach(), layer.running_mean, layer.running_var, *gradients]
    for name, a, b in zip(NAMES, found, exact, strict=True):
        # The rounding of the product (2^-9 or 2^-12) enters sums over rows.
        error = (a.cpu().double() - b).abs().max() / b.abs().max()
        assert float(error) < (0.03 if dtype == torch.bfloat16 else 0.004), name


def test_bfloat16_rounds_ties_to_even() -> None:
    """Sums halfway between two bfloat16 numbers, which softplus does not change so far above 20."""
    halfway = torch.tensor([64 + 0.25, 64 + 0.75, 64 + 1.25, 64.3]) * 4
    count = len(halfway)
    one, none = torch.ones(count), torch.zeros(count)
    layer = ConditionalLayer(torch.eye(count), none, one[None], one, none, none, one)
    layer = ConditionalLayer(*(part.to(TRITON_DEVICE) for part in layer))
    layer = layer._replace(weight=layer.weight.bfloat16(), bias=(halfway - 256).to(TRITON_DEVICE))
    h = torch.full((1, count), 256.0, device=TRITON_DEVICE, dtype=torch.bfloat16)
    t = torch.zeros(1, dtype=torch.int64, device=TRITON_DEVICE)
    found = whole.conditional_linear(h, layer, t, eps=0.0, tf32=False).cpu()
    # h is 256 in every column; adding the float32 bias gives the sums.
    assert torch.equal(found[0], halfway.bfloat16())
    assert not torch.equal(halfway.bfloat16().float(), halfway)


def test_nan_propagates() -> None:
    case = Case(0, 20, 6, 9, torch.float32)
    case.h[3, 2] = torch.nan
    layer = case.layer(torch.float32, TRITON_DEVICE)
    h, t = case.h.float().to(TRITON_DEVICE), case.timesteps.to(TRITON_DEVICE)
    out = conditional_linear(h, layer, t, backend="triton")
    assert out[3].isnan().all() and not out[torch.arange(20) != 3].isnan().any()
    found = case.run(torch.float32, "triton", training=True)
    assert all(value.isnan().any() for value in found)


def test_empty() -> None:
    case = Case(0, 4, 3, 5, torch.float32)
    layer = case.layer(torch.float32, TRITON_DEVICE)
    none = torch.empty(0, dtype=torch.int64, device=TRITON_DEVICE)
    out = conditional_linear(case.h.float()[:0].to(TRITON_DEVICE), layer, none, backend="triton")
    assert out.shape == (0, 5)
    h = case.h.float()[:0].to(TRITON_DEVICE).requires_grad_()
    parameters = [part.requires_grad_() for part in layer[:5]]
    out = conditional_linear(h, layer, none, backend="triton")
    for gradient in torch.autograd.grad(out.sum(), parameters):
        assert not gradient.any()


# ---- unsupported arguments --------------------------------------------------------------------


def test_float64_is_dispatched_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(0, 4, 3, 5, torch.float32)
    h, layer = case.h.to(TRITON_DEVICE), case.layer(torch.float64, TRITON_DEVICE)
    t = case.timesteps.to(TRITON_DEVICE)
    assert conditional_linear(h, layer, t).dtype == torch.float64
    with pytest.raises(
        BackendError, match=r"triton cannot serve.*float16 tensors, got torch.float64"
    ):
        conditional_linear(h, layer, t, backend="triton")
    with pytest.raises(ValueError, match=r"h must have at least one branch, got \(0, 4, 3\)"):
        conditional_linear(h[None][:0], layer, t)


@pytest.mark.skipif(TRITON_DEVICE.type != "cpu", reason="there is a GPU")
def test_cpu_tensors_need_the_interpreter() -> None:
    program = """
import torch
from diffmic_fast.ops._backend import decide
print(decide("conditional_linear", "auto", torch.device("cpu")))
decide("conditional_linear", "triton", torch.device("cpu"))
"""
    unwanted = ("TRITON_INTERPRET", "DIFFMIC_BACKEND")
    environment = {k: v for k, v in os.environ.items() if k not in unwanted}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert result.stdout == "('reference', '')\n"
    assert (
        "cannot serve: tensors must be on a GPU, or on the CPU in Triton's interpreter"
        in result.stderr
    )
