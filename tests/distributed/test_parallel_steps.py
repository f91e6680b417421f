"""Steps of two processes on the CPU against those of one, with replicated and with sharded weights."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from process_groups import in_processes
from torch import Tensor, nn
from training_runs import TOGETHER

from diffmic_fast.config.run import RunConfig
from diffmic_fast.distributed.fsdp import full, local_shard
from diffmic_fast.distributed.sync_batch_norm import SyncBatchNorm, synchronize_statistics
from diffmic_fast.models import DiffMIC
from diffmic_fast.training.steps import Steps


def batch(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 3


def make_model(config: RunConfig) -> DiffMIC:
    torch.manual_seed(0)
    return DiffMIC(config.model)


def make_steps(model: DiffMIC, config: RunConfig, **changes: Any) -> Steps:
    # Clipping and Adam would hide a wrong scale of the gradients.
    changes = {"gradient_clip": None} | changes
    return Steps(model, dataclasses.replace(config.training, **changes), seed=3)


def both_steps(
    steps: Steps, images: Tensor, labels: Tensor
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """A step of each model: losses, and by name gradients, weights, running statistics and averages."""
    found: dict[str, Tensor] = {}

    def keep_gradients() -> None:
        for name, value in steps.model.named_parameters():
            if value.grad is not None:
                found[f"gradient of {name}"] = full(value.grad).clone()

    losses = steps.denoiser_step(images, labels, 0.5)
    keep_gradients()
    losses["guidance"] = steps.guidance_step(images, labels, 0.5)
    keep_gradients()
    found |= {name: full(value).clone() for name, value in steps.model.state_dict().items()}
    assert steps.average is not None
    for name, value in steps.average.values.items():
        found[f"average of {name}"] = full(value).clone()
    return losses, found


def elements_kept(steps: Steps) -> dict[str, int]:
    """Number of elements of each kind on this process."""
    assert steps.average is not None
    optimizers = steps.optimizer, steps.guidance_optimizer
    kinds = {
        "weights": list(steps.model.parameters()),
        "gradients": [p.grad for p in steps.model.parameters() if p.grad is not None],
        "averages": list(steps.average.values.values()),
        "moments": [s["exp_avg"] for o in optimizers for s in o.state.values()],
    }
    return {kind: sum(local_shard(t).numel() for t in values) for kind, values in kinds.items()}


# Images of a batch, and changes to the defaults.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "equal shards": (8, TOGETHER),
    "unequal shards": (7, TOGETHER),
    "draws": (5, TOGETHER | {"draws": 2}),
    "accumulation": (9, TOGETHER | {"accumulation": 2}),
    "recomputed": (7, TOGETHER | {"recompute": True}),
    "clipped": (7, TOGETHER | {"gradient_clip": 0.1}),
    "sharded": (7, TOGETHER | {"fsdp": True}),
    "sharded, accumulation": (9, TOGETHER | {"accumulation": 2, "fsdp": True, "recompute": True}),
    "sharded, clipped": (7, TOGETHER | {"gradient_clip": 0.1, "fsdp": True}),
    "local statistics": (7, {}),
    "gathered only": (7, {"gather_mmd": True}),
}


def run_steps(rank: int, config: RunConfig) -> dict[str, Any]:
    """One step of both models for every case, and three of the first."""
    found: dict[str, Any] = {}
    for name, (count, changes) in CASES.items():
        steps = make_steps(make_model(config), config, **changes)
        images, labels = (steps.processes.shard(part) for part in batch(count))
        found[name] = both_steps(steps, images, labels)  # type: ignore[arg-type]
        found[f"{name}, kept"] = elements_kept(steps)
    steps = make_steps(make_model(config), config, **TOGETHER, fsdp=True)
    images, labels = (steps.processes.shard(part) for part in batch(8))
    steps.denoiser_step(images, labels, 0.5)  # type: ignore[arg-type]
    found["kept after a denoiser step"] = elements_kept(steps)
    steps = make_steps(make_model(config), config, **TOGETHER)
    for count in (8, 6, 7):
        images, labels = (steps.processes.shard(part) for part in batch(count))
        found["third"] = steps.denoiser_step(images, labels, 0.5)  # type: ignore[arg-type]
    found["errors"] = []
    for wrong in ("image", "label", "weight"):
        steps = make_steps(make_model(config), config)
        images, labels = batch(4)
        if rank == 1 and wrong == "image":
            images[2, 1] = torch.nan
        if rank == 1 and wrong == "label":
            labels[0] = 3
        if rank == 1 and wrong == "weight":
            with torch.no_grad():
                steps.model.denoiser.lin4.bias.fill_(torch.nan)
        for step in (steps.denoiser_step, steps.guidance_step):
            if wrong == "weight" and step == steps.guidance_step:
                continue
            before = copy.deepcopy(steps.model.state_dict())
            try:
                step(images, labels, 0.5)
            except ValueError as error:
                found["errors"].append(str(error))
            parameters = dict(steps.model.named_parameters())
            assert wrong == "weight" or all(
                torch.equal(before[k], parameters[k]) for k in parameters
            )
    return found


@pytest.fixture(scope="module")
def two(shared_config: RunConfig) -> list[dict[str, Any]]:
    return in_processes(2, run_steps, shared_config)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], kind: str) -> None:
    """Gradients and running statistics up to rounding; weights except those whose gradient is rounding alone."""
    assert found.keys() == expected.keys()
    assert sum(name.startswith("average") for name in found) > 20
    gradients = [value for name, value in expected.items() if name.startswith("gradient")]
    scale = max(float(value.abs().max()) for value in gradients)
    for name, value in expected.items():
        if name.startswith("gradient"):
            torch.testing.assert_close(
                found[name], value, rtol=1e-3, atol=3e-5 * scale, msg=f"{kind}: {name}"
            )
        elif "running" in name or "tracked" in name:
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-5, msg=f"{kind}: {name}"
            )
        else:
            # Adam's first step is the rate times the gradient's sign, which rounding decides for tiny gradients.
            gradient = expected.get(f"gradient of {name.removeprefix('average of ')}")
            if gradient is None:
                gradient = expected[f"gradient of denoiser.{name.removeprefix('average of ')}"]
            sure = gradient.abs() > 1e-3 * scale
            torch.testing.assert_close(
                found[name][sure], value[sure], rtol=1e-3, atol=5e-5, msg=f"{kind}: {name}"
            )


@pytest.mark.parametrize(
    "name", [name for name, (_, how) in CASES.items() if "sync_batch_norm" in how]
)
def test_two_processes_match_one_with_the_global_batch(
    name: str, two: list[dict[str, Any]], shared_config: RunConfig
) -> None:
    """Losses, every gradient, running statistics and averages, for equal and unequal shards."""
    count, changes = CASES[name]
    steps = make_steps(make_model(shared_config), shared_config, **changes)
    images, labels = batch(count)
    if (
        "accumulation" in changes
    ):  # a micro-batch is the processes' micro-batches, one after the other
        order = torch.tensor([0, 1, 2, 5, 6, 3, 4, 7, 8])
        images, labels = images[order], labels[order]
    expected, state_of_one = both_steps(steps, images, labels)
    for rank in (0, 1):
        losses, state = two[rank][name]
        assert losses == pytest.approx(expected, rel=1e-4)
        compare(state, state_of_one, f"{name}, process {rank}")
    first, second = (two[rank][name][1] for rank in (0, 1))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_sharded_weights_are_stored_once(two: list[dict[str, Any]]) -> None:
    """And gradients, averages and optimizer state: the two shards make one of each, and neither is large."""
    for name in ("sharded", "sharded, accumulation"):
        for kind, count in two[0]["equal shards, kept"].items():
            shares = [found[f"{name}, kept"][kind] for found in two]
            assert sum(shares) == count and max(shares) < 0.6 * count, kind
    # The guidance model had a forward pass and no backward pass.
    assert (
        sum(each["kept after a denoiser step"]["weights"] for each in two)
        == (two[0]["equal shards, kept"]["weights"])
    )


def test_three_steps(two: list[dict[str, Any]], shared_config: RunConfig) -> None:
    steps = make_steps(make_model(shared_config), shared_config, **TOGETHER)
    for count in (8, 6, 7):
        third = steps.denoiser_step(*batch(count), 0.5)
    assert two[0]["third"] == two[1]["third"] == pytest.approx(third, rel=1e-2)


@pytest.mark.parametrize("name", ["local statistics", "gathered only"])
def test_local_statistics_and_gathered_mmd(
    name: str, two: list[dict[str, Any]], shared_config: RunConfig
) -> None:
    """The gradient is the weighted sum over the processes, also of a gathered MMD; running statistics are rank 0's."""
    count, _ = CASES[name]
    models = [make_model(shared_config) for _ in range(2)]
    parameters = [dict(model.denoiser.named_parameters()) for model in models]
    images, labels = batch(count)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(0, 12, (count // 2 + 1,), generator=generator)
    timesteps = torch.cat((drawn, 11 - drawn))[:count]
    noise = torch.randn(count, 3, generator=generator)
    outputs: list[Tensor] = []
    losses = []
    for model, own in zip(models, (slice(0, 4), slice(4, 7)), strict=True):
        kept: list[Tensor] = []
        handle = model.denoiser.lin4.register_forward_hook(lambda *a, kept=kept: kept.append(a[-1]))
        model.train()
        losses.append(
            model.loss(images[own], labels[own], timesteps=timesteps[own], noise=noise[own])
        )
        handle.remove()
        outputs.append(kept[0])
    total = sum(n / 7 * loss.noise for n, loss in zip((4, 3), losses, strict=True))
    if name == "local statistics":
        for n, loss in zip((4, 3), losses, strict=True):
            total = total + n / 7 * 0.5 * (loss.mmd_global + loss.mmd_local)
    else:
        from diffmic_fast.ops.mmd import mmd

        eps = torch.cat(outputs, dim=1)
        total = total + 0.5 * (mmd(noise, eps[1]) + mmd(noise, eps[2]))
    assert (
        two[0][name][0]["loss"] == two[1][name][0]["loss"] == pytest.approx(total.item(), rel=1e-4)
    )
    every = [*parameters[0].values(), *parameters[1].values()]
    gradients = torch.autograd.grad(total, every)
    half = len(gradients) // 2
    joined = [a + b for a, b in zip(gradients[:half], gradients[half:], strict=True)]
    scale = max(float(gradient.abs().max()) for gradient in joined)
    for rank in (0, 1):
        state = two[rank][name][1]
        for key, gradient in zip(parameters[0], joined, strict=True):
            found = state[f"gradient of denoiser.{key}"]
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=3e-5 * scale, msg=key)
        for key, buffer in models[0].denoiser.named_buffers():
            torch.testing.assert_close(
                state[f"denoiser.{key}"], buffer, rtol=1e-4, atol=1e-5, msg=key
            )


def test_an_error_on_one_process_is_raised_on_both(two: list[dict[str, Any]]) -> None:
    """Before a step for images and labels, in it for a loss: no process waits for one that has raised."""
    first, second = (found["errors"] for found in two)
    image, label = "the images hold not-a-number or infinity", r"labels must be in [0, 2]"
    assert second[:4] == [image, image, label, label]
    assert first[:4] == [f"process 1: {reason}" for reason in second[:4]]
    assert len(first) == len(second) == 5
    assert first[4].startswith("the denoiser's loss is not finite") and second[4] == first[4]


def test_sync_batch_norm_takes_over_tensors_and_activation() -> None:
    """Keys and tensors stay the same, timm's activation is kept, and other subclasses are rejected."""
    import timm

    network = timm.create_model("test_efficientnet", num_classes=0).train()
    twin = copy.deepcopy(network)
    weight = network.bn1.weight
    synchronize_statistics(network)
    assert isinstance(network.bn1, SyncBatchNorm) and network.bn1.weight is weight
    assert network.state_dict().keys() == twin.state_dict().keys()
    x = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(network(x), twin(x), rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(network.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(network.eval()(x), twin.eval()(x), rtol=1e-4, atol=1e-4)

    class Other(nn.BatchNorm2d):
        pass

    with pytest.raises(
        ValueError, match=r"sync_batch_norm: must be BatchNorm1d, 2d, 3d .* got Other"
    ):
        synchronize_statistics(nn.Sequential(Other(3)))


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2, 5)])
def test_sync_batch_norm_of_one_process_matches_pytorch(
    shape: tuple[int, ...], momentum: float | None
) -> None:
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    norm = kind(4, momentum=momentum)
    nn.init.uniform_(norm.weight)
    synced = SyncBatchNorm.from_norm(copy.deepcopy(norm))
    for _ in range(3):
        x = (torch.randn(shape) + 100).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        a, b = synced(x), norm(twin)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        direction = torch.randn(shape)
        a.backward(direction), b.backward(direction)
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-3, atol=1e-4)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(synced.state_dict()[name], value, rtol=1e-4, atol=1e-5)
