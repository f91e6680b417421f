"""The configuration of a run: its sections, presets, files and command-line overrides."""

from __future__ import annotations

import importlib.resources
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from diffmic_fast.config.authors import is_authors, translate
from diffmic_fast.config.data import DataConfig
from diffmic_fast.config.fields import SECTION
from diffmic_fast.config.model import DiffMICConfig
from diffmic_fast.config.sampling import SamplingConfig
from diffmic_fast.config.training import TrainingConfig
from diffmic_fast.config.tree import Tree
from diffmic_fast.config.yaml_reader import parse_yaml, with_overrides
from diffmic_fast.diffusion.samplers import check_sampler
from diffmic_fast.limits import MAX_SEED

_PRESETS = importlib.resources.files("diffmic_fast.config") / "presets"


@dataclass(config=SECTION)
class RunConfig(Tree):
    """Everything that decides a training run, by section.

    Attributes:
        data: images, labels, splits and augmentation.
        model: the architecture.
        training: length, optimizers, precision.
        sampling: how validation, evaluation and prediction sample.
        seed: of initial weights, order and augmentation of images, timesteps and noise.

    Raises:
        ValueError: from the constructor, for values of another type, out of their range, or at odds with each other.
    """

    data: DataConfig
    model: DiffMICConfig
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    seed: Annotated[int, Strict(), Field(ge=0, le=MAX_SEED)] = 0

    def __post_init__(self) -> None:
        m = self.model
        if m.crop_size > m.image_size:
            raise ValueError(
                f"model.crop_size must be at most image_size {m.image_size}, got {m.crop_size}"
            )
        s = self.sampling
        check_sampler(s.sampler, s.steps, s.eta, m.timesteps)

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML, so that the run can be repeated from the file."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")


def presets() -> tuple[str, ...]:
    """Names of the configurations in the package."""
    return tuple(sorted(p.name[:-4] for p in _PRESETS.iterdir() if p.name.endswith(".yml")))


def _read_text(name: str | Path) -> tuple[str, str]:
    """The YAML text of a preset or file, and its name for errors."""
    names = presets()
    if str(name) in names:
        return (_PRESETS / f"{name}.yml").read_text(encoding="utf-8"), f"preset {name}"
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"config: there is no file {str(name)!r} and no preset of that name; presets are {', '.join(names)}"
        )
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} is not a text file: {error}") from error


def read_config(name: str | Path, overrides: Iterable[str | Mapping[str, Any]] = ()) -> RunConfig:
    """Read a preset or a YAML file and apply overrides.

    A file in the format of the authors' program is translated (`config.authors`). Its keys that are not known there
    are reported in a UserWarning, because the run lacks what they ask for.

    Args:
        name: preset name (`presets()`) or path of a YAML file.
        overrides: see `yaml_reader.with_overrides`.

    Raises:
        ValueError: a file that is missing or not YAML, unknown keys, wrong values; names file, section and key.
    """
    text, what = _read_text(name)
    values = parse_yaml(text, what)
    if not isinstance(values, Mapping):
        raise ValueError(f"{what}: a configuration must be a mapping of sections, got {values!r}")
    if is_authors(values):
        values, reports = translate(values)
        for message in reports:
            warnings.warn(f"{what}: {message}", UserWarning, stacklevel=2)
    values = with_overrides(values, overrides)
    try:
        return RunConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
