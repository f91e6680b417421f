"""`mmd` against recorded numbers and its own definition."""

from __future__ import annotations

import pytest
import torch

from diffmic_fast.ops.mmd import kernel_matrix, mmd


@pytest.mark.parametrize("pair", range(4))
def test_recorded_values_and_gradients(golden, pair):
    data = {key[2:]: value for key, value in golden("mmd").items() if key.startswith(f"{pair}/")}
    x, y = data["x"].requires_grad_(), data["y"].requires_grad_()
    value = mmd(x, y)
    value.backward()
    torch.testing.assert_close(value.detach(), data["mmd"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernel_matrix(x, y).detach(), data["k_xy"], rtol=1e-5, atol=1e-5)
    for name, leaf in (("grad_x", x), ("grad_y", y)):
        assert leaf.grad is not None
        scale = data[name].abs().max()
        assert float((leaf.grad - data[name]).abs().max() / scale) < 1e-4


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 2), (129, 1, 5)])
def test_definition_in_float64(shape):
    n, m, d = shape
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(m, d, generator=generator, dtype=torch.float64)

    def mean(a, b):
        return (
            sum(torch.exp(-(u - v).square().sum() / d**2) for u in a for v in b) / len(a) / len(b)
        )

    torch.testing.assert_close(mmd(x, y), mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert torch.autograd.gradcheck(mmd, (x[:4].requires_grad_(), y[:4].requires_grad_()))


def test_bad_arguments_are_named():
    x = torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"mmd: y must be \[m, d=5\], got \(4, 7\)"):
        mmd(x, torch.zeros(4, 7))
    with pytest.raises(ValueError, match="x must not be empty"):
        mmd(torch.zeros(0, 5), x)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        mmd(x.long(), x)
    with pytest.raises(TypeError, match=r"y must be torch.float32 .* got torch.float64"):
        mmd(x, x.double())
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
        mmd([[1.0]], x)
    with pytest.raises(RuntimeError, match="triton"):
        mmd(x, x, backend="triton")
    with pytest.raises(ValueError, match="got 'fast'"):
        mmd(x, x, backend="fast")
