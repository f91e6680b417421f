"""The training run: the guidance model alone first, then both models step by step."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmic_fast.checkpoint import Checkpoint, add_calibration, read_checkpoint
from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.bit_depth import warn_of_unused_bits
from diffmic_fast.data.identity import image_keys
from diffmic_fast.data.loading import load_batches
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.summary import report_images
from diffmic_fast.data.table import ImageTable
from diffmic_fast.devices import choose_device
from diffmic_fast.distributed.processes import current
from diffmic_fast.inference.evaluate import Evaluation
from diffmic_fast.inference.figures import Panel
from diffmic_fast.models import DiffMIC
from diffmic_fast.ops._transfer import to_device
from diffmic_fast.progress_bar import ProgressBar
from diffmic_fast.training.batches import epoch_batches
from diffmic_fast.training.calibration import calibrate_run
from diffmic_fast.training.datasets import digest, make_dataset
from diffmic_fast.training.feature_rows import FeatureRows, feature_rows
from diffmic_fast.training.image_checks import check_readable, check_training_images
from diffmic_fast.training.interruption import Interrupted, Interruption
from diffmic_fast.training.log import MAIN_LOSS, epoch_row, summary
from diffmic_fast.training.phases import Phase, guidance_epochs, phase_at, phases
from diffmic_fast.training.precision import resolve_precision
from diffmic_fast.training.progress import Progress
from diffmic_fast.training.random_states import random_states, restore_random_states
from diffmic_fast.training.resume import check_resume
from diffmic_fast.training.run_folder import RunFolder
from diffmic_fast.training.steps import Steps
from diffmic_fast.training.targets import class_weights
from diffmic_fast.training.validation import log_columns, validate


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or gradient is not finite, or a step rejected its input."""


class Trainer:
    """One training run in one folder (docs/algorithm.md, "Training step").

    With a `torch.distributed` process group (`distributed.processes`) its processes train together: each makes a
    Trainer with the same arguments, and rank 0 prints and writes.

    The folder gets config.yml, ckpt.pth with aux_ckpt.pth (published format), ckpt_best.pth if there are validation
    images, log.csv and tensorboard/. After the last epoch a calibration is fitted on the validation images and written
    into both checkpoints.

    Attributes:
        config: of the run, with a precision other than "auto".
        model: what is trained.
        steps: its optimizers.
        progress: how far the run has come.
        processes: of the run.
        last_evaluation: of the last epoch, or None if it was not validated.
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
        """Prepare a run.

        Args:
            config: of the run.
            out: its folder; made if it is missing.
            device: "auto", "cpu", "cuda", "cuda:1".
            resume: a checkpoint to resume from, to the same numbers as without the break (on the CPU, bit by bit, for
                the same number of threads).
            train: images to train with, instead of those of config.data.
            validation: images to validate with.
            quiet: print nothing.
            on_step: called after every step with (epoch, step of the epoch).

        Raises:
            ValueError: a configuration that does not fit the data, unreadable images, duplicates where
                config.data.duplicates is "error", a folder that already holds a run, a checkpoint that cannot be
                resumed.
            TypeError: torch's default dtype is not float32.
        """
        if torch.get_default_dtype() != torch.float32:
            raise TypeError(
                "training: torch's default dtype must be torch.float32, got "
                f"{torch.get_default_dtype()}; call torch.set_default_dtype(torch.float32)"
            )
        self.processes = current()
        self.device = choose_device(device)
        self.on_step = on_step
        resumed = None if resume is None else Path(resume)
        self.folder = RunFolder(Path(out), self.processes, resume=resumed)
        self.path = self.folder.path
        saved = read_checkpoint(resume) if resume is not None else None
        self._chosen = config.training.precision == "auto"
        config = self.config = resolve_precision(config, self.device, self.processes, saved)
        self.quiet = quiet or not self.processes.is_rank_zero
        if saved is not None:
            change = check_resume(saved, config, self.processes.world_size)
            if change:
                self._print(f"resume: {change}")
        given = train is not None
        if train is None:
            train = open_source(config.data, "train")
            if validation is None and config.data.has_split("validation"):
                validation = open_source(config.data, "validation")
        self.classes, self.data_digest = train.classes, digest(train)
        check_training_images(config, train, saved)
        report_images(
            config.data,
            {"train": train} | ({} if validation is None else {"validation": validation}),
            config.model.image_size,
            with_test=not given,
            say=None if self.quiet else self._print,
        )
        tables = {"training": train} | ({} if validation is None else {"validation": validation})
        check_readable(config, tables.values(), self.processes)
        self._image_keys = {name: image_keys(table) for name, table in tables.items()}
        if self.processes.is_rank_zero:
            sources = [entry.source for entry in train.entries]
            warn_of_unused_bits(sources, config.data.augmentation.bit_depth)
        self.dataset = make_dataset(config, train, train=True)
        self.validation = (
            None if validation is None else make_dataset(config, validation, train=False)
        )

        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        # A resumed run has its weights in the checkpoint: pretrained ones may be missing.
        self.model = DiffMIC(config.model, pretrained=saved is None).to(self.device)
        self.steps = Steps(self.model, config.training, config.seed, self.processes)
        self._rows: FeatureRows | None = None
        self._weights: Tensor | None = None
        if config.training.balance:
            labels = torch.tensor([entry.label for entry in train.entries])
            self._weights = class_weights(labels, config.training.balance)
        self.progress = Progress()
        self.last_evaluation: Evaluation | None = None
        self.folder.folder.mkdir(parents=True, exist_ok=True)
        self._resumed = resumed
        if saved is not None:
            self._restore(saved)

    @property
    def finished(self) -> bool:
        """Whether no epoch is left."""
        return self.progress.epoch >= self.epochs

    @property
    def epochs(self) -> int:
        """Number of epochs, of all phases."""
        return sum(phase.epochs for phase in phases(self.config.training))

    @property
    def best(self) -> float | None:
        """Best validation metric so far, or None."""
        return self.progress.best

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self) -> None:
        """Collective: write the checkpoint and the guidance file beside it."""
        state = self.steps.state()
        training = self.config.training
        joint = next(phase for phase in phases(training) if phase.name == "joint")
        finished = min(max(self.progress.epoch - joint.first, 0), joint.epochs)
        extras: dict[str, Any] = {
            "format": 1,
            "config": self.config.to_dict(),
            "classes": list(self.classes),
            "guidance": state["guidance"],
            "guidance_optimizer": state["guidance_optimizer"],
            **{name: state[name] for name in ("guidance_average", "encoder") if name in state},
            "progress": self.progress.to_dict(self.processes.world_size),
            "random": random_states({"noise": self.steps.noise}),
            "data_digest": self.data_digest,
            "images": self._image_keys,
        }
        self.folder.save(
            Checkpoint(
                self.path,
                state["denoiser"],
                state["optimizer"],
                finished,
                self.progress.step,
                state["average"],
                extras,
            )
        )

    def _restore(self, saved: Checkpoint) -> None:
        extras = saved.extras
        names = ("guidance", "guidance_optimizer", "guidance_average", "encoder")
        state: dict[str, Any] = {name: extras[name] for name in names if name in extras}
        state |= {"denoiser": saved.denoiser, "optimizer": saved.optimizer, "average": saved.ema}
        self.steps.load_state(state, f"{saved.path}")
        self.progress = Progress.from_dict(extras["progress"], saved.step)
        for phase in phases(self.config.training):
            if self.progress.epoch >= phase.first + phase.epochs:
                self.steps.drop_average(phase)
        if saved.path.resolve() != self.path.resolve():
            self.progress.is_best = False
        # Last: building the model and its optimizers has drawn from the global generators.
        restore_random_states(extras["random"], {"noise": self.steps.noise})

    # -- the run -------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train to the end and return the checkpoint's path.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the present step is finished and a checkpoint written before. A resumed run
                fits a calibration that an interruption has left out.
            TrainingError: a loss or gradient is not finite.
        """
        best_is_kept = self.processes.all_gather(
            self.finished and self.folder.has_best(self.progress.epoch)
        )[0]
        if (
            self._resumed is not None
            and self._resumed.resolve().parent != self.path.resolve().parent
        ):
            self._begin_folder(self._resumed)
        elif self.progress.is_best and self.progress.position == 0 and not best_is_kept:
            # The process may have been killed before the best was kept, or later, with the guidance file of the next
            # checkpoint written and the checkpoint not: write both again, so that the copies match.
            self.save()
            self.folder.keep_best()
        if self._chosen:
            self._print(f"training.precision auto: {self.config.training.precision}")
        with (
            self.folder.logs(self.config, self.classes, self.progress.epoch),
            Interruption() as self.interruption,
        ):
            try:
                while not self.finished:
                    self._run_epoch()
            except Interrupted as interrupted:
                self.save()
                raise Interrupted(
                    interrupted.signum,
                    f"interrupted in epoch {self.progress.epoch + 1} of {self.epochs}, after {self.progress.position} "
                    f"steps of it; saved {self.path}",
                ) from None
            self._calibrate()
        return self.path

    def _begin_folder(self, resumed: Path) -> None:
        """Collective: begin a folder with the checkpoint that is resumed, its calibration and its run's best one."""
        self.save()
        if self.processes.is_rank_zero and self.finished:
            calibration = read_checkpoint(resumed, mmap=True).calibration
            if calibration is not None:
                add_calibration(self.path, calibration)
                self._print(f"{self.path.name}: kept the calibration of {resumed}")
        self.folder.take_best(resumed, self.best)

    def _calibrate(self) -> None:
        """Collective: write a calibration into the finished run's checkpoints, where it is missing."""

        def on_batch() -> None:
            if self.processes.world_size == 1:
                self._check_interruption()

        try:
            calibrate_run(
                self.folder.folder,
                self.config,
                self.dataset.table,
                self.validation,
                device=self.device,
                on_batch=on_batch,
                say=self._print,
                quiet=self.quiet,
            )
        except Interrupted as interrupted:
            raise Interrupted(
                interrupted.signum,
                f"interrupted in the calibration after the last epoch; saved {self.path}",
            ) from None

    def _run_epoch(self) -> None:
        """Train (from `progress.position` on), validate, log and save one epoch."""
        phase = phase_at(self.config.training, self.progress.epoch)
        title = f"epoch {self.progress.epoch + 1}/{self.epochs} {phase.name}"
        self._train_epoch(title, phase)
        if self.progress.epoch + 1 == phase.first + phase.epochs:
            self.steps.finish(phase)
        rate = self.steps.optimizer.param_groups[0]["lr"] if phase.trains_denoiser else None
        row = epoch_row(self.progress, phase.name, len(self.dataset), rate)
        panels = self._validate(phase)
        if self.last_evaluation is not None:
            row |= log_columns(self.last_evaluation)
        self._print(summary(title, row))
        self.folder.append(row, panels)
        self.progress.begin_epoch()
        best = self.progress.is_best = self._is_best()
        every = self.config.training.checkpoint_every
        if best or self.progress.epoch == self.epochs or self.progress.epoch % every == 0:
            self.save()
        if best:
            self.folder.keep_best()

    def _train_epoch(self, title: str, phase: Phase) -> None:
        progress, world_size = self.progress, self.processes.world_size
        features = phase.name == "features"
        training = self.config.training
        batches = epoch_batches(
            len(self.dataset),
            training.feature_batch_size if features else training.batch_size * world_size,
            self.config.seed,
            progress.epoch,
            least=2 * world_size,
            weights=self._weights,
        )
        seen = sum(map(len, batches[: progress.position]))
        rest = batches[progress.position :]
        rows = self._feature_rows() if features else None
        began = time.perf_counter() - progress.seconds
        self.dataset.set_epoch(progress.epoch)
        self._check_interruption()
        step = partial(self._step, phase)
        if rows is None:
            loaded: Iterable[Any] = ((images, labels) for images, labels, _ in self._loader(rest))
        else:
            loaded, step = rows.batches(rest, self.steps.noise), partial(self._feature_step, phase)
        with self._bar(title, len(self.dataset), seen) as bar:
            for batch in loaded:
                count = len(batches[progress.position])
                moment = progress.epoch + progress.position / len(batches)
                try:
                    losses = step(moment, *(to_device(tensor, self.device) for tensor in batch))
                except ValueError as error:
                    raise self._error(str(error), len(batches)) from error
                for key, value in losses.items():
                    progress.sums[key] += value * count
                progress.position += 1
                progress.seconds = time.perf_counter() - began
                seen += count
                mean = progress.sums[MAIN_LOSS[phase.name]] / seen
                bar.set_postfix(loss=f"{mean:.4g}")
                bar.update(count)
                if self.on_step is not None:
                    self.on_step(progress.epoch, progress.position)
                self._check_interruption()

    def _feature_rows(self) -> FeatureRows:
        """The rows of the epochs on features, computed once; a resumed run computes the same ones."""
        if self._rows is None:
            training = self.config.training

            def on_batch(images: int) -> None:
                bar.update(images)
                self._check_interruption()

            with self._bar("features", training.feature_views * len(self.dataset)) as bar:
                self._rows = feature_rows(
                    self.model,
                    self.dataset,
                    self._loader,
                    views=training.feature_views,
                    first_epoch=self.epochs,  # augmentations that no epoch has
                    batch_size=training.batch_size,
                    precision=training.precision,
                    on_batch=on_batch,
                )
        return self._rows

    def _loader(self, batches: list[list[int]]) -> Iterator[Any]:
        """This process's shard of each batch."""
        return load_batches(
            self.dataset,
            [list(self.processes.shard(batch)) for batch in batches],
            workers=self.config.data.workers,
            pin_memory=self.device.type == "cuda",
        )

    def _check_interruption(self) -> None:
        """Collective: raise Interrupted on every process if one of them has received a signal."""
        signals = self.processes.all_gather(self.interruption.signum)
        signum = next((each for each in signals if each is not None), None)
        if signum is not None:
            raise Interrupted(signum)

    def _step(self, phase: Phase, epoch: float, images: Tensor, labels: Tensor) -> dict[str, float]:
        """A step on this process's images of a batch, at a fractional epoch of the run; returns its losses."""
        training = self.config.training
        losses: dict[str, float] = {}
        if phase.name == "encoder":
            return {"encoder_loss": self.steps.encoder_step(images, labels, epoch - phase.first)}
        if phase.name == "joint":
            losses = self.steps.denoiser_step(images, labels, epoch - phase.first)
            self.progress.step += 1
        if phase.name == "guidance" or training.joint_guidance:
            # The encoder's epochs lie between those of the guidance model.
            skipped = training.encoder_epochs if phase.name == "joint" else 0
            progress = (epoch - skipped) / guidance_epochs(training)
            losses["guidance_loss"] = self.steps.guidance_step(images, labels, progress)
        return losses

    def _feature_step(
        self, phase: Phase, epoch: float, features: Tensor, prior: Tensor, labels: Tensor
    ) -> dict[str, float]:
        """A step of the denoiser's layers on cached features; returns its losses."""
        self.progress.step += 1
        return self.steps.feature_step(features, prior, labels, epoch - phase.first)

    def _validate(self, phase: Phase) -> list[Panel]:
        """Set `last_evaluation` if this epoch is to be validated; returns a few predictions for TensorBoard."""
        self.last_evaluation = None
        t, epoch = self.config.training, self.progress.epoch + 1
        number = epoch - phase.first
        if self.validation is None or (number % t.validate_every and epoch != self.epochs):
            return []
        if phase.name == "encoder":  # neither the guidance model nor the diffusion has changed
            return []

        def on_batch(images: int) -> None:
            bar.update(images)
            # Several processes stop together, after the validation.
            if self.processes.world_size == 1:
                self._check_interruption()

        with self._bar("validation", len(self.validation)) as bar:
            self.last_evaluation, panels = validate(
                self.steps,
                self.validation,
                self.config,
                self.device,
                phase.trains_denoiser,
                on_batch,
            )
        return panels

    def _is_best(self) -> bool:
        """Whether the last evaluation of the diffusion is the best so far, which it then becomes."""
        if self.last_evaluation is None or len(self.last_evaluation.results) < 2:
            return False
        value = getattr(self.last_evaluation.results[1].metrics, self.config.training.select)
        if math.isnan(value) or (self.best is not None and value <= self.best):
            return False
        self.progress.best = value
        return True

    def _print(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def _bar(self, title: str, images: int, done: int = 0) -> ProgressBar:
        """The progress over a number of images."""
        return ProgressBar(title, images, done, quiet=self.quiet)

    def _error(self, reason: str, steps: int) -> TrainingError:
        saved = (
            f"the last checkpoint is {self.path}"
            if self.path.exists()
            else "no checkpoint was written yet"
        )
        return TrainingError(
            f"training stopped in epoch {self.progress.epoch + 1} of {self.epochs}, step {self.progress.position + 1} "
            f"of {steps}: {reason}; {saved}. A smaller training.learning_rate, training.gradient_clip, or precision "
            "fp32 may help; images and labels may be at fault"
        )
