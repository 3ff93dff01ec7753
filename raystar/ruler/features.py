"""Raw statistics of pictures, standardised and weighted; the classifier of domains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SHRINKAGE = 0.5  # of the within-domain covariance towards a multiple of the identity: statistics outnumber pictures


class Features(nn.Module):
    """Frozen features of pictures: statistics, each in units of its deviation within a domain, through asinh.

    asinh is linear around the mean and grows as a logarithm far from it, so that no single outlying statistic decides
    a distance. All of it is in closed form: the same pictures give the same features. Where a feature file adds its
    own, those weigh as much as all of `picture_stats.statistics` together; the classifier looks at the latter alone.

    Args:
        built_in: number of `picture_stats.statistics`, the first of all.
        size: number of all statistics d.
    """

    def __init__(self, num_domains: int, built_in: int, size: int) -> None:
        super().__init__()
        self.built_in = built_in
        self.mean: Tensor
        self.deviation: Tensor
        self.classifier: Tensor
        self.bias: Tensor
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))
        self.register_buffer("classifier", torch.zeros(built_in, num_domains))
        self.register_buffer("bias", torch.zeros(num_domains))

    def forward(self, raw: Tensor) -> Tensor:
        """Raw statistics [B,d] -> features [B,d]."""
        tamed = torch.asinh((raw - self.mean) / self.deviation)
        added = tamed.shape[1] - self.built_in
        if not added:
            return tamed
        return torch.cat([tamed[:, : self.built_in], tamed[:, self.built_in :] * (self.built_in / added) ** 0.5], dim=1)

    def classify(self, features: Tensor) -> Tensor:
        """Features [B,d] -> logits of the domains [B,N]."""
        return features[:, : self.built_in] @ self.classifier + self.bias

    @classmethod
    def fit(cls, raw: list[Tensor], built_in: int) -> Features:
        """Features of real pictures' raw statistics, one tensor [m,d] a domain.

        The classifier is linear discriminant analysis (Fisher 1936) with a shrunk covariance.
        """
        fitted = cls(len(raw), built_in, raw[0].shape[1])
        # Float64: these few sums must not depend on how a library orders them.
        double = [r.double() for r in raw]
        within = torch.cat([r - r.mean(dim=0) for r in double])
        fitted.mean = torch.cat(double).mean(dim=0).float()
        fitted.deviation = within.square().mean(dim=0).sqrt().clamp_min(1e-6).float()
        features = [fitted(r)[:, :built_in].double() for r in raw]
        centres = torch.stack([f.mean(dim=0) for f in features])
        spread = torch.cat([f - centre for f, centre in zip(features, centres, strict=True)])
        covariance = spread.T @ spread / len(spread)
        identity = torch.eye(len(covariance), dtype=covariance.dtype)
        covariance = covariance.lerp(identity * covariance.diagonal().mean(), _SHRINKAGE)
        weights = torch.linalg.solve(covariance, centres.T)  # [d,N]
        fitted.classifier = weights.float()
        fitted.bias = (-0.5 * (centres.T * weights).sum(dim=0)).float()
        return fitted.eval().requires_grad_(False)
