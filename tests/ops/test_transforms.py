"""Every operation under torch.func, forward-mode derivatives and autocast."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.ops._backend import BackendError
from diffmic_fast.ops.conditional_linear import ConditionalLayer, conditional_linear
from diffmic_fast.ops.conditioning import conditioning
from diffmic_fast.ops.denoise import DenoiserWeights, denoise
from diffmic_fast.ops.mmd import kernel_matrix, mmd
from diffmic_fast.ops.noise_losses import noise_losses
from diffmic_fast.ops.noised_conditioning import noised_conditioning
from diffmic_fast.ops.rois import cut_crops

ROWS, CLASSES, FEATURES = 7, 3, 10
SCHEDULE = make_schedule("linear", 12)
Function = Callable[..., Tensor]


@functools.cache
def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def make_layer(width: int) -> ConditionalLayer:
    vectors = (tensor(FEATURES, seed=seed) for seed in range(3))
    return ConditionalLayer(
        tensor(FEATURES, width),
        next(vectors),
        tensor(13, FEATURES).sigmoid(),
        *vectors,
        tensor(FEATURES, seed=5).clone(),  # updated in place in training
        tensor(FEATURES, seed=6).exp(),
    )


TIMESTEPS = torch.arange(ROWS) % 12
LABELS, GUIDANCE = tensor(3, ROWS, CLASSES, seed=1), tensor(3, ROWS, CLASSES, seed=2)


def of_mmd(rows: Tensor, **how: Any) -> Tensor:
    return mmd(rows, tensor(5, CLASSES), **how)


def of_kernel_matrix(rows: Tensor, **how: Any) -> Tensor:
    return kernel_matrix(rows, tensor(5, CLASSES), **how).square().sum()


def of_noise_losses(rows: Tensor, **how: Any) -> Tensor:
    other = tensor(ROWS, CLASSES, seed=3).round()  # which is exact in half precision
    return noise_losses(other, torch.stack((other, rows, 2 * other)).to(rows.dtype), **how).sum()


def of_conditioning(x: Tensor, *, training: bool = False, **how: Any) -> Tensor:
    arguments = LABELS, GUIDANCE, make_layer(2 * CLASSES), TIMESTEPS
    return conditioning(x, *arguments, training=training, **how).square().mean()


def of_noised_conditioning(x: Tensor, **how: Any) -> Tensor:
    found = noised_conditioning(
        x,
        LABELS[0],
        GUIDANCE,
        make_layer(2 * CLASSES),
        TIMESTEPS,
        SCHEDULE.sqrt_alpha_bar,
        SCHEDULE.sqrt_one_minus_alpha_bar,
        noise=tensor(ROWS, CLASSES, seed=4),
        **how,
    )
    return found.h.square().mean()


def of_conditional_linear(h: Tensor, **how: Any) -> Tensor:
    return conditional_linear(h, make_layer(FEATURES), TIMESTEPS, **how).square().mean()


def of_denoise(features: Tensor, **how: Any) -> Tensor:
    weights = DenoiserWeights(
        make_layer(2 * CLASSES),
        (make_layer(FEATURES), make_layer(FEATURES)),
        tensor(CLASSES, FEATURES),
        tensor(CLASSES),
    )
    steps = make_steps(SCHEDULE, "ddim", 3)
    return denoise(features, GUIDANCE[0], GUIDANCE[0], weights, steps, **how).square().mean()


def of_crops(images: Tensor, **how: Any) -> Tensor:
    origins = torch.tensor([[[-1, 2], [3, 3]]] * 2)
    return cut_crops(images, origins, (4, 5), "all", **how).square().mean()


CASES: list[tuple[Function, Tensor, str]] = [
    (of_mmd, tensor(ROWS, CLASSES), "cpu"),
    (of_kernel_matrix, tensor(ROWS, CLASSES), "cpu"),
    (of_noise_losses, tensor(ROWS, CLASSES), "cpu"),
    (of_conditioning, tensor(ROWS, FEATURES), "cpu"),
    (of_noised_conditioning, tensor(ROWS, FEATURES), "cpu"),
    (of_conditional_linear, tensor(ROWS, FEATURES), "triton"),
    (of_denoise, tensor(ROWS, FEATURES), "cpu"),
    (of_crops, tensor(2, 3, 6, 7), "cpu"),
]
EVERY = pytest.mark.parametrize(
    ("function", "x", "kernel"), CASES, ids=[function.__name__[3:] for function, *_ in CASES]
)


@pytest.fixture(scope="module", autouse=True)
def drawn() -> None:
    """Creates all cached tensors before a transform begins: one created inside must not outlive it."""
    for function, x, _ in CASES:
        function(x, backend="reference")


def slope(function: Function, x: Tensor, direction: Tensor) -> float:
    """The directional derivative of a function, by finite differences in float64 of float32 values."""
    step = 3e-3
    ahead, behind = (float(function(x + sign * step * direction).double()) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


@EVERY
@pytest.mark.usefixtures("auto_backend")
def test_forward_mode_derivatives_are_never_dropped(
    function: Function, x: Tensor, kernel: str
) -> None:
    """Kernels do not have this derivative: "auto" selects the reference, and a kernel requested by name raises."""
    direction = tensor(*x.shape, seed=9)
    expected = slope(function, x, direction)
    assert abs(expected) > 1e-4
    _, found = torch.func.jvp(function, (x,), (direction,))
    assert math.isclose(float(found), expected, rel_tol=0.02)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        found = forward_ad.unpack_dual(function(dual)).tangent
        assert math.isclose(float(found), expected, rel_tol=0.02)
        with pytest.raises(BackendError, match="forward-mode AD is active"):
            function(dual, backend=kernel)
    with torch.no_grad():
        function(x, backend=kernel)  # serves again after the block


@EVERY
@pytest.mark.usefixtures("auto_backend")
def test_gradient_transforms(function: Function, x: Tensor, kernel: str) -> None:
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(function(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(function)(x), expected, rtol=1e-4, atol=1e-6)
    batch = torch.stack((x, 2 * x))
    found = torch.func.vmap(torch.func.grad(function))(batch)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(BackendError, match="a transform of torch"):
        torch.func.grad(lambda value: function(value, backend=kernel))(x)


@EVERY
@pytest.mark.usefixtures("auto_backend")
def test_second_derivatives(function: Function, x: Tensor, kernel: str) -> None:
    """By torch.func, and by a gradient of a gradient: kernels support it or raise."""
    direction = tensor(*x.shape, seed=9)

    def first(value: Tensor) -> Tensor:
        return (torch.func.grad(function)(value) * direction).sum()

    expected = torch.func.grad(first)(x)
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(function(leaf), leaf, create_graph=True)[0]
    try:
        found = torch.autograd.grad((gradient * direction).sum(), leaf)[0]
    except RuntimeError as error:
        assert "second derivatives" in str(error)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_inside_a_compiled_graph(transform: str) -> None:
    torch._dynamo.reset()
    x, direction = tensor(ROWS, CLASSES), tensor(ROWS, CLASSES, seed=9)
    other = tensor(5, CLASSES)

    def value(rows: Tensor) -> Tensor:
        return mmd(rows, other)

    def run(rows: Tensor) -> Tensor:
        if transform == "grad":
            return torch.func.grad(value)(rows)
        if transform == "vmap":
            return torch.func.vmap(value)(torch.stack((rows, 2 * rows)))
        return torch.func.jvp(value, (rows,), (direction,))[1]

    found = torch.compile(run, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found, run(x))


# ---- autocast ---------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("auto_backend")
def test_autocast_computes_in_float32(
    function: Function, x: Tensor, kernel: str, dtype: torch.dtype
) -> None:
    """Half-precision arguments give the bits of their float32 copies, and gradients in their own dtype."""
    if function is of_conditional_linear:
        pytest.skip("its product is in autocast's dtype (test_conditional_linear_triton)")
    half = x.to(dtype)
    backends = ("auto", "reference", kernel) if function is not of_denoise else ("reference",)
    for backend in backends:
        plain = half.float().requires_grad_()
        expected = function(plain, backend=backend)
        leaf = half.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            found = function(leaf, backend=backend)
            if function is of_crops:  # pixels keep their type
                assert found.dtype == dtype
                found = found.float()
                torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)
                continue
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        gradient = torch.autograd.grad(found, leaf)[0]
        assert gradient.dtype == dtype
        assert torch.equal(gradient, torch.autograd.grad(expected, plain)[0].to(dtype))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_chain_is_float32_under_autocast(backend: str) -> None:
    x = tensor(ROWS, FEATURES)
    with torch.no_grad():
        expected = of_denoise(x.bfloat16().float(), backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(of_denoise(x.bfloat16(), backend=backend), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics_under_autocast(backend: str, dtype: torch.dtype) -> None:
    """Updated in place in the layer's own tensors, of any dtype."""
    exact = make_layer(2 * CLASSES)
    layer = ConditionalLayer(*(part.to(dtype) for part in exact))
    twin = ConditionalLayer(*(part.to(dtype).float() for part in exact))
    x = tensor(ROWS, FEATURES).bfloat16()
    conditioning(x.float(), LABELS, GUIDANCE, twin, TIMESTEPS, training=True, backend=backend)
    kept = layer.running_mean
    with torch.autocast("cpu", torch.bfloat16):
        conditioning(x, LABELS, GUIDANCE, layer, TIMESTEPS, training=True, backend=backend)
    assert layer.running_mean is kept
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(layer, name), getattr(twin, name).to(dtype))
    assert not torch.equal(kept, make_layer(2 * CLASSES).running_mean.to(dtype))
