"""What can be measured: networks, or anything that encodes and translates."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from raystar.config.schema import Config
from raystar.model.device import autocast
from raystar.model.networks import Nets


class Subject(Protocol):
    """What the ruler measures: something that translates scaled latents."""

    def encode(self, x_ref: Tensor, y: Tensor) -> Tensor:
        """Styles [B,S] of references [B,C,H,W] in domains y [B]."""

    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        """Styles [B,S] from noise [B,Z] for domains y [B]."""

    def translate(self, x: Tensor, s: Tensor) -> Tensor:
        """Contents [B,C,H,W] and styles [K*B,S] -> [K*B,C,H,W]."""


class NetsSubject:
    """Networks in the precision that they train in, without gradients."""

    def __init__(self, nets: Nets, config: Config) -> None:
        self.nets = nets
        self.device = next(nets.G.parameters()).device
        self.config = config

    def encode(self, x_ref: Tensor, y: Tensor) -> Tensor:
        with autocast(self.config, self.device):
            return self.nets.E(x_ref, y).float()

    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        with autocast(self.config, self.device):
            return self.nets.F(z, y).float()

    def translate(self, x: Tensor, s: Tensor) -> Tensor:
        with autocast(self.config, self.device):
            return self.nets.G(x, s).float()
