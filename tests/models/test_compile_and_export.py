"""The model under torch.compile, torch.export and torch.func: the eager numbers, for any batch."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch_versions import traces_context_managers

from diffmic_fast import DiffMIC, DiffMICConfig
from diffmic_fast.models.diffmic import DiffMICLoss

pytestmark = pytest.mark.usefixtures("auto_backend")

CLASSES, TIMESTEPS, PIXELS = 3, 20, 32


def network(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, channels, 3, padding=1)
    )  # fmt: skip


@pytest.fixture(scope="module")
def built() -> DiffMIC:
    """A small model, in training mode, whose running statistics have seen images."""
    torch.manual_seed(0)
    config = DiffMICConfig(
        classes=CLASSES,
        image_size=PIXELS,
        timesteps=TIMESTEPS,
        feature_dim=10,
        guidance_trunk="resnet18",
        crops=2,
        crop_size=9,
    )
    model = DiffMIC(config).train()
    # A graph of thirty layers instead of three hundred.
    model.denoiser.encoder_x = nn.Sequential(*network(10), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.guidance.ds_net, model.guidance.dn_resnet = network(512), network(512)
    model.loss(torch.randn(5, 3, PIXELS, PIXELS), torch.tensor([0, 1, 2, 0, 1]))
    return model


@pytest.fixture
def model(built: DiffMIC) -> DiffMIC:
    return copy.deepcopy(built)


def batch(count: int, draws: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, labels, timesteps and noise."""
    generator = torch.Generator().manual_seed(count)
    return (
        torch.randn(count, 3, PIXELS, PIXELS, generator=generator),
        torch.randint(0, CLASSES, (count,), generator=generator),
        torch.randint(0, TIMESTEPS, (count * draws,), generator=generator),
        torch.randn(count * draws, CLASSES, generator=generator),
    )


def equal_states(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    other = b.state_dict()
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, other[name], **tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "draws", "tolerance"),
    [("aot_eager", 3, 1e-6), pytest.param("inductor", 1, 1e-4, id="inductor")],
)
def test_the_loss_is_one_graph_for_any_batch(
    model: DiffMIC, backend: str, draws: int, tolerance: float
) -> None:
    """Value, gradients and running statistics of steps with batches of any size, without recompilation."""
    torch._dynamo.reset()
    eager = copy.deepcopy(model)
    graphs: list[object] = []

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def loss(of: DiffMIC, *arguments: Tensor) -> DiffMICLoss:
        images, labels, timesteps, noise = arguments
        return of.loss(images, labels, draws=draws, timesteps=timesteps, noise=noise)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counted)
    for count in (6, 9, 5, 12, 7):
        if count == 5:
            before = len(
                graphs
            )  # torch's own convolutions distinguish small batches from large ones
        arguments = batch(count, draws)
        expected, found = loss(eager, *arguments), compiled(model, *arguments)
        torch.testing.assert_close(tuple(found), tuple(expected), rtol=tolerance, atol=tolerance)
        gradients = []
        for of, losses in ((eager, expected), (model, found)):
            parameters = list(of.denoiser.parameters())
            gradients.append(torch.autograd.grad(losses.total, parameters))
            assert of.training and of.guidance.training  # the guidance model ran in evaluation mode
        scale = max(float(gradient.abs().max()) for gradient in gradients[0])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance * scale)
    equal_states(model, eager, rtol=10 * tolerance, atol=tolerance)
    assert len(graphs) == before


def test_a_compiled_loss_draws_as_the_eager_one(model: DiffMIC) -> None:
    torch._dynamo.reset()
    images, labels, *_ = batch(6)
    compiled = torch.compile(DiffMIC.loss, fullgraph=True, backend="aot_eager")
    found = []
    for loss in (DiffMIC.loss, compiled):
        torch.manual_seed(3)
        found.append(loss(copy.deepcopy(model), images, labels))
    torch.testing.assert_close(tuple(found[0]), tuple(found[1]))


def test_a_batchnorm_that_runs_twice_is_rejected_in_a_graph_too(model: DiffMIC) -> None:
    torch._dynamo.reset()
    norm = nn.BatchNorm1d(10)
    model.denoiser.encoder_x = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * PIXELS**2, 10), norm, nn.Linear(10, 10), norm
    )
    compiled = torch.compile(DiffMIC.loss, fullgraph=True, backend="aot_eager")
    for loss in (DiffMIC.loss, compiled):
        with pytest.raises(RuntimeError, match="runs a BatchNorm layer more than once"):
            loss(model, *batch(4)[:2])


def test_given_timesteps_and_noise(model: DiffMIC) -> None:
    """They are used instead of drawn ones; errors name those that do not fit."""
    images, labels, timesteps, noise = batch(6)
    first = copy.deepcopy(model).loss(images, labels, timesteps=timesteps, noise=noise)
    torch.manual_seed(1)
    again = copy.deepcopy(model).loss(images, labels, timesteps=timesteps, noise=noise)
    assert torch.equal(first.total, again.total)
    other = copy.deepcopy(model).loss(images, labels, timesteps=timesteps, noise=-noise)
    assert not torch.equal(first.total, other.total)
    for wrong, message in (
        ({"timesteps": timesteps[:5]}, r"timesteps must be \[rows=6\], got \(5,\)"),
        ({"timesteps": timesteps + TIMESTEPS}, r"timesteps must be in \[0, 19\]"),
        ({"noise": noise[:, :2]}, r"noise must be \[rows=6, C=3\], got \(6, 2\)"),
        ({"noise": noise, "draws": 2}, r"noise must be \[rows=12, C=3\], got \(6, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.loss(images, labels, **wrong)
    with pytest.raises(TypeError, match="noise must be"):
        model.loss(images, labels, noise=noise.long())


@traces_context_managers
def test_eval_forward_is_one_graph_for_any_batch(model: DiffMIC) -> None:
    """Guidance, encoder, hashes of the images and the whole chain."""
    torch._dynamo.reset()
    model.eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (6, 2, 9):
        images = batch(count)[0]
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-6)


@traces_context_managers
def test_eval_forward_is_exported_saved_and_loaded(model: DiffMIC) -> None:
    model.eval()
    size = torch.export.Dim("batch", min=1)
    for part in (model, model.guidance):
        program = torch.export.export(part, (batch(4)[0],), dynamic_shapes=({0: size},))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for count in (4, 1, 7):
            images = batch(count)[0]
            with torch.no_grad():
                expected = part(images)
            torch.testing.assert_close(loaded(images), expected, rtol=1e-5, atol=1e-6)
            if part is model.guidance:
                assert type(loaded(images)) is type(expected)


def test_denoiser_is_exported(model: DiffMIC) -> None:
    denoiser = model.denoiser.eval()
    size = torch.export.Dim("batch", min=1)

    def arguments(count: int) -> tuple[Tensor, ...]:
        images, _, timesteps, noise = batch(count)
        return images, noise, timesteps, noise.softmax(dim=1)

    program = torch.export.export(denoiser, arguments(4), dynamic_shapes=({0: size},) * 4)
    for count in (4, 1, 7):
        with torch.no_grad():
            expected = denoiser(*arguments(count))
        torch.testing.assert_close(program.module()(*arguments(count)), expected)


def test_functional_call_and_its_gradient(model: DiffMIC) -> None:
    """The loss as a function of the denoiser's parameters: torch.func.grad gives what backward() gives."""

    class Loss(nn.Module):
        def __init__(self, of: DiffMIC) -> None:
            super().__init__()
            self.model = of

        def forward(self, *arguments: Tensor) -> Tensor:
            images, labels, timesteps, noise = arguments
            return self.model.loss(images, labels, timesteps=timesteps, noise=noise).total

    other = Loss(copy.deepcopy(model))
    parameters = {
        f"model.denoiser.{name}": value.detach().clone()
        for name, value in model.denoiser.named_parameters()
    }
    arguments = batch(6)
    model.loss(
        *arguments[:2], timesteps=arguments[2], noise=arguments[3]
    ).total.backward()  # fmt: skip
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()  # functional_call must use the values that it is given
        for name, value in model.guidance.named_parameters():
            other.model.guidance.get_parameter(name).copy_(value)

    def of_parameters(values: dict[str, Tensor]) -> Tensor:
        buffers = {name: value.clone() for name, value in other.named_buffers()}
        return torch.func.functional_call(other, {**values, **buffers}, arguments)

    gradients = torch.func.grad(of_parameters)(parameters)
    scale = max(float(p.grad.abs().max()) for p in model.denoiser.parameters())
    for name, value in model.denoiser.named_parameters():
        found = gradients[f"model.denoiser.{name}"]
        torch.testing.assert_close(found, value.grad, rtol=1e-3, atol=1e-5 * scale, msg=name)
