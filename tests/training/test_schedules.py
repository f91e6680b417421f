"""Learning rates, moving average and batches against their formulas."""

import copy
import math

import pytest
import torch

from diffmic_fast.training.schedules import MovingAverage, epoch_batches, warmup_cosine


def test_learning_rate_of_the_published_schedule():
    def rate(epoch):
        return warmup_cosine(epoch, rate=1e-3, minimum=0.0, warmup=40, epochs=1000)

    assert rate(0) == 0.0
    assert rate(10) == pytest.approx(0.25e-3)
    assert rate(40) == pytest.approx(1e-3)
    assert rate(520) == pytest.approx(0.5e-3)
    assert rate(760) == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 0.75)))
    assert rate(1000) == pytest.approx(0.0, abs=1e-12)


def test_learning_rate_at_the_edges():
    assert warmup_cosine(0, rate=2.0, minimum=0.5, warmup=0, epochs=4) == 2.0
    assert warmup_cosine(4, rate=2.0, minimum=0.5, warmup=0, epochs=4) == pytest.approx(0.5)
    assert warmup_cosine(3, rate=2.0, minimum=0.0, warmup=8, epochs=4) == 0.75


def test_moving_average_is_the_recursion():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = MovingAverage(module, 0.9)
    expected = {k: p.detach().double().clone() for k, p in module.named_parameters()}
    assert set(average.values) == set(expected)  # parameters only, no running statistics
    for _ in range(5):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        average.update()
        for k, p in module.named_parameters():
            expected[k] = 0.9 * expected[k] + 0.1 * p.detach().double()
    for k, v in average.values.items():
        torch.testing.assert_close(v.double(), expected[k], rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError), average.applied():
        assert torch.equal(module[0].weight, average.values["0.weight"])
        raise RuntimeError
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("count", [2, 3, 8, 9, 12, 13])
def test_batches_hold_every_image_once_and_none_is_single(count):
    batches = epoch_batches(count, 4, seed=1, epoch=0)
    assert sorted(i for b in batches for i in b) == list(range(count))
    assert min(map(len, batches)) >= 2
    assert max(map(len, batches)) <= 5


def test_batches_depend_on_seed_and_epoch_alone():
    assert epoch_batches(50, 8, 1, 2) == epoch_batches(50, 8, 1, 2)
    others = [epoch_batches(50, 8, seed, epoch) for seed, epoch in ((1, 3), (2, 2), (2, 1))]
    assert all(o != epoch_batches(50, 8, 1, 2) for o in others)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    epoch_batches(50, 8, 1, 2)
    assert torch.equal(torch.rand(1), expected)
    with pytest.raises(ValueError, match="at least 2 training images"):
        epoch_batches(1, 8, 0, 0)
