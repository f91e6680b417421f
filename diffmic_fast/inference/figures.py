"""Figures of predictions and of confusion matrices."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffmic_fast._optional import require
from diffmic_fast.atomic_files import atomic_file
from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.models import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can tell apart; further classes have dashes.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1)))
_HEADINGS = (
    "saliency of\nthe predicted class",
    "patches, most\nsalient first",
    "trajectory of the label\n(mean and spread of samples)",
    "result",
)
MAX_ROWS = 16


@dataclass(frozen=True)
class Panel:
    """What `draw_predictions` shows of one image.

    Attributes:
        name: shown above the image.
        image: [H, W, 3], as the model saw it.
        saliency: [h, w], of the predicted class.
        boxes: [K, 4] patches in pixels: top, left, bottom, right.
        trajectory: [S, n + 1, C], states of S chains. Their mean is drawn as a line, their standard deviation as a
            band.
        guidance, probabilities: [C], of the guidance model alone and after the diffusion.
        truth: number of the true class, or None.
    """

    name: str
    image: NDArray[np.uint8]
    saliency: NDArray[np.float32]
    boxes: NDArray[np.int64]
    trajectory: NDArray[np.float32]
    guidance: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    truth: int | None = None

    @property
    def label(self) -> int:
        """Number of the predicted class."""
        return int(self.probabilities.argmax())


def make_panels(
    images: Tensor,
    prediction: Prediction,
    names: Sequence[str],
    augmentation: Preprocessing,
    truths: Sequence[int | None],
) -> list[Panel]:
    """Make a panel for each image of a batch.

    Args:
        images: [B, 3, H, W], normalised.
        prediction: with trajectory, saliency and boxes.
        names: B names to show.
        augmentation: with the mean and deviation that the images are normalised by.
        truths: B numbers of true classes, None where they are not known.

    Raises:
        ValueError: the prediction lacks trajectory, saliency or boxes.
    """
    if prediction.trajectory is None or prediction.saliency is None or prediction.boxes is None:
        raise ValueError(
            "figure: the prediction must have trajectory, saliency and boxes; "
            "call predict(..., trajectory=True, saliency=True, boxes=True)"
        )
    scale = torch.tensor(augmentation.std, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)
    shift = torch.tensor(augmentation.mean, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)
    pixels = ((images.float().cpu() * scale + shift) * 255).round().clamp(0, 255).byte()
    return [
        Panel(
            name=name,
            image=pixels[i].permute(1, 2, 0).numpy(),
            saliency=prediction.saliency[i, int(prediction.label[i])].float().cpu().numpy(),
            boxes=prediction.boxes[i].cpu().numpy(),
            trajectory=prediction.trajectory[i].float().cpu().numpy(),
            guidance=prediction.guidance[i, 0].float().cpu().numpy(),
            probabilities=prediction.probabilities[i].float().cpu().numpy(),
            truth=truths[i],
        )
        for i, name in enumerate(names)
    ]


def draw_predictions(panels: Sequence[Panel], classes: Sequence[str], title: str = "") -> Figure:
    """Draw a row for each image: image, saliency, patches, trajectory of the label, probabilities.

    Raises:
        ValueError: there are no panels, or more than `MAX_ROWS`.
    """
    rows = len(panels)
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"figure: there must be 1 to {MAX_ROWS} images, got {rows}")
    figure = _new_figure(13.0, 2.25 * rows + 0.9)
    axes = figure.subplots(rows, 5, squeeze=False, width_ratios=(1, 1, 1, 2.1, 1.5))
    for row, panel in zip(axes, panels, strict=True):
        _draw_image(row[0], panel, classes)
        _draw_saliency(row[1], panel)
        _draw_patches(row[2], panel)
        for axis in row[:3]:
            axis.set_xticks([])
            axis.set_yticks([])
        _draw_trajectory(row[3], panel)
        _draw_probabilities(row[4], panel, classes)
    for axis, heading in zip(axes[0, 1:], _HEADINGS, strict=True):
        axis.set_title(heading, fontsize=9)
    axes[-1, 3].set_xlabel("denoising steps done", fontsize=8)
    axes[-1, 4].set_xlabel("probability (pale: guidance alone)", fontsize=8)
    figure.legend(
        handles=_legend(classes), loc="outside lower center", ncols=min(len(classes), 7),
        fontsize=8, frameon=False,
    )  # fmt: skip
    if title:
        figure.suptitle(_literal(title), fontsize=10)
    return figure


def draw_confusion(confusion: NDArray[np.int64], classes: Sequence[str], title: str = "") -> Figure:
    """Draw a confusion matrix [C, C], rows true classes, columns predicted ones."""
    side = 2.2 + 0.55 * len(classes)
    figure = _new_figure(side + 0.6, side)
    axis = figure.add_subplot()
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(confusion):
        axis.text(
            j, i, str(count), ha="center", va="center", fontsize=8,
            color="white" if share[i, j] > 0.5 else "black",
        )  # fmt: skip
    names = [_short(c, 18) for c in classes]
    axis.set_xticks(range(len(classes)), names, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(classes)), names, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_title(_literal(title), fontsize=9)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG; an interrupted write leaves no file."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def to_pixels(figure: Figure) -> NDArray[np.uint8]:
    """A figure as pixels [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_to(path: str | Path, draw: Callable[[], Figure]) -> bool:
    """Draw a figure and write it as PNG, after results that must not be lost with it.

    Returns:
        Whether it was written; otherwise there is a UserWarning with the reason.
    """
    try:
        save_figure(draw(), path)
    except (
        Exception
    ) as error:  # matplotlib raises many types, for instance on fonts and configurations
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        warnings.warn(f"the figure {path} was not drawn: {reason}", UserWarning, stacklevel=2)
        return False
    return True


def _new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, drawn without pyplot, whose figures are global state."""
    require("matplotlib", extra="figures", purpose="drawing a figure")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[(number // len(_COLOURS)) % len(_DASHES)],
    }


def _draw_image(axis: Any, panel: Panel, classes: Sequence[str]) -> None:
    axis.imshow(panel.image)
    text, colour = f"{_short(panel.name, 26)}\n{_short(classes[panel.label], 18)}", "black"
    if panel.truth == panel.label:
        text, colour = f"{text} (right)", "#006644"
    elif panel.truth is not None:
        text, colour = f"{text},\nbut it is {_short(classes[panel.truth], 18)}", "#B00020"
    axis.set_title(text, fontsize=8, color=colour)


def _draw_saliency(axis: Any, panel: Panel) -> None:
    """Saliency in colour over the image in grey, more opaque where it is higher."""
    height, width = panel.image.shape[:2]
    low, high = float(panel.saliency.min()), float(panel.saliency.max())
    heat = (panel.saliency - low) / (high - low) if high > low else np.zeros_like(panel.saliency)
    tensor = torch.from_numpy(np.ascontiguousarray(heat))[None, None]
    heat = torch.nn.functional.interpolate(
        tensor, size=(height, width), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    axis.imshow(panel.image.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    axis.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.15 + 0.5 * heat)


def _draw_patches(axis: Any, panel: Panel) -> None:
    """Boxes around the patches, numbered from the most salient one; equal boxes share their numbers' label."""
    from matplotlib.patches import Rectangle

    height, width = panel.image.shape[:2]
    axis.imshow(panel.image)
    numbers_at: dict[tuple[int, int], list[int]] = {}
    for number, (top, left, bottom, right) in enumerate(panel.boxes.tolist(), start=1):
        axis.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5), right - left, bottom - top,
                fill=False, edgecolor="white", linewidth=1.2,
            )
        )  # fmt: skip
        numbers_at.setdefault((top, left), []).append(number)
    for (top, left), numbers in numbers_at.items():
        axis.text(
            left + 0.02 * width, top + 0.02 * height, ",".join(map(str, numbers)),
            color="black", fontsize=6, va="top", ha="left", clip_on=True,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )  # fmt: skip
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)


def _draw_trajectory(axis: Any, panel: Panel) -> None:
    """Mean and standard deviation of the label vectors over the samples, step by step."""
    samples, states, classes = panel.trajectory.shape
    steps = np.arange(states)
    mean, std = panel.trajectory.mean(axis=0), panel.trajectory.std(axis=0)
    for c in range(classes):
        winner = c == panel.label
        axis.plot(
            steps, mean[:, c], **_style(c), linewidth=1.8 if winner else 1.0,
            zorder=3 if winner else 2,
        )  # fmt: skip
        if samples > 1:
            axis.fill_between(
                steps, mean[:, c] - std[:, c], mean[:, c] + std[:, c],
                color=_style(c)["color"], alpha=0.12, linewidth=0, zorder=1.5,
            )  # fmt: skip
    axis.axhline(0, color="0.8", linewidth=0.8, zorder=1)
    axis.axhline(1, color="0.8", linewidth=0.8, zorder=1)
    axis.set_xlim(0, states - 1)
    axis.set_ylabel("label $y_t$", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_probabilities(axis: Any, panel: Panel, classes: Sequence[str]) -> None:
    """Bars of each class after the diffusion, and paler those of the guidance model alone."""
    rows = np.arange(len(classes))
    colours = [_style(c)["color"] for c in range(len(classes))]
    axis.barh(rows - 0.2, panel.probabilities, height=0.38, color=colours)
    axis.barh(rows + 0.2, panel.guidance, height=0.38, color=colours, alpha=0.35)
    axis.set_yticks(rows, [_short(c, 16) for c in classes], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(classes: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], linewidth=2, label=_short(name, 24), **_style(c))
        for c, name in enumerate(classes)
    ]


def _short(text: str, length: int) -> str:
    """The end of a text, at most `length` characters, to be drawn as it is."""
    return _literal(text if len(text) <= length else f"…{text[1 - length :]}")


def _literal(text: str) -> str:
    """A text that matplotlib draws as it is: no formula between dollars, control characters as escape sequences."""
    return "".join("\\$" if c == "$" else c if c.isprintable() else repr(c)[1:-1] for c in text)
