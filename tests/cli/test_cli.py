"""The command line, end to end on a few small images, and its error messages."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import one_error
from PIL import Image

from diffmic_fast.cli import main, make_parser
from diffmic_fast.ops.denoise import PRECISIONS

SOURCE = Path(__file__).parents[2]


def test_train_writes_checkpoint_and_log(work):
    assert (work / "run" / "ckpt.pth").is_file()
    with open(work / "run" / "log.csv", newline="") as file:
        assert [r["epoch"] for r in csv.DictReader(file)] == ["0", "1"]


@pytest.mark.parametrize("workers", [0, 1])
def test_train_names_all_unreadable_images_before_it_starts(work, tmp_path, capsys, workers):
    """Of training and validation; also those that only decoding finds, with data.scan=full."""
    images = tmp_path / "images"
    shutil.copytree(work / "images", images)
    for name in ("train/dark/1.png", "test/light/0.png"):
        (images / name).write_bytes((images / name).read_bytes()[:-200])
    inside = images / "train/light/3.png"
    content = bytearray(inside.read_bytes())
    content[300:340] = bytes(40)
    inside.write_bytes(content)
    changes = [f"data.root={images}", "data.validation_table=test", f"data.workers={workers}"]
    argv = ["train", "--config", str(work / "c.yml"), "--out", str(tmp_path / "run")]
    argv += [f"--set={change}" for change in changes]
    for scan, count in (("quick", 2), ("full", 3)):
        assert main([*argv, f"--set=data.scan={scan}"]) == 2
        err = capsys.readouterr().err
        assert f"error: data: {count} images cannot be read" in err
        assert str(images / "train/dark/1.png") in err and str(images / "test/light/0.png") in err
        assert (str(inside) in err) == (scan == "full")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_skipped_files_and_unused_bits_are_reported(work, tmp_path, capsys, command):
    """Of 12-bit images in 16-bit files, with the setting of 16."""
    images = tmp_path / "images"
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (images / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 4096, (32, 32), dtype=np.uint16)
            Image.fromarray(pixels).save(images / name / f"{i}.png")
    (images / "dark" / "notes.txt").write_text("text")
    run = tmp_path / "run"
    shutil.copytree(work / "run", run)
    changes = ["data.train_table=null", "data.test_table=null", f"data.root={images}"]
    argv = [command, str(run), "--split", "train", *(f"--set={change}" for change in changes)]
    assert main(argv) == 0
    err = capsys.readouterr().err
    assert f"skipped, not an image: 1 ({images}/dark/notes.txt)" in err
    assert "data.augmentation.bit_depth=12" in err


def test_evaluate_prints_a_table_and_writes_files(work, tmp_path, capsys):
    status = main(
        ["evaluate", str(work / "run"), "--sampler", "ddpm", "--sampler", "ddpm_truncated:4",
         "--samples", "1", "--json", str(tmp_path / "e.json"), "--bootstrap", "20",
         "--predictions", str(tmp_path / "new" / "p.csv"), "--confusion", str(tmp_path / "c.png")]
    )  # fmt: skip
    assert status == 0
    out = capsys.readouterr().out
    assert "guidance alone" in out and "ddpm_truncated 4" in out
    value = json.loads((tmp_path / "e.json").read_text())
    assert [r["method"] for r in value["results"]] == ["guidance alone", "ddpm", "ddpm_truncated 4"]
    assert value["classes"] == ["dark", "light"]
    assert value["bootstrap"]["resamples"] == 20 and "20 bootstrap resamples" in out
    with open(tmp_path / "new" / "p.csv", newline="") as file:
        assert [r["truth"] for r in csv.DictReader(file)] == ["dark", "dark", "light", "light"]
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_seen_images_need_allow_seen(work, tmp_path, capsys, command):
    """A duplicate across splits, as published data sets have."""
    shutil.copytree(work / "images", tmp_path / "images")
    shutil.copy(tmp_path / "images/train/dark/4.png", tmp_path / "images/test/dark/4.png")
    run = tmp_path / "run"
    shutil.copytree(work / "run", run)
    argv = [command, str(run), "--split", "test", "--set", f"data.root={tmp_path / 'images'}"]
    one_error(capsys, argv, "1 of 5 test images were training images", "dark/4.png", "--allow-seen")
    assert main([*argv, "--allow-seen"]) == (0 if command == "evaluate" else 2)
    err = capsys.readouterr().err
    assert "--allow-seen: 1 of 5 test images were training images" in err
    assert command == "evaluate" or "must be at least 20 validation images" in err


@pytest.mark.parametrize("command", ["predict", "evaluate", "calibrate"])
def test_another_model_or_preprocessing_needs_override(work, tmp_path, capsys, command):
    run = tmp_path / "run"
    shutil.copytree(work / "run", run)
    other = tmp_path / "other.yml"
    text = (work / "c.yml").read_text().replace("image_size: 32", "image_size: 48")
    other.write_text(text.replace("samples: 2", "samples: 3"))
    argv = [command, str(run)]
    argv += [str(work / "images/test")] if command == "predict" else ["--split", "test"]
    one_error(capsys, [*argv, "--config", str(other)],
              "model.image_size: 32 in the checkpoint, 48 now", "--override")  # fmt: skip
    for change, text in (
        ("model.schedule=cosine", "model.schedule: 'linear' in the checkpoint, 'cosine' now"),
        ("data.augmentation.bit_depth=12", "data.augmentation.bit_depth: 16"),
        ("data.augmentation.mean=[0.5,0.5,0.5]", "data.augmentation.mean"),
        ("model.crop_foreground=true", "model.crop_foreground"),
    ):
        one_error(capsys, [*argv, "--set", change], text, "--override")
    for order, found in (("light,dark", "light, dark"), ("dark,bright", "dark, bright")):
        one_error(capsys, [*argv, "--override", "--set", f"data.class_names=[{order}]"],
                  "data.class_names must be those of", "in order: dark, light", f"got {found}")  # fmt: skip
    if command == "calibrate":
        return
    free = ["data.augmentation.rotation=3", "sampling.steps=3", "data.cache=false"]
    assert main([*argv, *(f"--set={change}" for change in free)]) == 0
    assert "--override" not in capsys.readouterr().err
    assert main([*argv, "--config", str(other), "--override"]) == 0
    err = capsys.readouterr().err
    assert "--override: model.image_size: 32 in the checkpoint, 48 now\n" in err
    assert "sampling" not in err


@pytest.fixture(scope="module")
def clinic(work):
    """Folders of other images: 2 x 15, darker than those that trained the model."""
    rng = np.random.default_rng(7)
    for name, level in (("dark", 50), ("light", 170)):
        folder = work / "clinic" / name
        folder.mkdir(parents=True)
        for i in range(15):
            pixels = rng.integers(level - 40, level + 40, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return work / "clinic"


def test_a_clinic_calibrates_on_its_own_images(work, clinic, tmp_path, capsys):
    path = tmp_path / "ckpt.pth"
    path.write_bytes((work / "run" / "ckpt.pth").read_bytes())
    image = str(clinic / "dark" / "0.png")
    assert main(["predict", str(path), image]) == 0
    printed = capsys.readouterr()
    assert "probabilities are not calibrated: the model has no calibration" in printed.err
    assert next(csv.DictReader(printed.out.splitlines()))["calibrated"] == "no"

    assert main(["calibrate", str(path), "--images", str(clinic)]) == 0
    printed = capsys.readouterr()
    assert "temperature scaling, fitted on 30 validation images" in printed.out
    # Ten training images are too few for a detector.
    assert printed.out.rstrip().endswith("no detector of unlike images")
    assert main(["predict", str(path), image, "--coverage", "0.95"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    row = next(csv.DictReader(printed.out.splitlines()))
    assert row["calibrated"] == "yes" and row["class"] in row["prediction_set"].split("|")

    assert main(["predict", str(path), image, "--probability", "published"]) == 0
    assert "published probabilities were asked for" in capsys.readouterr().err
    assert main(["predict", str(path), image, "--samples", "3"]) == 0
    assert "was fitted for samples 2, got 3" in capsys.readouterr().err
    one_error(capsys, ["predict", str(path), image, "--samples", "3", "--probability", "calibrated"],
              "not calibrated", "samples 2, got 3")  # fmt: skip


def test_calibrate_rejects_training_images_and_few(work, clinic, capsys):
    run = str(work / "run")
    one_error(capsys, ["calibrate", run, "--split", "test"], "at least 20 validation images, got 4")
    one_error(capsys, ["calibrate", run, "--split", "train"], "must not have trained the model")
    one_error(capsys, ["calibrate", run], "validation")
    one_error(
        capsys,
        ["calibrate", run, "--split", "train", "--set", "data.kind=synthetic_fundus",
         "--set", "data.train_table=null", "--set", "data.test_table=null"],
        "classes", "dark, light",
    )  # fmt: skip


def test_published_checkpoints_need_a_configuration(work, tmp_path, capsys):
    """A checkpoint without the extras of this package; its classes are named by numbers."""
    parts = torch.load(work / "run" / "ckpt.pth", weights_only=True)
    del parts[1]["diffmic_fast"]
    torch.save(parts, tmp_path / "published.pth")
    args = ["predict", str(tmp_path / "published.pth"), str(work / "images/test/dark/0.png")]
    assert main(args) == 2
    assert "no configuration inside (its weights say classes 2" in capsys.readouterr().err
    args += ["--config", str(work / "c.yml"), "--guidance", str(work / "run" / "aux_ckpt.pth")]
    assert main(args) == 0
    assert "probability_0" in capsys.readouterr().out


def test_bad_input_is_one_line(work, tmp_path, capsys):
    run, config = str(work / "run"), str(work / "c.yml")
    new = str(tmp_path / "new")
    train = ["train", "--config", config, "--out", new]
    one_error(capsys, [*train, "--set", "training.epoch=3"], "'epoch'", "'training'", "'epochs'")
    one_error(capsys, [*train, "--set", "model.classes=3"], "2 classes (dark, light)", "classes=3")
    (tmp_path / "empty").mkdir()
    one_error(capsys, [*train, "--set", f"data.root={tmp_path / 'empty'}"], "empty")
    one_error(capsys, ["train", "--config", "nope", "--out", new], "'nope'", "chest_xray_small")
    one_error(capsys, ["train", "--out", new], "give --config")
    one_error(capsys, ["train", "--config", config, "--out", run], "already holds a run")
    one_error(capsys, [*train, "--resume"], "there is no file", "ckpt.pth")
    one_error(capsys, [*train, "--device", "tpu3"], "auto, cpu, cuda")
    (tmp_path / "text.pth").write_text("dear reader")
    one_error(capsys, ["evaluate", str(tmp_path / "text.pth")], "is not a checkpoint")
    one_error(capsys, ["evaluate", run, "--set", "model.classes=4"], "2 in the checkpoint, 4 now")
    one_error(capsys, ["evaluate", run, "--set", "model.timesteps=99"],
              "model.timesteps: 10 in the checkpoint, 99 now")  # fmt: skip
    one_error(
        capsys, ["evaluate", run, "--sampler", "ddim:500"], "steps must be in [1, 10]", "got 500"
    )
    one_error(capsys, ["evaluate", run, "--split", "validation"], "validation")
    one_error(capsys, ["predict", run, str(tmp_path / "empty")], "there is no image file in")
    one_error(capsys, ["predict", run, str(tmp_path / "gone")], "no folder", str(tmp_path / "gone"))
    one_error(capsys, ["predict", run, "x.png", "--out", "p.xls"], ".csv or .json")
    one_error(capsys, ["evaluate", run, "--predictions", "p.json"], "must end in .csv", "p.json")
    one_error(
        capsys,
        ["evaluate", run, "--set", f"data.root={work / 'images'}", "--set", "data.train_table=null",
         "--set", "data.test_table=null"],
        "test",
    )  # fmt: skip
    broken = work / "images/test/dark/0.png"
    bad = tmp_path / "bad" / "dark"
    bad.mkdir(parents=True)
    (tmp_path / "bad" / "light").mkdir()
    (bad / "cut.png").write_bytes(broken.read_bytes()[:300])
    (tmp_path / "bad" / "light" / "1.png").write_bytes(broken.read_bytes())
    one_error(capsys, ["evaluate", run, "--set", f"data.test_table={tmp_path / 'bad'}"], "cut.png")


@pytest.mark.usefixtures("auto_backend")
def test_a_precision_without_a_backend_is_one_line(work, capsys):
    one_error(capsys, ["predict", str(work / "run"), str(work / "images/test/light"),
                       "--device", "cpu", "--precision", "fp8"],
              "precision='fp8' needs a backend that has it (cuda, cuda-emulated)", "served by")  # fmt: skip


@pytest.mark.parametrize("command", [["predict", "x", "y"], ["evaluate", "x"]])
def test_precisions_are_those_of_the_chain(command, capsys):
    for precision in PRECISIONS:
        assert make_parser().parse_args([*command, "--precision", precision]).precision == precision
    with pytest.raises(SystemExit):
        make_parser().parse_args([*command, "--precision", "fp16"])
    assert f"choose from {', '.join(PRECISIONS)}" in capsys.readouterr().err.replace("'", "")


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("sklearn", "evaluate", "evaluate {run}"),
        ("rich", "evaluate", "evaluate {run}"),
        ("matplotlib", "figures", "evaluate {run} --confusion c.png"),
        ("matplotlib", "figures", "predict {run} x.png --figure c.png"),
        ("sklearn", "all", "demo"),
    ],
)
def test_a_missing_optional_package_is_one_line_with_its_extra(
    work, capsys, monkeypatch, module, extra, command
):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    one_error(
        capsys, command.format(run=work / "run").split(), f"pip install 'diffmic_fast[{extra}]'"
    )


def test_debug_shows_the_traceback(work):
    with pytest.raises(ValueError, match=r"is not a checkpoint|no file"):
        main(["evaluate", str(work / "nothere.pth"), "--debug"])


def test_usage_errors_exit_with_2(capsys):
    for argv in ([], ["fly"], ["train"], ["predict", "x"], ["predict", "x", "y", "--coverage", "1"],
                 ["evaluate", "x", "--samples", "0"]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert "must be a whole number from 1 to 10000, got '0'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "x", "--bootstrap", "-1"])
    assert "must be a whole number from 0 to 1000000, got '-1'" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_resumes_to_the_same_numbers(work, tmp_path, signum):
    """Ctrl-C and SIGTERM to a process of its own, then --resume."""
    unbroken = work / "unbroken"
    config = str(work / "long.yml")
    if not unbroken.exists():
        assert main(["train", "--config", config, "--out", str(unbroken), "--threads", "1"]) == 0
    command = [sys.executable, "-m", "diffmic_fast", "train", "--config", config]
    command += ["--out", str(tmp_path), "--threads", "1"]
    # A background job of a shell ignores SIGINT; the child must start with the default.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr is not None
    # The summary of the images comes first.
    assert any(line.startswith("epoch 1/4 guidance") for line in process.stderr)
    process.send_signal(signum)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 128 + signum
    assert "interrupted in epoch" in rest and "go on with --resume" in rest
    assert main(["train", "--out", str(tmp_path), "--resume", "--threads", "1"]) == 0
    one, other = (torch.load(p / "ckpt.pth", weights_only=True) for p in (unbroken, tmp_path))
    for state in (0, 4):
        assert all(torch.equal(v, other[state][k]) for k, v in one[state].items())
    guidance, resumed = (parts[1]["diffmic_fast"]["guidance"] for parts in (one, other))
    assert all(torch.equal(v, resumed[k]) for k, v in guidance.items())
    with open(tmp_path / "log.csv", newline="") as file:
        assert [r["epoch"] for r in csv.DictReader(file)] == [str(i) for i in range(4)]


def test_info_names_the_package_version(capsys):
    import diffmic_fast

    assert main(["info"]) == 0
    assert diffmic_fast.__version__ in capsys.readouterr().out


def test_info_without_torch_is_one_line_with_the_remedy():
    code = """if True:
        import runpy, sys
        sys.modules["torch"] = None  # importing it fails
        sys.argv = ["diffmic_fast", "info"]
        runpy.run_module("diffmic_fast", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: torch is not installed for ")
    assert "pip install torch" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(
    not (SOURCE / "README.md").is_file(), reason="README.md is not beside the tests"
)
def test_the_first_training_command_of_the_readme_needs_no_data(tmp_path, monkeypatch):
    """In an empty folder, with a smaller model and fewer images."""
    monkeypatch.chdir(tmp_path)
    readme = (SOURCE / "README.md").read_text(encoding="utf-8").splitlines()
    command = next(line for line in readme if line.startswith("diffmic-fast train "))
    argv = shlex.split(command, comments=True)[1:]
    for change in (
        "data.synthetic_size=32", "data.synthetic_per_class=2", "data.synthetic_validation_per_class=2",
        "data.synthetic_test_per_class=2", "sampling.steps=5", "model.image_size=32",
        "model.timesteps=10", "model.feature_dim=16", "model.encoder=test_resnet",
        "model.guidance_trunk=test_resnet", "model.crop_size=16", "training.feature_epochs=1",
        "training.guidance_epochs=0", "training.encoder_epochs=1", "training.batch_size=4",
        "training.tensorboard=false",
    ):  # fmt: skip
        argv += ["--set", change]
    assert main(argv) == 0
    assert Path(argv[argv.index("--out") + 1], "ckpt.pth").is_file()


def test_a_random_split_is_that_of_the_training(work, tmp_path, capsys):
    """Images that were added, another seed or another fraction move training images into other splits."""
    images, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(work / "images" / "train", images)
    rng = np.random.default_rng(5)

    def add(number):
        for name in ("dark", "light"):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name / f"new{number}.png")

    for number in range(7):
        add(number)
    changes = ["data.train_table=null", "data.test_table=null", f"data.root={images}", "training.epochs=1",
               "data.test_fraction=0.3", "data.validation_fraction=0.2", "data.workers=0"]  # fmt: skip
    argv = ["train", "--config", str(work / "c.yml"), "--out", str(run)]
    assert main([*argv, *(f"--set={change}" for change in changes)]) == 0
    for split in ("train", "validation", "test"):
        assert main(["evaluate", str(run), "--split", split, "--bootstrap", "0"]) == 0
    capsys.readouterr()
    for change in ("data.split_seed=1", "data.test_fraction=0.5"):
        one_error(capsys, ["evaluate", str(run), "--set", change],
                  "test images were training images when the model was trained")  # fmt: skip
    one_error(capsys, ["evaluate", str(run), "--split", "test", "--set", "data.test_fraction=0",
                       "--set", "data.validation_fraction=0", "--set", "data.train_table=.",
                       "--set", "data.test_table=."], "test images are training images too")  # fmt: skip
    one_error(capsys, ["calibrate", str(run), "--split", "test", "--set", "data.split_seed=3"],
              "test images were training images")  # fmt: skip
    one_error(capsys, ["calibrate", str(run), "--images", str(images)],
              "given images were training images")  # fmt: skip
    shutil.copytree(run, tmp_path / "old")
    file = torch.load(run / "ckpt.pth", weights_only=True)
    del file[1]["diffmic_fast"]["images"]
    torch.save(file, tmp_path / "old" / "ckpt.pth")
    capsys.readouterr()
    for folder in (run, tmp_path / "old"):  # the split is that of the training
        assert main(["evaluate", str(folder), "--bootstrap", "0"]) == 0
        assert "cannot be checked" not in capsys.readouterr().err
    add(99)
    assert main(["evaluate", str(run), "--bootstrap", "0"]) == 2
    assert "images were" in capsys.readouterr().err

    # Every image is written anew under its own name, so that no key is known any more.
    for path in images.rglob("*.png"):
        Image.open(path).resize((40, 40)).save(path)
    assert main(["evaluate", str(run), "--bootstrap", "0"]) == 0
    err = capsys.readouterr().err
    assert "images that trained the model are no longer there" in err and "cannot be checked" in err

    for command in ("evaluate", "calibrate"):
        argv = [command, str(tmp_path / "old"), "--split", "test"]
        main([*argv, "--bootstrap", "0"] if command == "evaluate" else argv)
        assert "does not say which images trained the model" in capsys.readouterr().err
