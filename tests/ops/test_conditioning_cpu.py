"""The C++ kernels of `conditioning` against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conditioning_cases import NAMES, Case, sliced
from rounding import assert_within_rounding
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.models import ConditionalModel
from diffmic_fast.ops._conditioning import (
    Conditioning,
    ConditioningBackward,
    Gradients,
    Outputs,
    Parameters,
)
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.reference.conditional_linear import ConditionalLayer

_C = _native.extension()
ISAS = _C.conditioning_instruction_sets()

# S (0: no branch dimension), B, F, C. Chunks are 64 output channels; evaluation mode takes 32 rows at a time.
SIZES = [(0, 2, 1, 2), (1, 7, 129, 3), (2, 33, 64, 4), (3, 5, 200, 5), (3, 70, 37, 7)]


def kernel(
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    running: Sequence[Tensor],
    timesteps: Tensor,
    grad: Tensor,
    *,
    training: bool,
    make: Callable[..., Tensor] = torch.empty,
    **options: Any,
) -> list[Tensor]:
    """`Case.run` in float32 through the extension's functions, with outputs allocated by `make`."""
    x, y, guidance = inputs
    features = x.shape[1]
    streams = y.shape[0] if training and y.ndim == 3 else 1
    h, statistics = make(*y.shape[:-1], features), make(2, streams, features)
    updated = [make(features) if training else None for _ in range(2)]
    call = Conditioning(
        x,
        y,
        guidance,
        timesteps,
        ConditionalLayer(*parameters, *running),
        training,
        0.3,
        1e-4,
        "cpu",
    )
    _C.conditioning(call, Outputs(h, statistics, *updated), **options)
    gradients = Gradients(*(make(*v.shape) for v in (*inputs, *parameters)))
    gradients.gamma.zero_()
    backward = ConditioningBackward(
        grad,
        x,
        y,
        guidance,
        timesteps,
        Parameters(*parameters),
        statistics,
        training,
        1e-4,
        [True] * 8,
        "cpu",
    )
    _C.conditioning_backward(backward, gradients, **options)
    behind = [old if new is None else new for old, new in zip(running, updated, strict=True)]
    return [h, *behind, *gradients]


# ---- values and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients(sizes: tuple[int, ...], training: bool) -> None:
    case = Case(*sizes)
    for timesteps in (None, case.timesteps[:1]):
        found = case.run(torch.float32, "cpu", training=training, timesteps=timesteps)
        case.check(found, training=training, timesteps=timesteps)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str, training: bool) -> None:
    for sizes in SIZES:
        case = Case(*sizes)
        parts = (*case.floats(), case.timesteps, case.grad.float())
        case.check(kernel(*parts, training=training, isa=isa), training=training)


@pytest.mark.parametrize("isa", ISAS)
def test_batch_of_two_rows_is_accurate(isa: str) -> None:
    """n of two rows is +-1 up to eps: computed as a difference, the gradient would be off by 500 roundings."""
    case = Case(1, 2, 1, 3)
    parts = (*case.floats(), case.timesteps, case.grad.float())
    found = kernel(*parts, training=True, isa=isa)[3:]
    assert_within_rounding(
        found,
        lambda: case.run(torch.float64, "reference", training=True)[3:],
        NAMES[3:],
        factor=0,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_softplus_of_large_and_small_arguments(isa: str) -> None:
    """All other parts are the identity: h = softplus(bias), and its derivative."""
    n = torch.cat([torch.linspace(-86, 86, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4])])
    features = n.numel()
    one, zero = torch.ones(features), torch.zeros(features)
    parameters = [torch.zeros(features, 2), n, one[None], one, zero]
    labels = torch.zeros(1, 1)
    running = [zero, one - 1e-4]
    found = kernel(
        [one[None], labels, labels], parameters, running, torch.zeros(1).long(), one[None],
        training=False, isa=isa,
    )  # fmt: skip
    exact = n.double().exp().log1p().where(n < 80, n.double())
    slope = n.double().sigmoid()
    assert float(((found[0][0].double() - exact) / exact).abs().max()) < 1e-6
    assert float(((found[7].double() - slope) / slope).abs().max()) < 1e-6


def test_statistics_with_a_large_mean() -> None:
    """The mean is 300 standard deviations: a difference of sums of squares would cancel."""
    case = Case(2, 500, 17, 3)
    case.parameters[1] = (case.parameters[1] + 300).float().double()
    case.parameters[2] = torch.ones_like(case.parameters[2])
    found = case.run(torch.float32, "cpu", training=True)
    case.check(found, training=True)
    exact = case.run(torch.float64, "reference", training=True)
    assert float(((found[2].double() - exact[2]) / exact[2]).abs().max()) < 1e-5


def test_subsets_of_gradients() -> None:
    case = Case(2, 6, 70, 3)
    names = ("x", "y_t", "guidance", "weight", "bias", "gamma", "norm_weight", "norm_bias")
    for training in (False, True):
        all_of_them = case.run(torch.float32, "cpu", training=training)[3:]
        for wanted in ({"x"}, {"y_t"}, {"weight", "gamma"}, {"bias"}, {"norm_bias"}, {"gamma"}):
            leaves = [
                value.float().requires_grad_(name in wanted)
                for name, value in zip(names, (*case.inputs, *case.parameters), strict=True)
            ]
            layer = ConditionalLayer(*leaves[3:], *(v.float() for v in case.running))
            h = conditioning(
                *leaves[:3], layer, case.timesteps, training=training, eps=1e-4, backend="cpu"
            )
            h.backward(case.grad.float())
            for name, leaf, expected in zip(names, leaves, all_of_them, strict=True):
                if name in wanted:
                    assert torch.equal(leaf.grad, expected)
                else:
                    assert leaf.grad is None


# ---- reproducibility, strides, special values ---------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_result_does_not_depend_on_threads_or_runs(isa: str, training: bool) -> None:
    case = Case(3, 40, 2500, 5)
    parts = (*case.floats(), case.timesteps, case.grad.float())
    expected = kernel(*parts, training=training, isa=isa, threads=1)
    for threads in (2, 3, 7, 2):
        found = kernel(*parts, training=training, isa=isa, threads=threads)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("isa", ISAS)
def test_rows_are_batch_invariant_in_evaluation_mode(isa: str) -> None:
    case = Case(2, 67, 130, 3)
    (x, y, guidance), parameters, running = case.floats()
    grad = case.grad.float()

    def run(rows: slice | list[int]) -> list[Tensor]:
        inputs = [x[rows], y[:, rows], guidance[:, rows]]
        t = case.timesteps[rows]
        return kernel(inputs, parameters, running, t, grad[:, rows], training=False, isa=isa)

    expected = run(slice(None))
    for rows in ([66], [3, 66, 0], slice(31, 60)):
        found = run(rows)
        assert torch.equal(found[0], expected[0][:, rows])
        assert torch.equal(found[3], expected[3][rows])
        assert torch.equal(found[4], expected[4][:, rows])


@pytest.mark.parametrize("training", [False, True])
def test_strides_and_out_of_bounds_writes(training: bool) -> None:
    case = Case(3, 6, 75, 4)
    inputs, parameters, running = case.floats()
    grad = case.grad.float()
    expected = kernel(inputs, parameters, running, case.timesteps, grad, training=training)
    views = [
        sliced(value, rows_only=rows_only)
        for value, rows_only in (
            (inputs[0], True), (inputs[1], False), (inputs[2], False), (parameters[0], False),
            (parameters[2], True), (grad, True),
        )
    ]  # fmt: skip
    copies = [buffer.clone() for _, buffer in views]
    x, y, guidance, weight, gamma, grad_view = (view for view, _ in views)
    t = torch.full((13,), 99)
    t[::2][:6] = case.timesteps
    outputs = []

    def framed(*shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 14,), 42.0)
        outputs.append((buffer, size))
        return buffer[7 : 7 + size].view(shape)

    found = kernel(
        [x, y, guidance], [weight, parameters[1], gamma, *parameters[3:]], running, t[::2][:6],
        grad_view, training=training, make=framed,
    )  # fmt: skip
    assert all(map(torch.equal, found, expected))
    for buffer, size in outputs:
        assert (buffer[:7] == 42).all() and (buffer[7 + size :] == 42).all()
    for (_, buffer), copy in zip(views, copies, strict=True):
        assert torch.equal(buffer.nan_to_num(-9), copy.nan_to_num(-9))
    # The public call copies strides that the kernel does not support.
    layer = ConditionalLayer(*(sliced(v, rows_only=False)[0] for v in parameters), *running)
    strided = sliced(inputs[0], rows_only=False)[0]
    h = conditioning(
        strided, y, guidance, layer, case.timesteps, training=training, momentum=0.3, eps=1e-4,
        backend="cpu",
    )  # fmt: skip
    assert torch.equal(h, expected[0])


@pytest.mark.parametrize("training", [False, True])
def test_nan_propagates(training: bool) -> None:
    case = Case(2, 6, 70, 3)
    case.inputs[1][1, 4, 2] = torch.nan
    found = case.run(torch.float32, "cpu", training=training)
    expected = case.run(torch.float64, "reference", training=training)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan()), name
    assert found[0][1, 4].isnan().all() and not found[0][0].isnan().any()


@pytest.mark.parametrize("streams", [0, 2])
def test_empty_batch(streams: int) -> None:
    case = Case(streams, 0, 5, 3)
    found = case.run(torch.float32, "cpu", training=False)
    expected = case.run(torch.float32, "reference", training=False)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [False, True])
def test_empty_batch_of_expanded_timesteps(training: bool) -> None:
    """A stride of 0 and no element: nothing may be read."""
    case = Case(0, 3, 5, 3)
    layer = ConditionalLayer(*(t.float() for t in (*case.parameters, *case.running)))
    timesteps = torch.zeros(1, dtype=torch.int64).expand(8)[:0]
    x, y = torch.zeros(0, 5), torch.zeros(0, 3)
    if training:
        with pytest.raises(ValueError, match="at least 2 rows"):
            conditioning(x, y, y, layer, timesteps, training=True, backend="cpu")
    else:
        assert conditioning(x, y, y, layer, timesteps, backend="cpu").shape == (0, 5)


# ---- autograd and the compiler ---------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_second_derivatives_match_the_reference(training: bool) -> None:
    case = Case(2, 5, 6, 2)

    def second(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = [v.to(dtype).requires_grad_() for v in (*case.inputs, *case.parameters)]
        layer = ConditionalLayer(*leaves[3:], *(v.to(dtype, copy=True) for v in case.running))
        x, y, guidance = leaves[:3]
        y = y + x[:, :2]  # one argument from another
        h = conditioning(x, y, guidance, layer, case.timesteps, training=training, backend=backend)
        first = torch.autograd.grad((h * h).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    for a, b in zip(second(torch.float32, "cpu"), second(torch.float64, "reference"), strict=True):
        assert float((a.double() - b).abs().max()) <= 1e-4 * float(b.abs().max())


def test_backward_uses_the_statistics_of_its_forward() -> None:
    """A training call between the forward and backward pass of evaluation mode has no effect on it."""
    case = Case(0, 5, 70, 2)
    inputs, parameters, running = case.floats()
    inputs[0].requires_grad_()
    layer = ConditionalLayer(*parameters, *(v.clone() for v in running))
    h = conditioning(*inputs, layer, case.timesteps, backend="cpu")
    (expected,) = torch.autograd.grad(h.sum(), inputs[0], retain_graph=True)
    conditioning(*inputs, layer, case.timesteps, training=True, backend="cpu")
    assert not torch.equal(layer.running_mean, running[0])
    (found,) = torch.autograd.grad(h.sum(), inputs[0])
    assert torch.equal(found, expected)


def test_opcheck() -> None:
    for streams, training in ((0, False), (2, True)):
        case = Case(streams, 3, 5, 2)
        inputs, parameters, running = case.floats()
        leaves = [value.requires_grad_() for value in (*inputs, *parameters)]
        call = (*leaves[:3], case.timesteps, *leaves[3:], *running, training, 0.1, 1e-5, "cpu")
        torch.library.opcheck(torch.ops.diffmic_fast.conditioning.default, call)
        detached = [value.detach() for value in leaves]
        statistics = torch.rand(2, 2 if training else 1, 5)
        wanted = [True, False, True, True, False, True, True, False]
        torch.library.opcheck(
            torch.ops.diffmic_fast.conditioning_backward.default,
            (
                case.grad.float(), *detached[:3], case.timesteps, *detached[3:], statistics,
                training, 1e-5, wanted, "cpu",
            ),
        )  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(training: bool) -> None:
    def loss(leaves: list[Tensor], running: list[Tensor], t: Tensor) -> Tensor:
        layer = ConditionalLayer(*leaves[3:], *running)
        h = conditioning(leaves[0] * 2, *leaves[1:3], layer, t, training=training)
        return (h.sin() * running[0]).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 7):
        case = Case(2, batch, 70, 3)
        results = []
        for call in (loss, compiled):
            inputs, parameters, running = case.floats()
            leaves = [value.requires_grad_() for value in (*inputs, *parameters)]
            value = call(leaves, running, case.timesteps)
            results.append([value.detach(), *running, *torch.autograd.grad(value, leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert torch.equal(results[1][1], case.running[0].float()) != training


# ---- dispatch and invalid arguments --------------------------------------------------------------


@pytest.mark.usefixtures("auto_backend")
def test_model_calls_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ConditionalModel(3, timesteps=10, feature_dim=16, encoder="resnet18")
    calls = []
    original = _C.conditioning
    monkeypatch.setattr(_C, "conditioning", lambda *a: (calls.append(a), original(*a)))
    features, y = torch.randn(4, 16), torch.rand(2, 4, 3)
    model.denoise_features(features, y, torch.arange(4), y).sum().backward()
    assert len(calls) == 1 and model.unetnorm1.num_batches_tracked == 2
    assert model.lin1.embed.weight.grad is not None
    with torch.no_grad():
        model.eval().denoise_features(features, y[0], torch.arange(4), y[0])
    assert len(calls) == 2


@pytest.mark.usefixtures("auto_backend")
def test_float64_uses_the_reference() -> None:
    case = Case(0, 3, 5, 2)
    layer = ConditionalLayer(*case.parameters, *case.running)
    h = conditioning(*case.inputs, layer, case.timesteps)
    assert torch.equal(h, conditioning(*case.inputs, layer, case.timesteps, backend="reference"))
    with pytest.raises(RuntimeError, match=r"it takes float32 tensors, got torch.float64"):
        conditioning(*case.inputs, layer, case.timesteps, backend="cpu")


def test_invalid_arguments_are_rejected() -> None:
    case = Case(2, 4, 5, 3)
    inputs, parameters, running = case.floats()
    grad, t = case.grad.float(), case.timesteps

    def bad(match: str, *parts: Any, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            kernel(*parts, training=True, **options)

    x, y, guidance = inputs
    bad("conditioning: timesteps must be in", inputs, parameters, running, t + 99, grad)
    bad("timesteps must be", inputs, parameters, running, t.int(), grad, error=TypeError)
    bad("x must have rows of unit stride", [x.T.contiguous().T, y, y], parameters, running, t, grad)
    bad("y_t must have shape", [x, y, y[:, :, :2]], parameters, running, t, grad)
    bad("at least 2 rows", [x[:1], y[:, :1], y[:, :1]], parameters, running, t[:1], grad[:, :1])
    bad("bias must have shape", inputs, [parameters[0], *parameters[:4]], running, t, grad)
    bad("isa must be auto or one that", inputs, parameters, running, t, grad, isa="sse")
    bad("threads must be at least 1", inputs, parameters, running, t, grad, threads=0)
    with pytest.raises(ValueError, match="y_t must have at least one branch"):
        layer = ConditionalLayer(*parameters, *running)
        conditioning(x, y[:0], guidance[:0], layer, t)
