"""The order of training images."""

import pytest
import torch

from diffmic_fast.training.batches import epoch_batches


@pytest.mark.parametrize("count", [2, 3, 8, 9, 12, 13])
def test_every_image_is_in_one_batch_and_no_batch_has_one_image(count):
    batches = epoch_batches(count, 4, seed=1, epoch=0)
    assert sorted(i for b in batches for i in b) == list(range(count))
    assert min(map(len, batches)) >= 2
    assert max(map(len, batches)) <= 5


def test_batches_are_a_function_of_seed_and_epoch():
    assert epoch_batches(50, 8, 1, 2) == epoch_batches(50, 8, 1, 2)
    others = [epoch_batches(50, 8, seed, epoch) for seed, epoch in ((1, 3), (2, 2), (2, 1))]
    assert all(o != epoch_batches(50, 8, 1, 2) for o in others)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    epoch_batches(50, 8, 1, 2)
    assert torch.equal(torch.rand(1), expected)
    with pytest.raises(ValueError, match="at least 2 training images"):
        epoch_batches(1, 8, 0, 0)
