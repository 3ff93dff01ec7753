"""docs/networks.md and docs/losses.md written down line by line: one call a network, no batching, nothing of raystar's.

The losses take any four callables `nets.G`, `.F`, `.E`, `.D`: raystar's networks, whose gradients `test_step.py` holds
against these, or `Networks`, which is the networks' own transcription. `step` is a whole step of training with those:
`golden.py` records numbers from it. Settings are read as attributes, `settings.loss.w_adv`, as a `Config` has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, l1_loss, relu

Weights = dict[str, dict[str, Tensor]]
"""Parameters by network, G, F, E and D, and name."""


# -- networks --------------------------------------------------------------------------------------


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def normalised(x: Tensor) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean(dim=(2, 3), keepdim=True) + 1e-5).sqrt()


def conv(p: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = p[f"{name}.weight"]
    return conv2d(x, weight, p[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def per_channel(values: Tensor) -> Tensor:
    return values[:, :, None, None]


def generator(p: dict[str, Tensor], x: Tensor, s: Tensor, residual: bool = False) -> Tensor:
    h = x
    for at in (0, 3):
        weight, bias = (per_channel(p[f"encoder.{at + 1}.{name}"][None]) for name in ("weight", "bias"))
        h = leaky(weight * normalised(conv(p, f"encoder.{at}", h)) + bias)
    block = 0
    while f"res_blocks.{block}.conv1.weight" in p:
        before = h
        for stage in (1, 2):
            gamma, beta = linear(p, f"res_blocks.{block}.adain{stage}.fc", s).chunk(2, dim=1)
            h = leaky((1 + per_channel(gamma)) * normalised(h) + per_channel(beta))
            h = conv(p, f"res_blocks.{block}.conv{stage}", h)
        h = before + h
        block += 1
    h = conv(p, "decoder.2", leaky(conv(p, "decoder.0", h)))
    return x + h if residual else h


def of_the_domains(p: dict[str, Tensor], h: Tensor, y: Tensor) -> Tensor:
    """Row by row, the linear layer of the row's domain."""
    return torch.stack([linear(p, f"unshared.{domain}", row) for row, domain in zip(h, y.tolist(), strict=True)])


def mapping_network(p: dict[str, Tensor], z: Tensor, y: Tensor) -> Tensor:
    h, at = z, 0
    while f"shared.{at}.weight" in p:
        h, at = relu(linear(p, f"shared.{at}", h)), at + 2
    return of_the_domains(p, h, y)


def style_encoder(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    h = leaky(conv(p, "shared.0", x))
    for at in (2, 4):
        h = leaky(conv(p, f"shared.{at}", h, stride=2))
    return of_the_domains(p, h.mean(dim=(2, 3)), y)


def discriminator(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    last = max(int(name.split(".")[1]) for name in p)
    h = x
    for at in range(0, last, 2):
        h = leaky(conv(p, f"main.{at}", h, stride=2 if at in (2, 4) else 1))
    logits = conv(p, f"main.{last}", h)
    return torch.stack([row[domain, None] for row, domain in zip(logits, y.tolist(), strict=True)])


class Networks:
    """The four networks with the parameters `weights`."""

    def __init__(self, weights: Weights, residual: bool = False) -> None:
        self.weights, self.residual = weights, residual

    def G(self, x: Tensor, s: Tensor) -> Tensor:
        return generator(self.weights["G"], x, s, self.residual)

    def F(self, z: Tensor, y: Tensor) -> Tensor:
        return mapping_network(self.weights["F"], z, y)

    def E(self, x: Tensor, y: Tensor) -> Tensor:
        return style_encoder(self.weights["E"], x, y)

    def D(self, x: Tensor, y: Tensor) -> Tensor:
        return discriminator(self.weights["D"], x, y)


# -- losses ----------------------------------------------------------------------------------------


def d_hinge(real: Tensor, fake: Tensor) -> Tensor:
    return relu(1 - real).mean() + relu(1 + fake).mean()


def d_terms(nets: Any, batch: Any, settings: Any, step: int) -> dict[str, Tensor]:
    scale, w = settings.training.latent_scale, settings.loss
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


def lambda_ds(settings: Any, epoch: int) -> float:
    w = settings.loss
    decay = w.ds_decay_epochs if w.ds_decay_epochs >= 1 else w.ds_decay_epochs * settings.training.epochs
    progress = min(max((epoch - 1) / decay, 0.0), 1.0)
    return w.w_ds * (1 - progress)


def g_terms(nets: Any, batch: Any, settings: Any, epoch: int) -> dict[str, Tensor]:
    scale, w = settings.training.latent_scale, settings.loss
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
    g_loss = w.w_adv * adv + w.w_sty * sty + w.w_cyc * cyc + w.w_id * identity - lambda_ds(settings, epoch) * ds
    return {"g_loss": g_loss, "g_adv": adv, "sty": sty, "ds": ds, "cyc": cyc, "id": identity}


# -- a whole step ----------------------------------------------------------------------------------


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019) with betas 0 and 0.99; one rate for each network."""

    def __init__(self, weights: Weights, rates: dict[str, float], weight_decay: float) -> None:
        self.weights, self.rates, self.decay, self.steps = weights, rates, weight_decay, 0
        self.square = {net: {name: torch.zeros_like(p) for name, p in weights[net].items()} for net in rates}

    def update(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`; a head that no row has asked for has a gradient of zero."""
        self.steps += 1
        parameters = [(net, name, p) for net in self.rates for name, p in self.weights[net].items()]
        gradients = torch.autograd.grad(loss, [p for _, _, p in parameters], allow_unused=True)
        with torch.no_grad():
            for (net, name, p), gradient in zip(parameters, gradients, strict=True):
                g = torch.zeros_like(p) if gradient is None else gradient
                square, lr = self.square[net][name], self.rates[net]
                square.copy_(0.99 * square + 0.01 * g**2)
                p.sub_(lr * self.decay * p)
                p.sub_(lr * g / ((square / (1 - 0.99**self.steps)).sqrt() + 1e-8))


class Training:
    """Steps on `weights`, which each step changes."""

    def __init__(self, weights: Weights, settings: Any) -> None:
        for parameters in weights.values():
            for p in parameters.values():
                p.requires_grad_(True)
        self.settings, rates = settings, settings.training
        self.nets = Networks(weights, settings.model.residual)
        self.opt_d = AdamW(weights, {"D": rates.lr_d}, rates.weight_decay)
        self.opt_g = AdamW(weights, {"G": rates.lr_g, "E": rates.lr_g, "F": rates.lr_mapping}, rates.weight_decay)

    def step(self, batch: Any, epoch: int, number: int) -> dict[str, float]:
        """D's update, then that of G, E and F on the updated D; the losses of the step."""
        d = d_terms(self.nets, batch, self.settings, number)
        self.opt_d.update(d["d_loss"])
        g = g_terms(self.nets, batch, self.settings, epoch)
        self.opt_g.update(g["g_loss"])
        return {name: value.item() for name, value in (d | g).items()}
