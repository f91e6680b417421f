"""SamplingOptions: ranges, the form of the command line, and the step table."""

from __future__ import annotations

import pytest
import torch

from diffmic_fast.config.run import SamplingConfig
from diffmic_fast.diffusion import SAMPLERS, make_steps
from diffmic_fast.diffusion.sampling_options import SamplingOptions


@pytest.mark.parametrize(
    ("text", "options", "method"),
    [
        ("ddpm", SamplingOptions("ddpm"), "ddpm"),
        ("ddpm_truncated:60", SamplingOptions("ddpm_truncated", 60), "ddpm_truncated 60"),
        ("ddim:20:0.5", SamplingOptions("ddim", 20, 0.5), "ddim 20 eta 0.5"),
    ],
)
def test_a_sampler_in_the_form_of_the_command_line(text, options, method):
    assert SamplingOptions("ddim", 3, 1.0).with_sampler(text) == options
    assert options.method == method
    other = SamplingOptions(samples=4, seed=5, precision="bf16", compile=True).with_sampler(text)
    assert (other.samples, other.seed, other.precision, other.compile) == (4, 5, "bf16", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ddmp:3", "NAME one of ddpm"),
        ("ddim:many", "STEPS and ETA must be numbers"),
        ("ddim:1:2:3", "NAME one of"),
        ("ddpm_truncated:3:0.5", r"eta must be 0 for the sampler 'ddpm_truncated', got 0\.5"),
        ("ddim:0", r"steps must be in \[1, T\] .* got 0"),
        ("ddim", r"steps must be in \[1, T\] .* got None"),
    ],
)
def test_another_form_is_rejected(text, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions().with_sampler(text)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"sampler": "euler"}, ValueError, "sampler must be one of ddpm, ddpm_truncated, ddim"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"samples": 1.0}, TypeError, r"samples must be a whole number, got 1\.0"),
        ({"steps": True}, TypeError, "steps must be a whole number, got True"),
        ({"seed": 2**64}, ValueError, f"seed must be from {-(2**63)} to {2**64 - 1}, got {2**64}"),
        ({"seed": -(2**63) - 1}, ValueError, "seed must be from"),
        ({"samples": 10**9}, ValueError, "samples must be at most 10000, got 1000000000"),
        ({"seed": None}, TypeError, "seed must be a whole number, got None"),
        ({"precision": "int4"}, ValueError, "precision must be one of fp32, .*got 'int4'"),
        ({"compile": 1}, TypeError, "compile must be True or False, got 1"),
        ({"sampler": "ddim", "steps": 3, "eta": 1.5}, ValueError, r"eta must be in \[0, 1\]"),
    ],
)
def test_values_out_of_range_are_rejected(values, error, message):
    with pytest.raises(error, match=message):
        SamplingOptions(**values)


def test_options_of_a_configuration():
    config = SamplingConfig(sampler="ddim", steps=7, eta=0.5, samples=3, seed=9)
    assert SamplingOptions.from_config(config) == SamplingOptions("ddim", 7, 0.5, 3, 9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_step_table_is_that_of_make_steps(schedule, sampler):
    steps = None if SAMPLERS[sampler].whole_chain else 5
    table = SamplingOptions(sampler, steps).step_table(schedule)
    for column, other in zip(table[:-1], make_steps(schedule, sampler, steps)[:-1], strict=True):
        assert torch.equal(column, other)


def test_steps_beyond_the_schedule_are_rejected(schedule):
    options = SamplingOptions("ddim", 101)
    for call in (lambda: options.check(100), lambda: options.step_table(schedule)):
        with pytest.raises(ValueError, match=r"steps must be in \[1, 100\] .* got 101"):
            call()
