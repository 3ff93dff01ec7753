"""Fractal noise and small image helpers shared by the scene generator and the five renderings."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.floating[Any]]


def smoothstep(low: float, high: float, value: Array) -> Array:
    """Rise smoothly from 0 where `value` <= low to 1 where `value` >= high."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t), np.float32)


def mix(first: Array, second: Array, weight: Array | float) -> Array:
    """Blend two colour images [..., 3] by a weight [...]: 0 gives the first, 1 the second."""
    w = np.asarray(weight, np.float32)[..., None]
    return np.asarray(first + (second - first) * w, np.float32)


def luminance(rgb: Array) -> Array:
    """Return the perceived brightness [...] of RGB values [..., 3] in 0..1."""
    return np.asarray(rgb @ np.array([0.299, 0.587, 0.114], np.float32), np.float32)


def saturate(rgb: Array, amount: float) -> Array:
    """Scale the distance of each colour from its grey: 0 is grey, 1 changes nothing."""
    grey = luminance(rgb)[..., None]
    return np.asarray(grey + (rgb - grey) * amount, np.float32)


def resize(field: Array, width: int, height: int) -> Array:
    """Resample a field [H, W] with an antialiased bicubic filter."""
    image = Image.fromarray(np.ascontiguousarray(field, np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32)


def blur(field: Array, radius: float) -> Array:
    """Gaussian blur of a field [H, W] or an image [H, W, C] by a standard deviation in pixels."""
    if field.ndim == 3:
        return np.stack([blur(field[..., c], radius) for c in range(field.shape[2])], axis=-1)
    if radius < 0.2:
        return field
    if radius > 4.0:
        # A wide blur is the same on a smaller picture, and many times cheaper there.
        height, width = field.shape
        shrink = radius / 2.0
        small = resize(field, max(4, round(width / shrink)), max(4, round(height / shrink)))
        return resize(blur(small, 2.0), width, height)
    reach = int(np.ceil(2.5 * radius))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / radius) ** 2).astype(np.float32)
    taps /= taps.sum()
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (reach, reach)
        padded = np.pad(field, pad, mode="edge")
        n = field.shape[axis]
        total = np.zeros_like(field, np.float32)
        for k, tap in enumerate(taps):
            total += tap * (padded[k : k + n] if axis == 0 else padded[:, k : k + n])
        field = total
    return field


def screen_noise(
    rng: np.random.Generator, size: int, cells: tuple[float, float], octaves: int = 4, gain: float = 0.5
) -> Array:
    """Fractal noise [size, size], mean 0 and deviation 1, with `cells` (across, down) in its first octave.

    The random numbers drawn do not depend on `size`: a larger picture has the same forms.
    """
    total = np.zeros((size, size), np.float32)
    weight = 1.0
    across, down = cells
    for _ in range(octaves):
        grid = rng.standard_normal((max(1, round(down)) + 3, max(1, round(across)) + 3)).astype(np.float32)
        # A margin of a cell and a half keeps the resampler's border effects out of the picture.
        box = (1.5, 1.5, grid.shape[1] - 1.5, grid.shape[0] - 1.5)
        layer = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC, box=box)
        total += weight * np.asarray(layer, np.float32)
        weight *= gain
        across *= 2.0
        down *= 2.0
    return np.asarray((total - total.mean()) / (total.std() + 1e-6), np.float32)


class Lattice:
    """Value noise that can be evaluated at any point of a plane (period 256 in both directions)."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._table = rng.uniform(-1.0, 1.0, 256 * 256).astype(np.float32)

    def at(self, x: Array, y: Array) -> Array:
        """Return smooth noise in -1..1 at the points (x, y), given in cells."""
        x0 = np.floor(x)
        y0 = np.floor(y)
        fx = (x - x0).astype(np.float32)
        fy = (y - y0).astype(np.float32)
        fx = fx * fx * (3.0 - 2.0 * fx)
        fy = fy * fy * (3.0 - 2.0 * fy)
        left = x0.astype(np.int32) & 255
        right = (left + 1) & 255
        row = y0.astype(np.int32) & 255
        top = row << 8
        bottom = ((row + 1) & 255) << 8
        table = self._table
        a = table[top | left]
        b = table[bottom | left]
        a = a + (table[top | right] - a) * fx
        b = b + (table[bottom | right] - b) * fx
        return np.asarray(a + (b - a) * fy, np.float32)

    def fractal(self, x: Array, y: Array, octaves: int, footprint: Array | None = None, ridged: bool = False) -> Array:
        """Sum octaves of noise, roughly -1..1 (ridged: 0..1 with sharp crests).

        `footprint` is the distance between neighbouring samples, in cells of the first octave: octaves too
        fine for it fade out, which keeps distant ground from shimmering.
        """
        total = np.zeros(np.broadcast(x, y).shape, np.float32)
        weight, norm, frequency = 1.0, 0.0, 1.0
        crest: Array | float = 1.0
        for _ in range(octaves):
            value = self.at(x, y)
            if ridged:
                value = (1.0 - np.abs(value)) ** 2
                value = value * crest
                crest = np.clip(value * 1.6, 0.0, 1.0)
            if footprint is not None:
                value = value * np.clip(1.6 - 2.0 * frequency * footprint, 0.0, 1.0)
            total += weight * value
            norm += weight
            weight *= 0.5
            frequency *= 2.0
            # Turning each octave hides the lattice directions.
            x, y = 1.6 * x - 1.2 * y + 17.3, 1.2 * x + 1.6 * y + 9.1
        return total / norm if ridged else total / (0.62 * norm)
