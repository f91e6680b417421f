"""Two processes on the CPU against one: training runs, evaluation and prediction, the command line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from process_groups import in_processes
from training_runs import TOGETHER, assert_same_run, rows, with_training

from diffmic_fast.checkpoint import NAME, load_model
from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.distributed.processes import (
    Processes,
    is_first_process,
    process_group,
    split_sizes,
)
from diffmic_fast.inference.evaluate import evaluate
from diffmic_fast.inference.predict import predict_files
from diffmic_fast.models import DiffMIC
from diffmic_fast.training.batches import epoch_batches
from diffmic_fast.training.datasets import make_dataset
from diffmic_fast.training.interruption import Interrupted
from diffmic_fast.training.trainer import Trainer


def test_shards_are_contiguous_and_nearly_equal() -> None:
    assert split_sizes(7, 3) == [3, 2, 2] and split_sizes(2, 3) == [1, 1, 0]
    parts = [Processes(rank, 3).shard(range(7)) for rank in range(3)]
    assert [list(part) for part in parts] == [[0, 1, 2], [3, 4], [5, 6]]
    for count in (8, 9, 10, 11, 12, 13, 17):
        batches = epoch_batches(count, 8, seed=0, epoch=0, least=4)
        assert sorted(i for b in batches for i in b) == list(range(count))
        assert min(map(len, batches)) >= 4
    with pytest.raises(ValueError, match="at least 4 training images are needed, got 3"):
        epoch_batches(3, 8, seed=0, epoch=0, least=4)


def train_and_predict(
    rank: int, config: RunConfig, folder: Path, files: list[Path]
) -> dict[str, Any]:
    """A run, the same run interrupted and resumed, and the predictions of its model."""
    found: dict[str, Any] = {}
    trainer = Trainer(config, folder / "unbroken", quiet=True)
    trainer.fit()
    found["best"] = trainer.best

    def stop(epoch: int, step: int) -> None:
        if (epoch, step) == (1, 1) and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    broken = folder / "broken"
    try:
        Trainer(config, broken, quiet=True, on_step=stop).fit()
    except Interrupted as interrupted:
        found["signal"] = interrupted.signum, str(interrupted)
    trainer = Trainer(config, broken, resume=broken / NAME, quiet=True)
    found["resumed at"] = trainer.progress.epoch, trainer.progress.position
    if rank == 0:
        shutil.copy(broken / NAME, folder / "middle.pth")

    def keep(epoch: int, step: int) -> None:
        if (epoch, step) == (2, 1) and rank == 0:
            shutil.copy(broken / NAME, folder / "epoch.pth")

    trainer.on_step = keep
    trainer.fit()
    model, _ = load_model(folder / "unbroken" / NAME)
    found["evaluation"] = evaluation_of(model, config)
    found["predictions"] = prediction_of(model, config, files)
    found["one file"] = prediction_of(model, config, files[:1])
    return found


def evaluation_of(model: DiffMIC, config: RunConfig) -> Any:
    dataset = make_dataset(config, open_source(config.data, "validation"), train=False)
    found = evaluate(model, dataset, [SamplingOptions("ddim", 3, samples=2)], batch_size=2)
    return found.labels, [result.probabilities for result in found.results]


def prediction_of(model: DiffMIC, config: RunConfig, files: list[Path]) -> Any:
    classes = ("blue", "green", "red")
    return predict_files(
        model, files, classes, config.data.augmentation, SamplingOptions("ddim", 3), batch_size=2
    )


@pytest.fixture(scope="module")
def runs(shared_config: RunConfig, images: Path, tmp_path_factory) -> tuple[Path, Any, list[Path]]:
    folder = tmp_path_factory.mktemp("parallel")
    files = sorted((images / "test").glob("*/*.png"))
    damaged = folder / "damaged.png"
    damaged.write_bytes(files[0].read_bytes()[:100])
    files.insert(4, damaged)
    config = with_training(shared_config, batch_size=4, **TOGETHER)
    return folder, in_processes(2, train_and_predict, config, folder, files), files


@pytest.mark.slow
def test_two_processes_match_one_with_the_global_batch(
    runs: tuple[Path, Any, list[Path]], shared_config: RunConfig, tmp_path: Path
) -> None:
    """The log up to rounding, which grows from step to step; one checkpoint, which a single process reads."""
    folder, found, _ = runs
    Trainer(with_training(shared_config, batch_size=8), tmp_path, quiet=True).fit()
    for a, b in zip(rows(folder / "unbroken"), rows(tmp_path), strict=True):
        for key in ("epoch", "phase", "step", "images"):
            assert a[key] == b[key]
        for key in ("loss", "guidance_loss", "noise_loss", "mmd_global"):
            if a[key]:
                assert float(a[key]) == pytest.approx(float(b[key]), rel=0.02), key
    assert found[0]["best"] == found[1]["best"]
    names = {path.name for path in (folder / "unbroken").iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    a, b = (torch.load(p / NAME, weights_only=True) for p in (folder / "unbroken", tmp_path))
    assert a[0].keys() == b[0].keys()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_the_run_resumes(
    runs: tuple[Path, Any, list[Path]],
) -> None:
    folder, found, _ = runs
    for each in found:
        assert each["signal"][0] == signal.SIGTERM
        assert "interrupted in epoch 2 of 3, after 1 steps of it" in each["signal"][1]
        assert each["resumed at"] == (1, 1)
    assert_same_run(folder / "unbroken", folder / "broken")


@pytest.mark.slow
def test_the_number_of_processes_can_change_between_epochs(
    runs: tuple[Path, Any, list[Path]], shared_config: RunConfig, tmp_path: Path
) -> None:
    """With the same global batch only, and not in the middle of an epoch."""
    folder, _, _ = runs
    config = with_training(shared_config, **TOGETHER)
    halfway = folder / "epoch.pth"
    for size, path, message in (
        (4, halfway, "was trained by 2 processes with 8 images a step, these are 1 with 4"),
        (8, folder / "middle.pth", "between two epochs"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(with_training(config, batch_size=size), tmp_path / "no", resume=path)
    trainer = Trainer(with_training(config, batch_size=8), tmp_path, resume=halfway, quiet=True)
    assert (trainer.progress.epoch, trainer.progress.position) == (2, 0)
    trainer.fit()
    a, b = rows(folder / "unbroken")[-1], rows(tmp_path)[-1]
    assert a["step"] == b["step"] and float(a["loss"]) == pytest.approx(float(b["loss"]), rel=0.02)


@pytest.mark.slow
def test_sharded_evaluation_and_prediction(
    runs: tuple[Path, Any, list[Path]], shared_config: RunConfig
) -> None:
    """In the order of the input, as from one process; also with a process without images and a damaged file."""
    folder, found, files = runs
    model, _ = load_model(folder / "unbroken" / NAME)
    labels, probabilities = evaluation_of(model, shared_config)
    predictions = prediction_of(model, shared_config, files)
    assert [row.file for row in predictions.rows] == [str(f) for f in files if f.stem != "damaged"]
    for each in found:
        assert (each["evaluation"][0] == labels).all()
        for a, b in zip(each["evaluation"][1], probabilities, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-5)
        assert each["predictions"].unreadable == predictions.unreadable
        assert len(predictions.unreadable) == 1
        for a, b in zip(each["predictions"].rows, predictions.rows, strict=True):
            assert (a.file, a.label) == (b.file, b.label)
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)
        assert len(each["one file"].rows) == 1


def test_torchrun(shared_config: RunConfig, images: Path, tmp_path: Path) -> None:
    """Train and predict from the command line: rank 0 alone prints and writes."""
    config = with_training(shared_config, batch_size=2, epochs=1, **TOGETHER)
    config.save(tmp_path / "run.yml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIFFMIC_BACKEND": "auto"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [*start, "-m", "diffmic_fast", *map(str, arguments), "--device", "cpu"]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    done = run("train", "--config", "run.yml", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 2 epochs") == 1
    assert done.stderr.count("epoch 2/2 joint") == 1
    again = run("train", "--config", "run.yml", "--out", "run")
    assert again.returncode != 0 and "already holds a run" in again.stderr
    done = run("predict", "run", images / "test", "--out", "found.csv")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "found.csv").read_text().splitlines(keepends=True)
    assert len(lines) == 7
    (tmp_path / "found.csv").write_text("".join(lines[:4]))
    done = run("predict", "run", images / "test", "--out", "found.csv", "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("3 rows were in found.csv, 3 were added") == 1
    names = [line.split(",")[0] for line in (tmp_path / "found.csv").read_text().splitlines()]
    assert names == [line.split(",")[0] for line in lines]
    done = run("predict", "run", images / "test", "--out", "found.csv", "--resume", "--seed", "9")
    assert done.returncode != 0 and "other options" in done.stderr
    done = run("predict", "run", images / "test", "--figure", "found.png")
    assert done.returncode != 0 and "are for a single process" in done.stderr


def test_without_torchrun_there_is_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("auto") as device:
        assert device == "auto" and not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="'cuda:1' is one GPU, and torchrun started 2"),
        process_group("cuda:1"),
    ):
        pass
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ValueError, match="has no GPU"), process_group("cuda"):
        pass


def test_the_first_process_is_known_before_the_group_is_formed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert is_first_process()
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert is_first_process() == (rank == 0)
