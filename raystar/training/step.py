"""One training step: one update of D, then one of G, E and F; batched, exact, without a host synchronisation.

The specification runs every network call alone. Here calls of one network that do not depend on each other
are one call: the same function of the same inputs, so the same losses and gradients up to rounding.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from raystar.data.batches import Batch
from raystar.model.device import autocast, layout
from raystar.training import losses
from raystar.training.state import TrainState

LOGGED = ("d_loss", "g_loss", "g_adv", "sty", "ds", "cyc", "id", "r1")
"""Keys of a step's losses, as in docs/losses.md."""


def train_step(state: TrainState, batch: Batch, *, epoch: int, step: int) -> dict[str, Tensor]:
    """One update of D, then one of G, E and F, on the updated D (docs/losses.md).

    Args:
        batch: unscaled latents, domains and noise; on the state's device. With several workers, this one's share.
        epoch: from 1; sets the weight of the diversity term.
        step: from 1 within the epoch; R1 runs when `step % r1_interval == 0`.

    Returns:
        The losses `LOGGED`, 0-d tensors on the device, of this batch. A loss that is not finite shows here (with
        several workers, on those whose share it is), and the optimisers have not moved on it: check before the next
        step's result is used.
    """
    if state.config.training.use_compile and state.config.training.compile_cudagraphs:
        # Here and nowhere else: what one update has saved for its backward pass the next one's graph would overwrite.
        torch.compiler.cudagraph_mark_step_begin()
    shared = _translations(state, batch, epoch)
    d_loss, r1 = _update_d(state, shared, step)
    g_losses = _update_g(state, shared, epoch)
    values = {"d_loss": d_loss, **g_losses, "r1": r1}
    return {name: values[name].detach() for name in LOGGED}


class _Shared(NamedTuple):
    """What both updates use."""

    content: Tensor  # [B,C,H,W] scaled, as the references
    x_ref: Tensor
    y_trg: Tensor  # [B]
    s_ref: Tensor  # [B,S] styles of the references, of the contents, and [3B,S] of the noises lat, 1, 2
    s_src: Tensor
    s_noise: Tensor
    fake: Tensor  # [2B,C,H,W]: by reference, by noise
    pair: Tensor  # [2B,C,H,W]: by noises 1 and 2; without gradients where the diversity term has no weight
    identity: Tensor  # [B,C,H,W], or [0,C,H,W] where it has no weight


def _translations(state: TrainState, batch: Batch, epoch: int) -> _Shared:
    """Styles and every translation that starts from the contents."""
    G, F, E = (state.call(name) for name in ("G", "F", "E"))
    content = batch.content * state.config.training.latent_scale  # [B,C,H,W]
    x_ref = batch.x_ref * state.config.training.latent_scale
    if layout(state.config, content) == torch.channels_last:
        content = content.contiguous(memory_format=torch.channels_last)
        x_ref = x_ref.contiguous(memory_format=torch.channels_last)
    y_src, y_trg = batch.y_src, batch.y_trg
    B = content.shape[0]
    with autocast(state.config, state.device):
        s_ref, s_src = E(torch.cat([x_ref, content]), torch.cat([y_trg, y_src])).split(B)
        s_noise = F(torch.cat([batch.z_trg, batch.z_1, batch.z_2]), y_trg.repeat(3))  # [3B,S]: lat, 1, 2
        # First the pair, where it is learnt from; else it is only looked at, and needs no activations kept.
        learnt = losses.lambda_ds(epoch, state.config.loss.w_ds, state.config.ds_decay) > 0
        s_lat, s_pair = s_noise.split([B, 2 * B])
        styles = [*([s_pair] if learnt else []), s_ref, s_lat, *([s_src] if state.config.loss.w_id > 0 else [])]
        fakes = G(content, torch.cat([s.to(s_noise.dtype) for s in styles]))
        if learnt:
            pair, fakes = fakes[: 2 * B], fakes[2 * B :]
        else:
            with torch.no_grad():
                pair = G(content, s_pair)
    return _Shared(content, x_ref, y_trg, s_ref, s_src, s_noise, fakes[: 2 * B], pair, fakes[2 * B :])


def losses_of(state: TrainState, batch: Batch, *, epoch: int) -> dict[str, Tensor]:
    """The losses `LOGGED` of a batch, 0-d, of networks that stay as they are.

    `r1` is that of this batch, and `d_loss` is without it: in training it is computed every `r1_interval` steps alone.
    """
    with torch.no_grad():
        shared = _translations(state, batch, epoch)
        d_loss = _d_hinge(state, shared)
        g_losses = _g_losses(state, shared, epoch)
    values = {"d_loss": d_loss, **g_losses, "r1": _r1(state, shared)}
    return {name: values[name].detach() for name in LOGGED}


def kept_for_g(state: TrainState, batch: Batch) -> Tensor:
    """The loss of G, E and F, 0-d, ready for its backward pass: the moment at which a step keeps most."""
    return _g_losses(state, _translations(state, batch, 1), 1)["g_loss"]


def _update_d(state: TrainState, shared: _Shared, step: int) -> tuple[Tensor, Tensor]:
    """One step of D; its loss, which includes R1 every `r1_interval` steps, and R1, both 0-d."""
    weights = state.config.loss
    with_r1 = step % weights.r1_interval == 0
    # As often as single calls would: on the real latents, on the fakes of each path, and for R1.
    state.nets.D.iterate(4 if with_r1 else 3)
    d_loss = _d_hinge(state, shared)
    r1 = d_loss.new_zeros(())
    if with_r1:
        r1 = _r1(state, shared)
        d_loss = d_loss + (weights.w_r1 * weights.r1_interval) * r1
    _update(state, state.opt_d, d_loss, len(shared.content))
    return d_loss, r1


def _d_hinge(state: TrainState, shared: _Shared) -> Tensor:
    """Hinge loss of both paths against one pass over the real latents, 0-d."""
    fake, B, D = shared.fake, len(shared.content), state.call("D")
    with autocast(state.config, state.device):
        logits = D(torch.cat([shared.x_ref.to(fake.dtype), fake.detach()]), shared.y_trg.repeat(3))
    real_logits, fake_logits = logits.split([B, 2 * B])
    # Both paths have B fakes, so the mean over all 2B is the mean of the two paths' losses.
    return losses.d_hinge_loss(real_logits, fake_logits)


def _r1(state: TrainState, shared: _Shared) -> Tensor:
    # Second derivatives: the original network (compiled ones cannot), in float32 even under autocast.
    x_real = shared.x_ref.detach().requires_grad_(True)
    with torch.autocast(state.device.type, enabled=False):
        return losses.r1_penalty(state.nets.D(x_real, shared.y_trg), x_real)


def _update_g(state: TrainState, shared: _Shared, epoch: int) -> dict[str, Tensor]:
    """One step of G, E and F, with D as it is now; their losses by name, 0-d."""
    # D is frozen: its gradients here would be computed for nothing.
    state.nets.D.requires_grad_(False)
    state.nets.D.iterate(2)  # for the fakes of each path
    try:
        g_losses = _g_losses(state, shared, epoch)
        _update(state, state.opt_g, g_losses["g_loss"], len(shared.content))
    finally:
        state.nets.D.requires_grad_(True)
    return g_losses


def _g_losses(state: TrainState, shared: _Shared, epoch: int) -> dict[str, Tensor]:
    weights = state.config.loss
    G, E, D = (state.call(name) for name in ("G", "E", "D"))
    content, y_trg, s_ref, fake, B = shared.content, shared.y_trg, shared.s_ref, shared.fake, len(shared.content)
    fake_1, fake_2 = shared.pair.split(B)
    with autocast(state.config, state.device):
        fake_logits = D(fake, y_trg.repeat(2))
        s_hat = E(fake, y_trg.repeat(2))
        rec = G(fake, shared.s_src.repeat(2, 1))  # [2B,C,H,W]
    # Means over 2B stand for both paths; docs/losses.md adds the paths, hence the factor 2.
    adv = 2 * losses.g_adversarial_loss(fake_logits)
    sty = 2 * losses.style_reconstruction_loss(s_hat, torch.cat([s_ref, shared.s_noise[:B].to(s_ref.dtype)]))
    cyc = 2 * losses.cycle_consistency_loss(rec, content.repeat(2, 1, 1, 1))
    whole = partial(state.group.mean, rows=B) if state.group.size > 1 else None
    ds = losses.diversity_sensitive_loss(fake_1, fake_2, weights.ds_margin, whole)
    w_ds = losses.lambda_ds(epoch, weights.w_ds, state.config.ds_decay)
    g_loss = weights.w_adv * adv + weights.w_sty * sty + weights.w_cyc * cyc - w_ds * ds
    identity = g_loss.new_zeros(())
    if weights.w_id > 0:
        identity = losses.cycle_consistency_loss(shared.identity, content)
        g_loss = g_loss + weights.w_id * identity
    return {"g_loss": g_loss, "g_adv": adv, "sty": sty, "ds": ds, "cyc": cyc, "id": identity}


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
