"""How much of the way to the target a young generator has gone, in latents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# The one place where latents are looked at: statistics of latents feel movement that pictures do not show yet. It is no
# verdict, only a guess of where a trial is going, and nothing is exported for it.


def _latent_statistics(x: Tensor) -> Tensor:
    """Scaled latents [B,C,H,W] -> channel means, deviations, and log deviations of three bands [B,5C]."""
    stats = [x.mean(dim=(2, 3)), x.std(dim=(2, 3))]
    for _ in range(3):
        if min(x.shape[2:]) < 4:
            break
        lower = functional.avg_pool2d(x, 2)
        band = x - functional.interpolate(lower, size=x.shape[2:], mode="bilinear", align_corners=False)
        stats.append(band.std(dim=(2, 3)).clamp_min(1e-6).log())
        x = lower
    return torch.cat(stats, dim=1)


def progress(fakes: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """How much of the way from sources to targets translations have gone, in units of the way; 0-d.

    Only what leads there counts, not what leads elsewhere: the mean change of the latents' statistics is projected on
    the difference of the domains' means, each statistic in units of its deviation within the domains.

    Args:
        fakes: [n,C,H,W] scaled translations of `sources` [n,C,H,W]; `targets` [m,C,H,W] are real.
    """
    fake, source, target = (_latent_statistics(x) for x in (fakes, sources, targets))
    within = torch.cat([source - source.mean(dim=0), target - target.mean(dim=0)]).std(dim=0).clamp_min(1e-6)
    way = (target.mean(dim=0) - source.mean(dim=0)) / within
    gone = ((fake - source) / within).mean(dim=0)
    return (gone * way).sum() / way.square().sum().clamp_min(0.25)  # domains that are alike have no way between them
