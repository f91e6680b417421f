"""The configuration of a run: its sections, presets, files and command-line overrides."""

from __future__ import annotations

import dataclasses
import importlib.resources
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffmic_fast.config import authors as authors_config
from diffmic_fast.config.data import DataConfig
from diffmic_fast.config.schema import build, convert, merge, parse_override, parse_yaml, plain
from diffmic_fast.diffusion import SAMPLERS, SCHEDULES
from diffmic_fast.models import DiffMICConfig


@dataclass
class TrainingConfig:
    """How long, in what steps, and with what care (spec 5; the defaults are the published ones).

    batch_size: images a step and process, at least 2 (batch normalisation). The last batch of an epoch may be
        smaller; fewer left-over images than two a process join the batch before them.
    accumulation: parts that a batch goes through the models in, one after the other, for one step of each
        optimizer on the sum of their gradients, for batches that do not fit into memory. Batch statistics and
        the two MMD terms are then of a part, and running statistics move once a part.
    recompute: compute the layers of the image networks (the denoiser's encoder, the guidance's trunks) again
        in the backward pass instead of keeping their results: the same numbers, less memory, a pass more.
    sync_batch_norm: several processes: batch statistics over the images of all of them, as one process with
        the whole batch would have. Else each has those of its own images, and the first one's are kept.
    gather_mmd: several processes: the two MMD terms over the rows of all of them, else of each on its own.
    fsdp: several processes: each keeps its share of weights, gradients, moving average and optimizer state
        (PyTorch's FSDP2), and has a model whole while it goes through it. Else each has all of them.
    draws: timesteps and noises an image in a denoiser step, as published 1; more share the image's
        encoder pass and let the denoiser learn from few images.
    epochs, guidance_epochs: joint epochs, and epochs of the guidance model alone before them.
    warmup_epochs: joint epochs in which the denoiser's learning rate climbs linearly from 0; then
        it follows a half-cosine to `min_learning_rate`. The guidance model's stays constant unless
        `guidance_cosine` lets it fall by a half-cosine too, over all epochs.
    encoder_learning_rate: of the denoiser's image encoder; null for `learning_rate`. A pretrained
        encoder wants less than the layers behind it, which start from random numbers.
    gradient_clip: largest gradient norm of a denoiser step; null for no clipping.
    ema_decay: of the moving average of the denoiser's weights; null for none. An average over
        1 / (1 - ema_decay) steps: short runs want a smaller value than the published 0.9999.
    precision: "fp32", or "bf16" for autocast to bfloat16 in the forward passes; weights, optimizers, batch
        statistics and MMD stay in float32. "auto": bf16 where the processor multiplies bfloat16 (AMX, AVX-512),
        else fp32; what was chosen stands in config.yml and the checkpoint, and a resumed run keeps it.
    validate_every: epochs between two validations (joint epochs; the last one always).
    checkpoint_every: epochs between two checkpoints (the last one and an interruption always).
    select: the validation measure by which the best checkpoint is kept.
    """

    batch_size: int = 32
    accumulation: int = 1
    recompute: bool = False
    sync_batch_norm: bool = False
    gather_mmd: bool = False
    fsdp: bool = False
    draws: int = 1
    epochs: int = 1000
    guidance_epochs: int = 15
    warmup_epochs: float = 40.0
    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0
    encoder_learning_rate: float | None = None
    weight_decay: float = 0.0
    gradient_clip: float | None = 1.0
    guidance_learning_rate: float = 2e-4
    guidance_weight_decay: float = 0.0
    guidance_cosine: bool = False
    ema_decay: float | None = 0.9999
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    validate_every: int = 1
    checkpoint_every: int = 1
    select: Literal["accuracy", "macro_f1", "kappa", "balanced_accuracy"] = "macro_f1"
    tensorboard: bool = True


@dataclass
class SamplingConfig:
    """How labels are drawn: the sampler, its steps, samples an image, seed of the noise.

    sampler: "ddpm" (the whole chain), "ddpm_truncated" (the first `steps` table entries, the
        published test timesteps) or "ddim" (`steps` respaced over the whole chain).
    """

    sampler: Literal["ddpm", "ddpm_truncated", "ddim"] = "ddpm_truncated"
    steps: int | None = 60
    eta: float = 0.0
    samples: int = 1
    seed: int = 0
    batch_size: int = 32


@dataclass
class RunConfig:
    """Everything that decides a training run, section by section."""

    data: DataConfig
    model: DiffMICConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and text, as in a YAML file or a checkpoint."""
        tree: dict[str, Any] = plain(self)
        return tree

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """From plain dicts; ValueError for unknown, missing or mistyped keys."""
        return build(cls, values, "")

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML, so that the run can be repeated from the file."""
        import yaml

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")


def check_types(config: RunConfig) -> None:
    """Raise ValueError if a value of `config` does not have the type its field declares."""
    import typing

    hints = typing.get_type_hints(type(config))
    for section in ("data", "model", "training", "sampling"):
        part = getattr(config, section)
        if not isinstance(part, hints[section]):
            raise ValueError(
                f"config: section '{section}' wants a {hints[section].__name__}, "
                f"got {type(part).__name__}"
            )
        inner = typing.get_type_hints(type(part))
        for item in dataclasses.fields(part):
            value = getattr(part, item.name)
            if not (dataclasses.is_dataclass(value) and not isinstance(value, type)):
                convert(plain(value), inner[item.name], f"{section}.{item.name}")
    convert(config.seed, int, "seed")


def check_ranges(config: RunConfig) -> None:
    """Raise ValueError if a size, rate or name of `config` is out of its range."""

    def want(section: str, key: str, good: bool, wish: str) -> None:
        if not good:
            value = getattr(getattr(config, section), key)
            raise ValueError(f"config: {section}.{key} wants {wish}, got {value!r}")

    if config.seed < 0:
        raise ValueError(f"config: seed wants a number not below 0, got {config.seed}")
    m, t, s = config.model, config.training, config.sampling
    want("model", "classes", m.classes >= 2, "at least 2 classes")
    for key in ("image_size", "feature_dim", "crops", "crop_size"):
        want("model", key, getattr(m, key) >= 1, "a positive whole number")
    want("model", "timesteps", m.timesteps >= 2, "at least 2 timesteps")
    want("model", "schedule", m.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES))
    for key in ("beta_start", "beta_end"):
        want("model", key, 0.0 < getattr(m, key) < 1.0, "a number between 0 and 1")
    want("model", "percent_t", 0.0 < m.percent_t <= 1.0, "a share above 0, at most 1")
    want("model", "crop_channels", m.crop_channels in ("first", "all"), "'first' or 'all'")
    want("model", "crop_size", m.crop_size <= m.image_size, f"at most image_size {m.image_size}")
    want("training", "batch_size", t.batch_size >= 2, "at least 2 (batch normalisation)")
    for key in ("epochs", "guidance_epochs", "warmup_epochs", "weight_decay"):
        want("training", key, getattr(t, key) >= 0, "a number not below 0")
    want("training", "epochs", t.epochs + t.guidance_epochs > 0, "an epoch to train at all")
    for key in ("learning_rate", "guidance_learning_rate"):
        want("training", key, getattr(t, key) > 0, "a positive number")
    want("training", "min_learning_rate", 0 <= t.min_learning_rate <= t.learning_rate,
         "a number from 0 to learning_rate")  # fmt: skip
    if t.encoder_learning_rate is not None:
        want("training", "encoder_learning_rate", t.encoder_learning_rate > 0, "a positive number")
    want("training", "guidance_weight_decay", t.guidance_weight_decay >= 0, "a number not below 0")
    if t.gradient_clip is not None:
        want("training", "gradient_clip", t.gradient_clip > 0, "a positive number or null")
    if t.ema_decay is not None:
        want("training", "ema_decay", 0 < t.ema_decay < 1, "a number between 0 and 1, or null")
    for key in ("validate_every", "checkpoint_every", "draws", "accumulation"):
        want("training", key, getattr(t, key) >= 1, "a positive whole number")
    for key in ("samples", "batch_size"):
        want("sampling", key, getattr(s, key) >= 1, "a positive whole number")
    want("sampling", "eta", 0.0 <= s.eta <= 1.0, "a number from 0 to 1")
    check_steps(s.sampler, s.steps, m.timesteps)


def check_steps(sampler: str, steps: int | None, timesteps: int) -> None:
    """Raise ValueError unless `sampler` can walk `steps` of `timesteps` table entries."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler wants one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler == "ddpm":
        if steps not in (None, timesteps):
            raise ValueError(
                f"sampler 'ddpm' walks all {timesteps} timesteps, got steps {steps}; leave steps "
                "out (null), or take 'ddpm_truncated' or 'ddim'"
            )
    elif steps is None or not 1 <= steps <= timesteps:
        raise ValueError(
            f"sampler {sampler!r} wants steps from 1 to {timesteps} (the timesteps), got {steps}"
        )


def presets() -> tuple[str, ...]:
    """Names of the configurations that come with the package."""
    folder = importlib.resources.files("diffmic_fast.config") / "presets"
    return tuple(sorted(p.name[:-4] for p in folder.iterdir() if p.name.endswith(".yml")))


def read_text(name: str | Path) -> tuple[str, str]:
    """The YAML text of a preset or file, and what to call it in an error."""
    names = presets()
    if str(name) in names:
        folder = importlib.resources.files("diffmic_fast.config") / "presets"
        return (folder / f"{name}.yml").read_text(encoding="utf-8"), f"preset {name}"
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"config: there is no file {str(name)!r}, and no preset of that name; "
            f"presets are {', '.join(names)}"
        )
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} is not a text file: {error}") from error


def read_config(name: str | Path, overrides: Iterable[str | Mapping[str, Any]] = ()) -> RunConfig:
    """Read a preset or a YAML file, ours or of the authors' kind, and lay overrides on top.

    name: preset name (`presets()`) or path of a YAML file. A file with the authors' sections
        (`diffusion`, `optim`, ...) is translated (authors_config); keys that it does not know are
        named in a UserWarning, since the run would silently lack what they ask for.
    overrides: texts "section.key=value" (the value read as YAML) or nested mappings.
    Raises ValueError naming the key, its section and the nearest known key.
    """
    text, what = read_text(name)
    values = parse_yaml(text, what)
    if not isinstance(values, Mapping):
        raise ValueError(f"{what}: a configuration wants sections with keys, got {values!r}")
    if authors_config.is_authors(values):
        values, ignored = authors_config.translate(values)
        for message in ignored:
            warnings.warn(f"{what}: {message}", UserWarning, stacklevel=2)
    for override in overrides:
        change = parse_override(override) if isinstance(override, str) else override
        values = merge(values, change)
    try:
        return RunConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
