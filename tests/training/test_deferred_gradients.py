"""Deferred weight gradients: the same bits as those of a backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffmic_fast.config.run import TrainingConfig
from diffmic_fast.models import DiffMIC, DiffMICConfig
from diffmic_fast.training import deferred_gradients, steps
from diffmic_fast.training.deferred_gradients import DeferredGradients
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
def test_gradients_match_the_backward_pass(
    loss: Callable[[Net, Tensor], Tensor], shape: tuple[int, ...], autocast: bool
) -> None:
    """One weight is used by two products, over two accumulated passes; only their sums differ in order."""
    net = Net()
    plain = copy.deepcopy(net)
    for seed in range(2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        how = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
        before = [None if grad is None else grad.clone() for grad in gradients(net)]
        with how, DeferredGradients([net.first.weight, net.second.weight]) as deferred:
            value = loss(net, x)
        with how:
            expected = loss(plain, x)
        assert torch.equal(value, expected)
        value.backward()
        waiting = net.first.weight.grad  # unchanged before `accumulate`
        assert waiting is None if before[0] is None else torch.equal(waiting, before[0])
        deferred.accumulate()
        expected.backward()
        for name, (found, wanted) in zip(
            ("w1", "b1", "w2"), zip(gradients(net), gradients(plain), strict=True), strict=True
        ):
            if name == "w2" or seed:
                rtol = 1e-2 if autocast else 1e-6
                torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol / 10)
            else:
                assert torch.equal(found, wanted)
        deferred.accumulate()  # changes nothing
        assert torch.equal(net.first.weight.grad, gradients(net)[0])


def test_gradients_are_converted_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows in blocks of three: the bfloat16 product, as float32."""
    monkeypatch.setattr(deferred_gradients, "_BLOCK_ROWS", 3)
    net, x = Net(), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with DeferredGradients([net.first.weight]) as deferred:
            value = loss_of_rows(net, x)
        expected = loss_of_rows(plain, x)
    value.backward()
    deferred.accumulate()
    expected.backward()
    found = net.first.weight.grad
    assert found is not None and found.dtype == torch.float32
    assert plain.first.weight.grad is not None
    assert torch.equal(found, plain.first.weight.grad)


def test_other_gradients_are_not_deferred() -> None:
    net, x = Net(), torch.ones(2, 6)
    net.first.requires_grad_(False)
    with DeferredGradients(net.parameters()) as deferred:
        with torch.no_grad():
            net(x)
        value = loss_of_rows(net, x)
    value.backward()
    # The input of the first product over this weight has no gradient: the backward pass computes the weight's.
    assert net.first.weight.grad is None and net.second.weight.grad is not None
    deferred.accumulate()
    plain = Net()
    plain.first.requires_grad_(False)
    loss_of_rows(plain, x).backward()
    torch.testing.assert_close(net.second.weight.grad, plain.second.weight.grad)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_weights_with_hooks_are_not_deferred(kind: str) -> None:
    net, seen = Net(), []
    getattr(net.first.weight, kind)(lambda value: seen.append(value))
    with DeferredGradients(net.parameters()) as deferred:
        value = loss_of_rows(net, torch.ones(2, 6))
    value.backward()
    assert len(seen) == 1 and net.first.weight.grad is not None
    deferred.accumulate()
    assert len(seen) == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_has_the_same_bits(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    """Wide weights have no gradient while the image encoder's backward pass runs, and the same one afterwards."""
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    results = []
    deferred: list[list[bool]] = []

    class Recorded(DeferredGradients):
        def accumulate(self) -> None:
            layers = model.denoiser.lin1.lin, model.denoiser.lin2.lin, model.denoiser.lin3.lin
            deferred.append([layer.weight.grad is None for layer in (*layers, model.denoiser.lin4)])
            super().accumulate()

    for kind in (Recorded, lambda weights: DeferredGradients([])):
        monkeypatch.setattr(steps, "DeferredGradients", kind)
        torch.manual_seed(0)
        config = DiffMICConfig(classes=3, feature_dim=32, image_size=32, crop_size=16, timesteps=20)
        model = DiffMIC(config)
        training = TrainingConfig(accumulation=2, recompute=recompute)
        Steps(model, training, seed=3).denoiser_step(images, torch.arange(6) % 3, 1.0)
        results.append(dict(model.state_dict()))
        results[-1] |= {f"gradient {n}": p.grad for n, p in model.denoiser.named_parameters()}
    # `noised_conditioning` computes the first one's.
    assert deferred == [[False, True, True, True], [False] * 4]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
