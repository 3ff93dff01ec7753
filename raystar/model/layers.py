"""What the networks are built of: convolutions, and normalisation with its LeakyReLU.

Shapes: B batch, C channels, H x W size, S style_dim.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from raystar.model.native import kernels

LEAK = 0.2
NORM_EPS = 1e-5
_SPECTRAL_EPS = 1e-12  # torch.nn.utils.spectral_norm's


class Leaky(nn.LeakyReLU):
    """LeakyReLU; where the native kernels serve, as one piece under torch.compile."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.leaky(x, self.negative_slope) if kernels.serves(x) else super().forward(x)


class Conv3x3(nn.Conv2d):
    """3x3 convolution of stride 1 and padding 1, plus an optional `residual`; by a native kernel where one serves."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if kernels.serves(x, self.in_channels, self.out_channels):
            return kernels.conv3x3(x, self.weight, self.bias, residual)
        y = super().forward(x)
        return y if residual is None else residual + y


class InstanceNormLeaky(nn.InstanceNorm2d):
    """Instance normalisation with weight and bias, then LeakyReLU; in one native kernel where it serves."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPS, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        if kernels.serves(x, self.num_features):
            return kernels.norm_leaky(x, self.weight, self.bias, self.eps, LEAK)
        return functional.leaky_relu(super().forward(x), LEAK)


class AdaINLeaky(nn.Module):
    """AdaIN, `(1 + gamma) * instance_norm(x) + beta`, then LeakyReLU; in one native kernel where it serves.

    `fc` starts at zero, so it starts as plain normalisation.
    """

    def __init__(self, style_dim: int, channels: int) -> None:
        super().__init__()
        self.fc = _zeroed(nn.Linear(style_dim, 2 * channels))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        gamma, beta = self.fc(s).chunk(2, dim=1)  # [B,C]
        if kernels.serves(x, x.shape[1]):
            return kernels.norm_leaky(x, 1 + gamma.float(), beta, NORM_EPS, LEAK)
        gamma, beta = gamma[:, :, None, None], beta[:, :, None, None]
        return functional.leaky_relu((1 + gamma) * functional.instance_norm(x, eps=NORM_EPS) + beta, LEAK)


class GroupNormLeaky(nn.GroupNorm):
    """Group normalisation with weight and bias, then LeakyReLU; in one native kernel where it serves."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        width = self.num_channels // self.num_groups
        if kernels.serves_width(width) and kernels.serves(x, self.num_channels):
            return kernels.norm_leaky(x, self.weight, self.bias, self.eps, LEAK, width)
        return functional.leaky_relu(super().forward(x), LEAK)


class AdaGNLeaky(nn.Module):
    """AdaGN, `(1 + gamma) * group_norm(x) + beta`, then LeakyReLU; in one native kernel where it serves.

    `fc` starts at zero, as AdaIN's does. Dhariwal and Nichol, arXiv:2105.05233, without the part for time steps.
    """

    def __init__(self, style_dim: int, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.fc = _zeroed(nn.Linear(style_dim, 2 * channels))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        gamma, beta = self.fc(s).chunk(2, dim=1)  # [B,C]
        width = x.shape[1] // self.groups
        if kernels.serves_width(width) and kernels.serves(x, x.shape[1]):
            return kernels.norm_leaky(x, 1 + gamma.float(), beta, NORM_EPS, LEAK, width)
        gamma, beta = gamma[:, :, None, None], beta[:, :, None, None]
        return functional.leaky_relu((1 + gamma) * functional.group_norm(x, self.groups, eps=NORM_EPS) + beta, LEAK)


def _zeroed(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class SpectralConv(nn.Conv2d):
    """Convolution by `weight / sigma`, where sigma is the weight's largest singular value as `iterate` estimates it.

    Miyato et al., arXiv:1802.05957; in float32 whatever the network runs in. Parameters and buffers are those of
    `torch.nn.utils.spectral_norm`, whose every call in training also iterates. Here that is a step of its own, so that
    calls have no side effects: compiled ones, R1's, and those that are still to be differentiated.
    """

    weight_u: Tensor
    """[outputs], the left singular vector so far."""
    weight_v: Tensor
    """[inputs * kernel height * kernel width], the right one."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding)
        weight = self.weight
        del self.weight
        self.weight_orig = weight
        for name, size in (("weight_u", outputs), ("weight_v", weight[0].numel())):
            self.register_buffer(name, functional.normalize(torch.randn(size), dim=0, eps=_SPECTRAL_EPS))

    @torch.no_grad()
    def iterate(self, times: int = 1) -> None:
        """So many steps of the power iteration."""
        matrix, u, v = self.weight_orig.flatten(1), self.weight_u, self.weight_v
        for _ in range(times):
            v = functional.normalize(matrix.T @ u, dim=0, eps=_SPECTRAL_EPS)
            u = functional.normalize(matrix @ v, dim=0, eps=_SPECTRAL_EPS)
        self.weight_u.copy_(u)
        self.weight_v.copy_(v)

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            sigma = torch.dot(self.weight_u, self.weight_orig.flatten(1) @ self.weight_v)
            weight = self.weight_orig / sigma
        return self._conv_forward(x, weight, self.bias)
