"""Two processes on the CPU against one: steps, whole runs, evaluation and prediction."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from process_groups import in_processes
from torch import Tensor, nn
from training_runs import assert_same_run, make_config, rows

from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion import make_steps as make_table
from diffmic_fast.models import DiffMIC, DiffMICConfig
from diffmic_fast.models.sync_batch_norm import SyncBatchNorm, synchronize_statistics
from diffmic_fast.ops.denoise import denoise
from diffmic_fast.training.checkpoint import NAME, load_model
from diffmic_fast.training.config import RunConfig
from diffmic_fast.training.evaluate import Method, evaluate
from diffmic_fast.training.interruption import Interrupted
from diffmic_fast.training.optimize import epoch_batches
from diffmic_fast.training.parallel import (
    Processes,
    divide,
    is_divided,
    own_share,
    sizes,
    started,
    undivided,
    whole,
)
from diffmic_fast.training.predict import predict_files
from diffmic_fast.training.steps import Steps
from diffmic_fast.training.trainer import Trainer, make_dataset

TOGETHER = {"sync_batch_norm": True, "gather_mmd": True}


def batch(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 3


def make_model(config: RunConfig) -> DiffMIC:
    torch.manual_seed(0)
    return DiffMIC(config.model)


def make_steps(model: DiffMIC, config: RunConfig, **changes: Any) -> Steps:
    # Clipped gradients, and Adam's steps, would be the same for gradients of another scale.
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
                found[f"gradient of {name}"] = entire(value.grad).clone()

    losses = steps.denoiser_step(images, labels, 0.5)
    keep_gradients()
    losses["guidance"] = steps.guidance_step(images, labels, 0.5)
    keep_gradients()
    found |= {name: entire(value).clone() for name, value in steps.model.state_dict().items()}
    assert steps.average is not None
    for name, value in steps.average.values.items():
        found[f"average of {name}"] = entire(value).clone()
    return losses, found


def elements_kept(steps: Steps) -> dict[str, int]:
    """How many numbers of each kind this process has."""
    assert steps.average is not None
    optimizers = steps.optimizer, steps.guidance_optimizer
    kinds = {
        "weights": list(steps.model.parameters()),
        "gradients": [p.grad for p in steps.model.parameters() if p.grad is not None],
        "averages": list(steps.average.values.values()),
        "moments": [s["exp_avg"] for o in optimizers for s in o.state.values()],
    }
    return {kind: sum(own_share(t).numel() for t in values) for kind, values in kinds.items()}


def entire(value: Tensor) -> Tensor:
    return value.full_tensor() if is_divided(value) else value  # type: ignore[attr-defined]


# ---- steps ------------------------------------------------------------------------------------

# Images of a batch, and what differs from the defaults.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "equal shards": (8, TOGETHER),
    "unequal shards": (7, TOGETHER),
    "draws": (5, TOGETHER | {"draws": 2}),
    "accumulation": (9, TOGETHER | {"accumulation": 2}),
    "recomputed": (7, TOGETHER | {"recompute": True}),
    "clipped": (7, TOGETHER | {"gradient_clip": 0.1}),
    "divided weights": (7, TOGETHER | {"fsdp": True}),
    "divided, accumulation": (9, TOGETHER | {"accumulation": 2, "fsdp": True, "recompute": True}),
    "divided, clipped": (7, TOGETHER | {"gradient_clip": 0.1, "fsdp": True}),
    "apart": (7, {}),
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
    steps = make_steps(make_model(config), config, **TOGETHER)
    for count in (8, 6, 7):
        images, labels = (steps.processes.shard(part) for part in batch(count))
        found["third"] = steps.denoiser_step(images, labels, 0.5)  # type: ignore[arg-type]
    found["refusals"] = []
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
                found["refusals"].append(str(error))
            parameters = dict(steps.model.named_parameters())
            assert wrong == "weight" or all(
                torch.equal(before[k], parameters[k]) for k in parameters
            )
    return found


@pytest.fixture(scope="module")
def shared_config(images: Path) -> RunConfig:
    return make_config(images)


@pytest.fixture(scope="module")
def two(shared_config: RunConfig) -> list[dict[str, Any]]:
    return in_processes(2, run_steps, shared_config)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], kind: str) -> None:
    """Gradients and running statistics to rounding; weights but for those whose gradient is rounding alone."""
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
            # Adam's first step is a rate times the gradient's sign, and rounding decides the sign of next to nothing.
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
def test_two_processes_are_one_with_the_whole_batch(
    name: str, two: list[dict[str, Any]], shared_config: RunConfig
) -> None:
    """Losses, every gradient, running statistics and averages, of equal and unequal shards."""
    count, changes = CASES[name]
    steps = make_steps(make_model(shared_config), shared_config, **changes)
    images, labels = batch(count)
    if "accumulation" in changes:  # a part is the processes' parts, one after the other
        order = torch.tensor([0, 1, 2, 5, 6, 3, 4, 7, 8])
        images, labels = images[order], labels[order]
    expected, state_of_one = both_steps(steps, images, labels)
    for rank in (0, 1):
        losses, state = two[rank][name]
        assert losses == pytest.approx(expected, rel=1e-4)
        compare(state, state_of_one, f"{name}, process {rank}")
    first, second = (two[rank][name][1] for rank in (0, 1))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_divided_weights_are_kept_once(two: list[dict[str, Any]]) -> None:
    """And gradients, averages and optimizer state: two shares make one of each, neither a large one."""
    for name in ("divided weights", "divided, accumulation"):
        for kind, count in two[0]["equal shards, kept"].items():
            shares = [found[f"{name}, kept"][kind] for found in two]
            assert sum(shares) == count and max(shares) < 0.6 * count, kind


def test_three_steps(two: list[dict[str, Any]], shared_config: RunConfig) -> None:
    steps = make_steps(make_model(shared_config), shared_config, **TOGETHER)
    for count in (8, 6, 7):
        third = steps.denoiser_step(*batch(count), 0.5)
    assert two[0]["third"] == two[1]["third"] == pytest.approx(third, rel=1e-2)


@pytest.mark.parametrize("name", ["apart", "gathered only"])
def test_apart_each_process_has_its_own_statistics(
    name: str, two: list[dict[str, Any]], shared_config: RunConfig
) -> None:
    """The gradient is the sum of the shards' by their shares; the MMD of all rows has its gradient in each. The first
    process's running statistics are everybody's."""
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
    if name == "apart":
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


def test_what_one_refuses_ends_both(two: list[dict[str, Any]]) -> None:
    """Before a step for images and labels, in it for a loss: nobody waits for somebody who has left."""
    first, second = (found["refusals"] for found in two)
    image, label = "the images hold not-a-number or infinity", r"labels must be in [0, 2]"
    assert second[:4] == [image, image, label, label]
    assert first[:4] == [f"process 1: {reason}" for reason in second[:4]]
    assert len(first) == len(second) == 5
    assert first[4].startswith("the denoiser's loss is not finite") and second[4] == first[4]


def test_synced_norms_take_over_what_is_there() -> None:
    """Keys and tensors stay; timm's keep their activation; what is not known is refused."""
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

    with pytest.raises(ValueError, match="sync_batch_norm: a Other is not known"):
        synchronize_statistics(nn.Sequential(Other(3)))


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2, 5)])
def test_a_synced_norm_alone_is_pytorchs(shape: tuple[int, ...], momentum: float | None) -> None:
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


def test_shards_are_contiguous_and_nearly_equal() -> None:
    assert sizes(7, 3) == [3, 2, 2] and sizes(2, 3) == [1, 1, 0]
    parts = [Processes(rank, 3).shard(range(7)) for rank in range(3)]
    assert [list(part) for part in parts] == [[0, 1, 2], [3, 4], [5, 6]]
    for count in (8, 9, 10, 11, 12, 13, 17):
        batches = epoch_batches(count, 8, seed=0, epoch=0, least=4)
        assert sorted(i for b in batches for i in b) == list(range(count))
        assert min(map(len, batches)) >= 4
    with pytest.raises(ValueError, match="at least 4 training images are needed, got 3"):
        epoch_batches(3, 8, seed=0, epoch=0, least=4)


# ---- whole runs -------------------------------------------------------------------------------


def with_training(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def run_whole(rank: int, config: RunConfig, folder: Path, files: list[Path]) -> dict[str, Any]:
    """A run, the same run interrupted and resumed, and what its model says of images."""
    found: dict[str, Any] = {}
    trainer = Trainer(config, folder / "unbroken", quiet=True)
    trainer.fit()
    found["best"] = trainer.best

    def stop(epoch: int, step: int) -> None:
        if (epoch, step) == (1, 1) and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    broken = folder / "broken"
    try:
        Trainer(config, broken, quiet=True, on_step=stop).fit()
    except Interrupted as interrupted:
        found["signal"] = interrupted.signum, str(interrupted)
    trainer = Trainer(config, broken, resume=broken / NAME, quiet=True)
    found["resumed at"] = trainer.epoch, trainer.position
    if rank == 0:
        shutil.copy(broken / NAME, folder / "middle.pth")

    def keep(epoch: int, step: int) -> None:
        if (epoch, step) == (2, 1) and rank == 0:
            shutil.copy(broken / NAME, folder / "epoch.pth")

    trainer.on_step = keep
    trainer.fit()
    model, _ = load_model(folder / "unbroken" / NAME)
    found["evaluation"] = whole_evaluation(model, config)
    found["predictions"] = whole_prediction(model, config, files)
    found["one file"] = whole_prediction(model, config, files[:1])
    return found


def run_divided(rank: int, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Both ways, the divided one interrupted and resumed too, and what each validation saw."""
    found: dict[str, Any] = {}
    Trainer(config, folder / "each has all", quiet=True).fit()
    config = with_training(config, fsdp=True)
    trainer = Trainer(config, folder / "divided", quiet=True)
    trainer.fit()
    assert trainer.last_evaluation is not None
    found["last"] = [r.probabilities for r in trainer.last_evaluation.results]

    def stop(epoch: int, step: int) -> None:
        if (epoch, step) == (1, 1) and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        Trainer(config, folder / "broken", quiet=True, on_step=stop).fit()
    Trainer(config, folder / "broken", resume=folder / "broken" / NAME, quiet=True).fit()
    return found


def test_a_run_of_divided_weights(shared_config: RunConfig, tmp_path: Path) -> None:
    """Its log and checkpoint are those of processes that have all; validations see the weights of their epoch."""
    config = with_training(shared_config, batch_size=4, **TOGETHER)
    last = in_processes(2, run_divided, config, tmp_path)[0]["last"]
    plain, divided = (tmp_path / name for name in ("each has all", "divided"))
    for a, b in zip(rows(divided), rows(plain), strict=True):
        for key in ("loss", "guidance_loss", "noise_loss", "mmd_global"):
            assert a[key] == b[key] or float(a[key]) == pytest.approx(float(b[key]), rel=0.02), key
    assert_same_run(divided, tmp_path / "broken")
    files = [torch.load(folder / NAME, weights_only=True) for folder in (divided, plain)]
    assert describe(files[0]) == describe(files[1])
    model, _ = load_model(divided / NAME)
    dataset = make_dataset(config, open_source(config.data, "validation"), train=False)
    s = config.sampling
    again = evaluate(
        model, dataset, [Method.of(s)], samples=s.samples, seed=s.seed, batch_size=s.batch_size
    )
    for result, seen in zip(again.results, last, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(result.probabilities), torch.as_tensor(seen), rtol=1e-4, atol=1e-5
        )


def describe(value: Any) -> Any:
    """Keys, types and shapes of what a checkpoint holds."""
    if isinstance(value, dict):
        return {key: describe(each) for key, each in value.items() if key not in ("fsdp", "random")}
    if isinstance(value, (list, tuple)):
        return [type(value), *map(describe, value)]
    return (type(value), *((value.shape, value.dtype) if isinstance(value, Tensor) else ()))


def test_weights_are_read_anew_each_time_they_are_made_whole() -> None:
    """What a chain keeps of weights goes by versions, which all-gathered memory does not have by itself."""
    values = in_processes(2, run_chains)
    for first, second, expected in values:
        assert not torch.equal(first, second)
        torch.testing.assert_close(second, expected)


def run_chains(rank: int) -> list[Tensor]:
    """A chain, one after the weights have changed, and what it should be."""
    torch.manual_seed(0)
    model = DiffMIC(
        DiffMICConfig(classes=3, feature_dim=32, image_size=32, crop_size=16, timesteps=8)
    )
    features, prior = torch.randn(4, 32), torch.full((4, 3), 1 / 3)
    steps = make_table(model.schedule, "ddpm")

    def chain() -> Tensor:
        with undivided(model.denoiser), torch.no_grad():
            versions.append(model.denoiser.lin2.lin.weight._version)
            return denoise(features, prior, prior, model.denoiser.weights(), steps, seed=1).clone()

    model.eval()
    versions: list[int] = []
    divide(model.denoiser)
    found = [chain()]
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            own_share(parameter).mul_(1.5)
    found.append(chain())
    assert versions[1] > versions[0]
    state = whole(dict(model.denoiser.state_dict()), Processes(0, 2))
    twin = DiffMIC(model.config).denoiser.eval()
    twin.load_state_dict(state)
    with torch.no_grad():
        found.append(denoise(features, prior, prior, twin.weights(), steps, seed=1))
    return found


def whole_evaluation(model: DiffMIC, config: RunConfig) -> Any:
    dataset = make_dataset(config, open_source(config.data, "validation"), train=False)
    found = evaluate(model, dataset, [Method("ddim", 3)], samples=2, batch_size=2)
    return found.labels, [result.probabilities for result in found.results]


def whole_prediction(model: DiffMIC, config: RunConfig, files: list[Path]) -> Any:
    classes = ("blue", "green", "red")
    return predict_files(
        model, files, classes, config.data.augmentation, Method("ddim", 3), batch_size=2
    )


@pytest.fixture(scope="module")
def runs(shared_config: RunConfig, images: Path, tmp_path_factory) -> tuple[Path, Any, list[Path]]:
    folder = tmp_path_factory.mktemp("parallel")
    files = sorted((images / "test").glob("*/*.png"))
    damaged = folder / "damaged.png"
    damaged.write_bytes(files[0].read_bytes()[:100])
    files.insert(4, damaged)
    config = with_training(shared_config, batch_size=4, **TOGETHER)
    return folder, in_processes(2, run_whole, config, folder, files), files


def test_a_run_of_two_is_that_of_one_with_their_batch(
    runs: tuple[Path, Any, list[Path]], shared_config: RunConfig, tmp_path: Path
) -> None:
    """Its log to rounding, which grows from step to step; one checkpoint, that a single process reads."""
    folder, found, _ = runs
    Trainer(with_training(shared_config, batch_size=8), tmp_path, quiet=True).fit()
    for a, b in zip(rows(folder / "unbroken"), rows(tmp_path), strict=True):
        for key in ("epoch", "phase", "step", "images"):
            assert a[key] == b[key]
        for key in ("loss", "guidance_loss", "noise_loss", "mmd_global"):
            if a[key]:
                assert float(a[key]) == pytest.approx(float(b[key]), rel=0.02), key
    assert found[0]["best"] == found[1]["best"]
    names = {path.name for path in (folder / "unbroken").iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    a, b = (torch.load(p / NAME, weights_only=True) for p in (folder / "unbroken", tmp_path))
    assert a[0].keys() == b[0].keys()


def test_a_signal_to_one_stops_both_and_the_run_goes_on(runs: tuple[Path, Any, list[Path]]) -> None:
    folder, found, _ = runs
    for each in found:
        assert each["signal"][0] == signal.SIGTERM
        assert "interrupted in epoch 2 of 3, after 1 steps of it" in each["signal"][1]
        assert each["resumed at"] == (1, 1)
    assert_same_run(folder / "unbroken", folder / "broken")


def test_another_number_of_processes_goes_on_between_epochs(
    runs: tuple[Path, Any, list[Path]], shared_config: RunConfig, tmp_path: Path
) -> None:
    """As one with their batch; not with another one, nor in the middle of an epoch."""
    folder, _, _ = runs
    config = with_training(shared_config, **TOGETHER)
    halfway = folder / "epoch.pth"
    for size, path, message in (
        (4, halfway, "was trained by 2 processes with 8 images a step, these are 1 with 4"),
        (8, folder / "middle.pth", "between two epochs"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(with_training(config, batch_size=size), tmp_path / "no", resume=path)
    trainer = Trainer(with_training(config, batch_size=8), tmp_path, resume=halfway, quiet=True)
    assert (trainer.epoch, trainer.position) == (2, 0)
    trainer.fit()
    a, b = rows(folder / "unbroken")[-1], rows(tmp_path)[-1]
    assert a["step"] == b["step"] and float(a["loss"]) == pytest.approx(float(b["loss"]), rel=0.02)


def test_evaluation_and_prediction_in_shards(
    runs: tuple[Path, Any, list[Path]], shared_config: RunConfig
) -> None:
    """In the order of the input, as one process has them; a process without images, and a damaged file."""
    folder, found, files = runs
    model, _ = load_model(folder / "unbroken" / NAME)
    labels, probabilities = whole_evaluation(model, shared_config)
    predictions = whole_prediction(model, shared_config, files)
    assert [row.file for row in predictions.rows] == [str(f) for f in files if f.stem != "damaged"]
    for each in found:
        assert (each["evaluation"][0] == labels).all()
        for a, b in zip(each["evaluation"][1], probabilities, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-5)
        assert each["predictions"].unreadable == predictions.unreadable
        assert len(predictions.unreadable) == 1
        for a, b in zip(each["predictions"].rows, predictions.rows, strict=True):
            assert (a.file, a.label) == (b.file, b.label)
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)
        assert len(each["one file"].rows) == 1


def test_torchrun(shared_config: RunConfig, images: Path, tmp_path: Path) -> None:
    """Train and predict from the command line, what is printed and written once."""
    config = with_training(shared_config, batch_size=2, epochs=1, **TOGETHER)
    config.save(tmp_path / "run.yml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIFFMIC_BACKEND": "auto"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [*start, "-m", "diffmic_fast", *map(str, arguments), "--device", "cpu"]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    done = run("train", "--config", "run.yml", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 2 epochs") == 1
    assert done.stderr.count("epoch 2/2 joint") == 1
    again = run("train", "--config", "run.yml", "--out", "run")
    assert again.returncode != 0 and "already holds a run" in again.stderr
    done = run("predict", "run", images / "test", "--out", "found.csv")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 7
    done = run("predict", "run", images / "test", "--figure", "found.png")
    assert done.returncode != 0 and "are for a single process" in done.stderr


def test_without_torchrun_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with started("auto") as device:
        assert device == "auto" and not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="'cuda:1' is one GPU, and torchrun started 2"),
        started("cuda:1"),
    ):
        pass
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ValueError, match="has no GPU"), started("cuda"):
        pass
