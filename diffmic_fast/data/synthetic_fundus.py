"""Retina-like images whose grade of diabetic retinopathy is decided by the lesions drawn.

For demonstrations and tests without any download; not for anything clinical. A picture is a dark
frame, a round field of view, a reddish-orange retina with uneven light, an optic disc, vessels that
branch from it round the macula, and noise. On that are drawn, by grade:

    0  nothing
    1  a few microaneurysms (small dark red dots)
    2  more microaneurysms, small haemorrhages (dark red blots)
    3  many of both, hard exudates (bright yellow specks in clusters), cotton-wool spots
    4  as 3, and new vessels (red tangles), a preretinal haemorrhage (large, dark, level top)

Lengths are in units of half the side of the image, so a picture keeps its looks at any size; the
sizes of lesions are chosen so that they stand out at 96 pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

GRADES = ("0_none", "1_mild", "2_moderate", "3_severe", "4_proliferative")

# (least, most) of each lesion by grade
_MICROANEURYSMS = ((0, 0), (5, 9), (12, 20), (18, 28), (14, 26))
_HAEMORRHAGES = ((0, 0), (0, 0), (5, 9), (13, 20), (10, 18))
_EXUDATE_CLUSTERS = ((0, 0), (0, 0), (0, 0), (3, 6), (2, 5))
_COTTON_WOOL = ((0, 0), (0, 0), (0, 0), (2, 4), (1, 3))
_TANGLES = ((0, 0), (0, 0), (0, 0), (0, 0), (2, 4))

_Point = tuple[float, float]


def generate(grade: int, seed: int = 0, size: int = 128, index: int = 0) -> np.ndarray:
    """One image, uint8 [size, size, 3], RGB; the same for the same four numbers.

    Args:
        grade: 0 to 4, the lesions to draw.
        seed: of the data set, not negative.
        size: side in pixels, 16 to 4096.
        index: number of the image within its grade and seed, not negative.

    Raises:
        ValueError: for a value out of range.
    """
    if not 0 <= grade < len(GRADES):
        raise ValueError(f"synthetic_fundus: grade must be 0 to {len(GRADES) - 1}, got {grade}")
    if not 16 <= size <= 4096:
        raise ValueError(f"synthetic_fundus: size must be 16 to 4096, got {size}")
    if seed < 0 or index < 0:
        raise ValueError(f"synthetic_fundus: seed and index must be >= 0, got {seed}, {index}")
    rng = np.random.Generator(np.random.PCG64([seed, grade, index]))
    return _Eye(rng, size).draw(grade)


def write_dataset(
    root: str | Path, per_grade: int, size: int = 128, seed: int = 0, first_index: int = 0
) -> list[Path]:
    """Write ``per_grade`` PNG images of every grade to one folder a class below ``root``.

    Args:
        root: made if it is not there.
        per_grade: number of images of each grade.
        size, seed: as in `generate`.
        first_index: number of the first image; ranges that do not overlap give disjoint sets.

    Returns:
        The files, in the order of grade and index.

    Raises:
        ValueError: for ``per_grade`` below 1 and what `generate` refuses.
    """
    if per_grade < 1:
        raise ValueError(f"write_dataset: per_grade must be at least 1, got {per_grade}")
    paths = []
    for grade, name in enumerate(GRADES):
        folder = Path(root) / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(first_index, first_index + per_grade):
            path = folder / f"eye_{seed}_{grade}_{index:05d}.png"
            Image.fromarray(generate(grade, seed, size, index)).save(path)
            paths.append(path)
    return paths


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1).astype(np.float32)
    return axis[None, :], axis[:, None]


class _Mask:
    """A gray canvas in image units, drawn larger than the image and averaged down."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.factor = 3 if size <= 256 else 2 if size <= 1024 else 1
        side = size * self.factor
        self.scale = side / 2
        self.image = Image.new("L", (side, side))
        self.pen = ImageDraw.Draw(self.image)

    def pixels(self, points: list[_Point]) -> list[_Point]:
        return [((x + 1) * self.scale, (y + 1) * self.scale) for x, y in points]

    def disc(self, x: float, y: float, radius: float, value: int = 255) -> None:
        box = [(x - radius, y - radius), (x + radius, y + radius)]
        self.pen.ellipse(self.pixels(box), fill=value)

    def line(self, points: list[_Point], width: float, value: int = 255) -> None:
        pixels = self.pixels(points)
        self.pen.line(pixels, fill=value, width=max(1, round(width * self.scale)), joint="curve")

    def polygon(self, points: list[_Point], value: int = 255) -> None:
        self.pen.polygon(self.pixels(points), fill=value)

    def coverage(self, blur: float = 0.0) -> np.ndarray:
        """Float32 [size, size] in [0, 1]; ``blur`` in image units."""
        small = self.image.reduce(self.factor) if self.factor > 1 else self.image
        if blur > 0:
            small = small.filter(ImageFilter.GaussianBlur(blur * self.size / 2))
        return np.asarray(small, dtype=np.float32) * np.float32(1 / 255)


class _Eye:
    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng = rng
        self.size = size
        # Left or right eye: the disc lies on the nasal side, the macula near the middle.
        self.side = 1.0 if rng.random() < 0.5 else -1.0
        self.disc = (self.side * rng.uniform(0.42, 0.54), rng.uniform(-0.10, 0.06))
        self.disc_radius = rng.uniform(0.115, 0.145)
        self.macula = (self.disc[0] - self.side * rng.uniform(0.52, 0.60), rng.uniform(0.0, 0.10))
        self.centre = (rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02))
        self.radius = rng.uniform(0.92, 0.97)

    def draw(self, grade: int) -> np.ndarray:
        rng, size = self.rng, self.size
        image, light = self._background()
        veins, arteries = self._vessels()
        self._blend(image, veins, (0.44, 0.075, 0.045), 0.72)
        self._blend(image, arteries, (0.66, 0.17, 0.085), 0.62)
        self._lesions(image, grade)
        image *= light[..., None]
        x, y = _grid(size)
        distance = np.hypot(x - self.centre[0], y - self.centre[1])
        # About a pixel and a half of soft edge, as optics leave it.
        view = np.clip((self.radius - distance) * (size / 3.0), 0, 1)
        image = image * view[..., None] + np.float32(0.012)
        noise = rng.standard_normal((size, size, 1), dtype=np.float32) * np.float32(0.010)
        noise = noise + rng.standard_normal((size, size, 3), dtype=np.float32) * np.float32(0.006)
        image += noise * (0.25 + 0.75 * view[..., None])
        return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)

    def _background(self) -> tuple[np.ndarray, np.ndarray]:
        """Retina without vessels, float32 [size, size, 3], and the light on it, [size, size]."""
        rng, size = self.rng, self.size
        x, y = _grid(size)
        warmth = rng.uniform(-1, 1)
        colour = np.array(
            [0.80 + 0.03 * warmth, 0.375 + 0.055 * warmth, 0.155 + 0.045 * rng.uniform(-1, 1)]
        )
        # Choroid: patches of a few scales.
        texture = 0.55 * self._patches(5) + 0.45 * self._patches(14)
        image = colour.astype(np.float32) * (1 + np.float32(0.11) * texture)[..., None]

        macula = (x - self.macula[0]) ** 2 + (y - self.macula[1]) ** 2
        shade = 0.26 * np.exp(-macula / 0.036) + 0.22 * np.exp(-macula / 0.0045)
        image *= 1 - shade[..., None] * np.array([0.75, 1.0, 1.0], dtype=np.float32)

        dx, dy = x - self.disc[0], y - self.disc[1]
        r = np.hypot(dx / 0.93, dy) / self.disc_radius
        glow = np.exp(-np.square(np.maximum(r - 1, 0)) / 1.2)
        image += glow[..., None] * np.array([0.06, 0.055, 0.02], dtype=np.float32)
        rim = np.clip((1.06 - r) * self.disc_radius * size / 5, 0, 1)
        cup = np.clip((0.48 - r) * self.disc_radius * size / 6, 0, 1)
        tint = 1 - 0.10 * np.clip(np.cos(np.arctan2(dy, self.side * dx)), 0, 1) * (r < 1)
        for mask, target in ((rim, (0.97, 0.73, 0.42)), (cup, (1.0, 0.90, 0.68))):
            weight = (mask * 0.88)[..., None]
            image += weight * (np.array(target, dtype=np.float32) * tint[..., None] - image)

        angle = rng.uniform(0, 2 * math.pi)
        slope = 0.12 * (x * math.cos(angle) + y * math.sin(angle))
        fall = 0.34 * np.square(np.hypot(x - 0.3 * self.disc[0], y - 0.3 * self.disc[1]))
        light = rng.uniform(0.92, 1.06) * (1 + slope - fall)
        return image.astype(np.float32), light.astype(np.float32)

    def _patches(self, cells: int) -> np.ndarray:
        coarse = self.rng.standard_normal((cells, cells), dtype=np.float32)
        wide = Image.fromarray(coarse).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(wide)

    def _vessels(self) -> tuple[np.ndarray, np.ndarray]:
        """Coverage of veins and of arteries, [size, size] each."""
        masks = (_Mask(self.size), _Mask(self.size))
        rng = self.rng
        for vein, mask in ((True, masks[0]), (False, masks[1])):
            for up in (-1.0, 1.0):
                width = rng.uniform(0.034, 0.042) * (1.0 if vein else 0.72)
                # Temporal arcade: up out of the disc, then round the macula. Heading 0 points
                # from the disc to the macula; `bend` turns the vessel back towards that line.
                start = up * math.radians(rng.uniform(62, 82) + (0 if vein else 9))
                self._grow(mask, self.disc, start, -up * rng.uniform(0.95, 1.25), width, 1.75, 0)
                # Nasal vessel: outwards, nearly straight.
                start = up * math.radians(rng.uniform(122, 150))
                self._grow(mask, self.disc, start, up * 0.15, width * 0.68, 0.75, 1)
        return masks[0].coverage(), masks[1].coverage()

    def _grow(
        self, mask: _Mask, start: _Point, heading: float, bend: float, width: float,
        length: float, depth: int,
    ) -> None:  # fmt: skip
        """Draw a vessel and its branches. ``heading`` in radians, ``bend`` in radians a unit."""
        rng = self.rng
        step = 0.045
        steps = max(int(length / step), 2)
        turns = rng.standard_normal(steps) * 0.085
        x, y = start
        points = [start]
        to_branch = rng.uniform(0.16, 0.3)
        branch_side = 1.0 if rng.random() < 0.5 else -1.0
        for i in range(steps):
            heading += bend * step + turns[i]
            x -= self.side * math.cos(heading) * step
            y += math.sin(heading) * step
            points.append((x, y))
            if x * x + y * y > 1.0:
                break
            to_branch -= step
            near_macula = math.hypot(x - self.macula[0], y - self.macula[1]) < 0.2
            if near_macula and depth > 0:
                break
            if to_branch <= 0 and depth < 3:
                left = 1 - i / steps
                self._grow(
                    mask, (x, y), heading + branch_side * rng.uniform(0.45, 0.85),
                    -branch_side * rng.uniform(0.0, 0.5), width * (0.5 + 0.3 * left) * 0.82,
                    length * left * 0.5 + 0.12, depth + 1,
                )  # fmt: skip
                branch_side = -branch_side
                to_branch = rng.uniform(0.17, 0.34) * (1 + 0.3 * depth)
        # Vessels thin out in a few steps; each piece overlaps the next by a point.
        pieces = 4
        for piece in range(pieces):
            part = points[piece * len(points) // pieces : (piece + 1) * len(points) // pieces + 1]
            if len(part) > 1:
                mask.line(part, width * (1 - 0.17 * piece))

    def _blend(
        self, image: np.ndarray, coverage: np.ndarray, colour: tuple[float, ...], opacity: float
    ) -> None:
        weight = (coverage * np.float32(opacity))[..., None]
        image += weight * (np.array(colour, dtype=np.float32) - image)

    def _place(self, low: float = 0.1, high: float = 0.82, clear: float = 0.02) -> _Point:
        """A point of the retina between two radii, off the disc by ``clear``."""
        while True:
            r = math.sqrt(self.rng.uniform(low * low, high * high))
            angle = self.rng.uniform(0, 2 * math.pi)
            x, y = r * math.cos(angle), r * math.sin(angle)
            if math.hypot(x - self.disc[0], y - self.disc[1]) > self.disc_radius + clear:
                return x, y

    def _count(self, ranges: tuple[tuple[int, int], ...], grade: int) -> int:
        low, high = ranges[grade]
        return int(self.rng.integers(low, high + 1))

    def _lesions(self, image: np.ndarray, grade: int) -> None:
        if grade == 0:
            return
        rng = self.rng
        wool = _Mask(self.size)
        for _ in range(count := self._count(_COTTON_WOOL, grade)):
            x, y = self._place(0.25, 0.75, 0.1)
            for _ in range(5):
                dx, dy = rng.normal(0, 0.035, 2)
                wool.disc(x + dx, y + dy * 0.7, rng.uniform(0.03, 0.055))
        if count:
            self._blend(image, wool.coverage(blur=0.018), (0.99, 0.90, 0.70), 0.85)

        dark = _Mask(self.size)
        for _ in range(self._count(_HAEMORRHAGES, grade)):
            self._blot(dark, *self._place(clear=0.08), rng.uniform(0.028, 0.052))
        for _ in range(self._count(_MICROANEURYSMS, grade)):
            x, y = self._place(clear=0.05)
            dark.disc(x, y, rng.uniform(0.017, 0.025))
        self._blend(image, dark.coverage(), (0.36, 0.035, 0.03), 0.90)

        bright = _Mask(self.size)
        for _ in range(count := self._count(_EXUDATE_CLUSTERS, grade)):
            x, y = self._place(0.1, 0.65, 0.12)
            spread = rng.uniform(0.05, 0.085)
            for _ in range(int(rng.integers(9, 18))):
                dx, dy = rng.normal(0, spread, 2)
                bright.disc(x + dx, y + dy, rng.uniform(0.010, 0.024))
        if count:
            self._blend(image, bright.coverage(), (1.0, 0.88, 0.36), 0.95)

        tangles = _Mask(self.size)
        for number in range(count := self._count(_TANGLES, grade)):
            # The first lies on the disc (NVD), the others elsewhere (NVE).
            self._tangle(tangles, self.disc if number == 0 else self._place(0.3, 0.7, 0.1))
        if count:
            self._blend(image, tangles.coverage(), (0.50, 0.04, 0.03), 0.90)
            if rng.random() < 0.75:
                self._blend(image, self._boat().coverage(blur=0.006), (0.30, 0.02, 0.025), 0.94)

    def _blot(self, mask: _Mask, x: float, y: float, radius: float) -> None:
        angles = np.linspace(0, 2 * math.pi, 14, endpoint=False)
        radii = radius * self.rng.uniform(0.62, 1.3, 14)
        stretch = self.rng.uniform(0.75, 1.3)
        outline = zip(
            (x + radii * np.cos(angles) * stretch).tolist(),
            (y + radii * np.sin(angles) / stretch).tolist(),
            strict=True,
        )
        mask.polygon(list(outline))

    def _tangle(self, mask: _Mask, centre: _Point) -> None:
        """New vessels: thin loops that wind out of one point."""
        rng = self.rng
        for _ in range(int(rng.integers(6, 10))):
            heading = rng.uniform(0, 2 * math.pi)
            curl = rng.uniform(9, 17) * (1 if rng.random() < 0.5 else -1)
            x, y = centre
            points = [(x, y)]
            for turn in rng.normal(0, 0.35, int(rng.integers(10, 18))).tolist():
                heading += curl * 0.03 + turn
                x, y = x + 0.03 * math.cos(heading), y + 0.03 * math.sin(heading)
                points.append((x, y))
            mask.line(points, rng.uniform(0.012, 0.018))

    def _boat(self) -> _Mask:
        """Blood in front of the retina: it settles, so its top is level and its floor round."""
        mask = _Mask(self.size)
        x, y = self._place(0.2, 0.55, 0.2)
        width, depth = self.rng.uniform(0.15, 0.27), self.rng.uniform(0.12, 0.22)
        angles = np.linspace(0, math.pi, 24)
        outline = zip(
            (x + width * np.cos(angles)).tolist(),
            (y + depth * np.sin(angles) ** 0.8).tolist(),
            strict=True,
        )
        mask.polygon(list(outline))
        return mask
