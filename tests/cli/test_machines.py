"""The command line on machines with little memory, without GPUs and with other terminals."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

import diffmic_fast.commands
import diffmic_fast.data.dataset
import diffmic_fast.inference.predict
from diffmic_fast.cli import main
from diffmic_fast.data.decode import load_image

CONFIG = """
seed: 3
data: {{kind: folder, root: "{root}"}}
model: {{classes: 2, image_size: 32, timesteps: 10, feature_dim: 32, encoder: test_resnet,
        guidance_trunk: test_resnet, crops: 2, crop_size: 16}}
training: {{batch_size: 8, epochs: 1, guidance_epochs: 1, warmup_epochs: 1, ema_decay: 0.9,
           tensorboard: false}}
sampling: {{sampler: ddim, steps: 2, samples: 2}}
"""


def write_images(root, per_class):
    rng = np.random.default_rng(per_class)  # other images for another number
    for name, level in (("dark", 60), ("light", 190)):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(level - 40, level + 40, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images of two classes, a configuration of 1 + 1 epochs and a run trained with it."""
    root = tmp_path_factory.mktemp("machines")
    write_images(root / "images", 5)
    (root / "c.yml").write_text(CONFIG.format(root=root / "images"))
    assert (
        main(["train", "--config", str(root / "c.yml"), "--out", str(root / "run"), "--quiet"]) == 0
    )
    return root


def commands(work, images, out):
    """The commands that load images, each with two workers."""
    run, workers = str(work / "run"), ["--workers", "2"]
    data = [f"--set=data.root={images}"]
    return {
        "train": [
            "train",
            "--config",
            str(work / "c.yml"),
            "--set=data.workers=2",
            *data,
            "--out",
            str(out),
        ],
        "evaluate": ["evaluate", run, "--split", "train", *data, *workers],
        "calibrate": ["calibrate", run, "--images", str(images), *workers],
        "predict": ["predict", run, str(images), *workers],
    }


@pytest.mark.parametrize("command", ["train", "evaluate", "calibrate", "predict"])
def test_a_worker_that_is_killed_ends_the_command(work, tmp_path, capsys, monkeypatch, command):
    own = os.getpid()

    def load(source, **options):
        if os.getpid() != own and "17" in str(source):
            os.kill(os.getpid(), signal.SIGKILL)
        return load_image(source, **options)

    monkeypatch.setattr(diffmic_fast.data.dataset, "load_image", load)
    monkeypatch.setattr(diffmic_fast.inference.predict, "load_image", load)
    images = write_images(tmp_path / "images", 24)
    began = time.monotonic()
    assert main(commands(work, images, tmp_path / "out")[command]) == 1
    assert time.monotonic() - began < 60
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a process that loads images was ended by SIGKILL")


@pytest.mark.parametrize("command", ["train", "evaluate", "calibrate"])
def test_a_damaged_image_is_named_as_without_workers(work, tmp_path, capsys, command):
    images = write_images(tmp_path / "images", 24)
    path = images / "light" / "11.png"
    path.write_bytes(path.read_bytes()[:200])
    argv = commands(work, images, tmp_path / "out")[command]
    alone = [{"2": "0", "--set=data.workers=2": "--set=data.workers=0"}.get(a, a) for a in argv]
    outcomes = []
    for arguments in (alone, argv):
        status = main(arguments)
        outcomes.append((status, capsys.readouterr().err.splitlines()[-1]))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == 2
    assert str(path) in outcomes[0][1]


@pytest.mark.parametrize(
    ("option", "value", "least", "most"),
    [
        ("--workers", "-1", 0, 1024),
        ("--workers", "1025", 0, 1024),
        ("--workers", "two", 0, 1024),
        ("--threads", "100000", 1, 1024),
        ("--threads", "0", 1, 1024),
        ("--samples", "1000000000", 1, 10_000),
        ("--seed", "18446744073709551616", -(2**63), 2**64 - 1),
        ("--seed", "-9223372036854775809", -(2**63), 2**64 - 1),
    ],
)
def test_numbers_out_of_range_are_named(capsys, option, value, least, most):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "run", "images", option, value])
    assert caught.value.code == 2
    message = f"argument {option}: must be a whole number from {least} to {most}, got '{value}'"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "bound"),
    [
        ("seed=18446744073709551616", "less than or equal to 18446744073709551615"),
        ("seed=-1", "greater than or equal to 0"),
        ("sampling.seed=18446744073709551616", "less than or equal to 18446744073709551615"),
        ("sampling.seed=-9223372036854775809", "greater than or equal to -9223372036854775808"),
        ("sampling.samples=10001", "less than or equal to 10000"),
        ("data.split_seed=9223372036854775808", "less than or equal to 9223372036854775807"),
        ("data.split_seed=-1", "greater than or equal to 0"),
        ("data.workers=1025", "less than or equal to 1024"),
        ("model.timesteps=1000001", "less than or equal to 1000000"),
        ("training.batch_size=10000000000", "less than or equal to 2147483647"),
        ("training.draws=10001", "less than or equal to 10000"),
        ("training.epochs=9223372036854775808", "less than or equal to 9223372036854775807"),
    ],
)
def test_settings_out_of_range_are_named(work, tmp_path, capsys, setting, bound):
    argv = ["train", "--config", str(work / "c.yml"), "--out", str(tmp_path), "--set", setting]
    assert main(argv) == 2
    key, value = setting.split("=")
    assert f"config: {key} must be {bound}, got {value}\n" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-(2**63), 2**63, 2**64 - 1])
def test_the_ends_of_the_range_of_seeds_are_accepted(work, seed):
    run, images = str(work / "run"), str(work / "images")
    assert main(["predict", run, images, "--seed", str(seed)]) == 0


@pytest.mark.parametrize("device", ["mps", "meta", ""])
def test_other_devices_are_an_error_before_any_work(capsys, device):
    assert main(["predict", "no-run", "no-images", "--device", device]) == 2
    message = f"error: device must be auto, cpu, cuda or cuda:N, got '{device}'\n"
    assert capsys.readouterr().err == message


def test_memory_that_has_run_out_is_one_sentence(capsys, monkeypatch):
    def fail(args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setitem(diffmic_fast.commands.COMMANDS, "predict", fail)
    assert main(["predict", "run", "images"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory has run out: ")
    assert line.endswith("use a smaller --batch-size, or fewer --samples or --workers")


def run(argv, encoding, monkeypatch):
    """The exit status, and the bytes on a standard output of this encoding."""
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, newline="\n"))
        status = main(argv)
        sys.stdout.flush()
        return status, raw.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_rows_are_written_whatever_the_encoding_of_standard_output(
    work, tmp_path, monkeypatch, encoding
):
    """The same rows as in a file, but for the escapes."""
    images = tmp_path / "images"
    images.mkdir()
    names = ["片.png", "é.png", "$x.png", "line\nbreak.png", os.fsdecode(b"\xff.png")]
    for name in names:
        shutil.copy(work / "images" / "dark" / "00.png", images / name)
    argv = ["predict", str(work / "run"), str(images)]
    status, output = run(argv, encoding, monkeypatch)
    assert status == 0
    assert run([*argv, "--out", str(tmp_path / "x.csv")], encoding, monkeypatch) == (0, b"")
    expected = (tmp_path / "x.csv").read_bytes()
    for character in "片é":
        try:
            escaped = character.encode(encoding)
        except UnicodeEncodeError:
            escaped = character.encode("ascii", "backslashreplace")
        expected = expected.replace(character.encode(), escaped)
    assert output == expected
    assert len(names) == 5 and b"\xff.png" in output


def test_class_names_that_standard_output_lacks_and_figures_do_not_stop_evaluate(
    work, tmp_path, monkeypatch
):
    images, out = tmp_path / "images", tmp_path / "out"
    write_images(images, 3)
    (images / "dark").rename(images / "$片_{")
    (images / "light").rename(images / "ä$")
    train = ["train", "--config", str(work / "c.yml"), "--set", f"data.root={images}", "--out"]
    assert run([*train, str(out / "ü片")], "ascii", monkeypatch)[0] == 0
    argv = ["evaluate", str(out / "ü片"), "--split", "train", "--bootstrap", "5"]
    figure = ["--confusion", str(out / "c.png"), "--predictions", str(out / "p.csv")]
    assert run([*argv, *figure], "ascii", monkeypatch)[0] == 0
    assert (out / "c.png").stat().st_size > 0
    assert (out / "p.csv").read_text().count("$片_{") >= 3
