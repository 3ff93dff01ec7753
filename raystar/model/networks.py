"""The four networks of the latent StarGAN v2 (docs/networks.md); parameter names are those of users' checkpoints.

Shapes: B batch, C latent channels, H x W latent size, S style_dim, Z latent_dim, N domains, K styles a content.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from raystar.base.errors import RaystarError
from raystar.config.schema import ModelConfig
from raystar.model.layers import (
    LEAK,
    AdaGNLeaky,
    AdaINLeaky,
    Conv3x3,
    GroupNormLeaky,
    InstanceNormLeaky,
    Leaky,
    SpectralConv,
)
from raystar.model.native import kernels

NAMES = ("G", "F", "E", "D")
AVERAGED = ("G", "F", "E")
"""Networks whose weights are averaged where `training.ema_epochs` wants it: those that translate."""


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


def _leaky() -> nn.LeakyReLU:
    return Leaky(LEAK)


class AdaINResBlock(nn.Module):
    """Two AdaIN -> LeakyReLU -> 3x3 convolution stages, plus the input."""

    def __init__(self, channels: int, style_dim: int) -> None:
        super().__init__()
        # Drawn in the order in which they run, as always: a seed's networks stay what they are. Registered in the
        # order of users' checkpoints, by which optimisers number their states.
        adain1, conv1 = AdaINLeaky(style_dim, channels), Conv3x3(channels, channels)
        adain2, conv2 = AdaINLeaky(style_dim, channels), Conv3x3(channels, channels)
        self.adain1, self.adain2 = adain1, adain2
        self.conv1, self.conv2 = conv1, conv2

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        h = self.conv1(self.adain1(x, s))
        return self.conv2(self.adain2(h, s), residual=x)


class AdaGNResBlock(nn.Module):
    """Two AdaGN -> LeakyReLU -> 3x3 convolution stages, plus the input."""

    def __init__(self, channels: int, style_dim: int, groups: int) -> None:
        super().__init__()
        self.adagn1 = AdaGNLeaky(style_dim, channels, groups)
        self.adagn2 = AdaGNLeaky(style_dim, channels, groups)
        self.conv1 = Conv3x3(channels, channels)
        self.conv2 = Conv3x3(channels, channels)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        h = self.conv1(self.adagn1(x, s))
        return self.conv2(self.adagn2(h, s), residual=x)


class Generator(nn.Module):
    """G: contents [B,C,H,W] and styles [K*B,S] -> translations [K*B,C,H,W].

    With K = 1 this is the specification's `G(x, s)`. With K styles for every content (style k of content b in
    row `k * B + b`) the encoder, which does not see the style, runs once instead of K times: the same function.

    With `model.residual` the translation is the content plus what the networks make of it, and the last convolution
    starts at zero: G begins as the identity, and whatever it does to a picture it has learnt (as in ReZero, Bachlechner
    et al., arXiv:2003.04887).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        b, channels = config.base_dim, config.latent_channels
        self.width, self.residual = b, config.residual
        self.recompute = False
        """Whether blocks keep their input alone, and are run again for the backward pass (Chen et al. 2016)."""
        groups = config.num_groups
        norm: Callable[[], nn.Module] = partial(InstanceNormLeaky, b)
        block: Callable[[], nn.Module] = partial(AdaINResBlock, b, config.style_dim)
        if config.norm == "adagn":
            norm = partial(GroupNormLeaky, config.encoder_groups or groups, b)
            block = partial(AdaGNResBlock, b, config.style_dim, groups)
        # The identities stand where checkpoints number the activations.
        self.encoder = nn.Sequential(
            _conv(channels, b), norm(), nn.Identity(),
            Conv3x3(b, b), norm(), nn.Identity(),
        )  # fmt: skip
        self.res_blocks = nn.ModuleList(block() for _ in range(config.n_res_blocks))
        last = _conv(b // 2, channels)
        if config.residual:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]  # the stubs forget that it has one
        self.decoder = nn.Sequential(Conv3x3(b, b // 2), _leaky(), last)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        native = kernels.serves(x, self.width)
        content = x
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        if native:  # the kernels' layout, from the first convolution on
            x = x.contiguous(memory_format=torch.channels_last)
        h = self.encoder(x)
        styles_each = s.shape[0] // x.shape[0]
        if styles_each > 1 and native:
            h = h.permute(0, 2, 3, 1).repeat(styles_each, 1, 1, 1).permute(0, 3, 1, 2)
        elif styles_each > 1:
            h = h.repeat(styles_each, 1, 1, 1)
        for block in self.res_blocks:
            again = self.recompute and torch.is_grad_enabled()
            h = checkpoint(block, h, s, use_reentrant=False, preserve_rng_state=False) if again else block(h, s)
        h = self.decoder(h)
        if self.residual:
            # In the content's precision, so that the identity is exact under autocast; in h's layout, the first one's.
            h = h + (content if styles_each == 1 else content.repeat(styles_each, 1, 1, 1))
        # Compiled networks are made for one layout of translations; whoever calls G decides on it.
        return h.contiguous(memory_format=layout) if native else h


def _select(heads: nn.ModuleList, h: Tensor, y: Tensor) -> Tensor:
    """Head y of each row: all N heads are one matrix product, which is cheaper than sorting rows by domain."""
    weight = torch.cat([head.weight for head in heads])  # type: ignore[misc]  # ModuleList forgets Linear
    bias = torch.cat([head.bias for head in heads])  # type: ignore[misc]
    every = functional.linear(h, weight, bias).unflatten(1, (len(heads), -1))
    return every[torch.arange(h.shape[0], device=h.device), y]


class MappingNetwork(nn.Module):
    """F: noise [B,Z] and domains [B] -> styles [B,S]."""

    def __init__(self, config: ModelConfig, num_domains: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = config.latent_dim
        for _ in range(config.mapping_shared_layers):
            layers += [nn.Linear(width, config.mapping_hidden_dim), nn.ReLU()]
            width = config.mapping_hidden_dim
        self.shared = nn.Sequential(*layers)
        self.unshared = nn.ModuleList(nn.Linear(width, config.style_dim) for _ in range(num_domains))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return _select(self.unshared, self.shared(z), y)


class StyleEncoder(nn.Module):
    """E: latents [B,C,H,W] and domains [B] -> styles [B,S]."""

    def __init__(self, config: ModelConfig, num_domains: int) -> None:
        super().__init__()
        b = config.base_dim
        m = max(b // 2, 64)
        self.shared = nn.Sequential(
            _conv(config.latent_channels, m), _leaky(),
            _conv(m, b, 2), _leaky(),
            _conv(b, b, 2), _leaky(),
            nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.unshared = nn.ModuleList(nn.Linear(b, config.style_dim) for _ in range(num_domains))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return _select(self.unshared, self.shared(x).flatten(1), y)


class Discriminator(nn.Module):
    """D: latents [B,C,H,W] and domains [B] -> patch logits [B,1,H/4,W/4] (for `d_layers` >= 3).

    Its first layer has `discriminator_dim` channels, by default base_dim / 4; no layer has over four times as many.
    With `model.discriminator_norm: spectral` all its convolutions are spectrally normalised.
    """

    def __init__(self, config: ModelConfig, num_domains: int) -> None:
        super().__init__()
        width = config.discriminator_dim or config.base_dim // 4
        widest = 4 * width if config.discriminator_dim else config.base_dim
        conv = SpectralConv if config.discriminator_norm == "spectral" else nn.Conv2d
        layers: list[nn.Module] = [conv(config.latent_channels, width, 3, 1, 1), _leaky()]
        for i in range(max(1, config.d_layers - 1)):
            wider = min(widest, 2 * width)
            layers += [conv(width, wider, 3, 2 if i < 2 else 1, 1), _leaky()]
            width = wider
        self.main = nn.Sequential(*layers, conv(width, num_domains, 1))

    def iterate(self, times: int) -> None:
        """Has spectral norms follow the weights, by so many steps of the power iteration."""
        for layer in self.main:
            if isinstance(layer, SpectralConv):
                layer.iterate(times)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.main(x)
        return logits[torch.arange(x.shape[0], device=x.device), y].unsqueeze(1)


class Nets:
    """The four networks of one model: `G`, `F`, `E`, `D`."""

    def __init__(self, config: ModelConfig, num_domains: int) -> None:
        self.G = Generator(config)
        self.F = MappingNetwork(config, num_domains)
        self.E = StyleEncoder(config, num_domains)
        self.D = Discriminator(config, num_domains)

    @classmethod
    def create(cls, config: ModelConfig, num_domains: int, seed: int) -> Nets:
        """Freshly initialised networks on the CPU, a pure function of the arguments."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(config, num_domains)

    @classmethod
    def of(cls, config: ModelConfig, num_domains: int, states: dict[str, dict[str, Tensor]], source: str) -> Nets:
        """Networks with the weights `states`. None are made, however large, before the weights are seen to fit them.

        Raises:
            RaystarError: a network, parameter or shape that does not fit, naming `source`.
        """
        counts = (config.n_res_blocks, config.mapping_shared_layers, config.d_layers, num_domains)
        held = sum(map(len, states.values()))
        if max(counts) > held:
            raise RaystarError(f"{source}: does not fit the configuration: {held} tensors for {max(counts)} layers")
        try:
            with torch.device("meta"), warnings.catch_warnings():  # that nothing is copied, which is the point
                warnings.simplefilter("ignore")
                cls(config, num_domains).load_state_dict(states, source)
        except (RuntimeError, OverflowError) as error:  # sizes that no memory has
            raise RaystarError(f"{source}: does not fit the configuration: {str(error).splitlines()[0]}") from None
        nets = cls.create(config, num_domains, seed=0)
        nets.load_state_dict(states, source)
        return nets

    def averages(self) -> Nets:
        """Copies of G, F and E beside the same D, in float32 and without gradients: what averages are kept in."""
        averages = copy.copy(self)
        for name in AVERAGED:
            setattr(averages, name, copy.deepcopy(getattr(self, name)).float().requires_grad_(False))
        return averages

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, network) in the order G, F, E, D."""
        return ((name, getattr(self, name)) for name in NAMES)

    def to(self, *args: object, **kwargs: object) -> Nets:
        """Moves every network, as `nn.Module.to` does; returns itself."""
        for _, net in self.items():
            net.to(*args, **kwargs)  # type: ignore[call-overload]
        return self

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """`{"G": {parameter: tensor}, ...}`; the tensors are the live ones."""
        return {name: net.state_dict() for name, net in self.items()}

    def load_state_dict(self, states: dict[str, dict[str, Tensor]], source: str) -> None:
        """Loads the four networks from `states`.

        Raises:
            RaystarError: a network, parameter or shape that does not fit, naming `source`.
        """
        for name, net in self.items():
            if not isinstance(states.get(name), dict):
                raise RaystarError(f"{source}: holds no weights of network {name}")
            try:
                net.load_state_dict(states[name])
            except (RuntimeError, TypeError, AttributeError) as error:
                first = [line.strip()[:160] for line in str(error).splitlines()[1:2]]
                raise RaystarError(
                    f"{source}: network {name} does not fit the configuration: {''.join(first)}"
                ) from None

    def translate(self, x: Tensor, s: Tensor) -> Tensor:
        """G with gradients off; `x` [B,C,H,W] scaled, `s` [K*B,S] -> [K*B,C,H,W] scaled."""
        with torch.inference_mode():
            return self.G(x, s)


def noise(seed: int, latent_dim: int) -> Tensor:
    """The noise [1,latent_dim] of a seed, the same on every machine and device."""
    if seed < 0:
        raise RaystarError(f"seed: expected 0 or more, found {seed}")
    drawn = np.random.default_rng(seed).standard_normal((1, latent_dim), dtype=np.float32)
    return torch.from_numpy(drawn)
