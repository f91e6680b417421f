"""The comparison of precisions, on synthetic probabilities and with a small model."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from diffmic_fast import DiffMIC, DiffMICConfig
from diffmic_fast.config.data import AugmentationConfig
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.table import ArrayImage, ImageEntry, ImageTable
from diffmic_fast.data.transforms import evaluation_transform
from diffmic_fast.diffusion.sampling_options import SamplingOptions

SOURCE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def precision_labels():
    """The script, from its file: an installed package has no benchmarks."""
    path = SOURCE / "benchmarks" / "precision_labels.py"
    if not path.exists():
        pytest.skip("the benchmarks are not beside the tests")
    spec = importlib.util.spec_from_file_location("precision_labels", path)
    script = sys.modules["precision_labels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    yield script
    del sys.modules["precision_labels"]


def test_counts_and_worst_images(precision_labels):
    exact = torch.tensor([[0.9, 0.1], [0.504, 0.496], [0.4, 0.6]])
    other = torch.tensor([[0.8, 0.2], [0.499, 0.501], [0.55, 0.45]])
    result = precision_labels.compare("bf16", exact, other, ["a", "b", "c"])
    assert (result.images, result.same, result.clear, result.same_clear) == (3, 1, 2, 1)
    assert result.largest == pytest.approx(0.15) and result.mean == pytest.approx(0.255 / 3)
    assert [row[0] for row in result.worst] == ["c", "a", "b"]
    assert result.worst[0][2:] == (1, 0)
    text = io.StringIO()
    precision_labels.show([result], Console(file=text, width=120))
    assert "1 of 2" in text.getvalue() and "c: 1.50e-01, label 1 to 0" in text.getvalue()


def test_a_small_model(precision_labels):
    torch.manual_seed(0)
    config = DiffMICConfig(
        classes=2, image_size=32, timesteps=12, feature_dim=32, encoder="test_resnet",
        guidance_trunk="test_resnet", crops=2, crop_size=16,
    )  # fmt: skip
    model = DiffMIC(config).eval()
    pixels = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    entries = tuple(ImageEntry(str(i), i % 2, ArrayImage(pixels, i)) for i in range(5))
    dataset = ImageDataset(
        ImageTable(("no", "yes"), entries), evaluation_transform(32, AugmentationConfig())
    )
    results = precision_labels.agreements(
        model, dataset, SamplingOptions("ddim", 3), batch_size=2, precisions=("fp32", "bf16")
    )
    assert [r.precision for r in results] == ["bf16"] and results[0].images == 5
    assert 0 < results[0].largest < 0.1 and results[0].mean < results[0].largest
    assert results[0].same_clear == results[0].clear
