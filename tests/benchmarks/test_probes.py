"""The probes of the machine's limits that benchmarks hold `denoise` against."""

from __future__ import annotations

import re
import time

import pytest
import torch
from denoise_cases import INSTRUCTIONS, PRECISIONS

from diffmic_fast import _native


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("threads", [1, 3])
def test_read_probe_reads_every_element(instructions: str, threads: int) -> None:
    for count in (0, 1, 127, 100_003):
        x = torch.arange(count, dtype=torch.float32) % 7
        found = _native.extension().read_probe(x, threads, instructions)
        assert found == x.double().sum()


def test_calibration_names_the_reader_that_it_leaves() -> None:
    x = torch.arange(300_001, dtype=torch.float32) % 5
    named = _native.extension().calibrate_read_probe(x, 2)
    assert re.fullmatch(r"[1-8] streams, \d+ bytes ahead", named)
    assert _native.extension().read_probe(x, 2) == x.double().sum()
    with pytest.raises(ValueError, match="calibrate_read_probe: x must be compact"):
        _native.extension().calibrate_read_probe(x[::2])


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_multiply_add_probe_takes_time_for_each_product(instructions: str, precision: str) -> None:
    def seconds(count: int) -> float:
        begin = time.perf_counter()
        _native.extension().multiply_add_probe(count, 1, instructions, precision)
        return time.perf_counter() - begin

    seconds(1)
    little, much = (min(seconds(count) for _ in range(5)) for count in (2**22, 2**27))
    assert much > 4 * little
