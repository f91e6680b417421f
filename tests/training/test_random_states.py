"""States of random number generators in a checkpoint."""

import random

import numpy as np
import torch

from diffmic_fast.training.random_states import random_states, restore_random_states


def test_restored_generators_repeat_their_draws(tmp_path):
    generator = torch.Generator().manual_seed(5)
    np.random.standard_normal()  # leaves a cached second normal number
    states = random_states({"noise": generator})
    torch.save(states, tmp_path / "r")

    def draw():
        return (
            random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist(),
            torch.rand(3, generator=generator).tolist(),
        )  # fmt: skip

    first = draw()
    assert draw() != first
    restored = torch.load(tmp_path / "r", weights_only=True)
    restore_random_states(restored, {"noise": generator})
    assert draw() == first
