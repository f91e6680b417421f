"""The training run: guidance alone first, then both models step by step (spec 5)."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffmic_fast import checkpoint as ckpt
from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.table import ImageTable
from diffmic_fast.data.transforms import evaluation_transform, training_transform
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.distributed.fsdp import undivided
from diffmic_fast.distributed.processes import current
from diffmic_fast.inference.evaluate import Evaluation, evaluate
from diffmic_fast.inference.metrics import NAMES
from diffmic_fast.models import DiffMIC
from diffmic_fast.training.interruption import Interrupted, Interruption, ignore_in_worker
from diffmic_fast.training.log import CsvLog, Progress, Stopwatch, TensorBoardLog
from diffmic_fast.training.precision import with_precision
from diffmic_fast.training.schedules import epoch_batches
from diffmic_fast.training.steps import LOSSES, Steps

SUMS = (*LOSSES, "guidance_loss")


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or gradient is not finite, or a step refused its input."""


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is CUDA where there is a GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device wants auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no GPU here; use cpu")
    return device


def make_dataset(config: RunConfig, table: ImageTable, *, train: bool) -> ImageDataset:
    """The images of `table` as the model of `config` takes them, augmented for training."""
    make = training_transform if train else evaluation_transform
    transform = make(config.model.image_size, config.data.augmentation)
    return ImageDataset(
        table,
        transform,
        seed=config.seed,
        cache=config.data.cache,
        shared=config.data.workers > 0,
    )


def fingerprint(table: ImageTable) -> str:
    """Digest of the names and labels of a table in order, to notice that the data has changed."""
    digest = hashlib.sha256()
    for entry in table.entries:
        digest.update(f"{entry.name}\0{entry.label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class Trainer:
    """One training run in one folder.

    Where `torch.distributed` has a process group (`training.parallel`), its processes train together: each makes a
    Trainer of the same arguments, and the first one prints and writes.

    The folder gets config.yml, ckpt.pth with aux_ckpt.pth (published format), ckpt_best.pth where
    there are validation images, log.csv and tensorboard/.

    config: the run.
    out: the folder; made if it is not there.
    device: "auto", "cpu", "cuda", "cuda:1".
    resume: a checkpoint to go on from, to the same numbers as without the break (on the CPU, bit
        by bit, for the same number of threads).
    train, validation: tables to use instead of those that config.data leads to.
    quiet: print nothing.
    on_step: called after every step with (epoch, step of the epoch); for tests and embedders.
    Raises ValueError for a configuration that does not fit the data, for a folder that already
    holds a run, and for a checkpoint that cannot be continued.
    """

    def __init__(
        self,
        config: RunConfig,
        out: str | Path,
        *,
        device: str = "auto",
        resume: str | Path | None = None,
        train: ImageTable | None = None,
        validation: ImageTable | None = None,
        quiet: bool = False,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config, self.out = config, Path(out)
        self.processes = current()
        self.device = choose_device(device)
        self.on_step = on_step
        self.path = self.out / ckpt.NAME
        self._check_processes()
        if resume is None and self.path.exists():
            raise ValueError(
                f"training: {self.out} already holds a run ({ckpt.NAME}); go on with it (--resume) "
                "or choose another folder (--out)"
            )
        saved = ckpt.read_checkpoint(resume) if resume is not None else None
        self.chosen = config.training.precision == "auto"
        config = self.config = with_precision(config, self.device, self.processes, saved)
        if saved is not None:
            ckpt.check_resume(saved, config, self.processes.count)

        if train is None:
            train = open_source(config.data, "train")
            if validation is None and config.data.has_split("validation"):
                validation = open_source(config.data, "validation")
        self._check_classes(train)
        self.classes = train.classes
        self.data_digest = fingerprint(train)
        if saved is not None and saved.extras["data_digest"] != self.data_digest:
            raise ValueError(
                f"resume: the training images are not those {saved.path} was trained with (their "
                f"names, labels or order differ; {len(train)} images now); restore them, or start "
                "anew in another folder"
            )
        self.dataset = make_dataset(config, train, train=True)
        self.validation = (
            make_dataset(config, validation, train=False) if validation is not None else None
        )

        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        # A resume brings its own weights: pretrained ones need not be there any more.
        self.model = DiffMIC(config.model, pretrained=saved is None).to(self.device)
        self.steps = Steps(self.model, config.training, config.seed, self.processes)

        self.epoch = 0  # epochs finished, guidance epochs included
        self.position = 0  # batches done in this epoch
        self.step = 0  # steps of the denoiser
        self.sums: dict[str, float] = dict.fromkeys(SUMS, 0.0)
        self.seconds = 0.0
        self.best: float | None = None
        self.is_best = False  # whether the last finished epoch's is the best validation so far
        self.last_evaluation: Evaluation | None = None
        self.progress = Progress(quiet or not self.processes.first)
        self.out.mkdir(parents=True, exist_ok=True)
        if saved is not None:
            self._restore(saved)

    @property
    def epochs(self) -> int:
        """Epochs in all, those of the guidance model alone included."""
        return self.config.training.guidance_epochs + self.config.training.epochs

    def _check_classes(self, table: ImageTable) -> None:
        if len(table.classes) != self.config.model.classes:
            raise ValueError(
                f"training: the data has {len(table.classes)} classes "
                f"({', '.join(table.classes)}), the configuration says "
                f"model.classes={self.config.model.classes}; set one of them"
            )

    def _check_processes(self) -> None:
        if len(set(self.processes.all_of(self.path.exists()))) > 1:
            raise ValueError(
                f"training: some processes find {self.path} and some do not; they need one folder"
            )

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint and the guidance file beside it; of several processes, which all call it, the first."""
        state = self.steps.state()
        if not self.processes.first:
            return
        joint = max(self.epoch - self.config.training.guidance_epochs, 0)
        ckpt.save_checkpoint(
            ckpt.Checkpoint(
                self.path,
                state["denoiser"],
                state["optimizer"],
                joint,
                self.step,
                state["average"],
                {
                    "format": 1,
                    "config": self.config.to_dict(),
                    "classes": list(self.classes),
                    "guidance": state["guidance"],
                    "guidance_optimizer": state["guidance_optimizer"],
                    "progress": {
                        "epoch": self.epoch,
                        "position": self.position,
                        "sums": dict(self.sums),
                        "seconds": self.seconds,
                        "best": self.best,
                        "is_best": self.is_best and self.position == 0,
                        "processes": self.processes.count,
                    },
                    "random": ckpt.random_states({"noise": self.steps.noise}),
                    "data_digest": self.data_digest,
                },
            )
        )

    def _restore(self, saved: ckpt.Checkpoint) -> None:
        extras = saved.extras
        state = {key: extras[key] for key in ("guidance", "guidance_optimizer")}
        state |= {"denoiser": saved.denoiser, "optimizer": saved.optimizer, "average": saved.ema}
        self.steps.load_state(state, f"{saved.path}")
        progress = extras["progress"]
        self.epoch, self.position = progress["epoch"], progress["position"]
        self.step = saved.step
        self.sums = dict(progress["sums"])
        self.seconds = progress["seconds"]
        self.best = progress["best"]
        here = saved.path.resolve() == self.path.resolve()
        self.is_best = progress.get("is_best", False) and here
        # Last: building the model and its optimizers has drawn from the global generators.
        ckpt.restore_random_states(extras["random"], {"noise": self.steps.noise})

    # -- the run -------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train to the end and return the checkpoint's path.

        Ctrl-C and SIGTERM: the step under way is finished, a checkpoint written, then Interrupted
        raised. Raises TrainingError where a loss or gradient is not finite.
        """
        if self.processes.first:
            ckpt.remove_unfinished(self.out)
        if self.is_best and self.position == 0:
            # The process may have died before it did, or later, with the next guidance file in place and not the next
            # checkpoint: both are written again, so that what is kept belongs together.
            self.save()
            self._keep_best()
        if self.chosen:
            self.progress.line(f"training.precision auto: {self.config.training.precision}")
        board = None
        if self.processes.first:
            self.config.save(self.out / "config.yml")
            self.csv = CsvLog(self.out / "log.csv", self.epoch)
        if self.processes.first and self.config.training.tensorboard:
            with ckpt.keep_random_states():
                board = TensorBoardLog(self.out / "tensorboard", self.epoch)
        with Interruption() as self.interruption:
            try:
                while self.epoch < self.epochs:
                    row = self._epoch()
                    if self.processes.first:
                        self.csv.append(row)
                    if board is not None:
                        board.append(row)
                    self._finish_epoch()
            except Interrupted as interrupted:
                self.progress.stop()
                self.save()
                raise Interrupted(
                    interrupted.signum,
                    f"interrupted in epoch {self.epoch + 1} of {self.epochs}, after "
                    f"{self.position} steps of it; saved {self.path}",
                ) from None
            finally:
                self.progress.stop()
                if board is not None:
                    board.close()
        return self.path

    def _finish_epoch(self) -> None:
        self.epoch += 1
        self.position = 0
        self.sums = dict.fromkeys(SUMS, 0.0)
        self.seconds = 0.0
        self.is_best = self._is_best()
        last = self.epoch == self.epochs
        if self.is_best or last or self.epoch % self.config.training.checkpoint_every == 0:
            self.save()
        if self.is_best:
            self._keep_best()

    def _keep_best(self) -> None:
        if not self.processes.first:
            return
        for name, best in (
            (ckpt.NAME, ckpt.BEST_NAME),
            (ckpt.GUIDANCE_NAME, ckpt.GUIDANCE_BEST_NAME),
        ):
            ckpt.keep_copy(self.out / name, self.out / best)

    def _is_best(self) -> bool:
        """Whether this epoch's validation of the diffusion is the best so far; notes it if so."""
        if self.last_evaluation is None or len(self.last_evaluation.results) < 2:
            return False
        value = getattr(self.last_evaluation.results[1].metrics, self.config.training.select)
        if math.isnan(value) or (self.best is not None and value <= self.best):
            return False
        self.best = value
        return True

    def _epoch(self) -> dict[str, Any]:
        """Train and validate one epoch, from `position` on; returns its row of the log."""
        t = self.config.training
        joint = self.epoch >= t.guidance_epochs
        several = self.processes.count
        batches = epoch_batches(
            len(self.dataset),
            t.batch_size * several,
            self.config.seed,
            self.epoch,
            least=2 * several,
        )
        mine = [list(self.processes.shard(batch)) for batch in batches]
        images_done = sum(map(len, batches[: self.position]))
        title = f"epoch {self.epoch + 1}/{self.epochs} {'joint' if joint else 'guidance'}"
        self.progress.start(title, len(self.dataset), images_done)
        watch = Stopwatch(self.seconds)
        self.dataset.set_epoch(self.epoch)
        loader = DataLoader(
            self.dataset,
            batch_sampler=mine[self.position :],
            num_workers=self.config.data.workers,
            worker_init_fn=ignore_in_worker,
            pin_memory=self.device.type == "cuda",
            # A generator of its own: a loader's start would otherwise draw from the global one,
            # and a resumed epoch starts a loader more than an unbroken one.
            generator=torch.Generator().manual_seed(0),
        )
        self._check_interruption()
        for images, labels, _ in loader:
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            try:
                moment = self.epoch + self.position / len(batches)
                self._step(images, labels, moment, joint, len(batches[self.position]))
            except ValueError as error:
                raise self._error(str(error), len(batches)) from error
            done = len(batches[self.position])
            self.position += 1
            self.seconds = watch.seconds
            seen = sum(map(len, batches[: self.position]))
            shown = {"loss": self.sums["loss" if joint else "guidance_loss"] / seen}
            self.progress.advance(done, **shown)
            if self.on_step is not None:
                self.on_step(self.epoch, self.position)
            self._check_interruption()
        self.progress.stop()

        count = len(self.dataset)
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "phase": "joint" if joint else "guidance",
            "step": self.step,
            "images": count,
            "guidance_loss": self.sums["guidance_loss"] / count,
        }
        if joint:
            row["learning_rate"] = self.steps.optimizer.param_groups[0]["lr"]
            row.update({key: self.sums[key] / count for key in LOSSES})
        row["seconds"] = self.seconds
        row["images_per_second"] = count / self.seconds
        row.update(self._validate(joint))
        self._report(title, row)
        return row

    def _check_interruption(self) -> None:
        """Raise Interrupted on every process once a signal has come to one of them."""
        signals = self.processes.all_of(self.interruption.signum)
        signum = next((each for each in signals if each is not None), None)
        if signum is not None:
            raise Interrupted(signum)

    def _step(self, images: Tensor, labels: Tensor, epoch: float, joint: bool, count: int) -> None:
        """A step of the models on this process's images of a batch of `count`."""
        losses: dict[str, float] = {}
        if joint:
            joint_epoch = epoch - self.config.training.guidance_epochs
            losses = self.steps.denoiser_step(images, labels, joint_epoch)
            self.step += 1
        losses["guidance_loss"] = self.steps.guidance_step(images, labels, epoch / self.epochs)
        for key, value in losses.items():
            self.sums[key] += value * count

    def _report(self, title: str, row: dict[str, Any]) -> None:
        parts = [title]
        if "loss" in row:
            parts.append(f"loss {row['loss']:.4f}")
        parts.append(f"guidance loss {row['guidance_loss']:.4f}")
        for key, name in (("validation_guidance_accuracy", "guidance accuracy"),
                          ("validation_accuracy", "accuracy")):  # fmt: skip
            if key in row:
                parts.append(f"{name} {row[key]:.4f}")
        parts.append(f"{row['images_per_second']:.1f} images/s")
        self.progress.line(", ".join(parts))

    def _error(self, reason: str, steps: int) -> TrainingError:
        saved = (
            f"the last checkpoint is {self.path}"
            if self.path.exists()
            else "no checkpoint was written yet"
        )
        return TrainingError(
            f"training stopped in epoch {self.epoch + 1} of {self.epochs}, step "
            f"{self.position + 1} of {steps}: {reason}; {saved}. A smaller training.learning_rate, "
            "training.gradient_clip, or precision fp32 may help; images and labels may be at fault"
        )

    def _validate(self, joint: bool) -> dict[str, float]:
        """Measures on the validation images; the diffusion's too once the denoiser trains."""
        self.last_evaluation = None
        t = self.config.training
        number = self.epoch + 1 if not joint else self.epoch + 1 - t.guidance_epochs
        due = number % t.validate_every == 0 or self.epoch + 1 == self.epochs
        if self.validation is None or not due:
            return {}
        s = self.config.sampling
        average = self.steps.average if joint else None
        self.progress.start("validation", len(self.validation))

        def on_batch(images: int) -> None:
            self.progress.advance(images)
            if self.processes.count == 1:  # several stop together, behind the validation
                self.interruption.check()

        # Measuring must not move training: libraries draw, some already when they are imported.
        with (
            ckpt.keep_random_states(),
            average.applied() if average else contextlib.nullcontext(),
            undivided(self.model.denoiser, self.model.guidance),
        ):
            self.last_evaluation = evaluate(
                self.model,
                self.validation,
                [SamplingOptions.from_config(s)] if joint else [],
                batch_size=s.batch_size,
                workers=self.config.data.workers,
                device=self.device,
                on_batch=on_batch,
            )
        self.progress.stop()
        row = {}
        prefixes = ("validation_guidance_", "validation_")
        for prefix, result in zip(prefixes, self.last_evaluation.results, strict=False):
            row.update({f"{prefix}{n}": getattr(result.metrics, n) for n in NAMES})
        return row
