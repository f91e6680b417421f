"""A small run of the command line, for its tests."""

from __future__ import annotations

from typing import Any

from diffmic_fast.cli import main

# Of two classes, in folders below `root`.
CONFIG = """
seed: 3
data: {{kind: folder, root: "{root}", train_table: train, test_table: test}}
model: {{classes: 2, image_size: 32, timesteps: 10, feature_dim: 32, encoder: test_resnet,
        guidance_trunk: test_resnet, crops: 2, crop_size: 16}}
training: {{batch_size: 4, epochs: {epochs}, guidance_epochs: 1, warmup_epochs: 1, ema_decay: 0.9,
           tensorboard: false}}
sampling: {{sampler: ddim, steps: 2, samples: 2}}
"""


def one_error(capsys: Any, argv: list[str], *parts: str) -> None:
    """Assert that the command exits with 2 and prints a single line that contains all parts."""
    assert main(argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    for part in parts:
        assert part in err
