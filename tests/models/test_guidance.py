"""The guidance model against numbers recorded after its trunks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffmic_fast.models import DCG


class Recorded(nn.Module):
    """In the place of a trunk: returns the recorded numbers for any input."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        self.seen = images
        return self.value


@pytest.fixture
def data(golden):
    return golden("guidance")


@pytest.fixture
def dcg(data):
    model = DCG(5)
    model.ds_net = nn.Identity()
    model.left_postprocess_net = Recorded(data["saliency"])
    model.dn_resnet = Recorded(data["h_crops"].flatten(0, 1))
    weights = {key[6:]: value for key, value in data.items() if key.startswith("state/mil")}
    weights["classifier_linear.weight"] = data["state/classifier_linear.weight"]
    model.load_state_dict(weights, strict=True)
    return model.eval()


def test_recorded_guidance(dcg, data):
    images = data["image_channel0"].float()[:, None].expand(-1, 3, -1, -1)
    detail = dcg.detail(images)
    assert torch.equal(detail.cells, data["window_index"])
    assert torch.equal(detail.origins, data["crop_origin"].long())
    assert torch.equal(detail.crops[:, :, 0].half(), data["crops"])
    assert torch.equal(dcg.dn_resnet.seen, detail.crops.flatten(0, 1))
    for name, value, expected in (
        ("y_global", detail.logits.global_, data["y_global"]),
        ("y_local", detail.logits.local, data["y_local"]),
        ("attention", detail.attention, data["attention"]),
        ("z", dcg.classify_patches(detail.crops)[0], data["z"]),
        ("fused", detail.logits.fused, (data["y_global"] + data["y_local"]) / 2),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=name)
    fused, global_, local = dcg(images)
    assert all(
        torch.equal(a, b) for a, b in zip((fused, global_, local), detail.logits, strict=True)
    )


def test_saliency_head_is_a_one_by_one_convolution(data):
    dcg = DCG(5)
    dcg.left_postprocess_net.load_state_dict(
        {"gn_conv_last.weight": data["state/left_postprocess_net.gn_conv_last.weight"]}
    )
    features = torch.randn(2, 2048, 3, 3)
    weight = data["state/left_postprocess_net.gn_conv_last.weight"][:, :, 0, 0]
    expected = torch.einsum("cd,bdhw->bchw", weight, features)
    torch.testing.assert_close(dcg.left_postprocess_net(features), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("percent", "count"), [(1.0, 49), (0.5, 24), (0.02, 1), (0.001, 1)])
def test_share_of_largest_responses(percent, count):
    dcg = DCG(3, "resnet18", percent_t=percent)
    saliency = torch.randn(2, 3, 7, 7)
    largest = saliency.flatten(2).sort(dim=2, descending=True).values[..., :count]
    torch.testing.assert_close(dcg.aggregate(saliency), largest.mean(2))


def test_all_channels_are_cut_on_request():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    first, every = (DCG(3, "resnet18", crop_channels=c).eval() for c in ("first", "all"))
    a, b = first.detail(images).crops, every.detail(images).crops
    assert torch.equal(a[:, :, 0], a[:, :, 2]) and not torch.equal(b[:, :, 0], b[:, :, 2])


def test_a_constant_class_leaves_no_nan_in_the_map(dcg, data):
    saliency = data["saliency"].clone()
    saliency[:, 2] = 1.5
    dcg.left_postprocess_net.value = saliency
    images = data["image_channel0"].float()[:, None].expand(-1, 3, -1, -1)
    cells = dcg.detail(images).cells
    others = saliency[:, [0, 1, 3, 4]]
    low, high = others.amin((2, 3), keepdim=True), others.amax((2, 3), keepdim=True)
    best = ((others - low) / (high - low)).sum(1).flatten(1).argmax(1)
    assert torch.equal(cells[:, 0, 0] * 7 + cells[:, 0, 1], best)


def test_gradients_reach_both_trunks():
    torch.manual_seed(0)
    dcg = DCG(3, "resnet18").train()
    torch.nn.functional.cross_entropy(dcg(torch.randn(3, 3, 64, 64))[0], torch.arange(3)).backward()
    assert all(parameter.grad is not None for parameter in dcg.parameters())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \(2, 1, 64, 64\)"):
        DCG(3, "resnet18")(torch.zeros(2, 1, 64, 64))
    with pytest.raises(ValueError, match="percent_t"):
        DCG(3, "resnet18", percent_t=0.0)
    with pytest.raises(ValueError, match="crop_channels"):
        DCG(3, "resnet18", crop_channels="green")
