"""loss_terms.md written down line by line: one call a network, no batching. The oracle of `test_step.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, relu

from raystar.config.schema import Config
from raystar.data.batches import Batch
from raystar.model.networks import Nets


def d_hinge(real: Tensor, fake: Tensor) -> Tensor:
    return relu(1 - real).mean() + relu(1 + fake).mean()


def d_terms(nets: Nets, batch: Batch, config: Config, step: int) -> dict[str, Tensor]:
    scale, w = config.training.latent_scale, config.loss
    content, x_ref = batch.content * scale, batch.x_ref * scale
    with torch.no_grad():
        fake_ref = nets.G(content, nets.E(x_ref, batch.y_trg))
        fake_lat = nets.G(content, nets.F(batch.z_trg, batch.y_trg))
    d_loss_ref = d_hinge(nets.D(x_ref, batch.y_trg), nets.D(fake_ref, batch.y_trg))
    d_loss_lat = d_hinge(nets.D(x_ref, batch.y_trg), nets.D(fake_lat, batch.y_trg))
    d_loss = 0.5 * (d_loss_ref + d_loss_lat)
    r1 = torch.zeros((), dtype=content.dtype)
    if step % w.r1_interval == 0:
        x = x_ref.clone().requires_grad_(True)
        with torch.autocast(x.device.type, enabled=False):
            (grad,) = torch.autograd.grad(nets.D(x, batch.y_trg).sum(), x, create_graph=True)
        r1 = (grad.reshape(len(x), -1) ** 2).sum(1).mean()
        d_loss = d_loss + w.w_r1 * w.r1_interval * r1
    return {"d_loss": d_loss, "r1": r1}


def g_terms(nets: Nets, batch: Batch, config: Config, epoch: int) -> dict[str, Tensor]:
    scale, w = config.training.latent_scale, config.loss
    content, x_ref = batch.content * scale, batch.x_ref * scale
    y_src, y_trg = batch.y_src, batch.y_trg
    s_ref = nets.E(x_ref, y_trg)
    s_lat = nets.F(batch.z_trg, y_trg)
    s_src = nets.E(content, y_src)
    fake_ref, fake_lat = nets.G(content, s_ref), nets.G(content, s_lat)
    adv = -nets.D(fake_ref, y_trg).mean() - nets.D(fake_lat, y_trg).mean()
    sty = l1_loss(nets.E(fake_ref, y_trg), s_ref) + l1_loss(nets.E(fake_lat, y_trg), s_lat)
    cyc = l1_loss(nets.G(fake_ref, s_src), content) + l1_loss(nets.G(fake_lat, s_src), content)
    fake_1 = nets.G(content, nets.F(batch.z_1, y_trg))
    fake_2 = nets.G(content, nets.F(batch.z_2, y_trg))
    ds = (fake_1 - fake_2).abs().mean()
    if w.ds_margin is not None:
        ds = ds.clamp(max=w.ds_margin)
    identity = torch.zeros((), dtype=content.dtype)
    if w.w_id > 0:
        identity = l1_loss(nets.G(content, s_src), content)
    decay = w.ds_decay_epochs if w.ds_decay_epochs >= 1 else w.ds_decay_epochs * config.training.epochs
    progress = min(max((epoch - 1) / decay, 0.0), 1.0)
    lambda_ds = w.w_ds * (1 - progress)
    g_loss = w.w_adv * adv + w.w_sty * sty + w.w_cyc * cyc + w.w_id * identity - lambda_ds * ds
    return {"g_loss": g_loss, "g_adv": adv, "sty": sty, "ds": ds, "cyc": cyc, "id": identity}
