"""Model cards: README.md of a folder of `DiffMIC.save_pretrained`, in the form of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from diffmic_fast import __version__
from diffmic_fast.calibration import Calibration
from diffmic_fast.config.description import ModelDescription
from diffmic_fast.diffusion.sampling_options import SamplingOptions

if TYPE_CHECKING:
    from diffmic_fast.inference.evaluation import Evaluation

# Keys of `evaluate --json` and their titles.
_MEASURES = {
    "accuracy": "accuracy", "macro_f1": "macro F1", "kappa": "kappa", "balanced_accuracy": "balanced accuracy",
    "auc_ovo": "AUC", "ece": "calibration error", "nll": "log loss",
}  # fmt: skip
_MAX_CLASSES = 200

_TEMPLATE = """---
{front_matter}---

# {title}

A [DiffMIC](https://arxiv.org/abs/2303.10610) classifier of medical images: a diffusion model that denoises a label
vector, conditioned on the image and on a guidance model. Written by diffmic_fast {version}.

**It is not a medical device, and has not been validated for clinical use.**

## Use

```python
from diffmic_fast import DiffMIC

model = DiffMIC.from_pretrained("FOLDER OR HUB ID")
result = model.predict(["image.png"])
result.label, result.probabilities
```

{usage}

## Classes

{classes}

## Images

{images}

## Probabilities

{probabilities}

## Measures

{measures}

## Intended use

Research on the classification of images like those that it was trained with. The training images, their origin, their
patients and the way their labels were made are not part of this folder; whoever publishes the model should describe
them here.

## Limits

- It is not a medical device. Its output must not be used for diagnosis or treatment.
- It always predicts one of its classes, also for an image that shows none of them or is not a medical image.
- Images of another device, population, preparation or preprocessing than those of the training may be classified
  wrongly with a high probability.
- The measures apply to images like those that they were measured on.
{novelty}"""


def read_evaluation(evaluation: Evaluation | Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """The content of a JSON file of `diffmic-fast evaluate --json`.

    Args:
        evaluation: An `Evaluation`, its `to_dict()`, or the path of the file.

    Raises:
        ValueError: There is no such file, or it is not one of `evaluate`.
    """
    what = "evaluation"
    if isinstance(evaluation, (str, Path)):
        what = str(evaluation)
        try:
            value = json.loads(Path(evaluation).read_bytes())
        except OSError as error:
            raise ValueError(f"evaluation: {what} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"evaluation: {what} is not JSON: {error}") from error
    elif isinstance(evaluation, Mapping):
        value = dict(evaluation)
    else:
        value = evaluation.to_dict()
    good = isinstance(value, dict) and isinstance(value.get("results"), list) and value["results"]
    if not good or not all(isinstance(r, dict) and "method" in r for r in value["results"]):
        raise ValueError(f"evaluation: {what} must be the JSON of diffmic-fast evaluate --json")
    found: dict[str, Any] = value
    return found


def make_card(
    title: str,
    description: ModelDescription,
    calibration: Calibration | None,
    evaluation: Mapping[str, Any] | None,
) -> str:
    """The content of README.md.

    Args:
        title: of the card, such as the name of the folder.
        description: of the model.
        calibration: of the model, or None.
        evaluation: of `read_evaluation`, or None.

    Raises:
        ValueError: The evaluation has other classes than the model.
    """
    names = description.class_names
    if evaluation is not None and names is not None and evaluation.get("classes") != list(names):
        raise ValueError(
            f"evaluation: its classes must be those of the model, {', '.join(names)}, got {evaluation.get('classes')}"
        )
    front_matter = {
        "library_name": "diffmic_fast",
        "pipeline_tag": "image-classification",
        "tags": ["diffmic", "diffusion", "medical-imaging"],
    }
    has_detector = calibration is not None and calibration.novelty is not None
    return _TEMPLATE.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        title=escaped(title),
        version=__version__,
        usage=_usage(description),
        classes=_classes(description),
        images=_images(description),
        probabilities=_probabilities(calibration),
        measures=_measures(evaluation),
        novelty=_NOVELTY if has_detector else "",
    )


_NOVELTY = (
    "- The calibration contains statistics of single training images (mean colours of a 4 x 4 grid, quantiles,\n"
    "  gradients), with which unlike images are detected.\n"
)


def escaped(text: str) -> str:
    """A text of one line in which Markdown and HTML have no meaning."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", line)


def _usage(description: ModelDescription) -> str:
    if description.preprocessing is None:
        lines = [
            "The preprocessing of the images is not known: set `model.preprocessing` to that of the training first."
        ]
    else:
        lines = ["`predict` also takes Pillow images, and tensors of `model.preprocess`."]
    if description.sampling is None:
        lines.append("It has no sampling options: pass a sampler to `predict`.")
    else:
        options = SamplingOptions.from_config(description.sampling)
        lines.append(
            f"By default it samples by {options.method}, {options.samples} per image, views {options.views}, seed "
            f"{options.seed}."
        )
    return "\n".join(lines)


def _classes(description: ModelDescription) -> str:
    names = description.class_names
    if names is None:
        return f"{description.model.classes}, whose names are not known."
    rows = [f"| {number} | {escaped(name)} |" for number, name in enumerate(names[:_MAX_CLASSES])]
    more = f"\n\n{len(names) - _MAX_CLASSES} more." if len(names) > _MAX_CLASSES else ""
    return "\n".join(["| number | name |", "|---|---|", *rows]) + more


def _images(description: ModelDescription) -> str:
    model, pixels = description.model, description.preprocessing
    size = f"{model.image_size} x {model.image_size} pixels"
    if pixels is None:
        return f"{size}, RGB. How they were preprocessed is not known."
    crop = (
        "the largest centred square is resized" if pixels.centre_square else "the image is resized"
    )
    return (
        f"{size}, RGB; {crop}. Mean {list(pixels.mean)}, standard deviation {list(pixels.std)} of pixels in [0, 1];\n"
        f"images of more than 8 bits that declare no depth have {pixels.bit_depth} bits."
    )


def _probabilities(calibration: Calibration | None) -> str:
    if calibration is None:
        return "They are not calibrated, but the softmax of the label vector, which is not a measure of confidence."
    fitted = f"{calibration.sampler}, steps {calibration.steps}, eta {calibration.eta:g}"
    return (
        f"Calibrated for {fitted}, samples {calibration.samples}, views {calibration.views}: {calibration.summary}.\n"
        "With other sampling options they are not calibrated."
    )


def _measures(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "No evaluation was given when this folder was written."
    lines = [
        f"On {evaluation.get('images')} images, {evaluation.get('samples')} samples per image; in brackets 95 % "
        "bootstrap intervals over the images.",
        "",
        f"| method | {' | '.join(_MEASURES.values())} |",
        "|---" * (len(_MEASURES) + 1) + "|",
    ]
    for result in evaluation["results"]:
        cells = [_cell(result, key) for key in _MEASURES]
        lines.append(f"| {escaped(str(result['method']))} | {' | '.join(cells)} |")
    notes = [f"\n{escaped(str(note))}" for note in evaluation.get("notes") or []]
    return "\n".join(lines + notes)


def _cell(result: Mapping[str, Any], key: str) -> str:
    value = result.get(key)
    if not isinstance(value, (int, float)):
        return ""
    interval = (result.get("intervals") or {}).get(key) or {}
    low, high = interval.get("low"), interval.get("high")
    ends = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{value:.3f}{ends}"
