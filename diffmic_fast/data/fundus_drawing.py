"""The drawing of synthetic fundus images. Lengths are in units of half the side of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Least and largest number of each lesion, by grade.
_MICROANEURYSMS = ((0, 0), (5, 9), (12, 20), (18, 28), (14, 26))
_HAEMORRHAGES = ((0, 0), (0, 0), (5, 9), (13, 20), (10, 18))
_EXUDATE_CLUSTERS = ((0, 0), (0, 0), (0, 0), (3, 6), (2, 5))
_COTTON_WOOL = ((0, 0), (0, 0), (0, 0), (2, 4), (1, 3))
_TANGLES = ((0, 0), (0, 0), (0, 0), (0, 0), (2, 4))

Point = tuple[float, float]


class Canvas:
    """A grey canvas, drawn larger than the image and averaged down."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.factor = 3 if size <= 256 else 2 if size <= 1024 else 1
        side = size * self.factor
        self.scale = side / 2
        self.image = Image.new("L", (side, side))
        self.pen = ImageDraw.Draw(self.image)

    def pixels(self, points: Sequence[Point]) -> list[Point]:
        """Points in pixels of the canvas."""
        return [((x + 1) * self.scale, (y + 1) * self.scale) for x, y in points]

    def disc(self, x: float, y: float, radius: float) -> None:
        """Fill a disc."""
        box = [(x - radius, y - radius), (x + radius, y + radius)]
        self.pen.ellipse(self.pixels(box), fill=255)

    def line(self, points: Sequence[Point], width: float) -> None:
        """Draw a polyline."""
        pixels = self.pixels(points)
        self.pen.line(pixels, fill=255, width=max(1, round(width * self.scale)), joint="curve")

    def polygon(self, x: np.ndarray, y: np.ndarray) -> None:
        """Fill a polygon."""
        self.pen.polygon(self.pixels(list(zip(x.tolist(), y.tolist(), strict=True))), fill=255)

    def coverage(self, blur: float = 0.0) -> np.ndarray:
        """Share of each pixel that is drawn on, [size, size] float32 in [0, 1], blurred by a Gaussian."""
        small = self.image.reduce(self.factor) if self.factor > 1 else self.image
        if blur > 0:
            small = small.filter(ImageFilter.GaussianBlur(blur * self.size / 2))
        return np.asarray(small, dtype=np.float32) * np.float32(1 / 255)


class Eye:
    """A retina whose anatomy is drawn from `rng`."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng = rng
        self.size = size
        axis = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1).astype(np.float32)
        self.grid = axis[None, :], axis[:, None]
        # Left or right eye: the disc is on the nasal side, the macula near the middle.
        self.side = 1.0 if rng.random() < 0.5 else -1.0
        self.disc = (self.side * rng.uniform(0.42, 0.54), rng.uniform(-0.10, 0.06))
        self.disc_radius = rng.uniform(0.115, 0.145)
        self.macula = (self.disc[0] - self.side * rng.uniform(0.52, 0.60), rng.uniform(0.0, 0.10))
        self.centre = (rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02))
        self.radius = rng.uniform(0.92, 0.97)

    def draw(self, grade: int) -> np.ndarray:
        """The image with the lesions of a grade, [size, size, 3] uint8."""
        rng, size = self.rng, self.size
        image, light = self._background()
        veins, arteries = self._vessels()
        self._blend(image, veins, (0.44, 0.075, 0.045), 0.72)
        self._blend(image, arteries, (0.66, 0.17, 0.085), 0.62)
        self._lesions(image, grade)
        image *= light[..., None]
        x, y = self.grid
        distance = np.hypot(x - self.centre[0], y - self.centre[1])
        # A soft edge of about a pixel and a half.
        view = np.clip((self.radius - distance) * (size / 3.0), 0, 1)
        image = image * view[..., None] + np.float32(0.012)
        noise = rng.standard_normal((size, size, 1), dtype=np.float32) * np.float32(0.010)
        noise = noise + rng.standard_normal((size, size, 3), dtype=np.float32) * np.float32(0.006)
        image += noise * (0.25 + 0.75 * view[..., None])
        return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)

    def _background(self) -> tuple[np.ndarray, np.ndarray]:
        """The retina without vessels, [size, size, 3] float32, and the light on it, [size, size]."""
        rng, size = self.rng, self.size
        x, y = self.grid
        warmth = rng.uniform(-1, 1)
        colour = np.array(
            [0.80 + 0.03 * warmth, 0.375 + 0.055 * warmth, 0.155 + 0.045 * rng.uniform(-1, 1)]
        )
        # The choroid: patches of two scales.
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
        rng = self.rng
        canvases = Canvas(self.size), Canvas(self.size)
        for vein, canvas in zip((True, False), canvases, strict=True):
            for up in (-1.0, 1.0):
                width = rng.uniform(0.034, 0.042) * (1.0 if vein else 0.72)
                # Temporal arcade: out of the disc and round the macula, which is at heading 0 from the disc.
                start = up * math.radians(rng.uniform(62, 82) + (0 if vein else 9))
                self._grow(canvas, self.disc, start, -up * rng.uniform(0.95, 1.25), width, 1.75, 0)
                # Nasal vessel: nearly straight.
                start = up * math.radians(rng.uniform(122, 150))
                self._grow(canvas, self.disc, start, up * 0.15, width * 0.68, 0.75, 1)
        return canvases[0].coverage(), canvases[1].coverage()

    def _grow(
        self, canvas: Canvas, start: Point, heading: float, bend: float, width: float,
        length: float, depth: int,
    ) -> None:  # fmt: skip
        """Draw a vessel and its branches; `heading` in radians, `bend` in radians per unit of length."""
        rng, step = self.rng, 0.045
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
            near_macula = math.hypot(x - self.macula[0], y - self.macula[1]) < 0.2
            if x * x + y * y > 1.0 or (near_macula and depth > 0):
                break
            to_branch -= step
            if to_branch <= 0 and depth < 3:
                left = 1 - i / steps
                self._grow(
                    canvas, (x, y), heading + branch_side * rng.uniform(0.45, 0.85),
                    -branch_side * rng.uniform(0.0, 0.5), width * (0.5 + 0.3 * left) * 0.82,
                    length * left * 0.5 + 0.12, depth + 1,
                )  # fmt: skip
                branch_side = -branch_side
                to_branch = rng.uniform(0.17, 0.34) * (1 + 0.3 * depth)
        # Four pieces, each thinner than the one before it, which it overlaps by a point.
        for piece in range(4):
            part = points[piece * len(points) // 4 : (piece + 1) * len(points) // 4 + 1]
            if len(part) > 1:
                canvas.line(part, width * (1 - 0.17 * piece))

    def _blend(
        self, image: np.ndarray, coverage: np.ndarray, colour: tuple[float, ...], opacity: float
    ) -> None:
        weight = (coverage * np.float32(opacity))[..., None]
        image += weight * (np.array(colour, dtype=np.float32) - image)

    def _place(self, low: float = 0.1, high: float = 0.82, clear: float = 0.02) -> Point:
        """A random point of the retina between two radii, at least `clear` away from the disc."""
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
        """Draw the lesions of a grade on the image, in place."""
        if grade == 0:
            return
        rng = self.rng
        wool = Canvas(self.size)
        for _ in range(count := self._count(_COTTON_WOOL, grade)):
            x, y = self._place(0.25, 0.75, 0.1)
            for _ in range(5):
                dx, dy = rng.normal(0, 0.035, 2)
                wool.disc(x + dx, y + dy * 0.7, rng.uniform(0.03, 0.055))
        if count:
            self._blend(image, wool.coverage(blur=0.018), (0.99, 0.90, 0.70), 0.85)

        dark = Canvas(self.size)
        for _ in range(self._count(_HAEMORRHAGES, grade)):
            self._blot(dark, *self._place(clear=0.08), rng.uniform(0.028, 0.052))
        for _ in range(self._count(_MICROANEURYSMS, grade)):
            x, y = self._place(clear=0.05)
            dark.disc(x, y, rng.uniform(0.017, 0.025))
        self._blend(image, dark.coverage(), (0.36, 0.035, 0.03), 0.90)

        bright = Canvas(self.size)
        for _ in range(count := self._count(_EXUDATE_CLUSTERS, grade)):
            x, y = self._place(0.1, 0.65, 0.12)
            spread = rng.uniform(0.05, 0.085)
            for _ in range(int(rng.integers(9, 18))):
                dx, dy = rng.normal(0, spread, 2)
                bright.disc(x + dx, y + dy, rng.uniform(0.010, 0.024))
        if count:
            self._blend(image, bright.coverage(), (1.0, 0.88, 0.36), 0.95)

        tangles = Canvas(self.size)
        for number in range(count := self._count(_TANGLES, grade)):
            # The first one is on the disc, the others elsewhere.
            self._tangle(tangles, self.disc if number == 0 else self._place(0.3, 0.7, 0.1))
        if count:
            self._blend(image, tangles.coverage(), (0.50, 0.04, 0.03), 0.90)
            if rng.random() < 0.75:
                blood = self._preretinal_haemorrhage()
                self._blend(image, blood, (0.30, 0.02, 0.025), 0.94)

    def _blot(self, canvas: Canvas, x: float, y: float, radius: float) -> None:
        """An irregular blot."""
        angles = np.linspace(0, 2 * math.pi, 14, endpoint=False)
        radii = radius * self.rng.uniform(0.62, 1.3, 14)
        stretch = self.rng.uniform(0.75, 1.3)
        canvas.polygon(x + radii * np.cos(angles) * stretch, y + radii * np.sin(angles) / stretch)

    def _tangle(self, canvas: Canvas, centre: Point) -> None:
        """New vessels: thin loops out of one point."""
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
            canvas.line(points, rng.uniform(0.012, 0.018))

    def _preretinal_haemorrhage(self) -> np.ndarray:
        """Coverage of settled blood, with a level top and a round floor."""
        canvas = Canvas(self.size)
        x, y = self._place(0.2, 0.55, 0.2)
        width, depth = self.rng.uniform(0.15, 0.27), self.rng.uniform(0.12, 0.22)
        angles = np.linspace(0, math.pi, 24)
        canvas.polygon(x + width * np.cos(angles), y + depth * np.sin(angles) ** 0.8)
        return canvas.coverage(blur=0.006)
