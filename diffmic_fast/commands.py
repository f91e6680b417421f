"""The commands of the command line that need a model; each returns the exit status.

A command asks for its optional packages before the work whose results need them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from diffmic_fast import demo
from diffmic_fast._optional import require
from diffmic_fast.checkpoint import (
    BEST_NAME,
    NAME,
    Checkpoint,
    add_calibration,
    check_takes_calibration,
    load_model,
    read_checkpoint,
)
from diffmic_fast.cli import EXIT_FAILED, EXIT_UNREADABLE
from diffmic_fast.command_options import (
    checkpoint_path,
    make_parents,
    run_config,
    sampling_options,
    trained_config,
)
from diffmic_fast.config.data import DataConfig
from diffmic_fast.config.run import RunConfig
from diffmic_fast.convert import FORMS, convert
from diffmic_fast.data.bit_depth import warn_of_unused_bits
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.identity import check_unseen, missing_keys
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.summary import skipped_lines
from diffmic_fast.data.table import ImageTable
from diffmic_fast.devices import choose_device
from diffmic_fast.distributed.processes import current, is_first_process, process_group
from diffmic_fast.inference.calibrate import calibrate, images_of
from diffmic_fast.inference.evaluate import evaluate
from diffmic_fast.inference.figures import draw_confusion, draw_to
from diffmic_fast.inference.output import check_suffix
from diffmic_fast.inference.pictures import Pictures
from diffmic_fast.inference.predict import FilePredictor, ProbabilityOptions, collect_files
from diffmic_fast.inference.prediction_run import predict_to
from diffmic_fast.onnx_export import NAMES as ONNX_NAMES
from diffmic_fast.onnx_export import OPSET
from diffmic_fast.progress_bar import ProgressBar
from diffmic_fast.reports.evaluation_report import write_evaluation_report
from diffmic_fast.reports.prediction_report import (
    PredictionReport,
    check_folder,
    print_if_replaced,
    remove_files,
)
from diffmic_fast.reports.settings import sampling_settings
from diffmic_fast.reports.training_report import write_training_report
from diffmic_fast.training.allocator import keep_freed_memory
from diffmic_fast.training.datasets import digest, make_dataset
from diffmic_fast.training.trainer import Trainer


def _train(args: argparse.Namespace) -> int:
    resume = None
    if args.resume is not None:
        resume = checkpoint_path(args.resume) if args.resume else Path(args.out) / NAME
    if args.config is None and resume is None:
        raise ValueError("train: give --config (a preset or a YAML file), or --resume")
    config = run_config(args, resume)
    if config.data.has_split("validation"):
        require("sklearn", extra="train", purpose="train: validation")
    keep_freed_memory()
    with process_group(args.device) as device:
        trainer = Trainer(config, args.out, device=device, resume=resume, quiet=args.quiet)
        finished = trainer.finished
        path = trainer.fit()
    if not trainer.processes.is_rank_zero:
        return 0
    if finished:
        print(
            f"{resume} had finished its {trainer.epochs} epochs, nothing was trained; the model is {path}"
        )
    else:
        print(f"trained {trainer.epochs} epochs; the model is {path}")
    if trainer.best is not None:
        best = path.with_name(BEST_NAME)
        where = (
            str(best) if best.is_file() else "of an epoch whose checkpoint is not in this folder"
        )
        print(f"best validation {config.training.select}: {trainer.best:.4f}, {where}")
    _report_training(path.parent, trainer.classes)
    return 0


def _report_training(folder: Path, classes: Sequence[str]) -> None:
    """Write the report of a run; an error is printed and not raised, since the training is complete."""
    try:
        _require_report("train")
        print(f"the report of the run is {write_training_report(folder, classes)}")
    except Exception as error:  # matplotlib raises many types, for instance for fonts
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        print(f"there is no report of the run: {reason}", file=sys.stderr)


def _calibrate(args: argparse.Namespace) -> int:
    path = checkpoint_path(args.checkpoint)
    check_takes_calibration(path)
    config = trained_config(args, path)
    file = read_checkpoint(path, mmap=True)
    model, names = load_model(path, args.guidance, config, ema=args.ema)
    if args.images:
        table = open_source(_folder(config, args.images, names), "train")
    else:
        table = open_source(config.data, args.split)
    _check_classes("calibrate", table, names)
    if digest(table) == file.extras.get("data_digest"):
        raise ValueError(
            "calibrate: the images must not have trained the model, got its training images; use others (--split, "
            "--images or --set)"
        )
    trained = {name: keys for name, keys in file.seen.items() if name != "validation"}
    split = "given" if args.images else args.split
    _say_of_seen(check_unseen("calibrate", split, table, trained, allow=args.allow_seen))
    if not args.images:
        _warn_of_unknown_split(args.split, file, config)
    options = sampling_options(args, config)
    if args.sampler:
        options = options.with_sampler(args.sampler)
    has_detector = model.calibration is not None and model.calibration.novelty is not None
    with process_group(args.device) as device:
        _report(config, table)
        validation = make_dataset(config, table, train=False)
        training = None if has_detector else _training_images(config, file)
        with _progress("calibrate", images_of(validation, training)) as bar:
            calibration = calibrate(
                model,
                validation,
                training,
                options,
                batch_size=args.batch_size or config.sampling.batch_size,
                workers=args.workers,
                device=choose_device(device),
                on_batch=bar.update,
            )
        if current().is_rank_zero:
            add_calibration(path, calibration)
            print(f"{path}: {calibration.summary}")
    return 0


def _folder(config: RunConfig, folder: str, names: tuple[str, ...] | None) -> DataConfig:
    """A data section for labelled images in a folder, with the preprocessing of a configuration."""
    return DataConfig(
        kind="folder",
        root=folder,
        class_names=names or config.data.class_names,
        augmentation=config.data.augmentation,
    )


def _training_images(config: RunConfig, file: Checkpoint) -> ImageDataset | None:
    """The images that trained the model, if the configuration still leads to them."""
    try:
        table = open_source(config.data, "train")
    except (ValueError, OSError) as error:
        print(f"no detector of unlike images: no training images: {error}", file=sys.stderr)
        return None
    if digest(table) != file.extras.get("data_digest"):
        print(
            "no detector of unlike images: the training images of the configuration are not those of the checkpoint",
            file=sys.stderr,
        )
        return None
    return make_dataset(config, table, train=False)


def _report(config: RunConfig, table: ImageTable) -> None:
    """Print to standard error what was skipped, and warn of unused bits; on rank 0."""
    if current().is_rank_zero:
        for line in skipped_lines([table]):
            print(line, file=sys.stderr)
        sources = [entry.source for entry in table.entries]
        warn_of_unused_bits(sources, config.data.augmentation.bit_depth)


def _check_classes(command: str, table: ImageTable, names: tuple[str, ...] | None) -> None:
    """Raise ValueError unless the images have the classes of the model, where those are known."""
    if names is not None and tuple(names) != table.classes:
        raise ValueError(
            f"{command}: the classes of the images must be those of the model, {', '.join(names)}, got "
            f"{', '.join(table.classes)}"
        )


def _check_unseen(
    split: str, table: ImageTable, path: Path, config: RunConfig, *, allow: bool
) -> None:
    """Raise ValueError if images of a held-out split were not held out, or warn on rank 0 if this is not known."""
    file = read_checkpoint(path, mmap=True)
    seen = file.seen
    others = {"train": (), "validation": ("training",), "test": ("training", "validation")}[split]
    seen_by_model = {name: seen[name] for name in others if name in seen}
    _say_of_seen(check_unseen("evaluate", split, table, seen_by_model, allow=allow))
    _warn_of_unknown_split(split, file, config)


def _say_of_seen(text: str) -> None:
    if text and is_first_process():
        print(text, file=sys.stderr)


def _warn_of_unknown_split(split: str, file: Checkpoint, config: RunConfig) -> None:
    """Warn on rank 0 if it cannot be checked whether a random split has images that trained the model."""
    if split == "train" or not getattr(config.data, f"{split}_fraction"):
        return
    train = open_source(config.data, "train")
    if digest(train) == file.extras.get("data_digest"):
        return
    reason = "the checkpoint does not say which images trained the model"
    if "training" in file.seen:
        others = [name for name in ("validation", "test") if config.data.has_split(name)]
        tables = [train, *(open_source(config.data, name) for name in others)]
        missing, known = missing_keys(tables, file.seen["training"]), len(file.seen["training"])
        if not missing:
            return
        reason = (
            f"{missing} of the {known} images that trained the model are no longer there, renamed or "
            "written anew"
        )
    if is_first_process():
        print(
            f"the {split} images are drawn at random, and {reason}: "
            "whether the model has seen these cannot be checked",
            file=sys.stderr,
        )


def _evaluate(args: argparse.Namespace) -> int:
    for module in ("sklearn", "rich"):
        require(module, extra="evaluate", purpose="evaluate")
    if args.confusion:
        require("matplotlib", extra="figures", purpose="evaluate: --confusion")
    earlier: list[Path] = []
    if args.report:
        _require_report("evaluate")
        earlier = check_folder(args.report)
    if args.predictions and not args.predictions.lower().endswith(".csv"):
        raise ValueError(f"evaluate: --predictions must end in .csv, got {args.predictions!r}")
    make_parents(args.json, args.predictions, args.confusion)
    path = checkpoint_path(args.checkpoint)
    config = trained_config(args, path)
    model, names = load_model(path, args.guidance, config, ema=args.ema)
    table = open_source(config.data, args.split)
    _check_classes("evaluate", table, names)
    _check_unseen(args.split, table, path, config, allow=args.allow_seen)
    options = sampling_options(args, config)
    methods = [options.with_sampler(text) for text in args.sampler or []] or [options]
    with process_group(args.device) as device:
        _report(config, table)
        dataset = make_dataset(config, table, train=False)
        with _progress("evaluate", len(dataset)) as bar:
            evaluation = evaluate(
                model,
                dataset,
                methods,
                batch_size=args.batch_size or config.sampling.batch_size,
                workers=args.workers,
                device=choose_device(device),
                on_batch=bar.update,
                resamples=args.bootstrap,
            )
        first = current().is_rank_zero
    if not first:
        return 0
    evaluation.print()
    if args.json:
        evaluation.save(args.json)
    if args.predictions:
        evaluation.save_predictions(args.predictions)
    if args.confusion:
        result = evaluation.primary
        confusion = result.metrics.confusion
        draw_to(args.confusion, lambda: draw_confusion(confusion, table.classes, result.method))
    if args.report:
        print_if_replaced(args.report)
        page = write_evaluation_report(
            args.report,
            evaluation,
            dataset,
            methods,
            timesteps=config.model.timesteps,
            split=args.split,
            settings=sampling_settings(methods[0], path),
        )
        remove_files(earlier, page)
        print(f"the report is {page}", file=sys.stderr)
    return 0


def _predict(args: argparse.Namespace) -> int:
    if args.figure or args.images_out:
        require("matplotlib", extra="figures", purpose="predict: --figure or --images-out")
    if args.report:
        _require_report("predict")
    if args.resume and not args.out:
        raise ValueError("predict: --resume continues a file; name it with --out")
    if args.resume and args.figure:
        raise ValueError(
            "predict: --figure draws the first images of a run; leave it out, or --resume"
        )
    make_parents(args.out, args.figure)
    if args.out:
        check_suffix(args.out)
    earlier = check_folder(args.report) if args.report else []
    files = collect_files(
        args.inputs,
        outputs=[*(path for path in (args.out, args.figure) if path), *earlier],
        output_folder=args.images_out,
    )
    path = checkpoint_path(args.checkpoint)
    config = trained_config(args, path)
    model, names = load_model(path, args.guidance, config, ema=args.ema)
    classes = names or config.data.class_names or tuple(str(c) for c in range(config.model.classes))
    options = sampling_options(args, config)
    if args.sampler:
        options = options.with_sampler(args.sampler)
    pictures = Pictures(classes, config.data.augmentation, args.figure, args.images_out)
    with process_group(args.device) as device:
        if (pictures.wanted or args.report) and current().world_size > 1:
            raise ValueError(
                "predict: --figure, --images-out and --report are for a single process; leave them out, or torchrun"
            )
        predictor = FilePredictor(
            model,
            classes,
            config.data.augmentation,
            options,
            probabilities=ProbabilityOptions(args.probability, args.coverage),
            device=choose_device(device),
        )
        written, failed = _predict_files(
            args, predictor, files, pictures, config, sampling_settings(options, path)
        )
        first = current().is_rank_zero
    if first:
        warn_of_unused_bits(files, config.data.augmentation.bit_depth)
        pictures.finish()
    if not written:
        return EXIT_FAILED
    return EXIT_UNREADABLE if failed else 0


def _convert(args: argparse.Namespace) -> int:
    path = checkpoint_path(args.checkpoint)
    form = args.to or ("checkpoint" if args.destination.lower().endswith(".pth") else "pretrained")
    config = trained_config(args, path) if args.config or args.overrides else None
    lines = convert(
        path,
        args.destination,
        form,
        config=config,
        guidance=args.guidance,
        ema=args.ema,
        evaluation=args.evaluation,
        overwrite=args.overwrite,
    )
    print(f"{args.destination}: {FORMS[form]}")
    for line in lines:
        print(line)
    return 0


def _export(args: argparse.Namespace) -> int:
    path = checkpoint_path(args.checkpoint)
    config = trained_config(args, path) if args.config or args.overrides else None
    model, _ = load_model(path, args.guidance, config, ema=args.ema)
    model.export_onnx(args.destination, overwrite=args.overwrite)
    print(f"{args.destination}: {', '.join(ONNX_NAMES)}, opset {OPSET}")
    return 0


def _predict_files(
    args: argparse.Namespace,
    predictor: FilePredictor,
    files: Sequence[Path],
    pictures: Pictures,
    config: RunConfig,
    settings: Sequence[tuple[str, str]],
) -> tuple[int, int]:
    """Write rows and, with --report, pages; returns the number of rows and of unreadable files."""
    report = None
    if args.report:
        if not args.resume:
            print_if_replaced(args.report)
        augmentation = config.data.augmentation
        report = PredictionReport(args.report, predictor.heading, augmentation, settings)
    with contextlib.closing(report) if report else contextlib.nullcontext():
        written, failed = predict_to(
            predictor,
            files,
            args.out,
            resume=args.resume,
            batch_size=args.batch_size or config.sampling.batch_size,
            workers=args.workers,
            pictures=pictures,
            report=report,
        )
        if report:
            print(f"the report is {report.finish()}", file=sys.stderr)
    return written, failed


def _progress(title: str, images: int) -> ProgressBar:
    """The progress of rank 0 over its share of the images."""
    share = -(-images // current().world_size)
    return ProgressBar(title, share, quiet=not current().is_rank_zero)


def _require_report(command: str) -> None:
    for module in ("jinja2", "matplotlib"):
        require(module, extra="report", purpose=f"{command}: a report")


def _demo(args: argparse.Namespace) -> int:
    for module in ("sklearn", "rich", "matplotlib", "jinja2"):
        require(module, extra="all", purpose="demo")
    demo.run_demo(args.out, device=args.device)
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "calibrate": _calibrate,
    "evaluate": _evaluate,
    "predict": _predict,
    "convert": _convert,
    "export": _export,
    "demo": _demo,
}
