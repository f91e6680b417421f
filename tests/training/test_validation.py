"""Validation during training: published probabilities alone, without a bootstrap."""

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
        found = validate(steps, dataset, config, torch.device("cpu"), joint, counts.append)
        assert [r.method for r in found.results] == methods
        assert found.bootstrap == 0 and all(r.intervals == {} for r in found.results)
        assert ("validation_accuracy" in log_columns(found)) == joint
    assert counts == [4, 2, 4, 2]
