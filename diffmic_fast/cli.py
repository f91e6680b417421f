"""The command line: train, evaluate, predict, info, demo.

Exit status: 0 done; 1 failed (training broke off, no image was readable); 2 the command, the
configuration, a file or the installation is not as it should be; 3 predictions were written, but
some images were unreadable; 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from diffmic_fast.config.run import RunConfig
    from diffmic_fast.inference.predict import Predictions

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREADABLE = 3


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"wants a positive whole number, got {text!r}")
    return value


def _parent_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return options


def _compute_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    return options


def _config_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--config", metavar="NAME", help="preset or YAML file (ours, or the authors' configs/*.yml)"
    )
    options.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="change one entry of the configuration, e.g. training.batch_size=16; repeatable",
    )  # fmt: skip
    return options


def _model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("checkpoint", help="ckpt.pth, or the folder of a run")
    options.add_argument("--guidance", help="guidance file, where the checkpoint has none inside")
    options.add_argument(
        "--no-ema", dest="ema", action="store_false", help="take the weights, not their average"
    )
    options.add_argument("--samples", type=_positive, help="chains an image (default: config's)")
    options.add_argument("--seed", type=int, help="seed of the noise (default: config's)")
    options.add_argument(
        "--precision", choices=("fp32", "bf16", "fp8", "int8"), default="fp32",
        help="of the chain: int8 on a CPU, fp8 on a GPU, the others on both; bf16 of the convolutions too, "
        "where the device has such instructions (default: fp32)",
    )  # fmt: skip
    options.add_argument(
        "--compile", action="store_true",
        help="compile the convolutions: takes minutes, pays from tens of thousands of images",
    )  # fmt: skip
    options.add_argument("--batch-size", type=_positive, help="images at a time")
    options.add_argument("--workers", type=int, default=0, help="processes that load images")
    return options


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="diffmic-fast",
        description="DiffMIC: a diffusion classifier of medical images.",
        epilog=__doc__.split("\n\n")[1] if __doc__ else None,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    debug, compute = _parent_options(), _compute_options()
    config, model = _config_options(), _model_options()

    train = commands.add_parser("train", parents=[config, compute, debug], help="train a model")
    train.add_argument("--out", required=True, help="folder for checkpoints and logs")
    train.add_argument(
        "--resume", nargs="?", const="", metavar="CHECKPOINT",
        help="go on from this checkpoint (default: the one in --out), to the same numbers",
    )  # fmt: skip
    train.add_argument("--quiet", action="store_true", help="no progress")

    evaluate = commands.add_parser(
        "evaluate", parents=[model, config, compute, debug],
        help="measure guidance alone and diffusion on labelled images",
    )  # fmt: skip
    evaluate.add_argument("--split", default="test", choices=("train", "validation", "test"))
    evaluate.add_argument(
        "--sampler", action="append", metavar="NAME[:STEPS[:ETA]]",
        help="ddpm, ddpm_truncated:60, ddim:20; repeatable (default: the configuration's)",
    )  # fmt: skip
    evaluate.add_argument("--json", metavar="FILE", help="write the results as JSON")
    evaluate.add_argument("--confusion", metavar="PNG", help="draw the first sampler's confusions")

    predict = commands.add_parser(
        "predict", parents=[model, config, compute, debug],
        help="label image files or folders",
    )  # fmt: skip
    predict.add_argument("inputs", nargs="+", help="image files and folders")
    predict.add_argument("--out", help="FILE.csv or FILE.json (default: CSV to standard output)")
    predict.add_argument("--sampler", metavar="NAME[:STEPS[:ETA]]", help="default: config's")
    predict.add_argument(
        "--figure", metavar="PNG", help="draw saliency, patches and trajectories of the first 16"
    )
    predict.add_argument("--images-out", metavar="DIR", help="draw such a picture for every image")

    info = commands.add_parser("info", parents=[debug], help="versions, build, backends")
    info.add_argument("--json", action="store_true", help="as JSON")

    demo = commands.add_parser(
        "demo", parents=[compute, debug], help="train and use a small model on synthetic images"
    )
    demo.add_argument("--out", default="diffmic-fast-demo", help="folder (default: %(default)s)")
    return parser


def _train(args: argparse.Namespace) -> int:
    from diffmic_fast.checkpoint import NAME, read_checkpoint
    from diffmic_fast.config.run import RunConfig, read_config
    from diffmic_fast.config.schema import merge, parse_override
    from diffmic_fast.distributed import processes as parallel
    from diffmic_fast.training.trainer import Trainer

    resume: Path | None = None
    if args.resume is not None:
        resume = _checkpoint(args.resume) if args.resume else Path(args.out) / NAME
    if args.config is not None:
        config = read_config(args.config, args.overrides)
    elif resume is not None:
        values = read_checkpoint(resume, mmap=True).extras.get("config")
        if values is None:
            raise ValueError(f"resume: {resume} has no configuration inside; give --config")
        for override in args.overrides:
            values = merge(values, parse_override(override))
        config = RunConfig.from_dict(values)
    else:
        raise ValueError("train: give --config (a preset or a YAML file), or --resume")
    with parallel.started(args.device) as device:
        trainer = Trainer(config, args.out, device=device, resume=resume, quiet=args.quiet)
        path = trainer.fit()
    if not trainer.processes.first:
        return 0
    print(f"trained {trainer.epochs} epochs; the model is {path}")
    if trainer.best is not None:
        best = path.with_name("ckpt_best.pth")
        print(f"best validation {config.training.select}: {trainer.best:.4f}, {best}")
    return 0


def _make_parents(*paths: str | None) -> None:
    """Make the folders of files to be written, before the work that they are to hold."""
    for path in paths:
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)


def _checkpoint(text: str) -> Path:
    from diffmic_fast.checkpoint import NAME

    path = Path(text)
    return path / NAME if path.is_dir() else path


def _stored_or_given(args: argparse.Namespace, path: Path) -> RunConfig:
    """The configuration of a command on a checkpoint: the file's own or --config, with --set."""
    from diffmic_fast.checkpoint import read_checkpoint
    from diffmic_fast.config.run import RunConfig, read_config
    from diffmic_fast.config.schema import merge, parse_override

    if args.config is not None:
        return read_config(args.config, args.overrides)
    checkpoint = read_checkpoint(path, mmap=True)
    values = checkpoint.extras.get("config")
    if values is None:
        sizes = ", ".join(f"{k} {v}" for k, v in checkpoint.sizes.items())
        raise ValueError(
            f"checkpoint: {path} has no configuration inside (its weights say {sizes}); give "
            "--config with the one it was trained with"
        )
    for override in args.overrides:
        values = merge(values, parse_override(override))
    return RunConfig.from_dict(values)


def _evaluate(args: argparse.Namespace) -> int:
    from diffmic_fast.checkpoint import load_model
    from diffmic_fast.data.sources import open_source
    from diffmic_fast.distributed import processes as parallel
    from diffmic_fast.inference import evaluate as ev
    from diffmic_fast.training.trainer import choose_device, make_dataset

    _make_parents(args.json, args.confusion)
    path = _checkpoint(args.checkpoint)
    config = _stored_or_given(args, path)
    model, names = load_model(path, args.guidance, config, ema=args.ema)
    table = open_source(config.data, args.split)
    if names is not None and tuple(names) != table.classes:
        raise ValueError(
            f"evaluate: the model's classes are {', '.join(names)}, those of the images "
            f"{', '.join(table.classes)}; the numbers of the labels would not match"
        )
    sampling = config.sampling
    methods = [ev.Method.parse(s) for s in args.sampler or []] or [ev.Method.of(sampling)]
    with parallel.started(args.device) as device:
        evaluation = ev.evaluate(
            model,
            make_dataset(config, table, train=False),
            methods,
            samples=args.samples or sampling.samples,
            seed=sampling.seed if args.seed is None else args.seed,
            precision=args.precision,
            compile=args.compile,
            batch_size=args.batch_size or sampling.batch_size,
            workers=args.workers,
            device=choose_device(device),
        )
        first = parallel.current().first
    if not first:
        return 0
    evaluation.print()
    if args.json:
        evaluation.save(args.json)
    if args.confusion:
        from diffmic_fast.inference.figures import draw_confusion, save

        result = evaluation.results[1]
        save(draw_confusion(result.metrics.confusion, table.classes, result.method), args.confusion)
    return 0


def _predict(args: argparse.Namespace) -> int:
    from diffmic_fast.checkpoint import load_model
    from diffmic_fast.distributed import processes as parallel
    from diffmic_fast.inference.evaluate import Method
    from diffmic_fast.inference.predict import Pictures, collect_files, predict_files, save, to_csv
    from diffmic_fast.training.trainer import choose_device

    _make_parents(args.out, args.figure)
    if args.out and Path(args.out).suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"predict: --out wants an ending .csv or .json, got {args.out!r}")
    files = collect_files(args.inputs)
    path = _checkpoint(args.checkpoint)
    config = _stored_or_given(args, path)
    model, names = load_model(path, args.guidance, config, ema=args.ema)
    classes = names or config.data.class_names
    classes = classes or tuple(str(c) for c in range(config.model.classes))
    sampling = config.sampling
    pictures = Pictures(classes, config.data.augmentation, args.figure, args.images_out)
    with parallel.started(args.device) as device:
        if pictures.wanted and parallel.current().count > 1:
            raise ValueError(
                "predict: --figure and --images-out are for a single process; leave them out, or torchrun"
            )
        predictions = predict_files(
            model,
            files,
            classes,
            config.data.augmentation,
            Method.parse(args.sampler) if args.sampler else Method.of(sampling),
            samples=args.samples or sampling.samples,
            seed=sampling.seed if args.seed is None else args.seed,
            precision=args.precision,
            compile=args.compile,
            batch_size=args.batch_size or sampling.batch_size,
            workers=args.workers,
            device=choose_device(device),
            explain=pictures.wanted,
            on_batch=pictures.add if pictures.wanted else None,
        )
        first = parallel.current().first
    if not first:
        return _status(predictions)
    for file, reason in predictions.unreadable:
        print(f"unreadable: {file}: {reason}", file=sys.stderr)
    if not predictions.rows:
        print(f"error: none of the {len(files)} files could be read", file=sys.stderr)
        return _status(predictions)
    if args.out:
        save(predictions, args.out)
    else:
        sys.stdout.write(to_csv(predictions))
    pictures.finish()
    if predictions.unreadable:
        count = f"{len(predictions.unreadable)} of {len(files)}"
        print(f"{count} files were unreadable and left out", file=sys.stderr)
    return _status(predictions)


def _status(predictions: Predictions) -> int:
    if not predictions.rows:
        return EXIT_FAILED
    return EXIT_UNREADABLE if predictions.unreadable else 0


def _info(args: argparse.Namespace) -> int:
    from diffmic_fast import info

    info.main(args.json)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from diffmic_fast.demo import run_demo

    run_demo(args.out, device=args.device)
    return 0


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "info": _info,
    "demo": _demo,
}

# How to go on with the training that a signal has stopped.
_GO_ON = {"train": "go on with --resume", "demo": "go on with the same command"}


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; errors become one line unless --debug is given."""
    args = make_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            if not args.debug:
                warnings.showwarning = _one_line
            if getattr(args, "threads", None):
                import torch

                torch.set_num_threads(args.threads)
            return _COMMANDS[args.command](args)
    except BrokenPipeError:  # the reader of our output is gone; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        return _report(error, args.command)


def _report(error: Exception, command: str) -> int:
    """Print an error that a user can act on as one line; others keep their traceback."""
    # First: the imports below need torch too.
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        print(
            f"error: torch is not installed for {sys.executable}; install it (pip install torch), "
            "or all that diffmic-fast needs (pip install . in the folder of its sources)",
            file=sys.stderr,
        )
        return EXIT_USAGE
    from diffmic_fast.ops._backend import BackendError
    from diffmic_fast.training.interruption import Interrupted
    from diffmic_fast.training.trainer import TrainingError

    if isinstance(error, Interrupted):
        print(f"{error}, {_GO_ON[command]}", file=sys.stderr)
        return 128 + error.signum
    if isinstance(error, (TrainingError, FloatingPointError)):
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    if isinstance(error, (BackendError, ValueError, TypeError, OSError)):
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    raise error
