"""Validation during training: published probabilities alone, without a bootstrap."""

import dataclasses

import numpy as np
import torch

from diffmic_fast.calibration import fit_calibration
from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.evaluate import GUIDANCE
from diffmic_fast.models import DiffMIC
from diffmic_fast.training.datasets import make_dataset
from diffmic_fast.training.steps import Steps
from diffmic_fast.training.validation import log_columns, validate


def test_a_calibration_of_earlier_weights_takes_no_part(config):
    """It would stand where the sampler is expected, as the second result."""
    torch.manual_seed(0)
    model = DiffMIC(config.model)
    labels = torch.arange(30) % 3
    model.calibration = fit_calibration(
        torch.randn(30, 1, 3), torch.full((30, 3), 1 / 3), labels, SamplingOptions("ddim", 2)
    )
    steps = Steps(model, config.training, seed=3)
    dataset = make_dataset(config, open_source(config.data, "validation"), train=False)
    counts: list[int] = []
    for joint, methods in ((False, [GUIDANCE]), (True, [GUIDANCE, "ddim 2"])):
        found, panels = validate(steps, dataset, config, torch.device("cpu"), joint, counts.append)
        assert panels == []  # without TensorBoard
        assert [r.method for r in found.results] == methods
        assert found.bootstrap == 0 and all(r.intervals == {} for r in found.results)
        assert ("validation_accuracy" in log_columns(found)) == joint
    assert counts == [4, 2, 4, 2]


def test_panels_show_evenly_spaced_images_as_the_averaged_model_predicts_them(config):
    torch.manual_seed(0)
    training = dataclasses.replace(config.training, tensorboard=True)
    config = dataclasses.replace(config, training=training)
    model = DiffMIC(config.model)
    steps = Steps(model, config.training, seed=3)
    with torch.no_grad():  # the weights in training differ from their average
        model.denoiser.lin4.bias += torch.tensor([1e5, 0.0, -1e5])
    dataset = make_dataset(config, open_source(config.data, "validation"), train=False)
    state = torch.get_rng_state()
    _, panels = validate(steps, dataset, config, torch.device("cpu"), True, lambda images: None)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(dataset) == 6
    entries = [dataset.table.entries[i] for i in (0, 1, 3, 4)]
    assert [(p.name, p.truth) for p in panels] == [(e.name, e.label) for e in entries]
    images = torch.stack([dataset[i][0] for i in (0, 1, 3, 4)])
    with steps.average.applied():
        expected = model.eval().predict(images, **dataclasses.asdict(options(config)))
    found = np.stack([p.probabilities for p in panels])
    np.testing.assert_allclose(found, expected.probabilities.numpy(), atol=1e-5)
    raw = model.predict(images, **dataclasses.asdict(options(config)))
    assert not np.allclose(found, raw.probabilities.numpy(), atol=1e-3)
    _, none = validate(steps, dataset, config, torch.device("cpu"), False, lambda images: None)
    assert none == []  # the diffusion was not evaluated


def options(config):
    return SamplingOptions.from_config(config.sampling)
