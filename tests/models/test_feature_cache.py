"""A sampling loop runs the encoder once, and features are never stale."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from diffmic_fast.models import ConditionalModel


class CountingEncoder(nn.Module):
    """Counts its passes, as a user's wrapper might, and has every kind of state that features can depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("offset", torch.zeros(8), persistent=False)
        self.scale = 1.0
        self.gains = [1.0, 2.0]
        self.table = {"shift": torch.zeros(8)}
        self.mean = np.zeros(8, np.float32)
        self.options = {"flip": (False, {1})}
        self.hidden = [nn.Linear(8, 8).eval().requires_grad_(False)]  # not in the state dict
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        h = self.norm(self.linear(x.flatten(1))) + self.offset + self.table["shift"]
        h = self.hidden[0](h - torch.from_numpy(self.mean))
        if self.options["flip"][0] or 2 in self.options["flip"][1]:
            h = -h
        return h * self.scale * self.gains[0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = ConditionalModel(3, timesteps=20, feature_dim=8)
    model.encoder_x = CountingEncoder()
    return model.eval()


@pytest.fixture
def x():
    return torch.randn(5, 3, 2, 2)


def call(model, x):
    y = torch.full((len(x), 3), 0.3)
    return model(x, y, torch.tensor([4]), y)


def fresh(model, x):
    with torch.enable_grad():
        return call(copy.deepcopy(model), x).detach()


@torch.no_grad()
def test_a_loop_runs_the_encoder_once(model, x):
    results = [call(model, x) for _ in range(5)]
    assert model.encoder_x.calls == 1
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0], fresh(model, x))


def test_gradients_and_training_are_never_cached(model, x):
    call(model, x).sum().backward()
    call(model, x).sum().backward()
    assert model.encoder_x.calls == 2
    with torch.no_grad():
        model.encoder_x.train()
        call(model, x)
        call(model, x)
    assert model.encoder_x.calls == 4


def _in_place(model, x):
    x.mul_(1.5)


def _through_data(model, x):
    x.data.add_(1.0)


def _one_pixel(model, x):
    x.data[4, 2, 1, 1] += 1e-3


def _swap_rows(model, x):
    x.data.copy_(x.flip(0))


def _weight(model, x):
    model.encoder_x.linear.weight.mul_(1.1)


def _weight_through_data(model, x):
    model.encoder_x.linear.weight.data[0, 0] += 0.1


def _weight_swapped(model, x):
    model.encoder_x.linear.weight.data = model.encoder_x.linear.weight.data.flip(0)


def _statistics(model, x):
    model.encoder_x.norm.running_var.fill_(3.0)


def _norm(model, x):
    model.norm.bias.data.add_(0.5)


def _eps(model, x):
    model.norm.eps = 0.3


def _buffer(model, x):
    model.encoder_x.offset += 1


def _attribute(model, x):
    model.encoder_x.scale = 2.0


def _attribute_in_list(model, x):
    model.encoder_x.gains[0] = 3.0


def _tensor_in_dict(model, x):
    model.encoder_x.table["shift"].add_(1.0)


def _array(model, x):
    model.encoder_x.mean[3] = 5.0


def _array_replaced(model, x):
    model.encoder_x.mean = np.ones(8, np.float32)


def _tuple_in_dict(model, x):
    model.encoder_x.options["flip"] = (True, {1})


def _set_in_tuple(model, x):
    model.encoder_x.options["flip"][1].add(2)


def _hidden_module(model, x):
    model.encoder_x.hidden[0].weight.mul_(3)


def _submodule(model, x):
    model.encoder_x.linear = nn.Linear(12, 8)


def _class(model, x):
    class Negated(CountingEncoder):
        def forward(self, x):
            return -super().forward(x)

    model.encoder_x.__class__ = Negated


def _hook(model, x):
    model.encoder_x.register_forward_hook(lambda module, inputs, output: output + 1)


def _forward(model, x):
    model.encoder_x.forward = lambda x: torch.ones(len(x), 8)


def _state_dict(model, x):
    state = {
        name: torch.rand_like(value)
        for name, value in model.encoder_x.state_dict().items()
        if value.ndim
    }
    model.encoder_x.load_state_dict(state, strict=False)


CHANGES = [
    _in_place,
    _through_data,
    _one_pixel,
    _swap_rows,
    _weight,
    _weight_through_data,
    _weight_swapped,
    _statistics,
    _norm,
    _eps,
    _buffer,
    _attribute,
    _attribute_in_list,
    _tensor_in_dict,
    _array,
    _array_replaced,
    _tuple_in_dict,
    _set_in_tuple,
    _hidden_module,
    _submodule,
    _class,
    _hook,
    _forward,
    _state_dict,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@torch.no_grad()
def test_every_change_gives_fresh_features(model, x, change):
    before = call(model, x)
    change(model, x)
    after = call(model, x)
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh(model, x))


@torch.no_grad()
def test_memory_shared_with_numpy(model):
    array = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)
    x = torch.from_numpy(array)
    before = call(model, x)
    array[3, 0, 0, 0] += 1.0
    after = call(model, x)
    assert not torch.equal(before[3], after[3]) and torch.equal(before[:3], after[:3])


@torch.no_grad()
def test_equal_images_in_other_memory_reuse_the_features(model, x):
    call(model, x)
    call(model, x.clone())
    wide = torch.zeros(5, 3, 2, 4)
    view = wide[..., ::2]
    view.copy_(x)
    call(model, view)
    call(model, view)
    assert model.encoder_x.calls == 2  # the strided view is another layout, computed once


def test_gradient_modes_and_autocast_do_not_share_features(model, x):
    with torch.inference_mode():
        call(model, x)
    with torch.no_grad():
        call(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model.features(x)
        assert torch.equal(model.features(x), fresh_features(model, x))
    assert model.encoder_x.calls == 4 and not torch.equal(low.float(), fresh_features(model, x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_a_trace_keeps_the_encoder(model, x):
    y, t, other = torch.full((5, 3), 0.3), torch.tensor([4]), torch.randn_like(x)
    with torch.no_grad():
        model(x, y, t, y)
        traced = torch.jit.trace(model, (x, y, t, y), check_trace=False)
        torch.testing.assert_close(traced(other, y, t, y), model(other, y, t, y))


def test_a_hidden_module_in_training_is_not_cached(model, x):
    model.encoder_x.hidden[0].train()
    with torch.no_grad():
        call(model, x)
        call(model, x)
    assert model.encoder_x.calls == 2


def fresh_features(model, x):
    other = copy.deepcopy(model)
    with torch.enable_grad():
        return other.features(x).detach()


@torch.no_grad()
def test_features_of_nan_are_not_cached(model, x):
    x[0, 0, 0, 0] = float("nan")
    call(model, x)
    call(model, x)
    assert model.encoder_x.calls == 2


@torch.no_grad()
def test_copies_compute_features_of_their_own(model, x):
    expected = call(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(other, x), expected)
        assert other.encoder_x.calls == model.encoder_x.calls + 1
    assert list(model.state_dict()) == list(copy.deepcopy(model).state_dict())


@torch.no_grad()
def test_training_mode_frees_the_features(model, x):
    kept = weakref.ref(model.features(x))
    gc.collect()
    assert kept() is not None and model.features(x) is kept()
    model.train()
    gc.collect()
    assert kept() is None
