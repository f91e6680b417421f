"""The folder of a training run: its checkpoints and logs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffmic_fast.atomic_files import keep_copy, remove_unfinished
from diffmic_fast.checkpoint import (
    BEST_NAME,
    GUIDANCE_BEST_NAME,
    GUIDANCE_NAME,
    NAME,
    Checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from diffmic_fast.config.run import RunConfig
from diffmic_fast.distributed.processes import Processes
from diffmic_fast.inference.figures import Panel
from diffmic_fast.training.log import CsvLog, TensorBoardLog
from diffmic_fast.training.random_states import keep_random_states


class RunFolder:
    """Files of a run, which rank 0 writes; on other processes the methods do nothing.

    Attributes:
        path: the checkpoint.
    """

    def __init__(self, folder: Path, processes: Processes, *, resume: Path | None) -> None:
        """Collective: check a folder, which is not changed.

        Args:
            folder: of the run.
            processes: of the run.
            resume: the checkpoint that is resumed, or None.

        Raises:
            ValueError: the folder holds a run that is not resumed, or not all processes see the same folder.
        """
        self.folder, self.path = folder, folder / NAME
        self._writes = processes.is_rank_zero
        self._logs: list[CsvLog | TensorBoardLog] = []
        if len(set(processes.all_gather(self.path.exists()))) > 1:
            raise ValueError(
                f"training: all processes must use one folder, got {self.path} for some of them only"
            )
        resumed = resume is not None and resume.resolve().parent == folder.resolve()
        for name in () if resumed else (NAME, BEST_NAME):
            if (folder / name).exists():
                raise ValueError(
                    f"training: {folder} already holds a run ({name}); resume it (--resume) or use another folder "
                    "(--out)"
                )

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and the guidance file beside it."""
        if self._writes:
            save_checkpoint(checkpoint)

    def keep_best(self) -> None:
        """Keep the last checkpoint as the best."""
        if self._writes:
            for name, best in ((NAME, BEST_NAME), (GUIDANCE_NAME, GUIDANCE_BEST_NAME)):
                keep_copy(self.folder / name, self.folder / best)

    def take_best(self, checkpoint: Path, best: float | None) -> None:
        """Keep the best checkpoint of the folder of `checkpoint`, if it has the metric `best`."""
        source = checkpoint.with_name(BEST_NAME)
        if not self._writes or best is None or (self.folder / BEST_NAME).exists():
            return
        if source.is_file():
            progress = read_checkpoint(source, mmap=True).extras.get("progress", {})
            if progress.get("best") == best:
                guidance = source.with_name(GUIDANCE_BEST_NAME)
                if guidance.is_file():  # the checkpoint has this model inside, too
                    keep_copy(guidance, self.folder / GUIDANCE_BEST_NAME)
                keep_copy(source, self.folder / BEST_NAME)

    def has_best(self, epoch: int) -> bool:
        """Whether the best checkpoint is that after `epoch` epochs."""
        best = self.folder / BEST_NAME
        if not best.is_file():
            return False
        progress = read_checkpoint(best, mmap=True).extras.get("progress", {})
        return bool(progress.get("epoch") == epoch)

    @contextlib.contextmanager
    def logs(self, config: RunConfig, classes: Sequence[str], epochs: int) -> Iterator[None]:
        """A block in which `append` writes to the logs, after the rows of the first `epochs`."""
        with contextlib.ExitStack() as stack:
            if self._writes:
                remove_unfinished(self.folder)
                config.save(self.folder / "config.yml")
                self._logs = [CsvLog(self.folder / "log.csv", epochs)]
            if self._writes and config.training.tensorboard:
                with keep_random_states():
                    board = TensorBoardLog(self.folder / "tensorboard", epochs, classes)
                self._logs.append(stack.enter_context(contextlib.closing(board)))
            yield

    def append(self, row: dict[str, Any], panels: Sequence[Panel] = ()) -> None:
        """Write an epoch's row; TensorBoard shows a few predictions with it."""
        for log in self._logs:
            log.append(row)
            if panels and isinstance(log, TensorBoardLog):
                log.show(panels, row["epoch"])
