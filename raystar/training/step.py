"""One training step: one update of D, then one of G, E and F; batched, exact, without a host synchronisation.

The specification runs every network call alone. Here calls of one network that do not depend on each other
are one call: the same function of the same inputs, so the same losses and gradients up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raystar.base.errors import RaystarError
from raystar.config.schema import Config
from raystar.data.bank import Batch
from raystar.model.native import kernels
from raystar.model.networks import AVERAGED, Nets
from raystar.training import losses
from raystar.training.workers import ALONE, Group

__all__ = [
    "LOGGED", "Batch", "TrainState", "autocast", "layout", "resolve_device", "set_backends", "synchronize",
    "train_step",
]  # fmt: skip

LOGGED = ("d_loss", "g_loss", "g_adv", "sty", "ds", "cyc", "id", "r1")
"""Keys of a step's losses, as in loss_terms.md."""

RAMP = 0.2
"""Averages have a half-life of at most this share of the steps so far. It is StyleGAN2-ADA's ramp-up (Karras et al.,
arXiv:2006.06676; `ema_rampup` in its training_loop.py), there of 0.05. Runs are short here: with 0.05, one of 8 epochs
would end with a half-life of 0.4 epochs, whatever was asked for."""

_BETAS = (0.0, 0.99)  # networks.md, "Optimisers"
_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(config: Config) -> torch.device:
    """The device of `training.device`; `RaystarError` if it is not there."""
    wanted = config.training.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RaystarError("training.device: cuda was asked for, but torch finds no GPU; take auto or cpu")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu" and config.training.use_amp and config.training.amp_dtype == "fp16":
        raise RaystarError("training.amp_dtype: fp16 needs a GPU, and none is used here; take bf16")
    return torch.device(wanted)


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """The precision in which `training` wants the networks run on `device`."""
    if not config.training.use_amp:
        return nullcontext()
    return torch.autocast(device.type, _AMP_DTYPES[config.training.amp_dtype])


def set_backends(config: Config, device: torch.device) -> None:
    """Torch's global switches as `training` wants them; all of them, since a process runs one trial after another."""
    if device.type != "cuda":
        return
    training = config.training
    torch.backends.cudnn.benchmark = training.cudnn_benchmark and not training.deterministic
    torch.backends.cudnn.deterministic = training.deterministic
    torch.backends.cudnn.allow_tf32 = training.tf32
    torch.set_float32_matmul_precision("high" if training.tf32 else "highest")


def synchronize(device: torch.device) -> None:
    """Waits for what was queued on a GPU; a CPU has nothing queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def layout(config: Config, latents: Tensor) -> torch.memory_format:
    """How latents [B,C,H,W] go into the networks: as the configuration says, or as the native kernels want them."""
    with autocast(config, latents.device):
        native = kernels.serves(latents, config.model.base_dim)
    return torch.channels_last if native or config.training.channels_last else torch.contiguous_format


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
        memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
        nets = Nets.create(config.model, config.num_domains, training.seed).to(device)
        for net in (nets.G, nets.E, nets.D):
            net.to(memory_format=memory_format)  # type: ignore[call-overload]
        fp16 = training.use_amp and training.amp_dtype == "fp16"
        opt_g = _adamw(
            [
                {"params": [*nets.G.parameters(), *nets.E.parameters()], "lr": training.lr_g},
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
        found = self.opt_g.state.get(self.opt_g.param_groups[0]["params"][0])
        return found["step"] if found else None


def _adamw(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.AdamW:
    # The fused form is one kernel instead of a dozen, and skips its update on the device when told to (_update).
    return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=weight_decay, fused=True)


def train_step(state: TrainState, batch: Batch, *, epoch: int, step: int) -> dict[str, Tensor]:
    """One update of D, then one of G, E and F, on the updated D (loss_terms.md).

    Args:
        batch: unscaled latents, domains and noise; on the state's device. With several workers, this one's share.
        epoch: from 1; sets the weight of the diversity term.
        step: from 1 within the epoch; R1 runs when `step % r1_interval == 0`.

    Returns:
        The losses `LOGGED`, 0-d tensors on the device, of this batch. A loss that is not finite shows here (with
        several workers, on those whose share it is), and the optimisers have not moved on it: check before the next
        step's result is used.
    """
    nets, weights = state.nets, state.config.loss
    G, F, E, D = (state.call(name) for name in ("G", "F", "E", "D"))
    precision = autocast(state.config, state.device)

    content = batch.content * state.config.training.latent_scale  # [B,C,H,W]
    x_ref = batch.x_ref * state.config.training.latent_scale
    if layout(state.config, content) == torch.channels_last:
        content = content.contiguous(memory_format=torch.channels_last)
        x_ref = x_ref.contiguous(memory_format=torch.channels_last)
    y_src, y_trg = batch.y_src, batch.y_trg
    B = content.shape[0]
    use_id = weights.w_id > 0

    # Styles and every translation that starts from `content`, once for both updates.
    with precision:
        s_ref, s_src = E(torch.cat([x_ref, content]), torch.cat([y_trg, y_src])).split(B)
        s_noise = F(torch.cat([batch.z_trg, batch.z_1, batch.z_2]), y_trg.repeat(3))  # [3B,S]: lat, 1, 2
        styles = [s_ref, s_noise, s_src] if use_id else [s_ref, s_noise]
        fakes = G(content, torch.cat([s.to(s_noise.dtype) for s in styles]))  # [4B or 5B,C,H,W]
    fake = fakes[: 2 * B]  # [2B,C,H,W]: by reference, by noise
    fake_1, fake_2 = fakes[2 * B : 4 * B].split(B)

    # D: hinge loss of both paths against one pass over the real latents, R1 every r1_interval steps.
    with precision:
        logits = D(torch.cat([x_ref.to(fake.dtype), fake.detach()]), y_trg.repeat(3))
    real_logits, fake_logits = logits.split([B, 2 * B])
    # Both paths have B fakes, so the mean over all 2B is the mean of the two paths' losses.
    d_loss = losses.d_hinge_loss(real_logits, fake_logits)
    r1 = d_loss.new_zeros(())
    if step % weights.r1_interval == 0:
        # Second derivatives: the original network (compiled ones cannot), in float32 even under autocast.
        x_real = x_ref.detach().requires_grad_(True)
        with torch.autocast(state.device.type, enabled=False):
            r1 = losses.r1_penalty(nets.D(x_real, y_trg), x_real)
        d_loss = d_loss + (weights.w_r1 * weights.r1_interval) * r1
    _update(state, state.opt_d, d_loss, B)

    # G, E, F. D is frozen: its gradients here would be computed for nothing.
    nets.D.requires_grad_(False)
    try:
        with precision:
            fake_logits = D(fake, y_trg.repeat(2))
            s_hat = E(fake, y_trg.repeat(2))
            rec = G(fake, s_src.repeat(2, 1))  # [2B,C,H,W]
        # Means over 2B stand for both paths; loss_terms.md adds the paths, hence the factor 2.
        adv = 2 * losses.g_adversarial_loss(fake_logits)
        sty = 2 * losses.style_reconstruction_loss(s_hat, torch.cat([s_ref, s_noise[:B].to(s_ref.dtype)]))
        cyc = 2 * losses.cycle_consistency_loss(rec, content.repeat(2, 1, 1, 1))
        whole = partial(state.group.mean, rows=B) if state.group.size > 1 else None
        ds = losses.diversity_sensitive_loss(fake_1, fake_2, weights.ds_margin, whole)
        w_ds = losses.lambda_ds(epoch, weights.w_ds, state.config.ds_decay)
        g_loss = weights.w_adv * adv + weights.w_sty * sty + weights.w_cyc * cyc - w_ds * ds
        identity = g_loss.new_zeros(())
        if use_id:
            identity = losses.cycle_consistency_loss(fakes[4 * B :], content)
            g_loss = g_loss + weights.w_id * identity
        _update(state, state.opt_g, g_loss, B)
    finally:
        nets.D.requires_grad_(True)

    values = (d_loss, g_loss, adv, sty, ds, cyc, identity, r1)
    return {name: value.detach() for name, value in zip(LOGGED, values, strict=True)}


def _update(state: TrainState, optimizer: torch.optim.AdamW, loss: Tensor, rows: int) -> None:
    """Gradients of `loss` and one optimiser step, left out on the device itself if the loss is not finite.

    `loss` is the mean over `rows` rows; with several workers the step is that of all their rows, the same on each.
    """
    optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    failed = 1 - loss.detach().isfinite().to(torch.float32)
    failed = state.group.average_gradients(parameters, rows, failed)
    if state.scaler.is_enabled():  # it looks for what is not finite in the gradients, by now the same on all workers
        state.scaler.step(optimizer)
        state.scaler.update()
        return
    # Read by the fused kernel: a non-finite loss never moves the weights, and nobody waits for the answer.
    optimizer.found_inf = failed  # type: ignore[attr-defined]
    optimizer.step()
