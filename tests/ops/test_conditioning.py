"""`conditioning` and `conditional_linear`: branches, statistics, gradients, invalid arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffmic_fast.ops.conditional_linear import ConditionalLayer, conditional_linear
from diffmic_fast.ops.conditioning import conditioning


def make_layer(width_in, width_out, timesteps, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=dtype) + 0.1

    return ConditionalLayer(
        random(width_out, width_in) - 0.5,
        random(width_out) - 0.5,
        random(timesteps + 1, width_out),
        *(random(width_out) for _ in range(4)),
    )


def copy(layer):
    return ConditionalLayer(*(tensor.clone() for tensor in layer))


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("classes", [2, 5, 7])
def test_branches_equal_separate_calls(training, classes):
    batch, width, streams = 9, 13, 3
    layer, deep = make_layer(2 * classes, width, 20), make_layer(width, 11, 20, 1)
    x = torch.randn(batch, width, dtype=torch.float64)
    y, guidance = torch.randn(2, streams, batch, classes, dtype=torch.float64)
    t = torch.randint(0, 20, (batch,))
    once, thrice = (copy(layer), copy(deep)), (copy(layer), copy(deep))
    h = conditioning(x, y, guidance, once[0], t, training=training)
    out = conditional_linear(h, once[1], t, training=training)
    for s in range(streams):
        h_s = conditioning(x, y[s], guidance[s], thrice[0], t, training=training)
        torch.testing.assert_close(h[s], h_s)
        torch.testing.assert_close(out[s], conditional_linear(h_s, thrice[1], t, training=training))
    for a, b in zip(once[0] + once[1], thrice[0] + thrice[1], strict=True):
        torch.testing.assert_close(a, b)
    moved = not torch.equal(once[0].running_mean, layer.running_mean)
    assert moved == training


def test_equals_the_formula_in_plain_pytorch(weights):
    layer = weights.conditioning
    y, guidance, x = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 64)
    t = torch.tensor([0, 3, 99, 100])
    product = torch.cat((y, guidance), 1) @ layer.weight.T + layer.bias
    scaled = layer.gamma[t] * product
    normed = (scaled - layer.running_mean) / torch.sqrt(layer.running_var + 1e-5)
    expected = x * F.softplus(normed * layer.norm_weight + layer.norm_bias)
    torch.testing.assert_close(conditioning(x, y, guidance, layer, t), expected)
    one = conditioning(x, y, guidance, layer, t[1:2])
    torch.testing.assert_close(one, conditioning(x, y, guidance, layer, t[1:2].expand(4)))


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("training", [False, True])
def test_gradients(training):
    layer = make_layer(6, 4, 3)
    x, y, guidance = (torch.randn(*s, dtype=torch.float64) for s in ((5, 4), (2, 5, 3), (2, 5, 3)))
    t = torch.tensor([0, 3, 2, 3, 1])

    def run(x, y, guidance, *parameters):
        running = layer.running_mean.clone(), layer.running_var.clone()
        return conditioning(
            x, y, guidance, ConditionalLayer(*parameters, *running), t, training=training
        )

    inputs = [tensor.clone().requires_grad_() for tensor in (x, y, guidance, *layer[:5])]
    assert torch.autograd.gradcheck(run, inputs)


def test_invalid_arguments_raise():
    layer = make_layer(6, 8, 10, dtype=torch.float32)
    x, y, t = torch.zeros(4, 8), torch.zeros(4, 3), torch.zeros(4).long()
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 10\], got 0 … 11"):
        conditioning(x, y, y, layer, torch.tensor([0, 1, 2, 11]))
    with pytest.raises(ValueError, match=r"timesteps must be \[B=4\] or \[1\], got \(3,\)"):
        conditioning(x, y, y, layer, t[:3])
    with pytest.raises(TypeError, match="timesteps must be int64"):
        conditioning(x, y, y, layer, t.float())
    with pytest.raises(ValueError, match=r"guidance must be \[B=4, C=3\], got \(4, 2\)"):
        conditioning(x, y, y[:, :2], layer, t)
    with pytest.raises(ValueError, match=r"weight must be \[out=8, 2C=4\], got \(8, 6\)"):
        conditioning(x, y[:, :2], y[:, :2], layer, t)
    with pytest.raises(ValueError, match="at least 2 rows for its batch statistics"):
        conditioning(x[:1], y[:1], y[:1], layer, t[:1], training=True)
    with pytest.raises(ValueError, match=r"h must be \[B, in\] or \[S, B, in\]"):
        conditional_linear(x[0], layer, t)
