"""Options of the command line as objects: checkpoint, configuration, sampling options."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from diffmic_fast.checkpoint import NAME, read_checkpoint
from diffmic_fast.config.differences import model_differences
from diffmic_fast.config.run import RunConfig, read_config
from diffmic_fast.config.yaml_reader import with_overrides
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.distributed.processes import is_first_process
from diffmic_fast.pretrained_folder import is_pretrained_folder


def checkpoint_path(text: str) -> Path:
    """A checkpoint given by its file or by the folder of its run, or a folder of `DiffMIC.save_pretrained`."""
    path = Path(text)
    return path / NAME if path.is_dir() and not is_pretrained_folder(path) else path


def run_config(args: argparse.Namespace, checkpoint: Path | None) -> RunConfig:
    """The configuration of --config, or else the checkpoint's own, with the changes of --set."""
    if args.config is not None or checkpoint is None:
        return read_config(args.config, args.overrides)
    file = read_checkpoint(checkpoint, mmap=True)
    values = file.extras.get("config")
    if values is None:
        sizes = ", ".join(f"{k} {v}" for k, v in file.sizes.items())
        raise ValueError(
            f"checkpoint: {checkpoint} has no configuration inside (its weights say {sizes}); give --config with the "
            "one it was trained with"
        )
    return RunConfig.from_dict(with_overrides(values, args.overrides))


def trained_config(args: argparse.Namespace, checkpoint: Path) -> RunConfig:
    """`run_config` for a trained model, whose architecture and preprocessing may change with --override only.

    Raises:
        ValueError: --config or --set change the model or its preprocessing without --override, or the classes or their
            order in any case.
    """
    config = run_config(args, checkpoint)
    file = read_checkpoint(checkpoint, mmap=True)
    own, given = file.config, config.data.class_names
    if file.class_names is not None and given is not None and given != file.class_names:
        raise ValueError(
            f"{args.command}: data.class_names must be those of {checkpoint}, in order: "
            f"{', '.join(file.class_names)}, got {', '.join(given)}"
        )
    changed = [] if own is None else model_differences(own.to_dict(), config.to_dict())
    lines = [
        f"{key}: {before!r} in the checkpoint, {after!r} now" for key, before, after in changed
    ]
    if lines and not args.override:
        raise ValueError(
            f"{args.command}: --config and --set must leave model and preprocessing of {checkpoint} as they were "
            f"trained, got {'; '.join(lines)}; remove these changes, or allow them with --override"
        )
    if is_first_process():
        for line in lines:
            print(f"--override: {line}", file=sys.stderr)
    return config


def sampling_options(args: argparse.Namespace, config: RunConfig) -> SamplingOptions:
    """The options of the configuration, with those of the command line in their place."""
    options = SamplingOptions.from_config(config.sampling)
    return replace(
        options,
        samples=args.samples or options.samples,
        views=args.views or options.views,
        seed=options.seed if args.seed is None else args.seed,
        precision=args.precision,
        compile=args.compile,
    )


def make_parents(*paths: str | None) -> None:
    """Create the folders of output files before the work whose results they will hold."""
    for path in paths:
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
