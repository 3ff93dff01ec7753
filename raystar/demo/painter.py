"""Five ways to paint a landscape: photo, pointillism, woodcut, watercolour and stained glass.

Each rendering draws from the description that `raystar.demo.scene` makes of a landscape (colour, depth,
kinds, regions, direction of form) and not from another picture. Lengths are in pixels of a 256-pixel picture
and scale with the size. Marks are four pixels wide or more: finer ones would not survive a latent that is
eight times smaller than its picture.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from raystar.demo import DOMAINS
from raystar.demo.noise import Array, blur, luminance, mix, saturate, screen_noise, smoothstep
from raystar.demo.scene import Kind, Scene, make_scene

__all__ = ["SEED", "paint"]

SEED = 20240917
"""First number of every picture's random seed; changing it changes all pictures."""

_LAND_EDGES = 0.035


def paint(domain: str, index: int, size: int = 256) -> Image.Image:
    """Paint one picture.

    Args:
        domain: one of `raystar.demo.DOMAINS`; each paints its own landscapes.
        index: which picture, 0 or more.
        size: width and height in pixels, 32 or more. Other sizes show the same sort of
            landscape, not the same pixels.

    Returns:
        An RGB picture. The same arguments always give the same picture.

    Raises:
        ValueError: an unknown domain, a negative index, or a size below 32.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}: choose one of {', '.join(DOMAINS)}")
    if index < 0:
        raise ValueError(f"index must be 0 or more, not {index}")
    if size < 32:
        raise ValueError(f"size must be 32 or more, not {size}")
    rng = np.random.default_rng([SEED, DOMAINS.index(domain), index])
    scene = make_scene(rng, size)
    rgb = RENDERINGS[domain](scene, rng)
    return Image.fromarray((np.clip(rgb, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8))


# ---- shared -----------------------------------------------------------------------------------------------


def _border(label: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Mark the pixels whose right or lower neighbour belongs to another region."""
    edge = np.zeros(label.shape, bool)
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    edge[:-1] |= label[:-1] != label[1:]
    return edge


def _dense(label: NDArray[np.int32]) -> tuple[NDArray[np.int64], int]:
    """Number the regions 0, 1, 2, ... without gaps; return the numbers and how many there are."""
    values, dense = np.unique(label, return_inverse=True)
    return dense.reshape(label.shape).astype(np.int64), len(values)


def _region_means(label: NDArray[np.int64], count: int, values: Array) -> Array:
    """Average values [S, S] or [S, S, C] over each region, giving [count] or [count, C]."""
    flat = label.ravel()
    area = np.maximum(np.bincount(flat, minlength=count), 1)
    if values.ndim == 2:
        return (np.bincount(flat, values.ravel(), count) / area).astype(np.float32)
    sums = [np.bincount(flat, values[..., c].ravel(), count) for c in range(values.shape[2])]
    return (np.stack(sums, axis=-1) / area[:, None]).astype(np.float32)


def _simplify(label: NDArray[np.int32], smallest: int, reach: int) -> NDArray[np.int64]:
    """Give the pixels of regions smaller than `smallest` pixels to larger neighbours."""
    dense, count = _dense(label)
    area = np.bincount(dense.ravel(), minlength=count)
    kept = np.flatnonzero(area >= smallest)
    kept = kept[np.argsort(-area[kept])][:250]
    code = np.zeros(count, np.uint8)
    code[kept] = np.arange(1, len(kept) + 1)
    coded = code[dense]
    for _ in range(12):
        hole = coded == 0
        if not hole.any():
            break
        grown = np.asarray(Image.fromarray(coded).filter(ImageFilter.MaxFilter(3)))
        coded = np.where(hole, grown, coded)
    smooth = Image.fromarray(coded).filter(ImageFilter.ModeFilter(2 * reach + 1))
    return np.asarray(smooth, np.int64)


def _streaks(rng: np.random.Generator, flow: Array, width: float, length: float) -> Array:
    """Smear noise along the flow into streaks `width` apart; return their rank, 0 to 1, evenly spread."""
    size = flow.shape[0]
    across = size / width / 2
    noise = screen_noise(rng, size, (across, across), 1)
    dx, dy = np.cos(flow), np.sin(flow)
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    total = noise.copy()
    stride = max(1.0, size / 170)
    for sign in (-stride, stride):
        x, y, px, py = columns, rows, sign * dx, sign * dy
        for _ in range(max(1, round(length / stride / 2))):
            x = np.clip(x + px, 0, size - 1)
            y = np.clip(y + py, 0, size - 1)
            xi, yi = x.astype(np.intp), y.astype(np.intp)
            total += noise[yi, xi]
            # Flow has no sign: follow the branch that continues the way so far.
            turn = np.where(px * dx[yi, xi] + py * dy[yi, xi] < 0, -stride, stride)
            px, py = turn * dx[yi, xi], turn * dy[yi, xi]
    total /= blur(total * total, size / 10) ** 0.5 + 1e-6
    order = np.argsort(total.ravel(), kind="stable")
    rank = np.empty(size * size, np.float32)
    rank[order] = np.linspace(0.0, 1.0, size * size, dtype=np.float32)
    return rank.reshape(size, size)


# ---- photo ------------------------------------------------------------------------------------------------


def _photo(scene: Scene, rng: np.random.Generator) -> Array:
    """Render through a lens: soft light, bloom, a film's curve, vignette and grain."""
    size = scene.rgb.shape[0]
    k = size / 256
    rgb = scene.rgb
    land = scene.kind >= Kind.ROCK
    texture = 0.6 * screen_noise(rng, size, (90, 90), 2) + 0.6 * screen_noise(rng, size, (30, 36), 2)
    rough = np.where(land, 0.075 * (1.0 - 0.75 * scene.depth), 0.0)
    rough = np.where(scene.kind == Kind.TREE, 0.17 * (1 - 0.6 * scene.depth), rough)
    rough = np.where((scene.kind == Kind.BUILDING) | (scene.kind == Kind.BOAT), 0.025, rough)
    # Warp fine edges a little: drawn shapes are too clean for a photograph.
    rgb = _warp(rgb, rng, 0.9 * k, np.where(scene.kind == Kind.TREE, 1.6, 0.3).astype(np.float32))
    rgb = rgb * (1 + (rough * texture))[..., None]
    rgb = mix(rgb, blur(rgb, 0.8 * k), 0.6 + 0.4 * (scene.depth > 0.7))
    halo = blur(np.clip(rgb - 0.72, 0, 1), 7 * k)
    # The meter half corrects dark and bright scenes towards a middle grey.
    exposure = min(1.9, max(0.85, (0.43 / max(0.05, float(luminance(rgb).mean()))) ** 0.55))
    rgb = np.clip(saturate(rgb * exposure + 0.3 * halo, 0.82), 0, 1.1)
    # A film's S-curve: deep shadows, a shoulder instead of burnt-out lights.
    rgb = np.clip(rgb * 1.02 - 0.015, 0, 1.1)
    rgb = 0.35 * rgb + 0.65 * rgb * rgb * (3.0 - 2.0 * np.minimum(rgb, 1.0))
    rgb = 0.97 * rgb
    v = np.linspace(-1, 1, size, dtype=np.float32)
    fall = v[:, None] ** 2 + v[None] ** 2
    rgb = rgb * (1 - 0.16 * fall**1.3)[..., None]
    grain = rng.standard_normal((size, size, 1)).astype(np.float32) * 0.014
    grain = grain + rng.standard_normal((size, size, 3)).astype(np.float32) * 0.006
    return np.asarray(rgb + grain, np.float32)


def _warp(rgb: Array, rng: np.random.Generator, amount: float, where: Array, cells: int = 60) -> Array:
    """Displace an image by fine noise, `amount` pixels times `where` (bilinear between pixels)."""
    size = rgb.shape[0]
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    x = np.clip(columns + amount * where * screen_noise(rng, size, (cells, cells), 2), 0, size - 1.01)
    y = np.clip(rows + amount * where * screen_noise(rng, size, (cells, cells), 2), 0, size - 1.01)
    x0, y0 = x.astype(np.intp), y.astype(np.intp)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    top = rgb[y0, x0] * (1 - fx) + rgb[y0, x0 + 1] * fx
    bottom = rgb[y0 + 1, x0] * (1 - fx) + rgb[y0 + 1, x0 + 1] * fx
    return np.asarray(top * (1 - fy) + bottom * fy, np.float32)


# ---- pointillism ------------------------------------------------------------------------------------------


def _pointillism(scene: Scene, rng: np.random.Generator) -> Array:
    """Lay dabs of divided colour, large to small, over a toned canvas."""
    size = scene.rgb.shape[0]
    k = 2 * size / 256  # the dabs are drawn at twice the size and reduced
    tone = luminance(scene.rgb)
    # Local contrast keeps forms readable through the dabs; the painters' studio light lifts dark scenes.
    lift = np.clip(0.46 - float(tone.mean()), 0.0, 0.2)
    rgb = scene.rgb + (0.55 * (tone - blur(tone, 12 * size / 256)) + lift)[..., None]
    rgb = np.clip(saturate(rgb, 1.35) * 1.04 + 0.03, 0, 1)
    smooth = blur(rgb, 1.2 * k / 2)
    canvas = np.array((0.87, 0.79, 0.62), np.float32)
    ground = mix(np.broadcast_to(canvas, rgb.shape), blur(rgb, 5 * k / 2), 0.45)
    picture = Image.fromarray((np.clip(ground, 0, 1) * 255).astype(np.uint8)).resize((2 * size, 2 * size))
    draw = ImageDraw.Draw(picture)
    detail = luminance(np.abs(rgb - blur(rgb, 3 * k / 2)))
    busy = smoothstep(0.015, 0.07, blur(detail, 2 * k / 2))
    circle = np.linspace(0, 2 * np.pi, 10, endpoint=False)
    for radius, spacing, finest in ((4.6, 6.4, False), (3.4, 4.9, False), (2.4, 3.6, True)):
        side = int(256 / spacing)
        grid = (np.arange(side) + 0.5) / side
        gy, gx = np.meshgrid(grid, grid, indexing="ij")
        x = (gx.ravel() + rng.uniform(-0.5, 0.5, side * side) / side).clip(0, 0.999)
        y = (gy.ravel() + rng.uniform(-0.5, 0.5, side * side) / side).clip(0, 0.999)
        chance = rng.random(side * side)
        xi, yi = (x * size).astype(np.intp), (y * size).astype(np.intp)
        if finest:
            keep = chance < 0.15 + 0.85 * busy[yi, xi]
            x, y, xi, yi = x[keep], y[keep], xi[keep], yi[keep]
        order = rng.permutation(len(x))
        x, y, xi, yi = x[order], y[order], xi[order], yi[order]
        colour = _divide(smooth[yi, xi], scene.kind[yi, xi], rng)
        angle = scene.flow[yi, xi] + rng.normal(0, 0.3, len(x))
        grow = rng.uniform(0.8, 1.2, len(x)) * radius * k
        long, short = grow * 1.3, grow * 0.82
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        ex, ey = long[:, None] * np.cos(circle), short[:, None] * np.sin(circle)
        outline = np.stack(
            [x[:, None] * 2 * size + ex * cos - ey * sin, y[:, None] * 2 * size + ex * sin + ey * cos], -1
        )
        inks = (np.clip(colour, 0, 1) * 255).astype(np.uint8)
        for points, ink in zip(outline.reshape(len(x), -1).tolist(), inks.tolist(), strict=True):
            draw.polygon(points, fill=tuple(ink))
    out = np.asarray(picture.resize((size, size), Image.Resampling.BOX), np.float32) / np.float32(255)
    return out


def _divide(colour: Array, kind: NDArray[np.uint8], rng: np.random.Generator) -> Array:
    """Split colours [N, 3] into pure neighbours that mix back to them in the eye.

    Light parts get warm dabs, dark parts blue and violet ones, and some dabs take the complement.
    """
    count = len(colour)
    light = luminance(colour)
    chance = rng.random(count)
    pure = saturate(colour, 1.25)
    warm = np.array([[1.0, 0.66, 0.22], [1.0, 0.82, 0.40], [0.98, 0.56, 0.40]], np.float32)[rng.integers(0, 3, count)]
    cool = np.array([[0.20, 0.30, 0.78], [0.46, 0.28, 0.66], [0.12, 0.50, 0.66]], np.float32)[rng.integers(0, 3, count)]
    opposite = np.clip(2 * light[:, None] - pure, 0, 1)
    out = pure + rng.normal(0, 0.045, (count, 3)).astype(np.float32)
    sunny = chance < 0.10 + 0.16 * light
    out = np.where(sunny[:, None], 0.6 * pure + 0.4 * (warm * (0.45 + 0.75 * light[:, None])), out)
    shady = (chance > 0.90 - 0.28 * (1 - light)) & ~sunny
    out = np.where(shady[:, None], 0.6 * pure + 0.4 * (cool * (0.55 + 0.7 * light[:, None])), out)
    contrary = (rng.random(count) < 0.06) & ~sunny & ~shady
    out = np.where(contrary[:, None], 0.6 * pure + 0.4 * opposite, out)
    out = out * rng.uniform(0.92, 1.09, (count, 1)).astype(np.float32)
    return np.asarray(np.clip(out, 0.03, 1), np.float32)


# ---- woodcut ----------------------------------------------------------------------------------------------

_PAPER = np.array((0.95, 0.90, 0.78), np.float32)
_BLACK = np.array((0.09, 0.08, 0.09), np.float32)
_INKS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "day": (
        (0.16, 0.33, 0.54),
        (0.55, 0.72, 0.76),
        (0.44, 0.54, 0.32),
        (0.85, 0.68, 0.40),
        (0.76, 0.32, 0.22),
    ),
    "warm": (
        (0.20, 0.30, 0.46),
        (0.86, 0.52, 0.30),
        (0.46, 0.48, 0.30),
        (0.92, 0.74, 0.44),
        (0.70, 0.26, 0.20),
    ),
    "grey": (
        (0.30, 0.38, 0.46),
        (0.66, 0.72, 0.70),
        (0.44, 0.50, 0.38),
        (0.78, 0.68, 0.50),
        (0.62, 0.32, 0.26),
    ),
    "dark": (
        (0.11, 0.17, 0.33),
        (0.30, 0.42, 0.54),
        (0.22, 0.32, 0.30),
        (0.66, 0.58, 0.42),
        (0.62, 0.34, 0.24),
    ),
}
_INK_SET = {"dawn": "warm", "golden": "warm", "dusk": "warm", "overcast": "grey", "storm": "grey",
            "twilight": "dark", "night": "dark"}  # fmt: skip


def _woodcut(scene: Scene, rng: np.random.Generator) -> Array:
    """Print flat inks on paper, one block each, and a black block of contours and hatching over them."""
    size = scene.rgb.shape[0]
    k = size / 256
    name = _INK_SET.get(scene.time, "day")
    inks = np.array((*_INKS[name], tuple(_PAPER)), np.float32)
    rgb = blur(scene.rgb, 1.0 * k)
    night = name == "dark"
    low, high = np.percentile(luminance(rgb), (3, 97))
    tone = np.clip((luminance(rgb) - low) / (high - low + 1e-3), 0, 1)
    spread_rgb = saturate(np.clip((rgb - low) / (high - low + 1e-3), 0, 1), 1.3)

    regions = _simplify(scene.label, round(70 * k * k), 2)
    count = int(regions.max()) + 1
    mean = _region_means(regions, count, spread_rgb)
    kinds = np.rint(_region_means(regions, count, scene.kind.astype(np.float32))).astype(int)
    far = ((mean[:, None] - inks[None]) ** 2 * np.array((0.8, 1.2, 0.8), np.float32)).sum(-1)
    # Greenery never turns to vermilion by accident, and snow is bare paper.
    warm_leaf = mean[:, 0] > mean[:, 1] * 1.12
    for kind in (Kind.GRASS, Kind.FOREST, Kind.TREE, Kind.FIELD):
        far[(kinds == kind) & ~warm_leaf, 4] += 1.0
        far[kinds == kind, 0] += 0.12
    for kind in (Kind.GRASS, Kind.FIELD, Kind.SAND):
        far[kinds == kind, 4] += 0.22
    far[kinds == Kind.SNOW, :5] += 0.35
    flat = inks[far.argmin(1)][regions]

    v = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]
    sky = scene.kind <= Kind.SUN
    bottom = max(float(np.where(sky, v, 0).max()), 0.05)
    # Bokashi: the printer wipes the ink from the block in a gradient.
    wipe = smoothstep(0.42, 0.0, v / bottom + 0.02 * screen_noise(rng, size, (3, 8), 2))
    glow = smoothstep(0.62, 1.0, v / bottom)
    heaven = mix(np.broadcast_to(_PAPER if not night else inks[1], rgb.shape), inks[0], wipe)
    heaven = mix(heaven, inks[1], glow * (0.75 if not night else 0.0))
    flat = np.where((scene.kind == Kind.SKY)[..., None], heaven, flat)
    cloud_tone = mix(np.broadcast_to(_PAPER, rgb.shape), inks[1], smoothstep(0.62, 0.3, tone) * 0.9)
    flat = np.where((scene.kind == Kind.CLOUD)[..., None], cloud_tone, flat)
    sun = inks[4] if scene.time in ("dawn", "dusk", "golden") else np.array((0.97, 0.93, 0.76), np.float32)
    flat = np.where((scene.kind == Kind.SUN)[..., None], sun, flat)
    water = scene.kind == Kind.WATER
    if water.any():
        deep = smoothstep(0.75, 0.2, tone)
        sea = mix(
            np.broadcast_to(inks[1] * 0.5 + _PAPER * 0.5, rgb.shape),
            inks[0],
            np.clip(0.15 + 0.85 * deep, 0, 1),
        )
        flat = np.where(water[..., None], sea, flat)

    streak = _streaks(rng, scene.flow, 2.9 * k, 60 * k)
    local = np.clip(0.55 * tone + 0.45 * np.clip(0.5 + 2.2 * (tone - blur(tone, 14 * k)), 0, 1), 0, 1)
    amount = np.clip(0.60 - 0.95 * local, 0.0, 0.5)
    leafy = (scene.kind == Kind.TREE) | (scene.kind == Kind.FOREST)
    amount = np.where(leafy, np.clip(0.50 - 0.8 * local, 0, 0.42), amount)
    amount = np.where(scene.kind == Kind.SKY, 0.16 * wipe * (local < 0.6), amount)
    amount = np.where(scene.kind == Kind.CLOUD, np.clip(0.36 - 0.75 * local, 0, 0.4), amount)
    amount = np.where(water, np.clip(0.55 - 0.85 * local, 0.05, 0.5), amount)
    amount = np.where(scene.kind == Kind.SNOW, amount * 0.7, amount)
    amount = np.where((scene.kind == Kind.SUN), 0, amount)
    amount = amount * (1 - 0.5 * smoothstep(0.55, 0.9, scene.depth) * (scene.kind > Kind.WATER))
    hatch = smoothstep(-0.09, 0.09, blur(amount, 1.0 * k) - streak)
    hatch = hatch * smoothstep(0.03, 0.08, amount)

    # Contours: where one thing stands before another, thick in front and thin far away.
    step = np.abs(scene.depth - np.roll(scene.depth, -1, 0)) + np.abs(scene.depth - np.roll(scene.depth, -1, 1))
    step[-1] = step[:, -1] = 0
    groups = np.where(regions > 0, kinds[regions], 0)
    things = np.where(scene.label >= 1000, regions, 0)
    line = _border(groups.astype(np.int32)) | _border(things.astype(np.int32)) | (step > _LAND_EDGES)
    wide = 1.0 + 0.6 * (1 - scene.depth)
    press = 0.34 + 0.05 * screen_noise(rng, size, (20, 20), 2)
    contour = smoothstep(-0.08, 0.08, blur(line.astype(np.float32), 1.15 * k) * wide - press * 0.75)
    black = np.maximum(hatch, contour)

    grain = screen_noise(rng, size, (5, 70), 2)
    worn = smoothstep(1.1, 2.2, grain) * 0.22 + 0.035 * screen_noise(rng, size, (100, 100), 1)
    shifted = np.roll(flat, (round(k), -round(k)), (0, 1))  # the colour blocks never meet the key block quite
    out = mix(shifted, np.broadcast_to(_PAPER, rgb.shape), np.clip(worn + 0.04, 0, 1))
    speck = np.clip(0.97 - 0.25 * smoothstep(1.7, 2.6, screen_noise(rng, size, (110, 110), 1)), 0, 1)
    out = mix(out, np.broadcast_to(_BLACK, rgb.shape), black * speck)
    fibre = 1 + 0.012 * screen_noise(rng, size, (60, 60), 2)
    return np.asarray(out * fibre[..., None], np.float32)


# ---- watercolour ------------------------------------------------------------------------------------------


def _watercolour(scene: Scene, rng: np.random.Generator) -> Array:
    """Lay transparent washes on white paper; pigment gathers at their edges and bleeds where it is wet."""
    size = scene.rgb.shape[0]
    k = size / 256
    rgb = scene.rgb
    light = luminance(rgb)
    # Washes are light: lift dark scenes, keep their hue.
    gain = min(2.2, max(1.0, 0.62 / max(0.1, float(light.mean()))))
    rgb = 1 - (1 - np.clip(rgb, 0, 0.98)) ** gain
    rgb = np.clip(saturate(rgb, 1.38), 0.02, 1)
    wobble = np.ones((size, size), np.float32)
    rgb = _warp(rgb, rng, 1.3 * k, wobble, 24)
    wet = np.clip(2.2 * scene.depth - 1.1, 0, 1) * (scene.kind <= Kind.WATER)
    soft = mix(blur(rgb, 1.6 * k), blur(rgb, 6 * k), np.clip(wet + 0.15, 0, 1))
    tone = luminance(soft)

    absorb = -np.log(np.clip(soft, 0.05, 0.985))
    density = 0.50 * -np.log(np.clip(mix(soft, blur(soft, 10 * k), 0.6), 0.05, 0.985))
    flowing = 0.10 * screen_noise(rng, size, (4, 4), 4) + 0.05 * screen_noise(rng, size, (14, 14), 2)
    detail = luminance(mix(blur(rgb, 1.4 * k), blur(rgb, 3.0 * k), np.clip(wet + 0.2, 0, 1)))
    # Four glazes, each over what is darker than the last: a dried edge shows where each one ends.
    pooled = np.zeros((size, size), np.float32)
    cover = np.zeros((size, size), np.float32)
    levels = np.quantile(detail, (0.84, 0.60, 0.34, 0.13))
    for level, strength in zip(levels, (0.14, 0.16, 0.20, 0.26), strict=True):
        wash = smoothstep(-0.03, 0.03, level - detail + 0.05 * flowing)
        wash = smoothstep(0.38, 0.62, blur(wash, 1.5 * k))
        cover += strength * wash
        pooled += strength * np.clip(wash - blur(wash, 3.0 * k), 0, 1)
    density = density + absorb * (0.85 * cover + 1.7 * pooled)[..., None]
    # Each thing's own edge is a dried edge too, and slivers of dry paper part neighbouring washes.
    regions = _simplify(scene.label, round(60 * k * k), 2)
    border = _border(regions.astype(np.int32)).astype(np.float32)
    border = _warp(border[..., None].repeat(3, -1), rng, 1.3 * k, wobble, 24)[..., 0]
    near = blur(border, 2.2 * k) * (scene.depth < 0.98)
    density = density * (1 + 0.7 * near)[..., None]
    gaps = smoothstep(0.22, 0.4, blur(border, 1.2 * k)) * smoothstep(0.7, 1.2, screen_noise(rng, size, (9, 9), 2)) * 0.8
    # Blooms: a drop on a drying wash pushes its pigment outwards into a crinkled rim.
    bloom = screen_noise(rng, size, (3.5, 3.5), 5, 0.55)
    rim = np.exp(-(((bloom - 1.05) / 0.09) ** 2)) * 0.30 - 0.22 * smoothstep(1.05, 1.5, bloom)
    tooth = screen_noise(rng, size, (85, 85), 1)
    granules = 0.10 * tooth * smoothstep(0.85, 0.3, tone) + 0.55 * flowing + rim
    density = density * np.clip(1 + granules, 0.4, 1.7)[..., None]
    density = density * (1 - 0.85 * gaps)[..., None]
    # A fast, dry brush drags over the water and leaves the paper sparkling in level strokes.
    dry = smoothstep(1.5, 2.0, 0.25 * tooth + screen_noise(rng, size, (7, 40), 2)) * (scene.kind == Kind.WATER)
    density = density * (1 - 0.8 * dry)[..., None]

    v = np.abs(np.linspace(-1, 1, size, dtype=np.float32))
    ragged = 0.018 * screen_noise(rng, size, (5, 5), 3) + 0.006 * screen_noise(rng, size, (50, 50), 1)
    inside = np.minimum(1 - v[:, None], 1 - v[None]) - 0.085 + ragged
    sheet = smoothstep(-0.008, 0.012, inside)
    rim_edge = np.clip(sheet - smoothstep(0.0, 0.06, inside), 0, 1)
    density = density * (sheet * (1 + 0.45 * rim_edge))[..., None]
    paper = np.array((0.985, 0.975, 0.945), np.float32) * (1 + 0.016 * tooth)[..., None]
    return np.asarray(paper * np.exp(-density), np.float32)


# ---- stained glass ----------------------------------------------------------------------------------------


def _stained_glass(scene: Scene, rng: np.random.Generator) -> Array:
    """Cut the landscape into panes of coloured glass, one colour each, and set them in lead."""
    size = scene.rgb.shape[0]
    k = size / 256
    regions = _simplify(_glass_regions(scene), round(240 * k * k), max(1, round(4 * k)))
    cells = _cut_panes(scene, regions, rng, k)
    dense, count = _dense(cells.astype(np.int32))
    colour = _glass_colour(_region_means(dense, count, scene.rgb), scene, rng)
    kinds = np.rint(_region_means(dense, count, scene.kind.astype(np.float32))).astype(int)
    colour = np.where((kinds == Kind.SUN)[:, None], np.array((1.0, 0.93, 0.62), np.float32), colour)
    pane = colour[dense]

    edge = _border(dense.astype(np.int32))
    edge[0] = edge[-1] = True
    edge[:, 0] = edge[:, -1] = True
    line = edge.astype(np.float32)
    lead = smoothstep(0.20, 0.30, blur(line, 1.5 * k) * 1.15)
    inner = np.clip(1 - blur(line, 5.5 * k) * 3.4, 0, 1)

    # Blown glass: streaks that run a different way in each pane, waves of thickness, and light from behind.
    turn = rng.uniform(0, np.pi, count)[dense]
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    phase = (columns * np.cos(turn) + rows * np.sin(turn)) * rng.uniform(9, 20, count)[dense]
    wave = np.sin(2 * np.pi * phase + 1.3 * screen_noise(rng, size, (6, 6), 3) + turn * 7)
    thick = screen_noise(rng, size, (9, 9), 3)
    glow = 0.80 + 0.30 * inner + 0.05 * wave + 0.06 * thick
    pane = pane * glow[..., None]
    pane = pane + (0.10 * inner * np.clip(0.4 + 0.5 * thick, 0, 1))[..., None] * colour[dense] ** 0.5
    bubble = smoothstep(2.2, 2.8, screen_noise(rng, size, (80, 80), 1))
    pane = pane + 0.25 * bubble[..., None]
    came = (
        np.array((0.055, 0.055, 0.065), np.float32) * (1 + 0.5 * smoothstep(0.45, 0.7, blur(line, 1.0 * k)))[..., None]
    )
    out = mix(pane, came, lead)
    halo = blur(np.clip(out - 0.55, 0, 1), 5 * k)
    return np.asarray(out + 0.28 * halo, np.float32)


def _glass_regions(scene: Scene) -> NDArray[np.int32]:
    """Number the regions that panes must not cross: kinds, silhouettes, and light or dark sides."""
    size = scene.rgb.shape[0]
    k = size / 256
    light = luminance(blur(scene.rgb, 5 * k))
    tone = (light > blur(light, 30 * k)).astype(np.int32)
    tier = np.digitize(scene.depth, (0.25, 0.45, 0.6, 0.72, 0.85)).astype(np.int32)
    kind = scene.kind.astype(np.int32)
    grouped = np.select([kind == Kind.TREE, kind == Kind.FOREST], [np.full_like(kind, Kind.FOREST), kind], default=kind)
    base = grouped * 64 + np.where(kind > Kind.WATER, tier * 2 + tone, 0)
    return np.where((scene.label >= 1000) & (kind != Kind.TREE), 2000 + scene.label, base).astype(np.int32)


def _cut_panes(scene: Scene, regions: NDArray[np.int64], rng: np.random.Generator, k: float) -> NDArray[np.int64]:
    """Divide the regions into panes: Voronoi cells of a jittered grid, stretched along sky and water."""
    size = regions.shape[0]
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    bend = 0.012
    x = columns + bend * screen_noise(rng, size, (4, 4), 2)
    y = rows + bend * screen_noise(rng, size, (4, 4), 2)
    best = np.full((size, size), np.inf, np.float32)
    owner = np.zeros((size, size), np.int64)
    flat = (scene.kind <= Kind.WATER) & (scene.kind != Kind.SUN)
    across, down = np.where(flat, 0.62, 1.1), np.where(flat, 1.25, 0.95)
    side = 9
    gx = (np.arange(side) + 0.5) / side
    seeds = [
        (float(a + rng.uniform(-0.5, 0.5) / side), float(b + rng.uniform(-0.5, 0.5) / side)) for b in gx for a in gx
    ]
    for i, (sx, sy) in enumerate(seeds):
        # Only the seed's neighbourhood can belong to it.
        x0, x1 = int(max(0, (sx - 0.32) * size)), int(min(size, (sx + 0.32) * size))
        y0, y1 = int(max(0, (sy - 0.25) * size)), int(min(size, (sy + 0.25) * size))
        part = (slice(y0, y1), slice(x0, x1))
        away = ((x[part] - sx) * across[part]) ** 2 + ((y[part] - sy) * down[part]) ** 2
        closer = away < best[part]
        best[part] = np.where(closer, away, best[part])
        owner[part] = np.where(closer, i, owner[part])
    cells = (regions * len(seeds) + owner).astype(np.int32)
    return _merge_slivers(cells, round(75 * k * k))


def _merge_slivers(cells: NDArray[np.int32], smallest: int) -> NDArray[np.int64]:
    """Give panes too small for the lead to hold to a neighbour that they touch."""
    dense, count = _dense(cells)
    area = np.bincount(dense.ravel(), minlength=count)
    code = np.where(area >= smallest, np.arange(1, count + 1), 0).astype(np.int32)
    coded = code[dense]
    for _ in range(24):
        hole = coded == 0
        if not hole.any():
            break
        grown = coded.copy()
        for axis, by in ((0, 1), (0, -1), (1, 1), (1, -1)):
            neighbour = np.roll(coded, by, axis)
            grown = np.where((grown == 0) & hole, neighbour, grown)
        coded = grown
    return coded.astype(np.int64)


def _glass_colour(mean: Array, scene: Scene, rng: np.random.Generator) -> Array:
    """Turn mean colours [N, 3] into those of pot-metal glass: strong hues, every pane a little different."""
    light = luminance(mean)
    low, high = np.percentile(light, (4, 96))
    tone = np.clip((light - low) / (high - low + 1e-3), 0, 1)
    chroma = mean - light[:, None]
    strength = np.abs(chroma).max(axis=1, keepdims=True) + 1e-4
    # Push weak chroma up so that even greys become a tinted glass, without inventing a hue from nothing.
    pushed = chroma / strength * np.minimum(0.13 + 1.7 * strength, 0.44)
    target = 0.20 + 0.52 * tone + rng.normal(0, 0.04, len(mean)).astype(np.float32)
    out = target[:, None] + pushed
    # Neighbouring panes come from different sheets: some warmer and yellower, some cooler and bluer.
    sheet = rng.normal(0, 1, (len(mean), 1)).astype(np.float32)
    out = out + 0.06 * sheet * np.array((1.0, 0.35, -0.9), np.float32)
    return np.asarray(np.clip(out, 0.03, 1.0), np.float32)


RENDERINGS = {
    "photo": _photo,
    "pointillism": _pointillism,
    "woodcut": _woodcut,
    "watercolour": _watercolour,
    "stained_glass": _stained_glass,
}
