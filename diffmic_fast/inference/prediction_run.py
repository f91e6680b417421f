"""A run of `predict`: files are classified batch by batch, and their rows written as they come."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from diffmic_fast.distributed.processes import current
from diffmic_fast.inference.output import FORMATS
from diffmic_fast.inference.pictures import Pictures
from diffmic_fast.inference.predict import FilePredictor, Heading, PredictedBatch, Row
from diffmic_fast.inference.row_file import RowFile
from diffmic_fast.progress_bar import ProgressBar


class BatchReport(Protocol):
    """The interface of the report of `predict_to`, such as `reports.prediction_report.PredictionReport`."""

    def begin(self, done: Sequence[str] | None) -> None:
        """Prepare the report; `done` are the files of the rows that are kept from an interrupted run, or None."""
        ...

    def add(self, batch: PredictedBatch) -> None:
        """Add a batch, whose prediction has trajectory, saliency and boxes."""
        ...

    def close(self) -> None:
        """Close files; the run may be continued."""
        ...


class _StandardOutput:
    """Writes rows to standard output as CSV; the part of `RowFile` that `predict_to` uses."""

    files: Sequence[str] = ()

    def __init__(self, heading: Heading) -> None:
        self._heading, self._format, self._rows = heading, FORMATS[".csv"], 0

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self._rows == 0:
                sys.stdout.write(self._format.begin(self._heading))
            sys.stdout.write(self._format.row(self._heading, row, first=self._rows == 0))
            self._rows += 1
        sys.stdout.flush()

    def finish(self, unreadable: Sequence[tuple[str, str]]) -> None:
        pass

    def close(self) -> None:
        pass


def predict_to(
    predictor: FilePredictor,
    files: Sequence[Path],
    out: str | Path | None,
    *,
    resume: bool,
    batch_size: int,
    workers: int,
    pictures: Pictures,
    report: BatchReport | None = None,
) -> tuple[int, int]:
    """Classify files and write a row for each, unreadable ones to standard error.

    Collective; rank 0 writes.

    Args:
        predictor: with the model.
        files: image files.
        out: CSV or JSON file, or None for CSV on standard output.
        resume: keep the rows that `out` has, and leave out their files.
        batch_size: images at a time and process.
        workers: processes that decode files.
        pictures: drawn of this process's images.
        report: gets every batch before its rows are written; for a single process.

    Returns:
        The number of rows in `out` and the number of unreadable files.

    Raises:
        ValueError: `out` cannot be continued (`RowFile`), or has rows of files that are not among `files`.
    """
    if not out and sys.stdout is None:
        raise ValueError("predict: standard output is closed; name a file with --out")
    processes, heading = current(), predictor.heading
    target: RowFile | _StandardOutput | None = None
    problem = ""
    if processes.is_rank_zero:
        try:
            target = RowFile(out, heading, resume=resume) if out else _StandardOutput(heading)
        except (ValueError, OSError) as error:
            problem = str(error)
    processes.raise_together(problem)
    done = processes.all_gather(list(target.files) if target is not None else [])[0]
    rest = _remaining(files, done, out)
    pictures.skip(len(done))
    if report is not None:
        report.begin(done if resume else None)
    explain = pictures.wanted or report is not None
    written, unreadable = len(done), list[tuple[str, str]]()
    # Rows and a bar on one terminal would mix.
    quiet = not processes.is_rank_zero or (not out and sys.stdout.isatty())
    bar = ProgressBar("predict", len(files), len(done), quiet=quiet)
    with contextlib.closing(target) if target is not None else contextlib.nullcontext(), bar:
        try:
            for batch in predictor.batches(
                rest, batch_size=batch_size, workers=workers, explain=explain
            ):
                # A killed run draws a picture again, rather than leave one out.
                if pictures.wanted and batch.images is not None and batch.prediction is not None:
                    pictures.add(batch.paths, batch.images, batch.prediction)
                if report is not None:
                    report.add(batch)
                written += len(batch.rows)
                unreadable += batch.unreadable
                bar.update(len(batch.rows) + len(batch.unreadable))
                if target is not None:
                    _write(target, batch)
        except BaseException:
            if target is not None and out and written:
                print(f"{written} rows are in {out}; go on with --resume", file=sys.stderr)
            raise
        if target is not None:
            target.finish(unreadable)
            _report(heading, out, len(done), written, len(unreadable))
    return written, len(unreadable)


def _write(target: RowFile | _StandardOutput, batch: PredictedBatch) -> None:
    """Write the rows of a batch, and the unreadable files to standard error."""
    for file, reason in batch.unreadable:
        ProgressBar.write(f"unreadable: {file}: {reason}")
    target.write(batch.rows)


def _remaining(files: Sequence[Path], done: Sequence[str], out: str | Path | None) -> list[Path]:
    """The files without a row."""
    names = {str(path) for path in files}
    others = [name for name in done if name not in names]
    if others:
        raise ValueError(
            f"predict: --resume: {out} has rows of {len(others)} files that are not among those given, {others[0]} for "
            "one; use another --out, or leave out --resume to replace it"
        )
    finished = set(done)
    if len(finished) < len(done):
        raise ValueError(f"predict: --resume: {out} has more than one row for a file")
    return [path for path in files if str(path) not in finished]


def _report(heading: Heading, out: str | Path | None, done: int, written: int, failed: int) -> None:
    """Print a summary to standard error."""
    if done:
        print(f"{done} rows were in {out}, {written - done} were added", file=sys.stderr)
    if not written:
        print(f"error: none of the {failed} files could be read", file=sys.stderr)
        return
    if heading.obstacle is not None:
        print(f"probabilities are not calibrated: {heading.obstacle}", file=sys.stderr)
    if failed:
        print(f"{failed} of {failed + written} files were unreadable and left out", file=sys.stderr)
