"""The command line: train, calibrate, evaluate, predict, convert, export, info, demo.

Exit status: 0 success; 1 failure (training stopped, no image was readable, a process
that loads images died); 2 invalid command, configuration, file or installation; 3 predictions were
written, but some images were unreadable; 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from diffmic_fast.limits import (
    MAX_RESAMPLES,
    MAX_SAMPLES,
    MAX_SEED,
    MAX_THREADS,
    MAX_WORKERS,
    MIN_SEED,
)
from diffmic_fast.terminal import escaped_output

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREADABLE = 3

# What continues a training run that a signal has stopped.
_CONTINUE = {"train": "go on with --resume", "demo": "go on with the same command"}

# In the message of torch's RuntimeError.
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
_LESS_MEMORY = (
    dict.fromkeys(
        ("calibrate", "evaluate", "predict"),
        "use a smaller --batch-size, or fewer --samples or --workers",
    )
    | dict.fromkeys(
        ("train", "demo", "info"),
        "use a smaller training.batch_size, or training.accumulation; see data.cache, too",
    )
    | dict.fromkeys(("convert", "export"), "the command needs a few times the size of the model")
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="diffmic-fast",
        description="DiffMIC: a diffusion classifier of medical images.",
        epilog=__doc__.split("\n\n")[1] if __doc__ else None,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a model")
    train.add_argument("--out", required=True, help="folder for checkpoints and logs")
    train.add_argument(
        "--resume", nargs="?", const="", metavar="CHECKPOINT",
        help="go on from this checkpoint (default: the one in --out), to the same numbers",
    )  # fmt: skip
    train.add_argument("--quiet", action="store_true", help="no progress")

    calibrate = commands.add_parser(
        "calibrate", help="fit probabilities to labelled images and write them into the checkpoint"
    )
    _add_model_options(calibrate, "checkpoint or run")
    calibrate.add_argument(
        "--split", default="validation", choices=("train", "validation", "test"),
        help="the images of the configuration's data to fit to; they must not have trained the model "
        "(default: %(default)s)",
    )  # fmt: skip
    calibrate.add_argument(
        "--images", metavar="DIR", help="fit to these images instead: a folder for each class"
    )
    calibrate.add_argument("--sampler", metavar="NAME[:STEPS[:ETA]]", help="default: config's")
    _add_allow_seen(calibrate)

    evaluate = commands.add_parser(
        "evaluate", help="measure the guidance model alone and the diffusion on labelled images"
    )
    _add_model_options(evaluate)
    evaluate.add_argument("--split", default="test", choices=("train", "validation", "test"))
    evaluate.add_argument(
        "--sampler", action="append", metavar="NAME[:STEPS[:ETA]]",
        help="ddpm, ddpm_truncated:60, ddim:20; repeatable (default: the configuration's)",
    )  # fmt: skip
    evaluate.add_argument(
        "--bootstrap", type=_between(0, MAX_RESAMPLES), default=1000, metavar="N",
        help="resamples of the images for 95 %% intervals; 0 for none (default: %(default)s)",
    )  # fmt: skip
    evaluate.add_argument("--json", metavar="FILE", help="write the results as JSON")
    evaluate.add_argument(
        "--predictions", metavar="FILE.csv",
        help="write a row for each image by the first sampler: classes, probabilities, confidence",
    )  # fmt: skip
    evaluate.add_argument(
        "--confusion", metavar="PNG", help="draw the confusion matrix of the first sampler"
    )
    evaluate.add_argument(
        "--report", metavar="DIR", help="write a page of HTML with measures, curves and mistakes"
    )
    _add_allow_seen(evaluate)

    predict = commands.add_parser("predict", help="label image files or folders")
    _add_model_options(predict)
    predict.add_argument("inputs", nargs="+", help="image files and folders")
    predict.add_argument("--out", help="FILE.csv or FILE.json (default: CSV to standard output)")
    predict.add_argument(
        "--resume", action="store_true",
        help="keep the rows that --out has from an interrupted run, and go on with the other files",
    )  # fmt: skip
    predict.add_argument("--sampler", metavar="NAME[:STEPS[:ETA]]", help="default: config's")
    predict.add_argument(
        "--probability", choices=("published", "calibrated"),
        help="published: the softmax of y_0 (default: calibrated where the checkpoint has a calibration for these "
        "options)",
    )  # fmt: skip
    predict.add_argument(
        "--coverage", type=_share, default=0.9,
        help="share of images whose class is to be in their prediction set (default: %(default)s)",
    )  # fmt: skip
    predict.add_argument(
        "--figure", metavar="PNG", help="draw saliency, patches and trajectories of the first 16"
    )
    predict.add_argument("--images-out", metavar="DIR", help="draw this picture for every image")
    predict.add_argument(
        "--report", metavar="DIR",
        help="write a page of HTML with image, saliency, probabilities and path of each label",
    )  # fmt: skip

    convert = commands.add_parser("convert", help="write a model in another form")
    _add_source_options(convert)
    _add_conversion(convert)

    export = commands.add_parser("export", help="write ONNX files of a model")
    _add_source_options(export)
    export.add_argument("destination", metavar="DST", help="new folder")

    info = commands.add_parser("info", help="versions, build, backends")
    info.add_argument("--json", action="store_true", help="as JSON")

    demo = commands.add_parser("demo", help="train and use a small model on synthetic images")
    demo.add_argument("--out", default="diffmic-fast-demo", help="folder (default: %(default)s)")

    for command in (train, calibrate, evaluate, predict, convert, export):
        _add_config_options(command)
    for command in (train, calibrate, evaluate, predict, demo):
        _add_compute_options(command)
    for command in (train, calibrate, evaluate, predict, convert, export, info, demo):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_conversion(command: argparse.ArgumentParser) -> None:
    command.add_argument("destination", metavar="DST", help="new folder, or new file .pth")
    command.add_argument(
        "--to", choices=("pretrained", "checkpoint", "published"),
        help="pretrained: a folder of safetensors and JSON, as of DiffMIC.save_pretrained; checkpoint: a file of this "
        "package; published: files of the published program (default: checkpoint if DST ends in .pth, else "
        "pretrained)",
    )  # fmt: skip
    command.add_argument(
        "--evaluation", metavar="FILE.json",
        help="for a pretrained folder: measures for its model card, of evaluate --json",
    )  # fmt: skip


def _add_source_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="SRC", help="checkpoint, run or pretrained folder")
    _add_weights_options(command, "SRC")
    command.add_argument("--overwrite", action="store_true", help="replace DST")
    command.set_defaults(device="cpu", threads=None)


def _add_weights_options(command: argparse.ArgumentParser, checkpoint: str) -> None:
    """The options of `load_model`; `checkpoint` names the positional argument in their help."""
    command.add_argument(
        "--guidance", help=f"guidance file, where {checkpoint} has none inside or beside it"
    )
    command.add_argument(
        "--no-ema", dest="ema", action="store_false", help="use the weights, not their average"
    )
    command.add_argument(
        "--override", action="store_true",
        help=f"accept changes of the model or preprocessing of {checkpoint} by --config or --set; otherwise an error",
    )  # fmt: skip


def _add_allow_seen(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow-seen", action="store_true",
        help="accept images that the model was trained with, such as duplicates across splits; otherwise an error",
    )  # fmt: skip


def _add_model_options(
    command: argparse.ArgumentParser, accepted: str = "checkpoint, run or pretrained folder"
) -> None:
    command.add_argument("checkpoint", help=accepted)
    _add_weights_options(command, "the checkpoint")
    command.add_argument(
        "--samples", type=_between(1, MAX_SAMPLES), help="chains per image (default: config's)"
    )
    command.add_argument(
        "--views", type=int, choices=(1, 2, 4),
        help="mirror images per image whose guidance and features are averaged (default: config's)",
    )  # fmt: skip
    command.add_argument(
        "--seed", type=_between(MIN_SEED, MAX_SEED), help="seed of the noise (default: config's)"
    )
    command.add_argument(
        "--precision", choices=("fp32", "bf16", "fp8", "int8"), default="fp32",
        help="of the chain: int8 on a CPU, fp8 on a GPU, the others on both; bf16 covers the convolutions too "
        "where the device has bfloat16 instructions (default: fp32)",
    )  # fmt: skip
    command.add_argument(
        "--compile", action="store_true",
        help="compile the convolutions: takes minutes, worth it for tens of thousands of images",
    )  # fmt: skip
    command.add_argument("--batch-size", type=_positive, help="images at a time")
    command.add_argument(
        "--workers", type=_between(0, MAX_WORKERS), default=0,
        help="processes that load images (default: 0, none)",
    )  # fmt: skip


def _add_config_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", metavar="NAME", help="preset or YAML file (ours, or the authors' configs/*.yml)"
    )
    command.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="change one entry of the configuration, e.g. training.batch_size=16; repeatable",
    )  # fmt: skip


def _add_compute_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument(
        "--threads", type=_between(1, MAX_THREADS), help="CPU threads (default: torch's choice)"
    )


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text!r}")
    return value


def _between(least: int, most: int) -> Callable[[str], int]:
    """A parser of whole numbers in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {least} to {most}, got {text!r}"
            )
        return value

    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments (default: those of the process).

    Returns:
        The exit status. Errors that a user can act on are one line on standard error; --debug raises them instead.
    """
    args = make_parser().parse_args(argv)
    try:
        with escaped_output(), warnings.catch_warnings():
            if not args.debug:
                warnings.showwarning = _print_warning
            return _run(args)
    except BrokenPipeError:
        # Nobody reads standard output any more; flushing it at exit must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        return _report(error, args.command)


def _run(args: argparse.Namespace) -> int:
    if args.command == "info":
        from diffmic_fast import info  # needs fewer packages than the other commands

        info.main(args.json)
        return 0
    import torch

    from diffmic_fast.commands import COMMANDS
    from diffmic_fast.devices import choose_device

    choose_device(args.device)  # before any work
    if args.threads:
        torch.set_num_threads(args.threads)
    return COMMANDS[args.command](args)


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _report(error: Exception, command: str) -> int:
    """Print an error that a user can act on and return the exit status; raise any other."""
    # Before the imports below, which need torch.
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        print(
            f"error: torch is not installed for {sys.executable}; install it (pip install torch), "
            "or diffmic-fast with its dependencies (pip install . in the folder of its sources)",
            file=sys.stderr,
        )
        return EXIT_USAGE
    import torch

    from diffmic_fast.data.loading import LoadingError
    from diffmic_fast.ops._backend import BackendError
    from diffmic_fast.training.interruption import Interrupted
    from diffmic_fast.training.trainer import TrainingError

    if isinstance(error, Interrupted):
        print(f"{error}, {_CONTINUE[command]}", file=sys.stderr)
        return 128 + error.signum
    if isinstance(error, (TrainingError, LoadingError, FloatingPointError)):
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _NO_MEMORY in str(error):
        print(f"error: memory has run out: {error}; {_LESS_MEMORY[command]}", file=sys.stderr)
        return EXIT_FAILED
    if isinstance(error, (BackendError, ValueError, TypeError, OSError, ImportError)):
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    raise error
