"""Pictures of predictions: the image, where the guidance model looked, and the label's way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffmic_fast.checkpoint import atomic_file
from diffmic_fast.models import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too; then dashes for more classes.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1)))
MAX_ROWS = 16


@dataclass(frozen=True)
class Panel:
    """One image's row of a picture.

    image: uint8 [H, W, 3], as the model saw it.
    saliency: float [h, w], of the predicted class.
    boxes: int [K, 4], patches as top, left, bottom, right in pixels.
    trajectory: float [S, n + 1, C], label vectors of S samples from the chain's beginning to its
        end; their mean is drawn as a line, their standard deviation as a band.
    guidance, probabilities: float [C], of the guidance model alone and after the diffusion.
    name: shown above the image; truth: the right class where it is known.
    """

    name: str
    image: NDArray[np.uint8]
    saliency: NDArray[np.float32]
    boxes: NDArray[np.int64]
    trajectory: NDArray[np.float32]
    guidance: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    truth: int | None = None


def make_panels(
    images: Tensor,
    prediction: Prediction,
    names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    truths: Sequence[int] | None = None,
) -> list[Panel]:
    """Panels of a batch of normalised images [B, 3, H, W] and their prediction.

    The prediction must carry trajectory, saliency and boxes; ValueError if it does not.
    """
    if prediction.trajectory is None or prediction.saliency is None or prediction.boxes is None:
        raise ValueError(
            "figure: the prediction wants trajectory, saliency and boxes; "
            "call predict(..., trajectory=True, saliency=True, boxes=True)"
        )
    scale = torch.tensor(list(std)).view(1, 3, 1, 1)
    shift = torch.tensor(list(mean)).view(1, 3, 1, 1)
    pixels = ((images.float().cpu() * scale + shift) * 255).round().clamp(0, 255).byte()
    panels = []
    for i, name in enumerate(names):
        label = int(prediction.label[i])
        panels.append(
            Panel(
                name=name,
                image=pixels[i].permute(1, 2, 0).numpy(),
                saliency=prediction.saliency[i, label].float().cpu().numpy(),
                boxes=prediction.boxes[i].cpu().numpy(),
                trajectory=prediction.trajectory[i].float().cpu().numpy(),
                guidance=prediction.guidance[i, 0].float().cpu().numpy(),
                probabilities=prediction.probabilities[i].float().cpu().numpy(),
                truth=None if truths is None else int(truths[i]),
            )
        )
    return panels


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[(number // len(_COLOURS)) % len(_DASHES)],
    }


def _overlay(axis: Any, panel: Panel) -> None:
    """Saliency in colour over the image in grey, opaque where the saliency is high."""
    height, width = panel.image.shape[:2]
    low, high = float(panel.saliency.min()), float(panel.saliency.max())
    heat = (panel.saliency - low) / (high - low) if high > low else np.zeros_like(panel.saliency)
    tensor = torch.from_numpy(np.ascontiguousarray(heat))[None, None]
    heat = torch.nn.functional.interpolate(
        tensor, size=(height, width), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    axis.imshow(panel.image.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    axis.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.15 + 0.5 * heat)


def _patches(axis: Any, panel: Panel) -> None:
    from matplotlib.patches import Rectangle

    height, width = panel.image.shape[:2]
    axis.imshow(panel.image)
    seen: dict[tuple[int, int], list[int]] = {}
    for number, (top, left, bottom, right) in enumerate(panel.boxes.tolist(), start=1):
        axis.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5), right - left, bottom - top,
                fill=False, edgecolor="white", linewidth=1.2,
            )
        )  # fmt: skip
        seen.setdefault((top, left), []).append(number)
    for (top, left), numbers in seen.items():
        axis.text(
            left + 0.02 * width, top + 0.02 * height, ",".join(map(str, numbers)),
            color="black", fontsize=6, va="top", ha="left", clip_on=True,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )  # fmt: skip
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)


def _trajectory(axis: Any, panel: Panel, last: bool) -> None:
    samples, states, classes = panel.trajectory.shape
    place = np.arange(states)
    mean, std = panel.trajectory.mean(axis=0), panel.trajectory.std(axis=0)
    winner = int(panel.probabilities.argmax())
    for c in range(classes):
        axis.plot(
            place, mean[:, c], **_style(c), linewidth=1.8 if c == winner else 1.0,
            zorder=3 if c == winner else 2,
        )  # fmt: skip
        if samples > 1:
            axis.fill_between(
                place, mean[:, c] - std[:, c], mean[:, c] + std[:, c],
                color=_style(c)["color"], alpha=0.12, linewidth=0, zorder=1.5,
            )  # fmt: skip
    axis.axhline(0, color="0.8", linewidth=0.8, zorder=1)
    axis.axhline(1, color="0.8", linewidth=0.8, zorder=1)
    axis.set_xlim(0, states - 1)
    axis.set_ylabel("label $y_t$", fontsize=8)
    if last:
        axis.set_xlabel("denoising steps done", fontsize=8)
    axis.tick_params(labelsize=7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _bars(axis: Any, panel: Panel, classes: Sequence[str], last: bool) -> None:
    places = np.arange(len(classes))
    colours = [_style(c)["color"] for c in range(len(classes))]
    axis.barh(places - 0.2, panel.probabilities, height=0.38, color=colours)
    axis.barh(places + 0.2, panel.guidance, height=0.38, color=colours, alpha=0.35)
    axis.set_yticks(places, [_short(c, 16) for c in classes], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.tick_params(axis="x", labelsize=7)
    if last:
        axis.set_xlabel("probability (pale: guidance alone)", fontsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"


def draw_predictions(panels: Sequence[Panel], classes: Sequence[str], title: str = "") -> Figure:
    """A figure with a row an image: image, saliency, patches, the label's way, probabilities.

    At most MAX_ROWS images; ValueError for none or more.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not 1 <= len(panels) <= MAX_ROWS:
        raise ValueError(f"figure: wants 1 to {MAX_ROWS} images, got {len(panels)}")
    rows = len(panels)
    figure = Figure(figsize=(13.0, 2.25 * rows + 0.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, 5, width_ratios=(1, 1, 1, 2.1, 1.5))
    headings = ("", "saliency of\nthe predicted class", "patches, most\nsalient first",
                "the label on its way\n(mean and spread of samples)", "result")  # fmt: skip
    for row, panel in enumerate(panels):
        last = row == rows - 1
        axes = [figure.add_subplot(grid[row, column]) for column in range(5)]
        axes[0].imshow(panel.image)
        winner = int(panel.probabilities.argmax())
        text = f"{_short(panel.name, 26)}\n{_short(classes[winner], 18)}"
        colour = "black"
        if panel.truth is not None:
            right = panel.truth == winner
            text += " (right)" if right else f",\nbut it is {_short(classes[panel.truth], 18)}"
            colour = "#006644" if right else "#B00020"
        axes[0].set_title(text, fontsize=8, color=colour)
        _overlay(axes[1], panel)
        _patches(axes[2], panel)
        for axis in axes[:3]:
            axis.set_xticks([])
            axis.set_yticks([])
        _trajectory(axes[3], panel, last)
        _bars(axes[4], panel, classes, last)
        if row == 0:
            for axis, heading in zip(axes[1:], headings[1:], strict=True):
                axis.set_title(heading, fontsize=9)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=2, label=_short(n, 24), **_style(c))
               for c, n in enumerate(classes)]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(classes), 7), fontsize=8,
        frameon=False,
    )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def draw_confusion(confusion: NDArray[np.int64], classes: Sequence[str], title: str = "") -> Figure:
    """A figure of a confusion matrix [C, C]: rows true classes, columns predicted ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = 2.2 + 0.55 * len(classes)
    figure = Figure(figsize=(side + 0.6, side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    totals = np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    share = confusion / totals
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(classes)):
        for j in range(len(classes)):
            axis.text(
                j, i, str(confusion[i, j]), ha="center", va="center", fontsize=8,
                color="white" if share[i, j] > 0.5 else "black",
            )  # fmt: skip
    names = [_short(c, 18) for c in classes]
    axis.set_xticks(range(len(classes)), names, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(classes)), names, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_title(title, fontsize=9)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
