"""Landscapes: a height field under a sky, seen through a camera, with trees, houses and boats set on it.

A scene is not a picture yet but a description of one: colour under its light, depth, what each pixel shows,
which region it belongs to and along which direction its form runs. `raystar.demo.painter` draws from these.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from raystar.demo.noise import Array, Lattice, blur, mix, resize, screen_noise, smoothstep
from raystar.demo.sprites import Colour, Kind, Sprites, Stage, blend

__all__ = ["Kind", "Scene", "make_scene"]

FAR = 700.0
"""Where the land ends, in world units (the eye is a few units above the ground)."""
NEAR = 1.6
STEPS = 360
FOCAL = 1.1
"""Focal length in picture widths."""


@dataclass
class Scene:
    """One landscape as layers of [S, S] pixels.

    `rgb` is the colour in 0..1 [S, S, 3]; `depth` runs from 0 (near) to 1 (the sky); `kind` holds `Kind`s;
    `label` numbers the regions; `flow` is the direction along the form in radians (0 is to the right,
    positive is clockwise on the picture). `time`, `season` and `view` name what was chosen.
    """

    rgb: Array
    depth: Array
    kind: NDArray[np.uint8]
    label: NDArray[np.int32]
    flow: Array
    time: str
    season: str
    view: str


@dataclass(frozen=True)
class Hour:
    """The light at a time of day: sky colours from top to horizon, sunlight and skylight."""

    zenith: Colour
    middle: Colour
    horizon: Colour
    sun: Colour
    ambient: Colour
    low_sun: bool = False


HOURS: dict[str, Hour] = {
    "dawn": Hour(
        (0.38, 0.50, 0.74), (0.80, 0.70, 0.74), (1.0, 0.82, 0.60), (0.95, 0.70, 0.46), (0.46, 0.48, 0.6), True
    ),
    "morning": Hour((0.32, 0.54, 0.84), (0.58, 0.76, 0.93), (0.92, 0.92, 0.86), (0.85, 0.76, 0.62), (0.42, 0.48, 0.58)),
    "noon": Hour((0.16, 0.40, 0.78), (0.40, 0.64, 0.92), (0.78, 0.88, 0.95), (0.86, 0.82, 0.74), (0.42, 0.48, 0.56)),
    "overcast": Hour(
        (0.60, 0.65, 0.70), (0.72, 0.76, 0.79), (0.87, 0.88, 0.87), (0.45, 0.44, 0.42), (0.60, 0.62, 0.66)
    ),
    "storm": Hour((0.24, 0.28, 0.36), (0.42, 0.46, 0.53), (0.86, 0.79, 0.62), (0.70, 0.62, 0.48), (0.34, 0.37, 0.44)),
    "golden": Hour(
        (0.36, 0.48, 0.68), (0.86, 0.76, 0.58), (1.0, 0.84, 0.50), (1.0, 0.72, 0.36), (0.38, 0.38, 0.46), True
    ),
    "dusk": Hour(
        (0.22, 0.22, 0.45),
        (0.64, 0.38, 0.50),
        (1.0, 0.56, 0.30),
        (0.80, 0.42, 0.26),
        (0.32, 0.29, 0.40),
        True,
    ),
    "twilight": Hour(
        (0.09, 0.16, 0.38), (0.25, 0.36, 0.58), (0.74, 0.62, 0.62), (0.30, 0.30, 0.40), (0.27, 0.32, 0.46)
    ),
    "night": Hour(
        (0.03, 0.06, 0.17),
        (0.08, 0.14, 0.31),
        (0.20, 0.29, 0.44),
        (0.30, 0.36, 0.50),
        (0.13, 0.18, 0.32),
        True,
    ),
}
_HOUR_ODDS = {
    "dawn": 0.13, "morning": 0.17, "noon": 0.2, "overcast": 0.09, "storm": 0.07,
    "golden": 0.13, "dusk": 0.11, "twilight": 0.05, "night": 0.05,
}  # fmt: skip


@dataclass(frozen=True)
class Season:
    """Colours of the growing things in a season."""

    grass: tuple[Colour, Colour]
    leaves: tuple[Colour, ...]
    crops: tuple[Colour, ...]
    species: tuple[str, ...]
    snow: bool = False


SEASONS: dict[str, Season] = {
    "spring": Season(
        ((0.46, 0.62, 0.24), (0.58, 0.68, 0.30)),
        ((0.46, 0.62, 0.24), (0.36, 0.55, 0.26), (0.92, 0.66, 0.74), (0.95, 0.84, 0.86)),
        ((0.88, 0.80, 0.24), (0.42, 0.62, 0.24), (0.56, 0.42, 0.30), (0.62, 0.70, 0.34)),
        ("round", "birch", "round", "conifer", "poplar"),
    ),
    "summer": Season(
        ((0.38, 0.52, 0.19), (0.52, 0.58, 0.24)),
        ((0.22, 0.42, 0.16), (0.30, 0.48, 0.18), (0.18, 0.36, 0.20)),
        ((0.86, 0.72, 0.34), (0.40, 0.54, 0.20), (0.56, 0.46, 0.66), (0.74, 0.64, 0.30)),
        ("round", "conifer", "poplar", "pine", "birch"),
    ),
    "autumn": Season(
        ((0.60, 0.52, 0.22), (0.70, 0.56, 0.28)),
        ((0.86, 0.48, 0.14), (0.74, 0.26, 0.12), (0.90, 0.70, 0.20), (0.44, 0.42, 0.18)),
        ((0.72, 0.54, 0.28), (0.54, 0.38, 0.26), (0.80, 0.66, 0.36), (0.52, 0.52, 0.22)),
        ("round", "birch", "conifer", "poplar", "round"),
    ),
    "winter": Season(
        ((0.90, 0.92, 0.96), (0.82, 0.86, 0.93)),
        ((0.20, 0.30, 0.26), (0.24, 0.32, 0.26), (0.32, 0.28, 0.24)),
        ((0.92, 0.93, 0.96), (0.84, 0.87, 0.92), (0.74, 0.72, 0.70), (0.88, 0.90, 0.95)),
        ("conifer", "bare", "conifer", "conifer", "bare"),
        snow=True,
    ),
    "dry": Season(
        ((0.76, 0.64, 0.36), (0.66, 0.60, 0.30)),
        ((0.32, 0.40, 0.18), (0.42, 0.46, 0.24), (0.26, 0.34, 0.18)),
        ((0.88, 0.76, 0.42), (0.52, 0.52, 0.26), (0.62, 0.50, 0.66), (0.72, 0.46, 0.28)),
        ("pine", "poplar", "round", "poplar", "bush"),
    ),
}
_SEASON_ODDS = {"spring": 0.2, "summer": 0.27, "autumn": 0.2, "winter": 0.19, "dry": 0.14}
_ROCKS: tuple[Colour, ...] = ((0.50, 0.48, 0.50), (0.56, 0.48, 0.42), (0.42, 0.44, 0.48), (0.60, 0.54, 0.50))

_VIEW_ODDS = {
    "lake": 0.18, "coast": 0.13, "river": 0.13, "fields": 0.15, "islands": 0.09,
    "volcano": 0.09, "valley": 0.12, "mesa": 0.05, "highland": 0.06,
}  # fmt: skip


@dataclass
class _Plan:
    """Everything decided before drawing."""

    view: str
    time: str
    season_name: str
    season: Season
    zenith: Colour
    middle: Colour
    horizon_colour: Colour
    light: Colour
    ambient: Colour
    rock: Colour
    horizon: float
    eye: float
    sun_x: float
    sun_height: float
    sun_visible: bool
    direction: tuple[float, float, float]
    haze_range: float
    snow_line: float
    tree_line: float
    forest: float
    mirror: bool
    curve: tuple[float, float, float, float] = field(default=(0.0, 0.0, 0.0, 0.0))


def _pick(rng: np.random.Generator, odds: dict[str, float]) -> str:
    weights = np.array(list(odds.values()))
    return str(rng.choice(list(odds), p=weights / weights.sum()))


def _jitter(rng: np.random.Generator, colour: Colour, amount: float) -> Colour:
    r, g, b = (float(np.clip(c + d, 0.0, 1.1)) for c, d in zip(colour, rng.normal(0, amount, 3), strict=True))
    return (r, g, b)


def _make_plan(rng: np.random.Generator) -> _Plan:
    view = _pick(rng, _VIEW_ODDS)
    time = _pick(rng, _HOUR_ODDS)
    season_name = "dry" if view == "mesa" else _pick(rng, _SEASON_ODDS)
    hour, season = HOURS[time], SEASONS[season_name]
    shift = 0.025
    sun_visible = time != "overcast" and time != "storm" and rng.random() < (0.6 if hour.low_sun else 0.12)
    sun_x = rng.uniform(-0.36, 0.36)
    sun_height = rng.uniform(0.05, 0.16) if time in ("dawn", "dusk", "golden") else rng.uniform(0.18, 0.32)
    # A visible sun is in front of the eye; tilting its light up keeps the land from going all black.
    side = np.sign(sun_x) or 1.0
    direction = (
        (2.2 * side, 0.9, 0.5) if sun_visible else (rng.choice((-1.0, 1.0)) * 1.0, rng.uniform(0.55, 0.9), -0.35)
    )
    length = float(np.linalg.norm(direction))
    horizons = {
        "lake": (0.40, 0.56), "coast": (0.36, 0.52), "river": (0.34, 0.5), "fields": (0.32, 0.52),
        "islands": (0.38, 0.62), "volcano": (0.5, 0.64), "valley": (0.42, 0.58), "mesa": (0.48, 0.62),
        "highland": (0.38, 0.52),
    }  # fmt: skip
    eyes = {"lake": (2.0, 5.0), "coast": (3.5, 8.0), "river": (3.0, 7.0), "fields": (3.5, 7.0),
            "islands": (2.0, 6.0), "volcano": (2.5, 5.0), "valley": (3.0, 7.0), "mesa": (2.5, 4.0),
            "highland": (3.0, 6.0)}  # fmt: skip
    clear = {"noon": 420.0, "morning": 300.0, "dawn": 170.0, "overcast": 150.0, "storm": 260.0,
             "golden": 220.0, "dusk": 240.0, "twilight": 260.0, "night": 300.0}  # fmt: skip
    return _Plan(
        view=view,
        time=time,
        season_name=season_name,
        season=season,
        zenith=_jitter(rng, hour.zenith, shift),
        middle=_jitter(rng, hour.middle, shift),
        horizon_colour=_jitter(rng, hour.horizon, shift),
        light=_jitter(rng, hour.sun, shift),
        ambient=hour.ambient,
        rock=_jitter(rng, _ROCKS[rng.integers(len(_ROCKS))], 0.02),
        horizon=rng.uniform(*horizons[view]),
        eye=rng.uniform(*eyes[view]),
        sun_x=sun_x,
        sun_height=sun_height,
        sun_visible=sun_visible,
        direction=(float(direction[0]) / length, float(direction[1]) / length, float(direction[2]) / length),
        haze_range=clear[time] * rng.uniform(0.6, 1.3),
        snow_line=rng.uniform(14.0, 40.0) if not season.snow else 0.0,
        tree_line=rng.uniform(12.0, 26.0),
        forest=rng.uniform(-0.35, 0.25) + (0.35 if view == "valley" else 0.0),
        mirror=bool(rng.random() < 0.5),
        curve=(rng.uniform(2.0, 6.0), rng.uniform(0.09, 0.16), rng.uniform(0, 6.28), rng.normal(0, 0.12)),
    )


# ---- the land ---------------------------------------------------------------------------------------------


def _curve(plan: _Plan, z: Array) -> Array:
    """Where the river (or path) crosses the distance z, in world units from the middle."""
    swing, rate, phase, drift = plan.curve
    # The swing grows with distance, else perspective would flatten the bends.
    wave = np.sin(rate * z * (1.0 + 2.0 * rate) ** 0.5 + phase) + 0.5 * np.sin(0.37 * rate * z + 2.0 * phase)
    return np.asarray(swing * (0.35 + z / 45.0) ** 0.6 * wave + drift * z, np.float32)


def _height(plan: _Plan, land: Lattice, rng: np.random.Generator, x: Array, z: Array, gap: Array) -> Array:
    """Return the height of the land above the water at world points; `gap` is the sampling distance."""

    def hills(size: float, octaves: int = 5) -> Array:
        return land.fractal(x / size + 31.7, z / size + 7.1, octaves, gap / size)

    def range_(size: float, octaves: int = 7) -> Array:
        return land.fractal(x / size + 3.3, z / size + 1.9, octaves, gap / size, ridged=True)

    def rise(low: float, high: float) -> Array:
        return smoothstep(low, high, z)

    slant = x / z * FOCAL  # the position across the picture, -0.5 to 0.5
    h: Array
    if plan.view == "lake":
        size, tall = rng.uniform(70, 130), rng.uniform(50, 110)
        mountains = tall * rise(60, 230) * (0.12 + range_(size)) * (0.75 + 0.5 * land.at(x / 160 + 5, z / 300))
        centre, reach = rng.uniform(-0.25, 0.25), rng.uniform(0.35, 0.9)
        far_shore = rng.uniform(40, 110)
        bowl = np.exp(-(((slant - centre) / reach) ** 4)) * (1 - rise(far_shore * 0.8, far_shore * 1.3))
        bank = rng.uniform(0.0, 1.0)
        bowl *= smoothstep(3.0 * bank + 0.5, 9.0 * bank + 2.0, z + 1.5 * land.at(x / 3, z / 3))
        h = 1.2 + 1.6 * hills(28) + rise(20, 120) * 6 * (hills(60, 3) + 0.4) + mountains - 5.0 * bowl
    elif plan.view == "coast":
        shore = rng.uniform(-0.05, 0.25) + 0.16 * land.at(z / 25 + 2, z * 0) + 0.08 * land.at(z / 7, z * 0 + 9)
        inland = slant - shore * (1 - 0.55 * rise(60, 300))
        cliff = rng.uniform(2.0, 16.0)
        body = smoothstep(-0.03, 0.12, inland) * (cliff * rise(8, 45) * (0.6 + 0.7 * range_(40, 6)) + 1.0)
        head = smoothstep(0.0, 0.5, inland) * rise(40, 180) * rng.uniform(5, 40) * range_(80)
        beach = (1 - rise(3.0, rng.uniform(6, 14))) * rng.uniform(0.0, 2.4)
        h = -1.6 + 1.6 * body + head + beach + 0.35 * hills(9)
        ending = 1 - smoothstep(250, 420, z)
        h = np.where(h > -1.0, (h + 1.0) * ending - 1.0, h)
    elif plan.view == "islands":
        h = np.full(x.shape, -2.0, np.float32)
        for _ in range(int(rng.integers(2, 6))):
            zc = float(np.exp(rng.uniform(np.log(22), np.log(260))))
            xc = zc * rng.uniform(-0.42, 0.42) / FOCAL
            reach = zc * rng.uniform(0.06, 0.2)
            tall = zc * rng.uniform(0.04, 0.18)
            bump = np.exp(-(((x - xc) / reach) ** 2) - ((z - zc) / (1.4 * reach)) ** 2)
            h = h + bump * (tall * (0.45 + 0.9 * land.fractal(x / reach, z / reach, 5, gap / reach, ridged=True)) + 2.5)
        if rng.random() < 0.5:
            h = h + (1 - rise(3, rng.uniform(6, 9))) * 3.0
    elif plan.view == "river":
        bed = np.abs(x - _curve(plan, z))
        wide = rng.uniform(1.2, 2.6) * (1 + z / 90)
        slope = np.maximum(bed - wide * 1.5, 0) * rng.uniform(0.04, 0.2) * rise(6, 50)
        mountains = rise(90, 260) * rng.uniform(15, 70) * range_(rng.uniform(70, 130))
        h = 0.9 + 0.5 * hills(14) + np.minimum(slope, 14) * (1 + 0.5 * hills(40, 4)) + mountains
        h = h - 2.6 * np.exp(-((bed / wide) ** 4)) * (1 - rise(150, 260)) - h * 0.5 * np.exp(-((bed / wide / 2) ** 2))
    elif plan.view == "volcano":
        xc, zc, reach = rng.uniform(-55, 55), rng.uniform(200, 300), rng.uniform(130, 200)
        r = np.hypot(x - xc, z - zc) / reach
        tall = rng.uniform(60, 90)
        gully = range_(22, 5) - 0.35
        cone = tall * np.maximum(0, 1 - r) ** 1.7
        cone = np.minimum(cone, tall * 0.86 + 1.5 * hills(6, 3)) + gully * 7 * smoothstep(0, 0.25, 1 - r)
        wet = rng.random() < 0.6
        pool = rise(5, 12) * (1 - rise(60, 110)) * np.exp(-((slant / 0.5) ** 6))
        h = 1.0 + 1.2 * hills(24) + cone + rise(60, 200) * 6 * (0.3 + hills(50)) - (4.5 * pool if wet else 0.0)
    elif plan.view == "valley":
        axis = np.abs(x - 0.4 * _curve(plan, z))
        sides = np.maximum(axis - 3 - 0.05 * z, 0)
        walls = np.minimum(sides * rng.uniform(0.25, 0.7), 60) * rise(5, 60) * (0.55 + 0.9 * range_(55))
        mountains = rise(110, 260) * rng.uniform(30, 95) * (0.1 + range_(rng.uniform(80, 130)))
        h = 1.0 + 1.0 * hills(18) + walls + mountains
    elif plan.view == "mesa":
        raw = land.fractal(x / 75 + 2.2, z / 75, 4, gap / 75) * rise(40, 110) + rng.uniform(-0.15, 0.1)
        levels = smoothstep(0.12, 0.2, raw) * 15 + smoothstep(0.26, 0.34, raw) * 13 + smoothstep(0.5, 0.55, raw) * 10
        h = 1.0 + 0.8 * hills(20) + levels * rng.uniform(0.7, 1.5) + 1.5 * hills(8, 4) * rise(40, 80)
    elif plan.view == "highland":
        h = 1.0 + rise(8, 40) * 9 * (0.25 + hills(45, 5)) + rise(60, 240) * rng.uniform(15, 45) * (range_(110) + 0.2)
    else:  # fields
        h = 1.0 + rng.uniform(0.8, 3.2) * (0.3 + hills(38, 3)) * rise(4, 30) + rise(50, 160) * 7 * (0.2 + hills(70, 4))
        h = h + rise(160, 300) * rng.uniform(0, 60) * range_(110)
    # The ground right at the eye must stay below it.
    return np.asarray(np.minimum(h, plan.eye - 1.3 + 0.1 * z**1.25), np.float32)


@dataclass
class _Land:
    """The height field on its grid of distances and columns, and what each pixel sees of it."""

    z: Array  # [STEPS] distances
    h: Array  # [STEPS, R] heights, negative under water
    screen: Array  # [STEPS, R] rows in picture heights
    horizon_line: Array  # [STEPS, R] the highest row hidden so far
    hit: NDArray[np.bool_]  # [R, R] land or water seen (else sky)
    step: NDArray[np.int32]  # [R, R] the grid step behind the point seen
    frac: Array  # [R, R] how far the point seen lies before that step


def _cast(plan: _Plan, rng: np.random.Generator, r: int) -> _Land:
    land = Lattice(rng)
    z = np.geomspace(NEAR, FAR, STEPS).astype(np.float32)
    s = ((np.arange(r, dtype=np.float32) + 0.5) / r - 0.5)[None]
    if plan.mirror:
        s = -s
    zz = np.broadcast_to(z[:, None], (STEPS, r))
    x = zz * s / FOCAL
    gap = np.broadcast_to(z[:, None] * (np.log(FAR / NEAR) / STEPS) * 0.8, (STEPS, r)).astype(np.float32)
    h = _height(plan, land, rng, x, zz, gap)
    surface = np.maximum(h, 0.0)
    screen = plan.horizon - FOCAL * (surface - plan.eye) / zz
    line = np.minimum.accumulate(screen, axis=0)
    rows = (np.arange(r, dtype=np.float32) + 0.5) / r
    step = np.empty((r, r), np.int32)
    for c in range(r):
        step[:, c] = np.searchsorted(-line[:, c], -rows, side="left")
    hit = step < STEPS
    step = np.clip(step, 1, STEPS - 1)
    columns = np.arange(r)[None]
    behind, before = screen[step, columns], screen[step - 1, columns]
    gone = np.maximum(before - behind, 1e-6)
    frac = np.clip((rows[:, None] - behind) / gone, 0.0, 1.0).astype(np.float32)
    return _Land(z, h, screen, line, hit, step, frac)


def _sky(plan: _Plan, rng: np.random.Generator, size: int) -> tuple[Array, Array, Array]:
    """Return the sky [S, S, 3], how much of it is cloud [S, S] and how much is sun or moon [S, S]."""
    v = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]
    s = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5)[None]
    up = np.broadcast_to(np.clip((plan.horizon - v) / plan.horizon, 0.0, 1.0), (size, size)).astype(np.float32)
    top, mid, low = (np.array(c, np.float32) for c in (plan.zenith, plan.middle, plan.horizon_colour))
    band = rng.uniform(0.3, 0.5)
    rgb = np.where(
        (up < band)[..., None],
        mix(low, mid, smoothstep(0, band, up)),
        mix(mid, top, smoothstep(band, 1.1, up)),
    )
    away = np.hypot(s - plan.sun_x, v - (plan.horizon - plan.sun_height)).astype(np.float32)
    moon = plan.time == "night"
    disc = np.zeros((size, size), np.float32)
    if moon:
        stars = np.zeros((size, size), np.float32)
        for _ in range(70):
            y, x = int(rng.uniform(0, 0.9) * size * plan.horizon), int(rng.random() * size)
            stars[y : y + max(1, size // 150), x : x + max(1, size // 150)] = rng.uniform(0.3, 1.0)
        rgb = rgb + 0.8 * stars[..., None]
    glow = np.array(plan.light, np.float32) * (0.3 if moon else 0.55)
    if plan.sun_visible or moon:
        rgb = rgb + glow * np.exp(-away / 0.16)[..., None] * (1.0 if plan.sun_visible else 0.3)
    if plan.sun_visible:
        radius = rng.uniform(0.025, 0.05)
        disc = 1 - smoothstep(radius - 0.004, radius + 0.004, away)
    cloud = np.zeros((size, size), np.float32)
    form = _pick(rng, {"none": 0.16, "heaped": 0.4, "streaks": 0.22, "rippled": 0.22})
    if plan.time in ("storm", "overcast"):
        form = "heaped"
    elif plan.time == "night" and form == "heaped":
        form = "streaks"
    bright = np.clip(
        0.35 * low + 0.75 * np.array(plan.light, np.float32) + 0.35 * np.array(plan.ambient, np.float32),
        0,
        1.1,
    )
    if plan.time in ("night", "twilight"):
        bright = np.clip(low * 1.1 + 0.05, 0, 1)
    dark = np.clip(0.5 * mid + 0.35 * np.array(plan.ambient, np.float32), 0, 1)
    if plan.time == "storm":
        dark, bright = top * 0.8, mid * 1.25
    if form == "heaped":
        cells = rng.uniform(2.5, 6.0)
        n = screen_noise(rng, size, (cells, cells * rng.uniform(1.1, 2.0)), 6, 0.52)
        cover = rng.uniform(-0.5, 0.8) - (0.9 if plan.time in ("storm", "overcast") else 0.0)
        cloud = smoothstep(cover, cover + 0.55, n + 0.4 * (0.5 - up))
        shift = max(1, size // 24)
        side = -shift if plan.direction[0] > 0 else shift
        relief = n - np.roll(n, (-shift, side), (0, 1))
        tone = np.clip(0.5 - 0.32 * blur(relief, size / 128) - 0.15 * (n - cover - 0.8), 0, 1)
        tone = np.clip(1.0 - tone if plan.time == "storm" else tone, 0, 1)
        rgb = mix(rgb, mix(dark, bright, tone), cloud * 0.94)
    elif form in ("streaks", "rippled"):
        plane = Lattice(rng)
        far = 1.0 / (plan.horizon * up + 0.07)
        stretch = (0.35, 1.1) if form == "streaks" else (1.0, 1.3)
        scale = rng.uniform(0.8, 1.5)
        n = plane.fractal(s * far * stretch[0] * 3 * scale + 0.25 * far, far * stretch[1] * scale, 5, far * far * 0.012)
        cover = rng.uniform(-0.1, 0.3)
        cloud = smoothstep(cover, cover + 0.6, n) * (0.9 if form == "rippled" else 0.75)
        tone = np.clip(0.35 + 0.5 * smoothstep(0.8, 0.0, up) + 0.2 * n, 0, 1)
        rgb = mix(rgb, mix(mix(mid, dark, 0.5), bright, tone), cloud)
    if plan.sun_visible:
        white = np.array((0.96, 0.94, 0.86) if moon else blend((1.0, 0.97, 0.85), plan.horizon_colour, 0.2), np.float32)
        cover_sun = disc * (1 - 0.6 * cloud)
        rgb = mix(rgb, white, cover_sun)
    return rgb.astype(np.float32), cloud, disc


def make_scene(rng: np.random.Generator, size: int = 256) -> Scene:
    """Lay out one landscape of `size` x `size` pixels, wholly given by the generator's state."""
    plan = _make_plan(rng)
    r = 2 * size
    land = _cast(plan, rng, r)
    columns = np.arange(r)[None]
    step, frac = land.step, land.frac

    def see(grid: Array) -> Array:
        """Pick up a grid's value at the point that each pixel sees."""
        behind = grid[step, columns]
        return behind + (grid[step - 1, columns] - behind) * frac

    zg = land.z[:, None]
    s = (np.arange(r, dtype=np.float32) + 0.5) / r - 0.5
    slant = -s if plan.mirror else s
    zgrid = np.broadcast_to(zg, land.h.shape)
    dh_ds = np.gradient(land.h, axis=1) / (slant[1] - slant[0])
    dh_dz = np.gradient(land.h, axis=0) / np.gradient(land.z)[:, None]
    hx_grid = dh_ds * FOCAL / zg
    hz_grid = dh_dz - hx_grid * slant[None] / FOCAL
    z, h, hx, hz = see(zgrid), see(land.h), see(hx_grid), see(hz_grid)
    x = z * slant[None] / FOCAL
    water = land.hit & (h <= 0.0)
    gap = z * (np.log(FAR / NEAR) / STEPS)

    sky, cloud, disc = _sky(plan, rng, size)
    sky_big = np.stack([resize(sky[..., c], r, r) for c in range(3)], axis=-1)

    # ---- ground colour
    tex = Lattice(rng)
    fine = tex.fractal(x * 1.7, z * 1.7, 4, gap * 1.7)
    broad = tex.fractal(x / 14, z / 14, 3, gap / 14)
    grass_a, grass_b = (np.array(c, np.float32) for c in plan.season.grass)
    albedo = mix(grass_a, grass_b, np.clip(0.5 + 0.6 * broad, 0, 1)) * (1 + 0.22 * fine)[..., None]
    kind = np.full((r, r), Kind.GRASS, np.uint8)
    slope = np.hypot(hx, hz)
    patch = np.zeros((r, r), np.int32)
    if plan.view == "mesa":
        strata = 0.5 + 0.5 * np.sin(h * 1.9 + 2 * broad)
        red = mix(np.array((0.72, 0.36, 0.22), np.float32), np.array((0.86, 0.58, 0.38), np.float32), strata)
        rock_colour = red
    else:
        rock_colour = np.array(plan.rock, np.float32) * (1 + 0.35 * fine + 0.1 * broad)[..., None]
    if plan.view in ("fields", "river", "volcano", "highland") and (plan.view == "fields" or rng.random() < 0.5):
        albedo, kind, patch = _fields(plan, rng, tex, x, z, h, slope, albedo, kind)
    if plan.view in ("fields", "valley", "highland", "volcano", "mesa") and rng.random() < 0.65:
        off = np.abs(x - 0.5 * _curve(plan, z)) / (0.55 + 0.1 * fine)
        path = (off < 1) & (z < 90) & (h > 0.1)
        soil = np.array((0.80, 0.70, 0.54) if not plan.season.snow else (0.70, 0.66, 0.64), np.float32)
        albedo = np.where(path[..., None], soil * (1 + 0.1 * fine)[..., None], albedo)
        kind[path] = Kind.SAND
    woods = tex.fractal(x / 24 + 90, z / 24, 4, gap / 24) + plan.forest
    forest = (woods > 0.12) & (z > 14) & (slope < 1.5) & (h > 0.6) & (h < plan.tree_line * (1 + 0.3 * broad))
    if plan.view == "mesa":
        forest &= False
    leaf = np.array(plan.season.leaves[rng.integers(len(plan.season.leaves))], np.float32)
    crowns = tex.fractal(x * 0.9, z * 0.45 + h * 0.9, 3, gap * 0.5)
    green = leaf * (0.78 + 0.42 * crowns)[..., None]
    albedo = np.where(forest[..., None], green, albedo)
    kind[forest] = Kind.FOREST
    steep = rng.uniform(0.75, 1.0)
    rocky = smoothstep(steep, steep + 0.35, slope + 0.35 * broad + 0.15 * fine) * (z > 8)
    rocky = np.maximum(rocky, smoothstep(plan.tree_line, plan.tree_line * 1.6, h + 5 * broad) * (not plan.season.snow))
    albedo = mix(albedo, rock_colour, rocky)
    kind[rocky > 0.5] = Kind.ROCK
    if plan.view != "mesa":
        high = smoothstep(plan.snow_line, plan.snow_line + 7, h + 9 * broad + 4 * fine - 3.0)
        lies = high * (1 - smoothstep(1.0, 1.9, slope + 0.5 * fine))
        if plan.season.snow:
            lies = lies * (1 - 0.85 * forest) * (1 - 0.6 * rocky)
        albedo = mix(albedo, np.array((0.95, 0.96, 1.0), np.float32), lies)
        kind[(lies > 0.5) & (h > 0.2)] = Kind.SNOW
    shoreline = (h > 0) & (h < 0.3 + 0.2 * broad) & (z < 120) & (plan.view not in ("fields", "highland", "valley"))
    sand = np.array((0.84, 0.76, 0.60) if plan.view in ("coast", "islands") else (0.56, 0.50, 0.42), np.float32)
    albedo = np.where(shoreline[..., None], sand * (1 + 0.15 * fine)[..., None], albedo)
    kind[shoreline] = Kind.SAND

    # ---- light and air
    relief = 1.0 + 0.5 * smoothstep(40, 150, z)  # far slopes are exaggerated, as painters do
    lx, ly, lz = plan.direction
    normal = (-hx * relief * (1 if not plan.mirror else -1) * lx - hz * relief * lz + ly) / np.sqrt(
        1 + relief**2 * (hx * hx + hz * hz)
    )
    sunny = np.clip(normal * 1.25 - 0.05, 0, 1.2)
    sunny = sunny * (1 - 0.45 * smoothstep(0.0, 0.5, tex.fractal(x / 60 + 40, z / 60, 2)))
    lit = albedo * (np.array(plan.ambient, np.float32) + sunny[..., None] * np.array(plan.light, np.float32))
    hit_depth = 1 - np.exp(-((z / plan.haze_range) ** 1.15))
    air = np.array(blend(plan.horizon_colour, plan.middle, 0.45), np.float32) * (
        0.85 if plan.time in ("dusk", "golden") else 0.95
    )
    rgb = mix(lit, air, np.clip(hit_depth * 0.93, 0, 1))
    rgb = np.where(land.hit[..., None], rgb, sky_big)
    kind = np.where(land.hit, kind, Kind.SKY).astype(np.uint8)

    # ---- regions
    tier = np.clip(np.log(z / NEAR) / np.log(FAR / NEAR), 0, 1)
    bucket = np.digitize(z, (6, 16, 40, 90, 170, 300)).astype(np.int32)
    bright = (sunny > 0.5).astype(np.int32)
    label = kind.astype(np.int32) * 16 + bucket + 8 * np.where(z > 30, bright, 0) + 300 * np.minimum(patch, 1) + patch
    label = np.where(land.hit, label, 0)

    # ---- things
    stage = Stage(rgb, label)
    sprites = Sprites(
        stage, rng, plan.light, plan.ambient, 1.0 if lx > 0 else -1.0,
        plan.time in ("night", "twilight", "dusk"), plan.season.snow,
    )  # fmt: skip
    air_colour: Colour = (float(air[0]), float(air[1]), float(air[2]))
    placer = _Placer(plan, land, rng, stage, sprites, air_colour, r)
    placer.populate(woods, step)
    rgb, label = stage.picture()

    # ---- water mirrors what stands above it
    wet = water & (label < 1000)
    if wet.any():
        rgb = _reflect(plan, rng, tex, rgb, wet, water, x, z, h, sky_big, air)
        kind[wet] = Kind.WATER
        label = np.where(wet, Kind.WATER * 16 + (bucket > 3), label)
        stage = Stage(rgb, label, 4000)
        sprites.stage = stage
        placer.stage = stage
        placer.boats(wet)
        rgb, label = stage.picture()
        things = [*placer.kinds, *stage.kinds]
    else:
        things = placer.kinds
    lookup = np.zeros(8000, np.uint8)
    lookup[1000 : 1000 + len(placer.kinds)] = placer.kinds
    if len(things) > len(placer.kinds):
        lookup[4000 : 4000 + len(things) - len(placer.kinds)] = things[len(placer.kinds) :]
    kind = np.where(label >= 1000, lookup[np.minimum(label, 7999)], kind)

    # ---- direction of the form: downhill on slopes, level elsewhere
    hxs = hx * (-1 if plan.mirror else 1)
    away_x = s[None] / FOCAL
    down_x = -hxs + away_x * hz
    down_y = (hxs * hxs + hz * hz) - (plan.eye - np.maximum(h, 0)) / z * hz * -1.0
    angle = np.arctan2(down_y, down_x)
    weight = smoothstep(0.12, 0.45, slope) * land.hit * ~water
    cos2 = weight * np.cos(2 * angle) + (1 - weight)
    sin2 = weight * np.sin(2 * angle)
    upright = (kind == Kind.TREE) | (kind == Kind.BUILDING)
    cos2 = np.where(upright, -0.6, cos2)[1::2, 1::2]
    sin2 = np.where(upright, 0.3, sin2)[1::2, 1::2]
    flow = 0.5 * np.arctan2(blur(sin2, size / 100), blur(cos2, size / 100))

    kind = kind[1::2, 1::2]
    label = label[1::2, 1::2]
    open_sky = kind == Kind.SKY
    kind = np.where(open_sky & (cloud > 0.45), Kind.CLOUD, kind).astype(np.uint8)
    kind = np.where(open_sky & (disc > 0.5), Kind.SUN, kind).astype(np.uint8)
    label = np.where(open_sky, kind.astype(np.int32), label)
    depth = np.where(land.hit, 0.95 * tier, 1.0)[1::2, 1::2]
    rgb = rgb.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
    return Scene(
        rgb=np.clip(rgb, 0, 1).astype(np.float32),
        depth=depth.astype(np.float32),
        kind=kind,
        label=label.astype(np.int32),
        flow=flow.astype(np.float32),
        time=plan.time,
        season=plan.season_name,
        view=plan.view,
    )


def _fields(
    plan: _Plan,
    rng: np.random.Generator,
    tex: Lattice,
    x: Array,
    z: Array,
    h: Array,
    slope: Array,
    albedo: Array,
    kind: NDArray[np.uint8],
) -> tuple[Array, NDArray[np.uint8], NDArray[np.int32]]:
    """Lay a patchwork of crops with rows over the gentle ground."""
    turn = rng.uniform(-0.5, 0.5)
    wide, deep = rng.uniform(7, 14), rng.uniform(9, 20)
    u = (x * np.cos(turn) - z * np.sin(turn)) / wide + 0.35 * tex.at(x / 30, z / 30)
    w = (x * np.sin(turn) + z * np.cos(turn)) / deep + 0.35 * tex.at(x / 30 + 50, z / 30)
    row = np.floor(w)
    u = u + 0.37 * row
    cell = np.floor(u)
    code = (cell * 37.0 + row * 101.0 + 7.0 * cell * row).astype(np.int64) % 61
    crops = np.array(plan.season.crops, np.float32)
    pick = rng.integers(0, len(crops) + 2, 61)
    colour = crops[np.minimum(pick, len(crops) - 1)][code]
    along = np.where((code % 2 == 0), u * wide, w * deep)
    stripes = np.sin(along * 2 * np.pi / 1.1) * np.clip(1.4 - z / 22, 0, 1)
    colour = colour * (1 + 0.17 * stripes)[..., None] * (1 + 0.12 * tex.at(x * 1.3, z * 1.3))[..., None]
    chosen = (pick[code] < len(crops)) & (slope < 0.6) & (h > 0.5) & (z < 170) & (z > 2)
    gap = np.minimum(u - cell, cell + 1 - u) * wide
    hedge = chosen & (gap < 0.25 + 0.003 * z) & (z > 12)
    albedo = np.where(chosen[..., None], colour, albedo)
    albedo = np.where(hedge[..., None], np.array(plan.season.leaves[0], np.float32) * 0.8, albedo)
    kind = np.where(chosen, Kind.FIELD, kind).astype(np.uint8)
    return albedo.astype(np.float32), kind, np.where(chosen, 1 + code, 0).astype(np.int32)


def _reflect(
    plan: _Plan,
    rng: np.random.Generator,
    tex: Lattice,
    rgb: Array,
    wet: NDArray[np.bool_],
    water: NDArray[np.bool_],
    x: Array,
    z: Array,
    h: Array,
    sky: Array,
    air: Array,
) -> Array:
    """Paint the water: what is above the shore upside down, broken by ripples, over its own colour."""
    r = rgb.shape[0]
    rows = np.arange(r, dtype=np.float32)[:, None]
    # The shore above each water pixel is the top of the unbroken run of water in its column.
    dry_row = np.where(~water, rows, -1.0)
    shore = np.maximum.accumulate(dry_row, axis=0)
    shore = np.maximum(shore, plan.horizon * r - 1)
    sea = plan.view in ("coast", "islands")
    rough = rng.uniform(0.5, 1.0) if sea else rng.uniform(0.03, 0.45)
    gap = z * (np.log(FAR / NEAR) / STEPS)
    waves = tex.fractal(x * 0.5, z * 1.6, 4, gap * 1.2)
    wide = tex.fractal(x * 0.08 + 11, z * 0.3, 3, gap * 0.25)
    # Neighbouring columns share their mirror line where they can, else each step of the bank draws a seam.
    reach = r // 12
    pad = np.pad(shore, ((0, 0), (reach + 1, reach)), mode="edge")
    total = np.cumsum(pad, axis=1, dtype=np.float64)
    even = ((total[:, 2 * reach + 1 :] - total[:, : -2 * reach - 1]) / (2 * reach + 1)).astype(np.float32)
    shore = np.minimum(even, rows)
    depth_px = rows - shore
    bend = waves * (0.35 * depth_px + 2) * rough + wide * 0.1 * depth_px
    source = np.clip(2 * shore - rows - np.abs(bend) * 0.8, 0, r - 1).astype(np.int32)
    lean = np.clip(np.arange(r)[None] + waves * depth_px * 0.06 * rough, 0, r - 1).astype(np.int32)
    mirrored = rgb[source, lean]
    if sea:
        mirrored = mix(mirrored, sky[source, lean], 0.7)
    body = {"winter": (0.20, 0.32, 0.42), "dry": (0.14, 0.42, 0.48), "spring": (0.16, 0.38, 0.42)}.get(
        plan.season_name, (0.12, 0.32, 0.42)
    )
    tint = np.array(body, np.float32) * (
        np.array(plan.ambient, np.float32) * 0.9 + 0.55 * np.array(plan.light, np.float32)
    )
    glance = np.clip(0.30 + 0.62 * np.exp(-(plan.eye / z) * 3.0) - 0.1 * rough, 0, 0.93)
    out = mix(tint, mirrored * 0.95, glance)
    crest = np.clip(waves, 0, 1) * rough
    out = out * (1 - 0.22 * np.clip(-waves, 0, 1) * rough)[..., None] + crest[..., None] * 0.16 * np.array(
        plan.middle, np.float32
    )
    if plan.sun_visible:
        s = (np.arange(r, dtype=np.float32)[None] + 0.5) / r - 0.5
        track = np.exp(-(((s - plan.sun_x) / (0.05 + 0.12 * rows / r)) ** 2)) * np.clip(0.4 + 1.3 * waves, 0, 1)
        out = out + track[..., None] * 0.8 * np.array(plan.light, np.float32)
    if sea:
        surf = smoothstep(-0.55, -0.05, h + 0.25 * waves) * (z < 150) * np.clip(0.5 + waves, 0, 1)
        caps = smoothstep(0.55, 0.8, waves) * rough * 0.5
        foam = np.clip(np.maximum(surf, caps), 0, 1) * 0.85
        out = mix(
            out,
            np.clip(np.array(plan.ambient, np.float32) + 0.8 * np.array(plan.light, np.float32), 0, 1),
            foam,
        )
    out = mix(out, air, np.clip(1 - np.exp(-((z / plan.haze_range / 1.3) ** 1.3)), 0, 0.85))
    return np.where(wet[..., None], out, rgb).astype(np.float32)


class _Placer:
    """Finds places in the land for trees, houses and boats, and has them drawn far to near."""

    def __init__(
        self,
        plan: _Plan,
        land: _Land,
        rng: np.random.Generator,
        stage: Stage,
        sprites: Sprites,
        air: Colour,
        r: int,
    ) -> None:
        self.plan, self.land, self.rng, self.stage, self.sprites, self.air, self.r = (
            plan,
            land,
            rng,
            stage,
            sprites,
            air,
            r,
        )
        self.kinds: list[Kind] = stage.kinds

    def _foot(self, s: float, z: float) -> tuple[float, float, bool]:
        """Return the row and the height of the land at (s, z), and whether it can be seen."""
        land = self.land
        k = int(np.clip(np.searchsorted(land.z, z), 1, STEPS - 1))
        c = int(np.clip((s + 0.5) * self.r, 0, self.r - 1))
        row = float(land.screen[k, c])
        return row, float(land.h[k, c]), row <= float(land.horizon_line[k - 1, c]) + 0.004

    def _slope(self, s: float, z: float) -> float:
        land = self.land
        k = int(np.clip(np.searchsorted(land.z, z), 1, STEPS - 2))
        c = int(np.clip((s + 0.5) * self.r, 2, self.r - 3))
        dz = abs(float(land.h[k + 1, c] - land.h[k - 1, c])) / float(land.z[k + 1] - land.z[k - 1])
        dx = abs(float(land.h[k, c + 2] - land.h[k, c - 2])) / (4 * z / FOCAL / self.r)
        return max(dx, dz)

    def _set(self, s: float, row: float, z: float, tall: float, kind: Kind) -> None:
        """Place a thing `tall` world units to the unit at distance z."""
        haze = (1 - float(np.exp(-((z / self.plan.haze_range) ** 1.15)))) * 0.93
        self.stage.place((s + 0.5) * self.r, row * self.r, FOCAL * tall / z * self.r, kind, self.air, haze)

    def _spots(
        self, count: int, near: float, far: float, dry: float = 0.35, steep: float = 0.6, top: float = 1e9
    ) -> list[tuple[float, float, float]]:
        """Return visible places (s, row, z) on gentle land between two distances."""
        places = []
        for _ in range(count):
            s, z = self.rng.uniform(-0.53, 0.53), float(np.exp(self.rng.uniform(np.log(near), np.log(far))))
            row, height, seen = self._foot(s, z)
            if seen and dry < height < top and self._slope(s, z) < steep and row < 1.02:
                places.append((s, row, z))
        return places

    def populate(self, woods: Array, step: NDArray[np.int32]) -> None:
        """Draw everything that stands on land."""
        plan, rng = self.plan, self.rng
        things: list[tuple[float, float, float, str]] = []
        groves = Lattice(rng)
        level = plan.forest + rng.uniform(-0.1, 0.15)
        species = plan.season.species[rng.integers(len(plan.season.species))]
        second = plan.season.species[rng.integers(len(plan.season.species))]
        if plan.view != "mesa":
            for s, row, z in self._spots(
                800, self.rng.choice((9.0, 14.0, 20.0, 28.0)), 140.0, steep=0.9, top=plan.tree_line
            ):
                x = z * s / FOCAL
                here = float(groves.fractal(np.array([x / 13]), np.array([z / 26]), 2)[0])
                if here + level > 0.12 + 0.12 * rng.random():
                    things.append((z, s, row, species if rng.random() < 0.75 else second))
            for s, row, z in self._spots(int(rng.integers(4, 26)), 6.5, 40.0):
                things.append((z, s, row, second if rng.random() < 0.6 else species))
        else:
            for s, row, z in self._spots(60, 5.0, 60.0):
                things.append((z, s, row, "bush"))
        village = rng.random() < {
            "fields": 0.75,
            "river": 0.6,
            "lake": 0.45,
            "coast": 0.4,
            "valley": 0.4,
        }.get(plan.view, 0.2)
        if village:
            things += self._village()
        things += self._landmark()
        if plan.view != "mesa" and rng.random() < 0.28:
            s = float(rng.choice((-1.0, 1.0)) * rng.uniform(0.3, 0.46))
            z = rng.uniform(4.5, 6.5)
            row, height, _ = self._foot(s, z)
            if height > 0.15:
                things.append((z, s, row, "framing"))
        wall = [(0.93, 0.89, 0.80), (0.86, 0.74, 0.58), (0.90, 0.90, 0.90), (0.74, 0.46, 0.36)]
        roofs = [(0.66, 0.28, 0.20), (0.40, 0.34, 0.34), (0.56, 0.38, 0.28), (0.34, 0.40, 0.48)]
        roof = roofs[rng.integers(len(roofs))]
        leaves = plan.season.leaves
        base = int(rng.integers(len(leaves)))
        for z, s, row, what in sorted(things, reverse=True):
            if what in ("house", "church"):
                self._set(s, row, z, rng.uniform(1.3, 1.7), Kind.BUILDING)
                colour = wall[rng.integers(len(wall))]
                self.sprites.house(colour, _jitter(rng, roof, 0.04), what == "church")
            elif what == "lighthouse":
                self._set(s, row, z, max(5.5, 0.16 * z), Kind.BUILDING)
                self.sprites.lighthouse(((0.78, 0.20, 0.16), (0.20, 0.26, 0.36))[rng.integers(2)])
            elif what == "windmill":
                self._set(s, row, z, max(4.0, 0.13 * z), Kind.BUILDING)
                self.sprites.windmill(wall[rng.integers(len(wall))])
            elif what == "castle":
                self._set(s, row, z, max(3.2, 0.07 * z), Kind.BUILDING)
                self.sprites.castle((0.62, 0.56, 0.48))
            elif what == "bridge":
                self._set(s, row, z, 0.16 * z, Kind.BUILDING)
                self.sprites.bridge((0.66, 0.60, 0.52), int(rng.integers(1, 4)))
            else:
                kind = species if what == "framing" else what
                tall = rng.uniform(3.6, 5.0) if what == "framing" else rng.uniform(1.5, 2.7)
                tall *= 0.28 if kind == "bush" else 1.25 if kind in ("poplar", "conifer") else 1.0
                self._set(s, row, z, tall, Kind.TREE)
                leaf = leaves[base if rng.random() < 0.6 else int(rng.integers(len(leaves)))]
                if kind == "conifer":
                    leaf = ((0.16, 0.30, 0.20), (0.20, 0.34, 0.22), (0.16, 0.28, 0.26))[rng.integers(3)]
                self.sprites.tree(kind, _jitter(rng, leaf, 0.03))

    def _village(self) -> list[tuple[float, float, float, str]]:
        """Choose a gentle place and gather houses around it, with a church now and then."""
        rng = self.rng
        spots = self._spots(60, 17.0, 55.0, steep=0.4)
        if not spots:
            return []
        s0, _, z0 = spots[int(rng.integers(len(spots)))]
        buildings: list[tuple[float, float, float, str]] = []
        spire = rng.random() < 0.5
        for i in range(int(rng.integers(3, 13)) * 2):
            z = z0 * float(np.exp(rng.normal(0, 0.16)))
            s = s0 + float(rng.normal(0, 2.2 * FOCAL / z0)) * 2.0
            row, height, seen = self._foot(s, z)
            apart = all(abs(s - other[1]) + abs(row - other[2]) > 1.3 / z for other in buildings)
            if seen and height > 0.3 and apart and self._slope(s, z) < 0.6 and abs(s) < 0.5:
                buildings.append((z, s, row, "church" if i == 0 and spire else "house"))
        return buildings

    def _landmark(self) -> list[tuple[float, float, float, str]]:
        """Choose at most one lighthouse, windmill, castle or bridge where the view allows it."""
        rng, plan = self.rng, self.plan
        what = {
            "coast": ("lighthouse", 0.55), "islands": ("lighthouse", 0.45), "fields": ("windmill", 0.35),
            "river": ("bridge", 0.6), "highland": ("castle", 0.5), "valley": ("castle", 0.3),
            "lake": ("castle", 0.15), "volcano": ("house", 0.4),
        }.get(plan.view)  # fmt: skip
        if what is None or rng.random() > what[1]:
            return []
        if what[0] == "bridge":
            z = float(rng.uniform(18, 38))
            middle = float(_curve(plan, np.array([z]))[0]) * FOCAL / z * (-1 if plan.mirror else 1)
            if abs(middle) > 0.4:
                return []
            return [(z, middle, plan.horizon + FOCAL * plan.eye / z, "bridge")]
        spots = self._spots(160, 18.0, 110.0, steep=0.8)
        if not spots:
            return []
        # Landmarks look best high up and off the middle.
        best = min(spots, key=lambda p: p[1] + 0.5 * abs(abs(p[0]) - 0.22))
        return [(best[2], best[0], best[1], what[0])]

    def boats(self, wet: NDArray[np.bool_]) -> None:
        """Draw boats on open water."""
        plan, rng = self.plan, self.rng
        if rng.random() > {"coast": 0.55, "islands": 0.65, "lake": 0.35, "river": 0.3}.get(plan.view, 0.25):
            return
        hulls = [(0.36, 0.24, 0.18), (0.70, 0.22, 0.18), (0.20, 0.30, 0.42), (0.90, 0.88, 0.84)]
        sails = [(0.97, 0.95, 0.90), (0.97, 0.95, 0.90), (0.82, 0.36, 0.22), (0.90, 0.74, 0.46)]
        fleet = []
        count = int(rng.choice((1, 1, 2, 2, 3, 5)))
        for _ in range(60):
            z = float(np.exp(rng.uniform(np.log(9), np.log(90))))
            s = rng.uniform(-0.45, 0.45)
            row = plan.horizon + FOCAL * plan.eye / z
            y, x, half = int(row * self.r), int((s + 0.5) * self.r), int(0.5 * FOCAL / z * self.r) + 2
            if y >= self.r - 4 or not wet[y, max(0, x - half) : x + half].all():
                continue
            fleet.append((z, s, row))
            if len(fleet) == count:
                break
        for z, s, row in sorted(fleet, reverse=True):
            self._set(s, row, z, rng.uniform(1.5, 2.6), Kind.BOAT)
            small = rng.random() < 0.25
            hull, sail = hulls[rng.integers(len(hulls))], sails[rng.integers(len(sails))]
            self.sprites.boat(hull, sail, 0 if small else int(rng.integers(1, 3)))
