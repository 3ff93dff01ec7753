"""The trainer that users come from, as far as its files show it: plain torch, and the textbook's losses.

Modules register in that trainer's order, spectral norm is torch's hook, optimisers have its groups; `load` has the
rules of its loader: everything fits exactly, or it fails.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import spectral_norm

from tests.kit import textbook

DOMAINS = ["photo", "Hayao", "monet"]
MODEL = {
    "latent_channels": 4, "style_dim": 6, "base_dim": 8, "num_domains": 3, "n_res_blocks": 2, "d_layers": 3,
    "latent_dim": 5, "mapping_hidden_dim": 12, "mapping_shared_layers": 2,
}  # fmt: skip
LOSS = {
    "w_adv": 1.0, "w_sty": 1.0, "w_ds": 1.0, "ds_margin": 1.5, "w_cyc": 1.0, "w_id": 1.0, "w_r1": 2.0, "r1_interval": 2,
    "ds_decay_epochs": 20,
}  # fmt: skip
BRANCHES: dict[str, dict[str, Any]] = {
    "before branches": {},
    "baseline_AdaIN": {"exp_branch": "baseline_AdaIN", "num_groups": 4},
    "AdaGN_with_SN": {"exp_branch": "AdaGN_with_SN", "num_groups": 4},
    "AdaGN_no_SN": {"exp_branch": "AdaGN_no_SN", "num_groups": 2},
    "unmarked": {"num_groups": 4},
}
"""What the configuration's `model` says, by the time or branch; an unmarked one is of AdaGN under AdaIN's names."""


def config(branch: str) -> dict[str, Any]:
    return {
        "experiment": {"name": "tiny", "outputs_dir": "outputs/tiny"},
        "model": MODEL | BRANCHES[branch],
        "loss": LOSS,
        "training": {
            "seed": 42, "batch_size": 8, "num_epochs": 4, "lr_g": 1e-3, "lr_d": 1e-3, "lr_mapping": 1e-5,
            "weight_decay": 1e-4, "lr_schedule": "cosine", "use_amp": False, "allow_tf32": True, "optim_fused": True,
            "latent_scale": 0.18215,
        },
        "visualization": {"every_epochs": 5, "vae_subfolder": "vae", "num_samples": 5, "auto_eval_latest": True},
        "data": {"data_root": "../datasets", "domains": DOMAINS, "epoch_size": 64},
        "checkpoint": {"save_dir": "outputs/tiny/ckpt", "resume_path": ""},
    }  # fmt: skip


class Ada(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        instance = nn.InstanceNorm2d(channels, affine=False)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5, affine=False) if groups else instance
        self.fc = nn.Linear(MODEL["style_dim"], 2 * channels)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        gamma, beta = self.fc(s).chunk(2, dim=1)
        return (1 + gamma[:, :, None, None]) * self.norm(x) + beta[:, :, None, None]


class Block(nn.Module):
    def __init__(self, channels: int, groups: int, called: str) -> None:
        super().__init__()
        self.called = called
        for number in (1, 2):
            setattr(self, f"{called}{number}", Ada(channels, groups))
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        h = self.conv1(functional.leaky_relu(getattr(self, f"{self.called}1")(x, s), 0.2))
        return x + self.conv2(functional.leaky_relu(getattr(self, f"{self.called}2")(h, s), 0.2))


class G(nn.Module):
    def __init__(self, branch: str) -> None:
        super().__init__()
        b, groups = MODEL["base_dim"], BRANCHES[branch].get("num_groups", 0)
        adagn = branch in ("AdaGN_with_SN", "AdaGN_no_SN")
        norms = [nn.GroupNorm(groups, b) if adagn else nn.InstanceNorm2d(b, affine=True) for _ in range(2)]
        self.encoder = nn.Sequential(
            nn.Conv2d(4, b, 3, padding=1), norms[0], nn.LeakyReLU(0.2),
            nn.Conv2d(b, b, 3, padding=1), norms[1], nn.LeakyReLU(0.2),
        )  # fmt: skip
        groups = groups if adagn or branch == "unmarked" else 0
        self.res_blocks = nn.ModuleList(
            Block(b, groups, "adagn" if adagn else "adain") for _ in range(MODEL["n_res_blocks"])
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(b, b // 2, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(b // 2, 4, 3, padding=1)
        )

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        h = self.encoder(x)
        for block in self.res_blocks:
            h = block(h, s)
        return self.decoder(h)


def _heads(inputs: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(inputs, MODEL["style_dim"]) for _ in DOMAINS)


class F(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(MODEL["mapping_shared_layers"]):
            inputs = MODEL["mapping_hidden_dim"] if number else MODEL["latent_dim"]
            layers += [nn.Linear(inputs, MODEL["mapping_hidden_dim"]), nn.ReLU()]
        self.shared, self.unshared = nn.Sequential(*layers), _heads(MODEL["mapping_hidden_dim"])

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        every = torch.stack([head(self.shared(z)) for head in self.unshared], dim=1)
        return every[torch.arange(len(y)), y]


class E(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        b, m = MODEL["base_dim"], max(MODEL["base_dim"] // 2, 64)
        self.shared = nn.Sequential(
            nn.Conv2d(4, m, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(m, b, 3, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(b, b, 3, 2, 1), nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.unshared = _heads(b)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        every = torch.stack([head(self.shared(x).flatten(1)) for head in self.unshared], dim=1)
        return every[torch.arange(len(y)), y]


class D(nn.Module):
    def __init__(self, branch: str) -> None:
        super().__init__()
        b = MODEL["base_dim"]
        spectral = branch in ("baseline_AdaIN", "AdaGN_with_SN", "unmarked")
        convs = [nn.Conv2d(4, b // 4, 3, 1, 1), nn.Conv2d(b // 4, b // 2, 3, 2, 1), nn.Conv2d(b // 2, b, 3, 2, 1)]
        convs.append(nn.Conv2d(b, len(DOMAINS), 1))
        layers: list[nn.Module] = []
        for conv in convs:
            layers += [spectral_norm(conv) if spectral else conv, nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.main(x)[torch.arange(len(y)), y].unsqueeze(1)


class Trainer:
    """Networks and optimisers of a branch, `textbook`'s steps on them, and files of them."""

    def __init__(self, branch: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.config = config(branch)
        self.G, self.F, self.E, self.D = G(branch), F(), E(), D(branch)
        rates = self.config["training"]
        self.opt_g = _adamw([(self.G, rates["lr_g"]), (self.E, rates["lr_g"]), (self.F, rates["lr_mapping"])])
        self.opt_d = _adamw([(self.D, rates["lr_d"])])
        self.epoch, self.global_step = 0, 0

    def step(self, batch: Any, epoch: int, number: int) -> dict[str, float]:
        """D's update, then that of G, E and F; the losses."""
        settings = SimpleNamespace(loss=SimpleNamespace(**LOSS), training=SimpleNamespace(**self.config["training"]))
        d = textbook.d_terms(self, batch, settings, number)
        _update(self.opt_d, d["d_loss"])
        g = textbook.g_terms(self, batch, settings, epoch)
        _update(self.opt_g, g["g_loss"])
        self.global_step += 1
        return {name: value.item() for name, value in (d | g).items()}

    def save(self, path: Path, prefix: str = "") -> dict[str, Any]:
        nets = {name: getattr(self, name).state_dict() for name in "GFED"}
        content = {
            "epoch": self.epoch,
            "global_step": self.global_step,
            **{name: {f"{prefix}{key}": value for key, value in net.items()} for name, net in nets.items()},
            "opt_g": self.opt_g.state_dict(),
            "opt_d": self.opt_d.state_dict(),
            "config": self.config,
        }
        torch.save(content, path)
        return content

    def load(self, path: Path) -> None:
        content = torch.load(path, weights_only=True)
        for name in "GFED":
            getattr(self, name).load_state_dict(content[name])
        self.opt_g.load_state_dict(content["opt_g"])
        self.opt_d.load_state_dict(content["opt_d"])
        self.epoch, self.global_step = int(content["epoch"]), int(content.get("global_step", 0))

    def named_moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimisers' states by the parameters' names."""
        return {
            f"{name}.{key}": optimizer.state[parameter]
            for optimizer, names in ((self.opt_g, "GEF"), (self.opt_d, "D"))
            for name in names
            for key, parameter in getattr(self, name).named_parameters()
            if parameter in optimizer.state
        }


def _update(optimizer: torch.optim.AdamW, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _adamw(nets: list[tuple[nn.Module, float]]) -> torch.optim.AdamW:
    groups = [{"params": list(net.parameters()), "lr": rate} for net, rate in nets]
    return torch.optim.AdamW(groups, betas=(0.0, 0.99), weight_decay=1e-4)
