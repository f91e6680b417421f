"""`noise_losses`: the terms of the training loss and their gradients in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_backends import CUDA_BACKENDS, device_of, schedule, seeds
from mmd_cases import TOLERANCE, in_a_buffer, rows
from torch import Tensor
from torch.nn import functional as F

from diffmic_fast import _native
from diffmic_fast.ops.mmd import mmd
from diffmic_fast.ops.noise_losses import noise_losses
from diffmic_fast.reference import mmd as reference_mmd
from diffmic_fast.reference import noise_losses as reference

KERNELS = ["cpu", *CUDA_BACKENDS]
BACKENDS = ["reference", *KERNELS]
# One block of all rows, of short rows only, and tiles that are shared out; one prediction and four.
SHAPES = [(3, 32, 5), (1, 7, 3), (4, 1, 1), (3, 60, 20), (2, 20, 70), (3, 150, 6), (4, 97, 37)]


def case(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    streams, n, d = shape
    noise = rows(n, d, dtype)
    predictions = torch.stack([rows(n, d, dtype, seed=1 + s) * (1 + s) for s in range(streams)])
    return noise.to(device_of(backend)), predictions.to(device_of(backend))


def losses_and_gradients(
    noise: Tensor, predictions: Tensor, grad: Tensor | None = None, **how: Any
) -> tuple[Tensor, Tensor]:
    leaf = predictions.detach().requires_grad_()
    losses = noise_losses(noise, leaf, **how)
    (found,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses) if grad is None else grad)
    return losses.detach(), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    noise, predictions = case(shape, dtype, backend)
    grad = torch.arange(1.0, shape[0] + 1, dtype=dtype, device=noise.device)
    found = losses_and_gradients(noise, predictions, grad, backend=backend)
    for s, prediction in enumerate(predictions.cpu().double()):
        leaf, given = prediction.requires_grad_(), noise.cpu().double()
        expected = F.mse_loss(leaf, given) if s == 0 else reference_mmd.mmd(given, leaf)
        (gradient,) = torch.autograd.grad((s + 1) * expected, leaf)
        error = TOLERANCE[dtype] * 4 * (s + 1)
        assert float(found[0][s]) == pytest.approx(expected.item(), rel=error, abs=error)
        size = float(gradient.abs().max()) + 4 / shape[1]
        assert float((found[1][s].cpu().double() - gradient).abs().max()) <= error * size


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_bits_equal_those_of_mmd(shape: tuple[int, ...], backend: str) -> None:
    noise, predictions = case(shape, torch.float32, backend)
    losses, gradients = losses_and_gradients(noise, predictions, backend=backend)
    for s in range(1, shape[0]):
        leaf = predictions[s].clone().requires_grad_()
        value = mmd(noise, leaf, backend=backend)
        assert torch.equal(losses[s], value.detach())
        assert torch.equal(gradients[s], torch.autograd.grad(value, leaf)[0])
    with torch.no_grad():
        assert torch.equal(noise_losses(noise, predictions, backend=backend), losses)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_any_schedule(backend: str) -> None:
    for shape in ((3, 32, 5), (3, 97, 37)):
        noise, predictions = case(shape, torch.float32, backend)
        schedule(backend, 0)
        expected = losses_and_gradients(noise, predictions, backend=backend)
        for seed in seeds(backend, 10):
            schedule(backend, seed)
            found = losses_and_gradients(noise, predictions, backend=backend)
            assert all(map(torch.equal, found, expected))
    schedule(backend, 0)


def test_bits_do_not_depend_on_threads() -> None:
    noise, predictions = case((3, 400, 9), torch.float32, "cpu")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(losses_and_gradients(noise, predictions, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True)
    )


@pytest.mark.parametrize("instructions", _native.extension().mmd_instruction_sets())
def test_every_instruction_set(instructions: str) -> None:
    noise, predictions = case((3, 40, 12), torch.float32, "cpu")
    expected = losses_and_gradients(noise.double(), predictions.double(), backend="reference")
    losses, gradients = torch.empty(3), torch.empty_like(predictions)
    _native.extension().noise_losses(noise, predictions, losses, gradients, 2, instructions)
    torch.testing.assert_close(losses.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients.double(), expected[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["transposed", "slice", "spread"])
@pytest.mark.parametrize("backend", KERNELS)
def test_strides_and_surroundings(kind: str, dtype: torch.dtype, backend: str) -> None:
    for shape in ((3, 30, 8), (3, 70, 36)):
        noise, predictions = case(shape, dtype, backend)
        expected = losses_and_gradients(noise, predictions, backend=backend)
        apart = [in_a_buffer(each, kind) for each in (noise, predictions.flatten(0, 1))]
        stacks = [
            apart[1].unflatten(0, shape[:2]),
            predictions.transpose(0, 1).contiguous().transpose(0, 1),
            predictions.new_full((2 * shape[0], *shape[1:]), torch.nan)[::2].copy_(predictions),
            # Matrices that do not all begin at a multiple of 16 bytes.
            predictions.new_full((shape[0] * (shape[1] * shape[2] + 1),), torch.nan)
            .as_strided(shape, (shape[1] * shape[2] + 1, shape[2], 1))
            .copy_(predictions),
        ]
        for stack in stacks:
            found = losses_and_gradients(apart[0], stack, backend=backend)
            assert all(map(torch.equal, found, expected))
    same = noise.expand(3, *noise.shape)
    found = losses_and_gradients(noise, same, backend=backend)
    expected = losses_and_gradients(noise, same.contiguous(), backend=backend)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_only_outputs_are_written(backend: str) -> None:
    for shape in ((3, 32, 5), (2, 97, 7)):
        streams, n, d = shape
        noise, predictions = case(shape, torch.float32, backend)
        kernels = _native.cuda(backend)
        needed = kernels.noise_losses_workspace(*shape, 4, True)
        scratch = noise.new_full((needed + 2,), 42.0, dtype=torch.float64)
        out = noise.new_full((streams + 2,), 42.0), noise.new_full((streams + 2, n, d), 42.0)
        arguments = noise, predictions, out[0][1:-1], out[1][1:-1], scratch[:needed], 0
        kernels.noise_losses(*arguments)
        expected = losses_and_gradients(noise, predictions, backend=backend)
        for buffer, want in zip(out, expected, strict=True):
            assert torch.equal(buffer[1:-1], want) and (buffer[[0, -1]] == 42).all()
        assert (scratch[needed:] == 42).all()


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_small_calls_need_no_workspace(backend: str) -> None:
    kernels = _native.cuda(backend)
    assert kernels.noise_losses_workspace(3, 32, 5, 4, True) == 0
    one = kernels.mmd_workspace(500, 500, 40, 4, True)
    assert kernels.noise_losses_workspace(3, 500, 40, 4, True) == 3 * one > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, backend: str) -> None:
    noise, predictions = (each.to(dtype) for each in case((3, 32, 5), torch.float32, backend))
    found = losses_and_gradients(noise, predictions, backend=backend)
    expected = losses_and_gradients(noise.float(), predictions.float(), backend=backend)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found, expected, strict=True))
    with torch.autocast(noise.device.type, dtype=torch.bfloat16):
        assert noise_losses(noise, predictions.float(), backend=backend).dtype == torch.float32


@pytest.mark.parametrize("which", [0, 1, 2, "noise"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_propagates(which: Any, backend: str) -> None:
    noise, predictions = case((3, 32, 5), torch.float32, backend)
    (noise if which == "noise" else predictions[which])[3, 2] = torch.nan
    losses = noise_losses(noise, predictions, backend=backend)
    assert losses.isnan().tolist() == [which in (s, "noise") for s in range(3)]


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivatives(backend: str) -> None:
    noise, predictions = case((3, 6, 4), torch.float64, backend)

    def of(predictions: Tensor) -> Tensor:
        return noise_losses(noise, predictions, backend=backend)

    leaf = predictions.requires_grad_()
    assert torch.autograd.gradcheck(of, leaf) and torch.autograd.gradgradcheck(of, leaf)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str) -> None:
    noise, predictions = case((3, 32, 5), torch.float32, backend)
    for wanted in (True, False):
        leaf = predictions.clone().requires_grad_(wanted)
        torch.library.opcheck(
            torch.ops.diffmic_fast.noise_losses.default, (noise, leaf, wanted, backend)
        )
    leaf = predictions.clone().requires_grad_()
    without = torch.ops.diffmic_fast.noise_losses(noise, leaf, False, backend)[0]
    with pytest.raises(RuntimeError, match="the gradient was not requested"):
        without.sum().backward()


@pytest.mark.parametrize("backend", KERNELS)
def test_compiles_as_one_graph(backend: str) -> None:
    def weighted(noise: Tensor, predictions: Tensor) -> Tensor:
        return noise_losses(noise, predictions, backend=backend).sum() * 3

    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (32, 40):
        noise, predictions = case((3, n, 5), torch.float32, backend)
        leaf = predictions.requires_grad_()
        values = compiled(noise, leaf), weighted(noise, leaf)
        assert torch.equal(*values)
        assert torch.equal(*(torch.autograd.grad(value, leaf)[0] for value in values))


def test_equals_mse_and_mmd() -> None:
    noise, predictions = case((3, 8, 4), torch.float64, "reference")
    mse, *others = reference.noise_losses(noise, predictions)
    torch.testing.assert_close(mse, (noise - predictions[0]).square().mean())
    for prediction, value in zip(predictions[1:], others, strict=True):
        torch.testing.assert_close(value, reference_mmd.mmd(noise, prediction))


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_arguments_raise(backend: str) -> None:
    noise, predictions = case((3, 8, 4), torch.float32, backend)
    with pytest.raises(ValueError, match=r"predictions must be \[S, B=8, C=4\], got \(3, 7, 4\)"):
        noise_losses(noise, predictions[:, :7], backend=backend)
    with pytest.raises(ValueError, match=r"predictions must be \[S, B=8, C=4\]"):
        noise_losses(noise, predictions[0], backend=backend)
    with pytest.raises(ValueError, match=r"predictions must not be empty, got \(0, 8, 4\)"):
        noise_losses(noise, predictions[:0], backend=backend)
    with pytest.raises(ValueError, match=r"noise must not be empty, got \(0, 4\)"):
        noise_losses(noise[:0], predictions[:, :0], backend=backend)
    with pytest.raises(TypeError, match=r"predictions must be torch.float32 .* got torch.float64"):
        noise_losses(noise, predictions.double(), backend=backend)
    with pytest.raises(TypeError, match="noise must be a floating-point tensor"):
        noise_losses(noise.long(), predictions, backend=backend)
    with pytest.raises(ValueError, match="noise must not require gradients"):
        noise_losses(noise.clone().requires_grad_(), predictions, backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_invalid_arguments_of_the_extension_raise(backend: str) -> None:
    noise, predictions = case((3, 8, 4), torch.float32, backend)
    losses, gradients = noise.new_empty(3), predictions.new_empty(predictions.shape)

    def call(noise: Tensor, predictions: Tensor, losses: Tensor, gradients: Tensor | None) -> None:
        if backend == "cpu":
            _native.extension().noise_losses(noise, predictions, losses, gradients)
            return
        scratch = noise.new_empty(0, dtype=torch.float64)
        _native.cuda(backend).noise_losses(noise, predictions, losses, gradients, scratch, 0)

    call(noise, predictions, losses, gradients)
    with pytest.raises(ValueError, match="noise_losses: losses must have shape"):
        call(noise, predictions, losses[:2], gradients)
    with pytest.raises(ValueError, match="noise_losses: gradients must have shape"):
        call(noise, predictions, losses, gradients[:2])
    with pytest.raises(ValueError, match="noise_losses: predictions must have shape"):
        call(noise, predictions[:, :, :3], losses, None)
    with pytest.raises(ValueError, match="noise_losses: gradients"):
        call(noise, predictions, losses, predictions)
    with pytest.raises(TypeError, match="noise_losses: predictions"):
        call(noise, predictions.double(), losses, None)
    with pytest.raises(ValueError, match="noise_losses: predictions must"):
        call(noise, predictions[:0], losses[:0], None)
