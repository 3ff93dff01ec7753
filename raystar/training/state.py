"""What a step changes: networks, their averages and optimisers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raystar.config.schema import Config
from raystar.model.device import channels_last
from raystar.model.networks import AVERAGED, Nets
from raystar.training.workers import ALONE, Group

_BETAS = (0.0, 0.99)  # docs/networks.md

RAMP = 0.2
"""Averages have a half-life of at most this share of the steps so far. It is StyleGAN2-ADA's ramp-up (Karras et al.,
arXiv:2006.06676; `ema_rampup` in its training_loop.py), there of 0.05. Runs are short here: with 0.05, one of 8 epochs
would end with a half-life of 0.4 epochs, whatever was asked for."""


@dataclass
class TrainState:
    """Everything that a step changes: networks and optimisers; and how the networks are called."""

    nets: Nets
    opt_g: torch.optim.AdamW
    opt_d: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    config: Config
    device: torch.device
    calls: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    """Compiled stand-ins by network name; a network that has none is called itself."""
    group: Group = ALONE
    """The workers that share every batch; a batch given to `train_step` is this worker's part of it."""
    averaged: Nets | None = None
    """Averages of G, F and E, in float32, beside the D of `nets`; None without `training.ema_epochs`."""
    _counted: Tensor | None = None
    """Steps of `opt_g` that `average` has seen, 0-d."""

    @classmethod
    def create(cls, config: Config, device: torch.device | str, group: Group = ALONE) -> TrainState:
        """Networks freshly initialised from `training.seed`, with their optimisers, on `device`."""
        device = torch.device(device)
        training = config.training
        memory_format = torch.channels_last if channels_last(config, device) else torch.contiguous_format
        nets = Nets.create(config.model, config.num_domains, training.seed).to(device)
        for net in (nets.G, nets.E, nets.D):
            net.to(memory_format=memory_format)  # type: ignore[call-overload]
        nets.G.recompute = training.recompute
        fp16 = training.use_amp and training.amp_dtype == "fp16" and device.type == "cuda"
        opt_g = _adamw(
            [
                {"params": list(nets.G.parameters()), "lr": training.lr_g},
                {"params": list(nets.E.parameters()), "lr": training.lr_g},
                {"params": list(nets.F.parameters()), "lr": training.lr_mapping},
            ],
            training.weight_decay,
        )
        opt_d = _adamw([{"params": list(nets.D.parameters()), "lr": training.lr_d}], training.weight_decay)
        scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        averaged = nets.averages() if training.ema_epochs > 0 else None
        return cls(nets, opt_g, opt_d, scaler, config, device, group=group, averaged=averaged)

    def call(self, name: str) -> Callable[..., Tensor]:
        """Network `name` as it is to be run: compiled where that was asked for and worked."""
        return self.calls[name] if name in self.calls else getattr(self.nets, name)

    @property
    def shown(self) -> Nets:
        """What is measured, drawn and exported: the averages where there are any, else the networks themselves."""
        return self.nets if self.averaged is None else self.averaged

    def load_networks(
        self,
        states: dict[str, dict[str, Tensor]],
        source: str,
        averages: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        """Puts weights into all networks, and `averages`, by default the same weights, into the averages of G, F, E.

        Raises:
            RaystarError: a network, parameter or shape that does not fit, naming `source`.
        """
        self.nets.load_state_dict(states, source)
        if self.averaged is not None:
            self.averaged.load_state_dict(states | (averages or {}), source if averages is None else f"{source}: ema")

    def count_steps(self) -> None:
        """Tells `average` that the optimisers' steps so far are in the averages, as after loading both."""
        done = self._steps()
        self._counted = None if done is None else done.clone()

    def average(self, epoch_steps: int) -> None:
        """Takes the weights into their averages, if there are any and the last step has moved G, E and F.

        With t steps so far, of which `epoch_steps` make an epoch, what is averaged loses half of its weight in
        h = min(ema_epochs * epoch_steps, RAMP * t) steps: average = beta * average + (1 - beta) * weights, where
        beta = 0.5 ** (1 / h). A step that was left out, since its loss or gradients were not finite, is none of them.
        """
        done = self._steps()
        if self.averaged is None or done is None:
            return
        # All on the device, where the optimiser counts the steps that it has taken: nobody waits for the number.
        half_life = (RAMP * done).clamp(max=self.config.training.ema_epochs * epoch_steps)
        share = -torch.expm1(-math.log(2) / half_life)
        if self._counted is not None:
            share = share * (done > self._counted)
        self._counted = done.clone()
        averages, weights = (
            [p for name in AVERAGED for p in getattr(nets, name).parameters()] for nets in (self.averaged, self.nets)
        )
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, [share] * len(weights))

    def _steps(self) -> Tensor | None:
        """Steps that the optimiser of G, E and F has taken in the whole run, 0-d on the device; None before any."""
        moments = self.opt_g.state.get(self.opt_g.param_groups[0]["params"][0])
        return moments["step"] if moments else None


def _adamw(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.AdamW:
    for group in groups:
        group["initial_lr"] = group["lr"]  # as torch's schedulers name it: what a schedule multiplies
    # The fused form is one kernel instead of a dozen, and skips its update on the device when told to (_update).
    return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=weight_decay, fused=True)
