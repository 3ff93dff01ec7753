"""How far apart two samples are; the channel transfer that a model has to beat."""

from __future__ import annotations

import torch
from torch import Tensor


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased energy distance 2E|a-b| - E|a-a'| - E|b-b'| of two samples [n,d] and [m,d]; 0-d, may be below 0."""
    return 2 * distances(a, b).mean() - mean_pairwise(a) - mean_pairwise(b)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances [n,m] of the rows of [n,d] and [m,d]."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def mean_pairwise(a: Tensor) -> Tensor:
    """Mean distance of two different rows of [..., n, d]."""
    n = a.shape[-2]
    return distances(a, a).sum(dim=(-2, -1)).mean() / (n * (n - 1))


def channel_transfer(x: Tensor, reference: Tensor) -> Tensor:
    """Latents [B,C,H,W] with the channel means and deviations of references [B,C,H,W] (AdaIN, Huang and Belongie)."""
    (deviation, mean), (scale, shift) = (
        torch.std_mean(latents, dim=(2, 3), keepdim=True) for latents in (x, reference)
    )
    return (x - mean) / deviation.clamp_min(1e-6) * scale + shift
