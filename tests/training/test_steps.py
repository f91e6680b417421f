"""Optimizer steps with gradient accumulation and activation checkpointing."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from diffmic_fast.config.run import RunConfig
from diffmic_fast.distributed.processes import Processes
from diffmic_fast.models import DiffMIC
from diffmic_fast.models.encoders import ImageEncoder
from diffmic_fast.training.steps import LOSSES, Steps


@pytest.fixture
def model(config: RunConfig) -> DiffMIC:
    torch.manual_seed(0)
    return DiffMIC(config.model)


def batch(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 3


def steps_of(model: DiffMIC, config: RunConfig, **changes: object) -> Steps:
    return Steps(model, dataclasses.replace(config.training, **changes), seed=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "parts"), [(9, [5, 4]), (5, [3, 2]), (4, [2, 2]), (3, [3])])
def test_accumulation_is_a_step_on_the_weighted_mean_of_the_losses(
    model: DiffMIC, config: RunConfig, count: int, parts: list[int]
) -> None:
    """Each micro-batch has its own draws, statistics and MMD, weighted by its images; one clipping, one update."""
    by_hand = copy.deepcopy(model)
    images, labels = batch(count)
    steps = steps_of(model, config, accumulation=2)
    found = steps.denoiser_step(images, labels, 0.5)
    of_guidance = steps.guidance_step(images, labels, 0.5)

    other = steps_of(by_hand, config)
    by_hand.train()
    expected, guidance = torch.zeros(4), torch.zeros(())
    both = zip(images.split(parts), labels.split(parts), strict=True)
    for some, theirs in both:
        losses = torch.stack(list(by_hand.loss(some, theirs, generator=other.noise)))
        expected = expected + len(some) / count * losses
    expected[0].backward()
    nn.utils.clip_grad_norm_(by_hand.denoiser.parameters(), 1.0)
    other.optimizer.param_groups[0]["lr"] = steps.optimizer.param_groups[0]["lr"]
    other.optimizer.step()
    by_hand.guidance.train()
    both = zip(images.split(parts), labels.split(parts), strict=True)
    for some, theirs in both:
        loss = nn.functional.cross_entropy(by_hand.guidance(some)[0], theirs)
        guidance = guidance + len(some) / count * loss
    guidance.backward()
    other.guidance_optimizer.step()

    torch.testing.assert_close([found[key] for key in LOSSES], expected.tolist())
    assert of_guidance == pytest.approx(guidance.item())
    for (name, a), b in zip(model.state_dict().items(), by_hand.state_dict().values(), strict=True):
        # Adam's first step is the learning rate times a sign, which rounding decides for gradients of 0.
        moved = (a.double() - b.double()).abs() > 1e-5
        assert float(moved.double().mean()) < 0.02, name
        if "running" in name or "batches" in name:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_the_default_is_no_accumulation(model: DiffMIC, config: RunConfig) -> None:
    once = copy.deepcopy(model)
    images, labels = batch(7)
    for of, changes in ((model, {}), (once, {"accumulation": 1})):
        steps_of(of, config, **changes).denoiser_step(images, labels, 0.5)
    for a, b in zip(model.state_dict().values(), once.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"accumulation\n.*greater than or equal to 1"):
        dataclasses.replace(config, training=dataclasses.replace(config.training, accumulation=0))


class Kept:
    """Bytes saved for the backward pass."""

    def __init__(self) -> None:
        self.bytes = 0
        self.seen: set[int] = set()

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in self.seen:
            self.seen.add(tensor.data_ptr())
            self.bytes += tensor.numel() * tensor.element_size()
        return tensor


@pytest.mark.parametrize("momentum", [0.1, None])
def test_recomputation_gives_the_same_bits_and_saves_memory(
    model: DiffMIC, config: RunConfig, momentum: float | None
) -> None:
    """Weights, averages and running statistics after two steps."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = momentum
    other = copy.deepcopy(model)
    kept = []
    for of, recompute in ((model, False), (other, True)):
        steps = steps_of(of, config, recompute=recompute, draws=2)
        for count in (8, 6):
            images, labels = batch(count)
            measure = Kept()
            with torch.autograd.graph.saved_tensors_hooks(measure.pack, lambda tensor: tensor):
                steps.denoiser_step(images, labels, 0.5)
                steps.guidance_step(images, labels, 0.5)
        kept.append(measure.bytes)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    norm = next(part for part in other.modules() if isinstance(part, nn.BatchNorm2d))
    assert norm.momentum == momentum and int(norm.num_batches_tracked or 0) == 6
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.parametrize(
    "name",
    ["resnet18", "densenet121", "efficientnet_b0", "mobilenet_v2", "mobilenet_v3_small", "convnext_tiny",
     "regnet_y_400mf", "shufflenet_v2_x0_5", "test_resnet", "test_efficientnet"],
)  # fmt: skip
def test_every_family_of_encoders_supports_recomputation(name: str) -> None:
    """In-place activations, blocks with branches, dropped paths: the same gradients bit by bit."""
    torch.manual_seed(0)
    encoder = ImageEncoder(name, 5).to(memory_format=torch.channels_last).train()
    other = copy.deepcopy(encoder)
    other.recompute = True
    images = torch.randn(3, 3, 64, 64)
    results = []
    for of in (encoder, other):
        torch.manual_seed(1)
        of(images).square().mean().backward()
        results.append([p.grad for p in of.parameters()])
    for a, b in zip(*results, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    for a, b in zip(encoder.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


def test_recomputation_in_evaluation_mode_and_without_gradients(model: DiffMIC) -> None:
    encoder = model.denoiser.encoder_x
    assert isinstance(encoder, ImageEncoder)
    images, _ = batch(4)
    encoder.eval()
    with torch.no_grad():
        expected = encoder(images)
    encoder.recompute = True
    with torch.no_grad():
        assert torch.equal(encoder(images), expected)
    found = encoder(images.requires_grad_())
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert images.grad is not None and float(images.grad.abs().max()) > 0


@pytest.mark.parametrize("of_guidance", [False, True])
def test_recomputation_of_a_replaced_network_is_an_error(
    model: DiffMIC, config: RunConfig, of_guidance: bool
) -> None:
    if of_guidance:
        model.guidance.dn_resnet = nn.Conv2d(3, 512, 3)
    else:
        model.denoiser.encoder_x = nn.Sequential(nn.Flatten(), nn.Linear(3072, 32))
    with pytest.raises(ValueError, match="must be ImageEncoder or Trunk, got"):
        steps_of(model, config, recompute=True)


@pytest.mark.parametrize("clip", [None, 5.0])
def test_a_gradient_of_the_guidance_model_that_is_not_finite_changes_nothing(
    model: DiffMIC, config: RunConfig, clip: float | None
) -> None:
    """The loss is finite; one gradient is not."""
    steps = steps_of(
        model, config, guidance_gradient_clip=clip, classifier_ema_decay=0.9, guidance_epochs=1,
        joint_guidance=False,
    )  # fmt: skip
    weight = next(model.guidance.ds_net.parameters())
    weight.register_hook(lambda gradient: gradient * torch.inf)
    before = {name: p.detach().clone() for name, p in model.guidance.named_parameters()}
    average = {name: value.clone() for name, value in steps.guidance_average.values.items()}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="norm of the guidance model's gradient is"):
        steps.guidance_step(*batch(4), 0.5)
    assert all(torch.equal(p, before[name]) for name, p in model.guidance.named_parameters())
    assert all(torch.equal(v, average[name]) for name, v in steps.guidance_average.values.items())  # type: ignore[union-attr]


def test_dropout_is_for_a_single_process(model: DiffMIC, config: RunConfig) -> None:
    training = dataclasses.replace(config.training, classifier_dropout=0.2)
    with pytest.raises(
        ValueError, match=r"classifier_dropout must be 0 with several .* 2 processes"
    ):
        Steps(model, training, seed=3, processes=Processes(0, 2))
