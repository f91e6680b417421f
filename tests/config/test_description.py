"""What the description of a run's model says, and the configuration that is made of it."""

from __future__ import annotations

import dataclasses

from training_runs import MODEL

from diffmic_fast.config.data import DataConfig
from diffmic_fast.config.description import ModelDescription
from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.config.run import RunConfig
from diffmic_fast.config.sampling import SamplingConfig


def test_names_of_the_checkpoint_come_before_those_of_the_configuration():
    """The order of the classes is that of the training."""
    run = RunConfig(
        DataConfig(class_names=("a", "b", "c")), MODEL, sampling=SamplingConfig("ddim", 2)
    )
    assert ModelDescription.from_run(run, ("c", "a", "b")).class_names == ("c", "a", "b")
    assert ModelDescription.from_run(run, None).class_names == ("a", "b", "c")


def test_a_run_of_a_description_samples_as_the_model_does():
    description = ModelDescription(MODEL, ("a", "b", "c"), Preprocessing(bit_depth=12))
    run = description.to_run()
    assert run is not None
    assert (run.sampling.sampler, run.sampling.steps) == ("ddpm", None)  # all steps
    assert run.data.augmentation.bit_depth == 12
    assert run.data.class_names == ("a", "b", "c") and run.model == MODEL
    assert dataclasses.replace(description, preprocessing=None).to_run() is None
