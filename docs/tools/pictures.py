"""`python docs/tools/pictures.py`: draws docs/pictures/*.svg.

Curves, states and windows are computed by the package; the image is drawn by `data.synthetic_fundus`. Nothing shown
comes from a trained model.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from diffmic_fast.data.synthetic_fundus import generate
from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.reference.denoise import StepTable, chain
from diffmic_fast.reference.rois import class_map, rois

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
# Okabe and Ito's palette, for all kinds of colour vision.
BLUE, GREEN, RED, GREY = "#0072B2", "#009E73", "#D55E00", "#777777"
COLOURS = (BLUE, GREEN, RED)
TIMESTEPS = 1000
PROBABILITIES = (0.6, 0.3, 0.1)

plt.rcParams.update(
    {
        "svg.hashsalt": "diffmic_fast",  # the same names of elements in every run
        "svg.fonttype": "path",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def save(figure: Figure, name: str) -> None:
    """Write an SVG file without date."""
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def plane(points: Tensor) -> np.ndarray:
    """Points of three classes in the plane of the label distributions: each class a corner of a triangle."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=points.dtype)
    return np.asarray(points @ corners)


def draw_triangle(axes: Axes) -> None:
    """The label distributions of three classes."""
    corners = plane(torch.eye(3))
    axes.fill(*corners.T, facecolor="none", edgecolor=GREY, linewidth=0.8)
    for number, corner in enumerate(corners):
        outwards = 1.5 * (corner - corners.mean(0))
        axes.text(
            *(corners.mean(0) + outwards), str(number + 1), ha="center", va="center", fontsize=8,
            color=COLOURS[number], zorder=3, fontweight="bold",
        )  # fmt: skip
    axes.set_aspect("equal")
    axes.axis("off")


def draw_forward() -> None:
    """Shares of label, prior mean and noise; noisy labels at four timesteps."""
    schedule = make_schedule("linear", TIMESTEPS)
    s, q = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar
    figure = plt.figure(figsize=(9, 3.1))
    grid = figure.add_gridspec(2, 4, width_ratios=(2.1, 0.25, 1, 1), wspace=0.1, hspace=0.25)
    axes = figure.add_subplot(grid[:, 0])
    for values, label, colour in (
        (s, "label, $s_t$", BLUE),
        (1 - s, "prior mean, $1 - s_t$", GREEN),
        (q, "noise, $q_t$", RED),
    ):
        axes.plot(values.numpy(), color=colour, label=label)
    axes.set(xlabel="timestep t", ylabel="weight in $y_t$", xlim=(0, TIMESTEPS), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="center right")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 3, generator=generator)
    prior = torch.tensor(PROBABILITIES)
    label = torch.eye(3)[1]
    for place, t in zip(
        (grid[0, 2], grid[0, 3], grid[1, 2], grid[1, 3]), (0, 100, 300, 999), strict=True
    ):
        axes = figure.add_subplot(place)
        draw_triangle(axes)
        points = plane(s[t] * label + (1 - s[t]) * prior + q[t] * noise)
        axes.scatter(*points.T, s=3, color=GREEN, linewidths=0, alpha=0.6)
        axes.plot(*plane(prior), "k+", markersize=7)
        axes.set(xlim=(-1.6, 2.6), ylim=(-1.5, 2.3))
        axes.set_title(f"t = {t}", fontsize=9, pad=0)
    save(figure, "forward")


def best_noise(y: Tensor, prior: Tensor, s: Tensor, q: Tensor, probabilities: Tensor) -> Tensor:
    """The noise that the posterior mean of the label leaves: the best prediction for these class probabilities.

    Args:
        y: [M, C], states.
        prior: [M, C], prior mean.
        s, q: weights of label and noise at the timestep.
        probabilities: [C], of the classes, for the image.
    """
    labels = torch.eye(len(probabilities), dtype=y.dtype)
    distance = y[:, None] - s * labels - (1 - s) * prior[:, None]
    logits = probabilities.log() - distance.square().sum(-1) / (2 * q**2)
    mean = logits.softmax(-1) @ labels
    return (y - s * mean - (1 - s) * prior) / q


def run_chains(steps: StepTable, rows: int) -> Tensor:
    """The states [n + 1, rows, 3] of chains with the best denoiser for `PROBABILITIES`, which are also the guidance."""
    schedule = make_schedule("linear", TIMESTEPS)
    s, q = schedule.sqrt_alpha_bar.double(), schedule.sqrt_one_minus_alpha_bar.double()
    probabilities = torch.tensor(PROBABILITIES, dtype=torch.float64)
    prior = probabilities.expand(rows, -1)
    generator = torch.Generator().manual_seed(1)
    return chain(
        lambda y, t: best_noise(y, prior, s[t], q[t], probabilities),
        prior,
        steps,
        noise=torch.randn(len(steps.timesteps), rows, 3, generator=generator, dtype=torch.float64),
        trajectory=True,
    )


def draw_samplers() -> None:
    """Chains of three samplers with the best denoiser; prints how often 4,000 of them end at each class."""
    schedule = make_schedule("linear", TIMESTEPS)
    cases: list[tuple[str, StepTable]] = [
        ("ddpm, 1000 steps", make_steps(schedule, "ddpm")),
        ("ddim, 20 steps, eta 1", make_steps(schedule, "ddim", 20, eta=1.0)),
        ("ddpm_truncated, 60 steps", make_steps(schedule, "ddpm_truncated", 60)),
    ]
    figure, all_axes = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True)
    for axes, (title, steps) in zip(all_axes, cases, strict=True):
        labels = run_chains(steps, 4000)[-1].argmax(1)
        print(title, [f"{float((labels == k).double().mean()):.2f}" for k in range(3)])
        states = run_chains(steps, 8)
        place = np.linspace(0, 1, len(states))
        for row in range(8):
            label = int(states[-1, row].argmax())
            axes.plot(place, states[:, row, 0], color=COLOURS[label], linewidth=0.8, alpha=0.8)
        axes.set(xlabel="share of the steps done", title=title, xlim=(0, 1.0))
        axes.axhline(0, color=GREY, linewidth=0.5, linestyle=":")
        axes.axhline(1, color=GREY, linewidth=0.5, linestyle=":")
    all_axes[0].set_ylabel("first component of $y_t$")
    for number, colour in enumerate(COLOURS):
        all_axes[2].plot([], [], color=colour, label=f"ends at class {number + 1}")
    all_axes[2].legend(frameon=False, fontsize=7, loc="upper right")
    figure.tight_layout()
    save(figure, "samplers")


def draw_softmax() -> None:
    """The largest softmax of a one-hot vector over the number of classes."""
    figure, axes = plt.subplots(figsize=(4.6, 2.3))
    classes = np.arange(2, 15)
    values = [float(torch.eye(int(count))[0].softmax(0)[0]) for count in classes]
    axes.bar(classes, values, color=BLUE, width=0.7)
    for count, value in zip(classes, values, strict=True):
        axes.text(count, value + 0.015, f"{value:.2f}", ha="center", fontsize=7)
    axes.set(xlabel="classes", ylabel="probability", ylim=(0, 1), xticks=classes)
    axes.set_title("softmax of a perfect one-hot vector", fontsize=9)
    save(figure, "softmax")


def draw_windows() -> None:
    """Windows and crops of a synthetic image. The saliency is its local contrast, not that of a model."""
    size, grid, crop = 224, 14, 48
    pixels = generate(3, seed=5, size=size, index=1)
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    cell = size // grid
    blocks = image[0].reshape(3, grid, cell, grid, cell)
    inside = image[0].mean(0).reshape(grid, cell, grid, cell).amin((1, 3)) > 0.08
    saliency = (blocks.std((2, 4)).mean(0) * inside)[None, None]
    found = rois(saliency, image, (crop, crop), 6, channels="all")
    figure = plt.figure(figsize=(9, 2.7))
    spec = figure.add_gridspec(2, 6, width_ratios=(2.1, 2.1, 2.1, 1, 1, 1), wspace=0.08, hspace=0.1)
    for column, (title, picture) in enumerate(
        (("image", pixels), ("saliency", class_map(saliency)[0].numpy()), ("windows", pixels))
    ):
        axes = figure.add_subplot(spec[:, column])
        axes.imshow(picture, cmap="viridis" if picture.ndim == 2 else None, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    for number, (row, left) in enumerate(found.origins[0].tolist(), 1):
        axes.add_patch(
            Rectangle((left, row), crop, crop, fill=False, color="#56B4E9", linewidth=1.2)
        )
        axes.text(left + 3, row + 3, str(number), color="white", fontsize=8, va="top")
    for number, each in enumerate(found.crops[0]):
        axes = figure.add_subplot(spec[number // 3, 3 + number % 3])
        axes.imshow(each.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.text(2, 2, str(number + 1), color="white", fontsize=8, va="top")
        axes.axis("off")
    save(figure, "windows")


def draw_overview() -> None:
    """The parts of the model."""
    figure, axes = plt.subplots(figsize=(9, 3.3))
    axes.set(xlim=(0, 18), ylim=(0, 6.6))
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
        axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, boxstyle="round,pad=0.05,rounding_size=0.15",
                facecolor=colour + "22", edgecolor=colour, linewidth=1.2,
            )
        )  # fmt: skip
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5)

    def arrow(
        begin: tuple[float, float], end: tuple[float, float], text: str = "", above: float = 0.2
    ) -> None:
        axes.add_patch(
            FancyArrowPatch(
                begin, end, arrowstyle="-|>", mutation_scale=10, color="#333333", linewidth=1
            )
        )
        if text:
            middle = ((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2 + above)
            align = "left" if begin[0] == end[0] else "center"
            axes.text(*middle, text, ha=align, va="bottom", fontsize=8, color="#333333")

    axes.imshow(generate(3, seed=5, size=224, index=1), extent=(0.1, 3.1, 1.8, 4.8), zorder=2)
    axes.text(1.6, 1.5, "image", ha="center", va="top", fontsize=8.5)
    box(4.4, 4.2, 3.6, 1.9, "guidance model\nwhole image,\nK salient patches", GREEN)
    box(4.4, 0.3, 3.6, 1.9, "image encoder\nonce per image", BLUE)
    box(
        10.2,
        0.3,
        3.6,
        3.0,
        "denoiser\nat each step:\nnoise in $y_t$,\nestimate of $y_0$,\nnext $y_t$",
        RED,
    )
    box(10.2, 4.7, 3.6, 1.0, "$y_T = g + z$,  z random", GREY)
    box(15.2, 1.3, 2.6, 1.0, "label $y_0$", RED)
    arrow((3.2, 3.9), (4.3, 5.0))
    arrow((3.2, 2.7), (4.3, 1.5))
    arrow((8.1, 1.25), (10.1, 1.25), "features x", -0.55)
    arrow((8.1, 5.2), (10.1, 5.2), "proposal g", 0.15)
    arrow((8.1, 4.5), (10.1, 3.1))
    arrow((12.0, 4.6), (12.0, 3.45), "  start", 0)
    arrow((13.9, 1.8), (15.1, 1.8))
    axes.add_patch(
        FancyArrowPatch(
            (13.9, 2.6), (13.4, 3.4), connectionstyle="arc3,rad=1.6", arrowstyle="-|>",
            mutation_scale=10, color="#333333", linewidth=1,
        )
    )  # fmt: skip
    axes.text(14.75, 3.35, "n steps", fontsize=8, color="#333333", va="center")
    save(figure, "overview")


if __name__ == "__main__":
    for draw in (draw_overview, draw_forward, draw_windows, draw_samplers, draw_softmax):
        draw()
