"""`conditioning` in CUDA: numerical results, reproducibility and argument validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conditioning_cases import NAMES, Case, sliced
from cuda_backends import CUDA_BACKENDS, device_of, schedule, seeds
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.ops._conditioning import (
    Conditioning,
    ConditioningBackward,
    Gradients,
    Outputs,
    Parameters,
)
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.reference.conditional_linear import ConditionalLayer

pytestmark = pytest.mark.parametrize("backend", CUDA_BACKENDS)

# S (0: no branch dimension), B, F, C. A block has 32 channels, 32 rows at a time, 16 inputs (2 C + 1), 6 branches; in
# the last two, a tile has fewer rows than the batch in the backward pass, and in both passes.
SIZES = [
    (0, 2, 1, 2), (1, 7, 129, 3), (2, 33, 64, 4), (3, 5, 200, 5), (3, 35, 40, 7), (2, 4, 33, 20),
    (8, 6, 37, 3), (3, 120, 8, 2), (6, 130, 6, 2),
]  # fmt: skip


def kernel(
    backend: str,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    running: Sequence[Tensor],
    timesteps: Tensor,
    grad: Tensor,
    *,
    training: bool,
    make: Callable[..., Tensor] = torch.empty,
) -> list[Tensor]:
    """`Case.run` by the module's functions, on the backend's device, with outputs allocated by `make`."""
    module = _native.cuda(backend)
    x, y, guidance = inputs
    features = x.shape[1]
    streams = y.shape[0] if y.ndim == 3 else 1
    h = make(*y.shape[:-1], features)
    statistics = make(2, streams if training else 1, features)
    updated = [make(features) if training else None for _ in range(2)]
    layer = ConditionalLayer(*parameters, *running)
    call = Conditioning(x, y, guidance, timesteps, layer, training, 0.3, 1e-4, backend)
    module.conditioning(call, Outputs(h, statistics, *updated), None, 0)
    gradients = Gradients(*(make(*v.shape) for v in (*inputs, *parameters)))
    gradients.gamma.zero_()
    workspace = make(module.conditioning_workspace(features, streams, x.shape[0], y.shape[-1]))
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
        backend,
    )
    module.conditioning_backward(backward, gradients, workspace, 0)
    behind = [old if new is None else new for old, new in zip(running, updated, strict=True)]
    return [h, *behind, *gradients]


def parts(case: Case, backend: str) -> list[Any]:
    """The arguments of `kernel`."""
    device = device_of(backend)
    found: list[Any] = [[v.to(device) for v in part] for part in case.floats()]
    return [*found, case.timesteps.to(device), case.grad.float().to(device)]


# ---- values and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients(backend: str, sizes: tuple[int, ...], training: bool) -> None:
    case = Case(*sizes)
    case.check(case.run(torch.float32, backend, training=training), training=training)


@pytest.mark.parametrize("training", [False, True])
def test_one_timestep_for_all(backend: str, training: bool) -> None:
    case = Case(2, 33, 40, 4)
    t = case.timesteps[:1]
    found = case.run(torch.float32, backend, training=training, timesteps=t)
    case.check(found, training=training, timesteps=t)


def test_softplus_of_large_and_small_numbers(backend: str) -> None:
    """With identities elsewhere: h = softplus(bias), and its derivative."""
    n = torch.cat([torch.linspace(-86, 86, 301), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4])])
    device = device_of(backend)
    n = n.to(device)
    features = n.numel()
    one, zero = torch.ones_like(n), torch.zeros_like(n)
    parameters = [n.new_zeros(features, 2), n, one[None], one, zero]
    labels = n.new_zeros(1, 1)
    found = kernel(
        backend, [one[None], labels, labels], parameters, [zero, one - 1e-4],
        torch.zeros(1, dtype=torch.int64, device=device), one[None], training=False,
        make=n.new_empty,
    )  # fmt: skip
    exact = n.double().exp().log1p().where(n < 80, n.double())
    slope = n.double().sigmoid()
    assert float(((found[0][0].double() - exact) / exact).abs().max()) < 1e-6
    assert float(((found[7].double() - slope) / slope).abs().max()) < 1e-6


@pytest.mark.parametrize("batch", [60, 300])
def test_statistics_far_from_zero(backend: str, batch: int) -> None:
    """A mean of 300 standard deviations, in one tile and in several."""
    case = Case(2, batch, 5, 3)
    case.parameters[1] = (case.parameters[1] + 300).float().double()
    case.parameters[2] = torch.ones_like(case.parameters[2])
    found = case.run(torch.float32, backend, training=True)
    case.check(found, training=True)
    exact = case.run(torch.float64, "reference", training=True)
    assert float(((found[2].double() - exact[2]) / exact[2]).abs().max()) < 1e-5


def test_only_required_gradients_are_computed(backend: str) -> None:
    names = ("x", "y_t", "guidance", "weight", "bias", "gamma", "norm_weight", "norm_bias")
    device = device_of(backend)
    for batch, training in ((6, False), (6, True), (140, True)):
        case = Case(2, batch, 10, 3)
        all_of_them = case.run(torch.float32, backend, training=training)[3:]
        for wanted in ({"x"}, {"y_t"}, {"weight", "gamma"}, {"bias"}, {"norm_bias"}, {"gamma"}):
            leaves = [
                value.float().to(device).requires_grad_(name in wanted)
                for name, value in zip(names, (*case.inputs, *case.parameters), strict=True)
            ]
            layer = ConditionalLayer(*leaves[3:], *(v.float().to(device) for v in case.running))
            t = case.timesteps.to(device)
            h = conditioning(*leaves[:3], layer, t, training=training, eps=1e-4, backend=backend)
            h.backward(case.grad.float().to(device))
            for name, leaf, expected in zip(names, leaves, all_of_them, strict=True):
                if name in wanted:
                    assert torch.equal(leaf.grad.cpu(), expected), (name, wanted)
                else:
                    assert leaf.grad is None


def test_the_recorded_layer_matches_the_reference(backend: str, weights: Any) -> None:
    device = device_of(backend)
    layer = ConditionalLayer(*(v.to(device) for v in weights.conditioning))
    y, guidance = torch.randn(2, 3, 4, 5).to(device)
    x, t = torch.randn(4, 64).to(device), torch.tensor([0, 3, 99, 100]).to(device)
    found = conditioning(x, y, guidance, layer, t, backend=backend)
    expected = conditioning(x, y, guidance, layer, t, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---- reproducibility -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "training"),
    [((2, 5, 34, 3), False), ((2, 5, 34, 3), True), ((6, 100, 3, 1), True)],
    ids=["eval", "one tile", "tiles"],
)
def test_bits_do_not_depend_on_the_schedule(
    backend: str, sizes: tuple[int, ...], training: bool
) -> None:
    case = Case(*sizes)
    expected = case.run(torch.float32, backend, training=training)
    for seed in seeds(backend, 50):
        schedule(backend, seed)
        found = case.run(torch.float32, backend, training=training)
        for name, a, b in zip(NAMES, found, expected, strict=True):
            assert torch.equal(a, b), (seed, name)


def test_evaluation_mode_is_batch_invariant(backend: str) -> None:
    case = Case(2, 67, 40, 3)
    (x, y, guidance), parameters, running, t, grad = parts(case, backend)

    def run(rows: slice | list[int]) -> list[Tensor]:
        inputs = [x[rows], y[:, rows], guidance[:, rows]]
        return kernel(
            backend, inputs, parameters, running, t[rows], grad[:, rows], training=False,
            make=x.new_empty,
        )  # fmt: skip

    expected = run(slice(None))
    for rows in ([66], [3, 66, 0], slice(31, 60)):
        found = run(rows)
        assert torch.equal(found[0], expected[0][:, rows])
        assert torch.equal(found[3], expected[3][rows])
        assert torch.equal(found[4], expected[4][:, rows])


@pytest.mark.parametrize("features", [36, 75])
@pytest.mark.parametrize("training", [False, True])
def test_strides_and_surrounding_memory(backend: str, training: bool, features: int) -> None:
    """Rows of any alignment, and 16-byte aligned rows, which are accessed as vectors."""
    case = Case(3, 6, features, 4)
    inputs, parameters, running, timesteps, grad = parts(case, backend)
    make = inputs[0].new_empty
    expected = kernel(
        backend, inputs, parameters, running, timesteps, grad, training=training, make=make
    )
    views = [
        sliced(value, rows_only=rows_only)
        for value, rows_only in (
            (inputs[0], True), (inputs[1], False), (inputs[2], False), (parameters[0], False),
            (parameters[2], True), (grad, True),
        )
    ]  # fmt: skip
    copies = [buffer.clone() for _, buffer in views]
    x, y, guidance, weight, gamma, grad_view = (view for view, _ in views)
    t = timesteps.new_full((13,), 99)
    t[::2][:6] = timesteps
    outputs = []

    def framed(*shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = inputs[0].new_full((size + 14,), 42.0)
        outputs.append((buffer, size))
        return buffer[7 : 7 + size].view(shape)

    found = kernel(
        backend, [x, y, guidance], [weight, parameters[1], gamma, *parameters[3:]], running,
        t[::2][:6], grad_view, training=training, make=framed,
    )  # fmt: skip
    assert all(map(torch.equal, found, expected))
    for buffer, size in outputs:
        assert (buffer[:7] == 42).all() and (buffer[7 + size :] == 42).all()
    for (_, buffer), copy in zip(views, copies, strict=True):
        assert torch.equal(buffer.nan_to_num(-9), copy.nan_to_num(-9))
    # The public function copies arguments whose strides the kernel does not support.
    layer = ConditionalLayer(*(sliced(v, rows_only=False)[0] for v in parameters), *running)
    strided = sliced(inputs[0], rows_only=False)[0]
    h = conditioning(
        strided, y, guidance, layer, timesteps, training=training, momentum=0.3, eps=1e-4,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(h, expected[0])


@pytest.mark.parametrize(
    ("value", "training"), [(torch.nan, False), (torch.nan, True), (torch.inf, False)]
)
def test_non_finite_values_stay_in_their_row(backend: str, value: float, training: bool) -> None:
    case = Case(2, 6, 39, 3)
    case.inputs[1][1, 4, 2] = value
    found = case.run(torch.float32, backend, training=training)
    expected = case.run(torch.float64, "reference", training=training)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan()), name
    assert not found[0][0].isnan().any()


def test_timesteps_out_of_range(backend: str) -> None:
    """The kernel makes their rows NaN without a gradient of gamma; the public function raises on the CPU."""
    case = Case(2, 6, 39, 3)
    inputs, parameters, running, t, grad = parts(case, backend)
    expected = kernel(
        backend, inputs, parameters, running, t, grad, training=False, make=inputs[0].new_empty
    )
    t[1], t[4] = -1, 9
    found = kernel(
        backend, inputs, parameters, running, t, grad, training=False, make=inputs[0].new_empty
    )
    good = [0, 2, 3, 5]
    assert found[0][:, [1, 4]].isnan().all()
    assert torch.equal(found[0][:, good], expected[0][:, good])
    x, y, guidance = inputs
    without = kernel(
        backend, [x[good], y[:, good], guidance[:, good]], parameters, running, t[good], grad[:, good],
        training=False, make=x.new_empty,
    )  # fmt: skip
    torch.testing.assert_close(found[8], without[8])
    assert float(without[8].abs().max()) > 0
    layer = ConditionalLayer(*parameters, *running)
    if backend == "cuda":
        served = conditioning(*inputs, layer, t, backend=backend)
        assert torch.equal(served.isnan(), found[0].isnan())
        return
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 8\], got -1 … 9"):
        conditioning(*inputs, layer, t, backend=backend)


@pytest.mark.parametrize("streams", [0, 2])
def test_empty_batch(backend: str, streams: int) -> None:
    case = Case(streams, 0, 5, 3)
    found = case.run(torch.float32, backend, training=False)
    expected = case.run(torch.float32, "reference", training=False)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_no_features(backend: str) -> None:
    case = Case(2, 3, 0, 3)
    found = case.run(torch.float32, backend, training=True)
    assert found[0].shape == (2, 3, 0)
    assert torch.equal(found[4], torch.zeros(2, 3, 3))


# ---- autograd and the compiler ---------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_second_derivatives_match_the_reference(backend: str, training: bool) -> None:
    case = Case(2, 5, 6, 2)

    def second(dtype: torch.dtype, name: str) -> list[Tensor]:
        device = device_of(name)
        leaves = [v.to(device, dtype).requires_grad_() for v in (*case.inputs, *case.parameters)]
        running = (v.to(device, dtype, copy=True) for v in case.running)
        layer = ConditionalLayer(*leaves[3:], *running)
        t = case.timesteps.to(device)
        h = conditioning(*leaves[:3], layer, t, training=training, backend=name)
        first = torch.autograd.grad((h * h).sum(), leaves, create_graph=True)
        total = torch.stack([(g * g).sum() for g in first]).sum()
        return [g.cpu() for g in torch.autograd.grad(total, leaves)]

    for a, b in zip(
        second(torch.float32, backend), second(torch.float64, "reference"), strict=True
    ):
        assert float((a.double() - b).abs().max()) <= 1e-4 * float(b.abs().max())


def test_opcheck(backend: str) -> None:
    for streams, training in ((0, False), (2, True)):
        case = Case(streams, 3, 5, 2)
        inputs, parameters, running, t, grad = parts(case, backend)
        leaves = [value.requires_grad_() for value in (*inputs, *parameters)]
        call = (*leaves[:3], t, *leaves[3:], *running, training, 0.1, 1e-5, backend)
        torch.library.opcheck(torch.ops.diffmic_fast.conditioning.default, call)
        detached = [value.detach() for value in leaves]
        statistics = torch.rand(2, 2 if training else 1, 5).to(grad.device)
        wanted = [True, False, True, True, False, True, True, False]
        torch.library.opcheck(
            torch.ops.diffmic_fast.conditioning_backward.default,
            (grad, *detached[:3], t, *detached[3:], statistics, training, 1e-5, wanted, backend),
        )


@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(backend: str, training: bool) -> None:
    def loss(leaves: list[Tensor], running: list[Tensor], t: Tensor) -> Tensor:
        layer = ConditionalLayer(*leaves[3:], *running)
        h = conditioning(leaves[0] * 2, *leaves[1:3], layer, t, training=training, backend=backend)
        return (h.sin() * running[0]).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 7):
        results = []
        for call in (loss, compiled):
            inputs, parameters, running, t, _ = parts(Case(2, batch, 35, 3), backend)
            leaves = [value.requires_grad_() for value in (*inputs, *parameters)]
            value = call(leaves, running, t)
            results.append([value.detach(), *running, *torch.autograd.grad(value, leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- the model, and argument validation ------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_model_uses_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffmic_fast.models import ConditionalModel  # needs torchvision, the other tests do not

    module = _native.cuda(backend)
    calls = []
    original = module.conditioning
    monkeypatch.setattr(module, "conditioning", lambda *a: (calls.append(a), original(*a)))
    monkeypatch.setenv("DIFFMIC_BACKEND", backend)
    device = device_of(backend)
    model = ConditionalModel(3, timesteps=10, feature_dim=16, encoder="resnet18").to(device)
    features, y = torch.randn(4, 16, device=device), torch.rand(2, 4, 3, device=device)
    model.denoise_features(features, y, torch.arange(4).to(device), y).sum().backward()
    assert len(calls) == 1 and model.unetnorm1.num_batches_tracked == 2
    assert model.lin1.embed.weight.grad is not None


def test_other_dtypes_raise(backend: str) -> None:
    case = Case(0, 3, 5, 2)
    device = device_of(backend)
    inputs, parameters, running = (
        [v.to(device) for v in part] for part in (case.inputs, case.parameters, case.running)
    )
    layer = ConditionalLayer(*parameters, *running)
    with pytest.raises(RuntimeError, match=r"it takes float32 tensors, got torch.float64"):
        conditioning(*inputs, layer, case.timesteps.to(device), backend=backend)


def test_the_extension_validates_its_arguments(backend: str) -> None:
    inputs, parameters, running, t, grad = parts(Case(2, 4, 5, 3), backend)
    x, y, guidance = inputs
    make = x.new_empty

    def bad(match: str, *parts: Any, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            kernel(backend, *parts, training=True, **{"make": make, **options})

    bad("timesteps must be", inputs, parameters, running, t.int(), grad, error=TypeError)
    bad("x must have rows of unit stride", [x.T.contiguous().T, y, y], parameters, running, t, grad)
    bad("y_t must have shape", [x, y, y[:, :, :2]], parameters, running, t, grad)
    bad("at least 2 rows", [x[:1], y[:, :1], y[:, :1]], parameters, running, t[:1], grad[:, :1])
    bad("bias must have shape", inputs, [parameters[0], *parameters[:4]], running, t, grad)
    bad("bias must be contiguous", inputs, [parameters[0], parameters[1].repeat(2)[::2],
        *parameters[2:]], running, t, grad)  # fmt: skip
    bad("must be float32, got float64", inputs, parameters, running, t, grad, make=lambda *s: make(*s).double(),
        error=TypeError)  # fmt: skip
    module = _native.cuda(backend)
    layer = ConditionalLayer(*parameters, *running)
    call = Conditioning(x, y[0], guidance[0], t, layer, False, 0.3, 1e-4, backend)
    with pytest.raises(ValueError, match="h must not share memory with x"):
        module.conditioning(call, Outputs(x, make(2, 1, 5), make(0), make(0)), None, 0)
    gradients = Gradients(None, make(2, 4, 3), *[None] * 6)  # type: ignore[arg-type]
    backward = ConditioningBackward(
        grad,
        x,
        y,
        guidance,
        t,
        Parameters(*parameters),
        make(2, 2, 5),
        True,
        1e-4,
        [True] * 8,
        backend,
    )
    with pytest.raises(ValueError, match="workspace must be there for the gradients of y_t"):
        module.conditioning_backward(backward, gradients, None, 0)
