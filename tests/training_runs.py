"""What a training run left in its folder, and whether two left the same."""

import csv

import torch


def rows(out):
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def flat(value, prefix=""):
    """Every tensor and number of a nested checkpoint, by its path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {k: v for key, inner in items for k, v in flat(inner, f"{prefix}/{key}").items()}


def assert_same_run(one, other):
    """Checkpoints equal bit by bit, logs equal but for the times."""
    a, b = (flat(torch.load(p / "ckpt.pth", weights_only=True)) for p in (one, other))
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key], b[key]), key
        elif not key.endswith("seconds"):
            assert a[key] == b[key], key
    timed = ("seconds", "images_per_second")
    logs = [[{k: v for k, v in r.items() if k not in timed} for r in rows(p)]
            for p in (one, other)]  # fmt: skip
    assert logs[0] == logs[1]
