"""The run that tests of the command line share."""

import numpy as np
import pytest
from command_line import CONFIG
from PIL import Image

from diffmic_fast.cli import main


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """Images of two classes, a configuration of 1 + 1 epochs and a run trained with it."""
    root = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 2)):
        for name, level in (("dark", 60), ("light", 190)):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 40, level + 40, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    for name, epochs in (("c.yml", 1), ("long.yml", 3)):
        (root / name).write_text(CONFIG.format(root=root / "images", epochs=epochs))
    assert main(["train", "--config", str(root / "c.yml"), "--out", str(root / "run")]) == 0
    return root
