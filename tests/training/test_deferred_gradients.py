"""Gradients of wide weights made behind a backward pass: the same bits, at another time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffmic_fast.config.run import TrainingConfig
from diffmic_fast.models import DiffMIC, DiffMICConfig
from diffmic_fast.training import deferred_gradients as later_module
from diffmic_fast.training import steps
from diffmic_fast.training.deferred_gradients import LaterGradients
from diffmic_fast.training.steps import Steps


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.second(self.first(x).relu()).relu())


def gradients(net: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in net.parameters()]


def loss_of_rows(net: Net, x: Tensor) -> Tensor:
    return net(x).square().mean()


def loss_of_the_weight_too(net: Net, x: Tensor) -> Tensor:
    return net(x).square().mean() + net.second.weight.square().sum()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (3, 5, 6)])
@pytest.mark.parametrize("loss", [loss_of_rows, loss_of_the_weight_too])
def test_same_gradients(
    loss: Callable[[Net, Tensor], Tensor], shape: tuple[int, ...], autocast: bool
) -> None:
    """Of a weight that two products use, over two accumulated passes; sums of several in another order."""
    net = Net()
    plain = copy.deepcopy(net)
    for seed in range(2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        how = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
        before = [None if grad is None else grad.clone() for grad in gradients(net)]
        with how, LaterGradients([net.first.weight, net.second.weight]) as later:
            value = loss(net, x)
        with how:
            expected = loss(plain, x)
        assert torch.equal(value, expected)
        value.backward()
        waiting = net.first.weight.grad  # as it was, before `add`
        assert waiting is None if before[0] is None else torch.equal(waiting, before[0])
        later.add()
        expected.backward()
        for name, (found, wanted) in zip(
            ("w1", "b1", "w2"), zip(gradients(net), gradients(plain), strict=True), strict=True
        ):
            if name == "w2" or seed:
                rtol = 1e-2 if autocast else 1e-6
                torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol / 10)
            else:
                assert torch.equal(found, wanted)
        later.add()  # nothing is left
        assert torch.equal(net.first.weight.grad, gradients(net)[0])


def test_a_gradient_is_converted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven rows three at a time: the product of bfloat16, as float32."""
    monkeypatch.setattr(later_module, "_ROWS", 3)
    net, x = Net(), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with LaterGradients([net.first.weight]) as later:
            value = loss_of_rows(net, x)
        expected = loss_of_rows(plain, x)
    value.backward()
    later.add()
    expected.backward()
    found = net.first.weight.grad
    assert found is not None and found.dtype == torch.float32
    assert plain.first.weight.grad is not None
    assert torch.equal(found, plain.first.weight.grad)


def test_others_have_theirs_at_once() -> None:
    net, x = Net(), torch.ones(2, 6)
    net.first.requires_grad_(False)
    with LaterGradients(net.parameters()) as later:
        with torch.no_grad():
            net(x)
        value = loss_of_rows(net, x)
    value.backward()
    # The first product over this weight has an input without gradient, so its own is made as ever.
    assert net.first.weight.grad is None and net.second.weight.grad is not None
    later.add()
    plain = Net()
    plain.first.requires_grad_(False)
    loss_of_rows(plain, x).backward()
    torch.testing.assert_close(net.second.weight.grad, plain.second.weight.grad)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_a_weight_see_its_gradient(kind: str) -> None:
    net, seen = Net(), []
    getattr(net.first.weight, kind)(lambda value: seen.append(value))
    with LaterGradients(net.parameters()) as later:
        value = loss_of_rows(net, torch.ones(2, 6))
    value.backward()
    assert len(seen) == 1 and net.first.weight.grad is not None
    later.add()
    assert len(seen) == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_has_the_same_bits(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    """Wide weights wait for the image encoder's backward pass, and end as they would have."""
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found, waited = [], []

    class Counted(LaterGradients):
        def add(self) -> None:
            waited.append([w.grad is None for w in self._weights.values()])
            super().add()

    for later in (Counted, type("Never", (LaterGradients,), {"_linear": torch._C._nn.linear})):
        monkeypatch.setattr(steps, "LaterGradients", later)
        torch.manual_seed(0)
        config = DiffMICConfig(classes=3, feature_dim=32, image_size=32, crop_size=16, timesteps=20)
        model = DiffMIC(config)
        training = TrainingConfig(accumulation=2, recompute=recompute)
        Steps(model, training, seed=3).denoiser_step(images, torch.arange(6) % 3, 1.0)
        found.append(dict(model.state_dict()))
        found[-1] |= {f"gradient {n}": p.grad for n, p in model.denoiser.named_parameters()}
    # lin1's goes through `noised_conditioning`; then lin2, lin3, lin4.
    assert waited == [[False, True, True, True], [False] * 4]
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
