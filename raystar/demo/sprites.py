"""Things that stand in the landscape, drawn as flat shapes: trees, houses, towers, bridges, boats."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from PIL import Image, ImageDraw

from raystar.demo.noise import Array

Colour = tuple[float, float, float]
Point = tuple[float, float]


class Kind(IntEnum):
    """What a pixel of a scene shows."""

    SKY = 0
    CLOUD = 1
    SUN = 2
    WATER = 3
    ROCK = 4
    SNOW = 5
    GRASS = 6
    FIELD = 7
    FOREST = 8
    SAND = 9
    TREE = 10
    BUILDING = 11
    BOAT = 12


def shade(colour: Colour, factor: float) -> Colour:
    """Scale a colour's brightness."""
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def blend(first: Colour, second: Colour, weight: float) -> Colour:
    """Mix two colours: weight 0 gives the first, 1 the second."""
    r, g, b = (x + (y - x) * weight for x, y in zip(first, second, strict=True))
    return (r, g, b)


class Stage:
    """A picture being drawn, with the number of the thing that each pixel belongs to.

    Shapes are given in pixels. `place` sets where the next thing stands and how large one of its units is;
    from then on coordinates are in units of its height, x to the right and y up from its foot.
    """

    def __init__(self, rgb: Array, labels: np.ndarray, first_label: int = 1000) -> None:
        bytes_ = (np.clip(rgb, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
        self._image = Image.fromarray(bytes_)
        self._labels = Image.fromarray(labels.astype(np.int32))
        self._draw = ImageDraw.Draw(self._image)
        self._mark = ImageDraw.Draw(self._labels)
        self._next = first_label
        self._first = first_label
        self.kinds: list[Kind] = []
        self._haze: Colour = (0.0, 0.0, 0.0)
        self._haze_weight = 0.0
        self._x = self._y = 0.0
        self._unit = 1.0

    def place(self, x: float, y: float, unit: float, kind: Kind, haze: Colour, haze_weight: float) -> None:
        """Begin a new thing with its foot at pixel (x, y), `unit` pixels to a unit, seen through haze."""
        self._x, self._y, self._unit = x, y, unit
        self._haze, self._haze_weight = haze, haze_weight
        self._next = self._first + len(self.kinds)
        self.kinds.append(kind)

    def part(self) -> None:
        """Begin another part of the same thing, set off from the last by a contour."""
        self._next = self._first + len(self.kinds)
        self.kinds.append(self.kinds[-1])

    def _ink(self, colour: Colour) -> tuple[int, int, int]:
        r, g, b = (
            int(255.0 * min(1.0, max(0.0, c + (h - c) * self._haze_weight)) + 0.5)
            for c, h in zip(colour, self._haze, strict=True)
        )
        return (r, g, b)

    def _pixel(self, point: Point) -> Point:
        return (self._x + point[0] * self._unit, self._y - point[1] * self._unit)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Fill a polygon."""
        pixels = [self._pixel(p) for p in points]
        self._draw.polygon(pixels, fill=self._ink(colour))
        self._mark.polygon(pixels, fill=self._next)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """Fill an upright ellipse."""
        left, top = self._pixel((x - rx, y + ry))
        right, bottom = self._pixel((x + rx, y - ry))
        box = (left, top, max(right, left + 1), max(bottom, top + 1))
        self._draw.ellipse(box, fill=self._ink(colour))
        self._mark.ellipse(box, fill=self._next)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Draw a line of a width in units, at least one pixel."""
        pixels = [self._pixel(p) for p in points]
        pen = max(1, round(width * self._unit))
        self._draw.line(pixels, fill=self._ink(colour), width=pen, joint="curve")
        self._mark.line(pixels, fill=self._next, width=pen)

    @property
    def unit(self) -> float:
        """Pixels to a unit of the thing being drawn."""
        return self._unit

    def picture(self) -> tuple[Array, np.ndarray]:
        """Return the picture [H, W, 3] in 0..1 and the labels [H, W]."""
        return np.asarray(self._image, np.float32) / np.float32(255.0), np.asarray(self._labels, np.int32)


class Sprites:
    """Draws things onto a stage under one light.

    `light` and `ambient` are the colours of the sun and the sky; `side` is -1 with the sun on the left and 1
    with the sun on the right; `lamp` lights the windows; `snow` covers roofs and boughs.
    """

    def __init__(
        self,
        stage: Stage,
        rng: np.random.Generator,
        light: Colour,
        ambient: Colour,
        side: float,
        lamp: bool,
        snow: bool,
    ) -> None:
        self.stage = stage
        self.rng = rng
        self.light = light
        self.ambient = ambient
        self.side = side
        self.lamp = lamp
        self.snow = snow

    def lit(self, colour: Colour, amount: float) -> Colour:
        """Return a surface's colour with `amount` (0..1) of the sun on it."""
        r, g, b = (c * (a + s * amount) for c, s, a in zip(colour, self.light, self.ambient, strict=True))
        return (r, g, b)

    # ---- trees ---------------------------------------------------------------------------------------

    def tree(self, species: str, colour: Colour) -> None:
        """Draw a tree of one unit's height: conifer, round, poplar, bare, pine, birch or bush."""
        {
            "conifer": self._conifer,
            "round": self._round,
            "poplar": self._poplar,
            "bare": self._bare,
            "pine": self._pine,
            "birch": self._birch,
            "bush": self._bush,
        }[species](colour)

    def _conifer(self, colour: Colour) -> None:
        rng, stage, side = self.rng, self.stage, self.side
        stage.line([(0, 0), (0, 0.2)], 0.05, self.lit((0.30, 0.22, 0.16), 0.2))
        tiers = 3 if stage.unit < 24 else 5 if stage.unit < 90 else 8
        width = rng.uniform(0.2, 0.28)
        left: list[Point] = []
        right: list[Point] = []
        for i in range(tiers):
            y = 0.1 + 0.86 * i / tiers
            reach = width * (1.0 - i / tiers) * rng.uniform(0.85, 1.15)
            left += [(-reach, y), (-reach * 0.5, y + 0.55 / tiers)]
            right += [(reach * rng.uniform(0.9, 1.1), y - 0.01), (reach * 0.5, y + 0.55 / tiers)]
        outline = [*left, (0.0, 1.0), *right[::-1]]
        stage.polygon(outline, self.lit(colour, 0.12))
        bright = (0.92, 0.94, 0.98) if self.snow else colour
        half = [
            (0.0, 1.0),
            *[(x * 0.96, y) for x, y in (right if side > 0 else left)[::-1]],
            (0.02 * side, 0.1),
        ]
        if self.snow:
            # Snow lies on each bough: one sloping stroke a tier, on both sides but brighter under the sun.
            for flank, sun in ((left, side < 0), (right, side > 0)):
                for k in range(0, len(flank), 2):
                    (x0, y0), (x1, y1) = flank[k], flank[k + 1]
                    tip = (x1 * 0.3, y1 + 0.03)
                    points = [(x0, y0 + 0.02), tip, (x1 * 0.6, y1 - 0.35 / tiers)]
                    stage.polygon(points, self.lit(bright, 0.8 if sun else 0.35))
        else:
            stage.polygon(half, self.lit(bright, 0.75))

    def _blobs(self, centres: Sequence[tuple[float, float, float]], colour: Colour, flat: float = 0.8) -> None:
        """Draw a crown of leaf masses (x, y, radius): a dark body, a middle tone, lights towards the sun."""
        rng, stage, side = self.rng, self.stage, self.side
        for x, y, r in centres:
            stage.ellipse(x, y, r, r * flat, self.lit(colour, 0.08))
        for x, y, r in centres:
            stage.ellipse(x + 0.2 * r * side, y + 0.2 * r, r * 0.72, r * 0.62 * flat, self.lit(colour, 0.5))
        if stage.unit < 16:
            return
        for x, y, r in centres:
            for _ in range(1 if stage.unit < 40 else 3):
                dx, dy = rng.normal(0.32 * side, 0.22), rng.normal(0.36, 0.2)
                size = r * rng.uniform(0.18, 0.36)
                stage.ellipse(x + dx * r, y + dy * r, size, size * flat, self.lit(colour, 1.0))

    def _round(self, colour: Colour) -> None:
        rng, stage = self.rng, self.stage
        bark = self.lit((0.34, 0.26, 0.20), 0.3)
        lean = rng.normal(0, 0.04)
        stage.polygon([(-0.045, 0), (0.045, 0), (0.02 + lean, 0.5), (-0.02 + lean, 0.5)], bark)
        count = 4 if stage.unit < 24 else 9 if stage.unit < 90 else 16
        spread = rng.uniform(0.22, 0.32)
        centres = []
        for i in range(count):
            angle = 2.399963 * i + rng.uniform(-0.3, 0.3)
            reach = np.sqrt((i + 0.5) / count)
            x = lean + spread * reach * np.cos(angle)
            y = 0.64 + 0.25 * reach * np.sin(angle)
            centres.append((float(x), float(y), 0.13 + 0.1 * rng.random() + (0.1 if count < 6 else 0.0)))
        self._blobs(sorted(centres, key=lambda c: c[1]), colour)

    def _poplar(self, colour: Colour) -> None:
        rng, stage = self.rng, self.stage
        stage.line([(0, 0), (0, 0.3)], 0.04, self.lit((0.32, 0.25, 0.2), 0.3))
        steps = 4 if stage.unit < 30 else 9
        width = rng.uniform(0.07, 0.1)
        centres = []
        for i in range(steps):
            t = (i + 0.5) / steps
            r = width * (0.55 + 1.1 * np.sin(np.pi * (0.12 + 0.8 * t)) * (1.0 - 0.35 * t))
            centres.append((rng.normal(0, 0.012), 0.1 + 0.85 * t, float(r)))
        self._blobs(centres, colour, flat=1.25)

    def _bare(self, colour: Colour) -> None:
        rng = self.rng
        bark = self.lit((0.27, 0.21, 0.19), 0.45)
        levels = 3 if self.stage.unit < 30 else 5 if self.stage.unit < 120 else 6

        def grow(x: float, y: float, angle: float, length: float, width: float, level: int) -> None:
            x1, y1 = x + length * np.sin(angle), y + length * np.cos(angle)
            self.stage.line([(x, y), (x1, y1)], width, bark)
            if level == 0:
                return
            for turn in (-rng.uniform(0.25, 0.6), rng.uniform(0.25, 0.6)):
                grow(x1, y1, angle * 0.9 + turn, length * rng.uniform(0.66, 0.82), width * 0.62, level - 1)

        grow(0.0, 0.0, rng.normal(0, 0.06), 0.29, 0.055, levels)

    def _pine(self, colour: Colour) -> None:
        rng, stage = self.rng, self.stage
        bend = rng.uniform(-0.12, 0.12)
        trunk = [(0.0, 0.0), (bend, 0.35), (bend * 0.4, 0.62), (bend * 0.8, 0.85)]
        stage.line(trunk, 0.05, self.lit((0.42, 0.27, 0.19), 0.45))
        centres = []
        for i in range(4 if stage.unit < 30 else 6):
            x = bend * 0.6 + rng.uniform(-0.3, 0.3) * (1.0 - i * 0.1)
            y = 0.62 + 0.06 * i + rng.normal(0, 0.02)
            stage.line([(bend * 0.5, y - 0.1), (x, y)], 0.02, self.lit((0.4, 0.26, 0.19), 0.3))
            centres.append((x, y, rng.uniform(0.13, 0.22)))
        self._blobs(centres, colour, flat=0.42)

    def _birch(self, colour: Colour) -> None:
        rng, stage = self.rng, self.stage
        lean = rng.normal(0, 0.03)
        stage.line([(0, 0), (lean, 0.5), (lean * 1.5, 0.92)], 0.03, self.lit((0.92, 0.9, 0.86), 0.6))
        for _ in range(5):
            y = rng.uniform(0.05, 0.6)
            stage.line([(lean * y - 0.014, y), (lean * y + 0.008, y)], 0.012, self.lit((0.15, 0.14, 0.14), 0.3))
        centres = []
        for _ in range(5 if stage.unit < 30 else 11):
            y = rng.uniform(0.38, 0.97)
            reach = 0.2 * np.sin(np.pi * (y - 0.25) / 0.85)
            centres.append((lean + rng.uniform(-1, 1) * float(reach), y, rng.uniform(0.05, 0.1)))
        self._blobs(centres, colour, flat=1.0)

    def _bush(self, colour: Colour) -> None:
        rng = self.rng
        centres = [(rng.uniform(-0.6, 0.6), rng.uniform(0.2, 0.6), rng.uniform(0.3, 0.45)) for _ in range(5)]
        self._blobs(centres, colour)

    # ---- buildings -----------------------------------------------------------------------------------

    def _window(self, x: float, y: float, w: float, h: float) -> None:
        pane: Colour = (1.0, 0.82, 0.42) if self.lamp else self.lit((0.22, 0.24, 0.28), 0.4)
        self.stage.polygon([(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)], pane)

    def house(self, wall: Colour, roof: Colour, church: bool = False) -> None:
        """Draw a house one unit wide at the gable (a church: with a spire) with its long wall beside it."""
        rng, stage = self.rng, self.stage
        turn = rng.choice((-1.0, 1.0))
        height, ridge = rng.uniform(0.55, 0.8), rng.uniform(0.45, 0.65)
        length = rng.uniform(0.9, 1.5)
        sunny = turn * self.side > 0

        def at(x: float, y: float) -> Point:
            return (turn * (x - 0.5 * length), y)

        tiles: Colour = (0.93, 0.95, 0.99) if self.snow else roof
        if church:
            tower = [at(-0.5, 0), at(0.05, 0), at(0.05, 1.6), at(-0.5, 1.6)]
            stage.polygon(tower, self.lit(wall, 0.3 if sunny else 0.85))
            stage.part()
            stage.polygon([at(-0.56, 1.6), at(0.11, 1.6), at(-0.22, 2.9)], self.lit(roof, 0.55))
            stage.part()
        stage.polygon(
            [at(0, 0), at(length, 0), at(length, height), at(0, height)],
            self.lit(wall, 0.9 if sunny else 0.25),
        )
        stage.part()
        gable = [at(-0.5, 0), at(0.02, 0), at(0.02, height), at(-0.24, height + ridge), at(-0.5, height)]
        stage.polygon(gable, self.lit(wall, 0.3 if sunny else 0.85))
        stage.part()
        slope = [
            at(0.1, height - 0.06),
            at(length + 0.08, height - 0.06),
            at(length - 0.18, height + ridge + 0.04),
            at(-0.24, height + ridge + 0.04),
        ]
        stage.polygon(slope, self.lit(tiles, 0.85 if sunny else 0.4))
        stage.line([at(-0.6, height - 0.1), at(-0.24, height + ridge + 0.02)], 0.07, self.lit(tiles, 0.5))
        stage.part()
        if stage.unit > 9:
            self._window(at(-0.24, 0)[0], height * 0.55, 0.07, 0.1)
            for k in range(2):
                self._window(at(length * (0.3 + 0.4 * k), 0)[0], height * 0.5, 0.08, 0.1)
            chimney = at(length * 0.55, 0)[0]
            top = height + ridge
            stage.polygon(
                [
                    (chimney - 0.06, top - 0.1),
                    (chimney + 0.06, top - 0.1),
                    (chimney + 0.06, top + 0.2),
                    (chimney - 0.06, top + 0.2),
                ],
                self.lit((0.5, 0.36, 0.3), 0.5),
            )

    def lighthouse(self, stripe: Colour) -> None:
        """Draw a lighthouse of one unit's height, with a lit lantern."""
        stage, side = self.stage, self.side
        white: Colour = (0.95, 0.94, 0.9)

        def ring(low: float, high: float, colour: Colour) -> None:
            wide, narrow = 0.11 - 0.05 * low, 0.11 - 0.05 * high
            stage.polygon([(-wide, low), (wide, low), (narrow, high), (-narrow, high)], self.lit(colour, 0.35))
            bright = [(0.02 * side, low), (side * wide, low), (side * narrow, high), (0.02 * side, high)]
            stage.polygon(bright, self.lit(colour, 0.9))

        for i in range(4):
            ring(0.2 * i, 0.2 * (i + 1), stripe if i % 2 else white)
            stage.part()
        stage.polygon([(-0.1, 0.8), (0.1, 0.8), (0.1, 0.83), (-0.1, 0.83)], self.lit((0.25, 0.25, 0.28), 0.5))
        stage.polygon([(-0.05, 0.83), (0.05, 0.83), (0.05, 0.93), (-0.05, 0.93)], (1.0, 0.9, 0.55))
        stage.part()
        stage.polygon([(-0.08, 0.92), (0.08, 0.92), (0.0, 1.02)], self.lit(stripe, 0.5))

    def windmill(self, wall: Colour) -> None:
        """Draw a windmill of one unit's height without its sails, which reach above it."""
        stage, side = self.stage, self.side
        stage.polygon([(-0.24, 0), (0.24, 0), (0.15, 0.75), (-0.15, 0.75)], self.lit(wall, 0.3))
        stage.polygon([(0, 0), (0.24 * side, 0), (0.15 * side, 0.75), (0, 0.75)], self.lit(wall, 0.85))
        stage.part()
        stage.polygon([(-0.19, 0.74), (0.19, 0.74), (0.1, 0.94), (-0.1, 0.94)], self.lit((0.38, 0.25, 0.2), 0.6))
        stage.part()
        turn = self.rng.uniform(0.2, 1.3)
        for k in range(4):
            angle = turn + k * np.pi / 2
            dx, dy = float(np.cos(angle)), float(np.sin(angle))
            tip = (0.62 * dx, 0.82 + 0.62 * dy)
            stage.line([(0, 0.82), tip], 0.03, self.lit((0.3, 0.22, 0.18), 0.4))
            sail = [
                (0.12 * dx, 0.82 + 0.12 * dy),
                tip,
                (tip[0] - 0.13 * dy, tip[1] + 0.13 * dx),
                (0.12 * dx - 0.13 * dy, 0.82 + 0.12 * dy + 0.13 * dx),
            ]
            stage.polygon(sail, self.lit((0.9, 0.86, 0.76), 0.7))

    def castle(self, stone: Colour) -> None:
        """Draw a ruined castle about two units wide."""
        rng, stage, side = self.rng, self.stage, self.side
        for x, wide, tall in ((0.0, 0.9, 0.55), (-0.75, 0.2, 1.0), (0.7, 0.26, 0.8), (0.15, 0.22, 1.25)):
            tall *= rng.uniform(0.85, 1.15)
            top: list[Point] = []
            teeth = 7 if wide > 0.5 else 4
            for i in range(teeth):
                a, b = -wide + 2 * wide * i / teeth, -wide + 2 * wide * (i + 1) / teeth
                level = tall + (0.08 if i % 2 == 0 else 0.0)
                top += [(x + a, level), (x + b, level)]
            stage.polygon([(x - wide, -0.1), *top, (x + wide, -0.1)], self.lit(stone, 0.35))
            edge = x + side * wide
            face = [(x, -0.1), (x, tall), (edge, tall), (edge, -0.1)]
            stage.polygon(face, self.lit(stone, 0.85))
            stage.part()

    def bridge(self, stone: Colour, arches: int) -> None:
        """Draw a stone bridge two units long and centred on its foot, with round arches open below."""
        stage = self.stage
        span = 2.0 / arches
        deck: list[Point] = [(-1.25, 0.18), (-0.6, 0.33), (0.0, 0.4), (0.6, 0.33), (1.25, 0.18)]
        under: list[Point] = [(1.25, -0.02)]
        for a in range(arches):
            right = 1.0 - a * span
            for t in np.linspace(0.0, np.pi, 9):
                reach = 0.42 * span
                under.append((float(right - span / 2 + reach * np.cos(t)), float(0.27 * np.sin(t)) - 0.02))
        under.append((-1.25, -0.02))
        stage.polygon(deck + under, self.lit(stone, 0.5))
        stage.part()
        stage.line(deck, 0.07, self.lit(stone, 0.95))

    # ---- on the water --------------------------------------------------------------------------------

    def boat(self, hull: Colour, sail: Colour, sails: int) -> None:
        """Draw a boat about one unit high with its broken reflection; without sails it is a rowing boat."""
        rng, stage, side = self.rng, self.stage, self.side
        lean = rng.uniform(0.0, 0.08)
        for flip, dim in ((-0.75, 0.55), (1.0, 1.0)):
            stage.polygon(
                [(-0.34, 0.1 * flip), (-0.24, 0.0), (0.26, 0.0), (0.4, 0.13 * flip)],
                shade(self.lit(hull, 0.6), dim),
            )
            if sails == 0:
                stage.polygon(
                    [(-0.05, 0.1 * flip), (0.07, 0.1 * flip), (0.03, 0.33 * flip)],
                    shade(self.lit(sail, 0.4), dim),
                )
                continue
            stage.part()
            stage.line([(0.0, 0.1 * flip), (lean, 1.0 * flip)], 0.025, shade(self.lit((0.3, 0.22, 0.16), 0.4), dim))
            main = [(0.03, 0.16 * flip), (0.36, 0.17 * flip), (lean + 0.01, 0.96 * flip)]
            stage.polygon(main, shade(self.lit(sail, 0.9 if side > 0 else 0.6), dim))
            if sails > 1:
                stage.part()
                jib = [(-0.02, 0.16 * flip), (-0.32, 0.13 * flip), (lean - 0.01, 0.86 * flip)]
                stage.polygon(jib, shade(self.lit(sail, 0.9 if side < 0 else 0.6), dim))
            stage.part()
