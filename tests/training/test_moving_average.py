"""The moving average of weights against its recursion."""

import copy

import pytest
import torch

from diffmic_fast.training.moving_average import MovingAverage


def test_update_is_the_recursion_and_applied_restores():
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


def test_averages_of_another_shape_are_refused():
    module = torch.nn.Linear(3, 2)
    average = MovingAverage(module, 0.9)
    for wrong in (torch.ones(1, 1), torch.ones(5, 3), torch.ones(3, 2)):
        with pytest.raises(ValueError, match=r"average of weight must be \(2, 3\), got"):
            average.load({"weight": wrong, "bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"average of bias must be \(2,\), got none"):
        average.load({"weight": torch.ones(2, 3)})
