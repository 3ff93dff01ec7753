"""What the ruler sees of a picture: colours, contrasts, textures and strokes as numbers, and its layout as a sketch.

Plain statistics with no learnt weights, so there is nothing to download and nothing that a generator could have been
trained against: the discriminator works on latents, these look at what a decoder makes of them.

Shapes: B pictures, h x w pixels (128 for a 32x32 latent), d statistics, G cells along a side of a sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Luminance and two colour differences (ITU-R BT.601): the directions in which eyes and codecs tell colours apart.
_OPPONENT = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))
_MOST_LEVELS = 5
_CELLS = 16
"""Along a side of a sketch: eight pixels of 128, coarser than a brush stroke or the lead between two panes."""
_WINDOW = 8
"""Cells along a side of the windows in which layouts are compared: a quarter of the picture each."""
_PATCHES = 4
"""Along a side, of a picture whose tones are compared with those of the other pictures."""
_TONE, _LAYOUT = 0.75, 0.25
"""Shares of the two questions of `content_lost`: so weighted they came closest to a perceptual distance (LOG.md)."""


def opponent(rgb: Tensor) -> Tensor:
    """[B,3,h,w] in [0,1] -> luminance and two colour differences [B,3,h,w]."""
    return torch.einsum("bchw,dc->bdhw", rgb, torch.tensor(_OPPONENT, device=rgb.device))


def statistics(rgb: Tensor) -> Tensor:
    """[B,3,h,w] in [0,1] -> raw statistics [B,d].

    Of each band of a Laplacian pyramid (Burt and Adelson 1983), after Portilla and Simoncelli 2000: the strength and
    sparsity of its detail, its directions, how sharp it is, how the channels go together, and whether it lies in the
    light or in the dark. Of the whole: means, deviations and the 5 and 95 % quantiles of the three channels.
    """
    y = whole = opponent(rgb)
    stats = []
    for _ in range(min(_MOST_LEVELS, min(rgb.shape[2:]).bit_length() - 3)):  # the coarsest has 8 pixels or more
        lower = functional.avg_pool2d(y, 2)
        enlarged = functional.interpolate(lower, size=y.shape[2:], mode="bilinear", align_corners=False)
        stats += _of_a_band(y - enlarged, y[:, :1])
        y = lower
    flat = whole.flatten(2)
    # Every fourth pixel does for a quantile, and sorting is what all of this costs most.
    ordered = flat[:, :, ::4].sort(dim=2).values
    last = ordered.shape[2] - 1
    stats += [flat.mean(dim=2), flat.std(dim=2), ordered[:, :, round(0.05 * last)], ordered[:, :, round(0.95 * last)]]
    return torch.cat([*stats, flat[:, 1:].std(dim=2).clamp_min(5e-3).log()], dim=1)


def _of_a_band(band: Tensor, luminance: Tensor) -> list[Tensor]:
    """Statistics of one level [B,3,h,w] of the pyramid; `luminance` [B,1,h,w] is the picture at that level."""
    across, down = (_mean(band.diff(dim=dim).abs()).clamp_min(1e-4) for dim in (3, 2))
    falling = _mean((band[:, :, 1:, 1:] - band[:, :, :-1, :-1]).abs()).clamp_min(1e-4)
    rising = _mean((band[:, :, 1:, :-1] - band[:, :, :-1, 1:]).abs()).clamp_min(1e-4)
    # A floor of half a grey level: in flat colour, ratios would be rounding.
    deviation = band.std(dim=(2, 3)).clamp_min(2e-3)
    normed = (band / deviation[:, :, None, None]).flatten(2)
    together = [(normed[:, i] * normed[:, j]).mean(dim=1, keepdim=True) for i, j in ((0, 1), (0, 2), (1, 2))]
    cell = 4 if min(band.shape[2:]) >= 16 else 1
    activity = functional.avg_pool2d(band[:, :1].abs(), cell).flatten(1)
    light = functional.avg_pool2d(luminance, cell).flatten(1)
    return [
        deviation.log(),
        _mean(band.abs()) / deviation,
        (across / down).log().clamp(-2, 2),
        (falling / rising).log().clamp(-2, 2),
        (across * down).sqrt() / deviation,
        *together,
        _correlation(activity, light)[:, None],
    ]


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


def sketch(rgb: Tensor) -> Tensor:
    """[B,3,h,w] in [0,1] -> mean luminances of its cells [B,G,G]: where light and dark lie, without strokes."""
    return functional.adaptive_avg_pool2d(opponent(rgb)[:, :1], _CELLS)[:, 0]


def content_lost(translated: Tensor, source: Tensor) -> Tensor:
    """How much of the sources' layout their translations have lost.

    Two questions, each 1 - correlation. Where do light and dark lie, in 4x4 patches, over all pictures of the set
    together? A tone that changes for all of them alike does not count here, one that jumps from picture to picture
    does. And within each picture, window by window, are its shapes still there? So a dark or a faint picture's layout
    counts as any other's. Both look at cells that are coarser than strokes, outlines and grain.

    Args:
        translated: sketches [...,n,G,G] of translations, a set of n pictures.
        source: [...,n,G,G].

    Returns:
        [...]; 0 for untouched pictures, a quarter for other renderings of the same scenes, about 0.95 for other
        pictures, up to 2 for negatives.
    """
    tones_a, tones_b = (
        functional.adaptive_avg_pool2d(x.flatten(0, -3)[:, None], _PATCHES).unflatten(0, x.shape[:-2]).flatten(-4)
        for x in (translated, source)
    )
    return _TONE * (1 - _correlation(tones_a, tones_b)) + _LAYOUT * _lost_in_windows(translated, source)


def _lost_in_windows(translated: Tensor, source: Tensor) -> Tensor:
    """1 - mean correlation of the windows of sketches [...,n,G,G], windows with much contrast counting more; [...]."""
    shape = source.shape[:-3]
    a, b = (x.flatten(0, -3)[:, None] for x in (translated, source))

    def mean(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, _WINDOW, stride=_WINDOW // 2)

    mean_a, mean_b = mean(a), mean(b)
    variance_a = (mean(a * a) - mean_a * mean_a).clamp_min(0)
    variance_b = (mean(b * b) - mean_b * mean_b).clamp_min(0)
    covariance = mean(a * b) - mean_a * mean_b
    # What is flatter than a hundredth of the range holds no layout; the square root forgives rounding below that.
    agreement = (covariance + 1e-5) / ((variance_a + 1e-5) * (variance_b + 1e-5)).sqrt()
    weight = (variance_b + 1e-5).sqrt()
    lost = 1 - (agreement * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))
    return lost.unflatten(0, (*shape, -1)).mean(dim=-1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of the last dimension; 0 where one of them is constant."""
    a, b = (x - x.mean(dim=-1, keepdim=True) for x in (a, b))
    scale = (a.square().mean(dim=-1) * b.square().mean(dim=-1)).sqrt()
    return (a * b).mean(dim=-1) / scale.clamp_min(1e-6)
