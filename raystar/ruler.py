"""The score that loss weights cannot move: held-out latents translated into every other domain, and compared.

Losses cannot rank trials whose weights define them. The ruler asks three questions of a model instead, with the
same sources, references and noise in every trial and epoch:

- S, style: does the set of translations look like held-out latents of the target domain? Per ordered pair of
  domains the unbiased energy distance (Szekely and Rizzo 2013) in frozen features, as a share of the distance
  between source and target. Doing nothing is 1, true target samples are 0 on average. Where domains differ by far
  more than latents of one do, that share hides what no domain looks like (all black, all white): so what the means and
  deviations of the channels are further from the target's than the source's are is added, in units of the target's own
  spread. It is nothing for doing nothing and for true samples.
- C, content: is the layout of the source still there? 1 - correlation of instance-normalised latents averaged
  over 2x2 cells. Doing nothing is 0; two unrelated pictures are about 0.92.
- V, diversity: do different noises give different translations? Their mean feature distance over that of real
  target latents, at most 1.

`score = mean over pairs of (1 + S)(1 + C) + max(0, 0.25 - V)`: 1 is perfect, doing nothing scores 2.25, and
copying some target picture scores about 1.9. Lower is better.

Shapes: n sources a pair, P ordered pairs, d features, C x H x W latents, S style code, Z noise.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from raystar.checkpoint import digest
from raystar.config import Config
from raystar.dataset import Bank
from raystar.errors import RaystarError
from raystar.model import Nets
from raystar.step import autocast

METRICS = ("score", "style", "content", "diversity", "worst_pair", "accuracy", "movement", "outlook")
"""What `Ruler.measure` returns. `worst_pair` is the largest (1 + S)(1 + C) of any ordered pair; `accuracy` the
share of translations that the ruler's classifier takes for the target domain; `movement` how far translations are from
their own sources, as a share of how far pictures of a domain are from each other; `outlook` what ranks at rungs."""

HIGHER = ("diversity", "accuracy", "movement")
"""Those of `METRICS` of which more is better."""

UNMOVED = 0.1
"""A model whose `movement` is below this cannot be told from doing nothing."""

DIVERSITY_WANTED = 0.25
MIN_HELD_OUT = 4
_VERSION = 2  # part of the cache's name: raise it when features or training change
_SEED = 20_251_121
_STEPS, _BATCH, _LR = 120, 48, 2e-3
_MAX_TRAIN = 2048  # training latents a domain that the classifier and the standardisation see
_CHUNK = 64  # latents in one pass of the networks


class Subject(Protocol):
    """What the ruler measures: something that translates scaled latents."""

    def encode(self, x_ref: Tensor, y: Tensor) -> Tensor:
        """Styles [B,S] of references [B,C,H,W] in domains y [B]."""

    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        """Styles [B,S] from noise [B,Z] for domains y [B]."""

    def translate(self, x: Tensor, s: Tensor) -> Tensor:
        """Contents [B,C,H,W] and styles [K*B,S] -> [K*B,C,H,W]."""


class _Nothing:
    """Gives back its sources."""

    def encode(self, x_ref: Tensor, y: Tensor) -> Tensor:
        return x_ref.mean(dim=(2, 3))

    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        return z[:, :1].expand(-1, 4)

    def translate(self, x: Tensor, s: Tensor) -> Tensor:
        return x.repeat(len(s) // len(x), 1, 1, 1)


class _Transfer(_Nothing):
    """Gives its sources other channel means."""

    def translate(self, x: Tensor, s: Tensor) -> Tensor:
        x = x.repeat(len(s) // len(x), 1, 1, 1)
        return x - x.mean(dim=(2, 3), keepdim=True) + s[:, :, None, None]


class _NetsSubject:
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


# -- features --------------------------------------------------------------------------------------


class _Features(nn.Module):
    """Frozen features: what tells the domains apart, and how everything else is distributed.

    Raw statistics are the channel moments of a small domain classifier's layers and of a Laplacian pyramid
    (Burt and Adelson 1983). They are standardised and passed through asinh, which is linear around the mean and
    grows as a logarithm far from it, so that no single outlying statistic decides a distance. The features are
    their linear discriminants (Fisher 1936; within-domain variance 1) beside all of them, so that a translation
    must lie right between the domains and must not leave what latents look like in any other direction.
    """

    widths = (32, 64, 64)
    strides = (2, 2, 1)
    levels = 4
    general_weight = 1.5
    """Weight of all statistics together, beside discriminants of unit variance each."""
    shrinkage = 0.5
    """Of the within-domain covariance towards a multiple of the identity: statistics outnumber small domains."""

    def __init__(self, channels: int, num_domains: int) -> None:
        super().__init__()
        inputs = (channels, *self.widths[:-1])
        sizes = zip(inputs, self.widths, self.strides, strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride, padding=1) for i, o, stride in sizes)
        self.head = nn.Linear(2 * sum(self.widths), num_domains)
        self.channel_mean: Tensor
        self.channel_std: Tensor
        self.register_buffer("channel_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("channel_std", torch.ones(1, channels, 1, 1))
        raw = self.statistics(torch.zeros(1, channels, 32, 32)).shape[1]
        self.register_buffer("mean", torch.zeros(raw))
        self.register_buffer("std", torch.ones(raw))
        self.register_buffer("discriminants", torch.zeros(raw, num_domains - 1))

    def _learned(self, x: Tensor) -> Tensor:
        """x [B,C,H,W], standardised channels -> moments of the classifier's layers [B, 2*sum(widths)]."""
        found = []
        for conv in self.convs:
            x = functional.leaky_relu(conv(x), 0.2)
            deviation, mean = torch.std_mean(x, dim=(2, 3))
            found += [mean, deviation]
        return torch.cat(found, dim=1)

    def statistics(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] scaled -> raw statistics [B,r]."""
        x = (x - self.channel_mean) / self.channel_std
        found = [self._learned(x)]
        for _ in range(self.levels - 1):
            lower = functional.avg_pool2d(x, 2)
            band = x - functional.interpolate(lower, scale_factor=2, mode="bilinear", align_corners=False)
            found += _band_statistics(band)
            x = lower
        deviation, mean = torch.std_mean(x, dim=(2, 3))
        return torch.cat([*found, mean, deviation], dim=1)

    def _tamed(self, raw: Tensor) -> Tensor:
        return torch.asinh((raw - self.mean) / self.std)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] scaled -> features [B,d]."""
        return self.examine(x)[0]

    def examine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,C,H,W] scaled -> features [B,d] and the classifier's logits [B,N]."""
        raw = self.statistics(x)
        tamed = self._tamed(raw)
        general = tamed * self._weight(tamed.shape[1])
        logits = self.head(raw[:, : self.head.in_features])
        return torch.cat([tamed @ self.discriminants, general], dim=1), logits

    def range_of(self, features: Tensor) -> Tensor:
        """Features [...,d] -> the channels' means and deviations among them, standardised, not tamed: [...,2C]."""
        tamed = features[..., -2 * self.channel_mean.shape[1] :] / self._weight(len(self.mean))
        return tamed.sinh()

    def _weight(self, statistics: int) -> float:
        return self.general_weight * statistics**-0.5

    def classify(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] scaled -> logits of the domains [B,N]."""
        return self.head(self._learned((x - self.channel_mean) / self.channel_std))

    @torch.no_grad()
    def fit(self, latents: list[Tensor]) -> None:
        """Sets standardisation and discriminants from scaled latents, one tensor [n,C,H,W] a domain."""
        raw = [torch.cat([self.statistics(chunk) for chunk in x.split(256)]) for x in latents]
        everything = torch.cat(raw)
        self.mean, self.std = everything.mean(dim=0), everything.std(dim=0).clamp_min(1e-6)
        # Float64: these few small products must not depend on how a library orders its sums.
        tamed = [self._tamed(r).double() for r in raw]
        centres = torch.stack([t.mean(dim=0) for t in tamed])
        spread = torch.cat([t - centre for t, centre in zip(tamed, centres, strict=True)])
        within = spread.T @ spread / len(spread)
        r = within.shape[0]
        within = within.lerp(torch.eye(r, dtype=within.dtype) * within.diagonal().mean(), self.shrinkage)
        lower = torch.linalg.cholesky(within)
        between = torch.linalg.solve_triangular(lower, (centres - centres.mean(dim=0)).T, upper=False)  # [r,N]
        axes = torch.linalg.svd(between, full_matrices=False).U[:, : len(latents) - 1]
        self.discriminants = torch.linalg.solve_triangular(lower.T, axes, upper=True).float()


def _band_statistics(band: Tensor) -> list[Tensor]:
    """Of one pyramid level [B,C,H,W]: strength, sparsity, direction of its detail, and how channels go together."""
    deviation = band.std(dim=(2, 3)).clamp_min(1e-6)  # [B,C]
    horizontal = band.diff(dim=3).abs().mean(dim=(2, 3)) / deviation
    vertical = band.diff(dim=2).abs().mean(dim=(2, 3)) / deviation
    flat = (band / deviation[:, :, None, None]).flatten(2)
    flat = flat - flat.mean(dim=2, keepdim=True)
    i, j = torch.triu_indices(band.shape[1], band.shape[1], 1)
    together = (flat @ flat.transpose(1, 2) / flat.shape[2])[:, i, j]
    return [deviation.log(), band.abs().mean(dim=(2, 3)) / deviation, horizontal, vertical, together]


def _train_features(latents: list[Tensor], num_domains: int) -> _Features:
    """A `_Features` trained to tell the domains apart; `latents` are scaled [n,C,H,W], one tensor a domain."""
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(_SEED)
        everything = torch.cat(latents)
        net = _Features(everything.shape[1], num_domains)
        net.channel_mean = everything.mean(dim=(0, 2, 3), keepdim=True)
        net.channel_std = everything.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)
        labels = torch.cat([torch.full((len(x),), y) for y, x in enumerate(latents)])
        # Domains of different sizes are drawn equally often, as training draws them.
        chance = torch.cat([torch.full((len(x),), 1 / len(x)) for x in latents])
        optimizer = torch.optim.AdamW(net.parameters(), lr=_LR, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=_STEPS)
        for _ in range(_STEPS):
            rows = torch.multinomial(chance, _BATCH, replacement=True)
            x = _augment(everything[rows], net.channel_std)
            loss = functional.cross_entropy(net.classify(x), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval().requires_grad_(False)
        net.fit(latents)
    return net


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, so that a ruler is the same bits on any number of cores; and no cores taken from others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _augment(x: Tensor, std: Tensor) -> Tensor:
    """Crops, mirrors, and shifts and noise in channels [B,C,H,W]: a few hundred latents are soon learnt by heart."""
    B, C, H, W = x.shape
    if torch.rand(()) < 0.5:
        x = x.flip(3)
    h, w = (size // 4 * int(torch.randint(2, 5, ())) for size in (H, W))
    top, left = int(torch.randint(0, H - h + 1, ())), int(torch.randint(0, W - w + 1, ()))
    x = x[:, :, top : top + h, left : left + w]
    x = x * (1 + 0.1 * torch.randn(B, C, 1, 1)) + 0.2 * std * torch.randn(B, C, 1, 1)
    return x + 0.1 * std * torch.randn_like(x)


# -- distances -------------------------------------------------------------------------------------


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased energy distance 2E|a-b| - E|a-a'| - E|b-b'| of two samples [n,d] and [m,d]; 0-d, may be below 0."""
    return 2 * _distances(a, b).mean() - _mean_pairwise(a) - _mean_pairwise(b)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _mean_pairwise(a: Tensor) -> Tensor:
    """Mean distance of two different rows of [..., n, d]."""
    n = a.shape[-2]
    return _distances(a, a).sum(dim=(-2, -1)).mean() / (n * (n - 1))


def content_distance(translated: Tensor, source: Tensor) -> Tensor:
    """1 - correlation of instance-normalised latents [B,C,H,W] averaged over 2x2 cells; [B], in [0, 2]."""
    a, b = (functional.avg_pool2d(functional.instance_norm(x), 2).flatten(1) for x in (translated, source))
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    scale = (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)
    return 1 - (a * b).sum(dim=1) / scale


# -- the ruler -------------------------------------------------------------------------------------


@dataclass
class Ruler:
    """A built ruler; `measure` is a pure function of the model."""

    features: _Features
    domains: tuple[str, ...]
    content: Tensor
    """[P*n,C,H,W] scaled sources, ordered by pair."""
    y_trg: Tensor
    """[P*n] target domains."""
    reference: Tensor
    """[P*n] which row of `targets[y_trg]` is the reference."""
    noise: Tensor
    """[styles, P*n, Z]."""
    targets: list[Tensor]
    """Scaled held-out latents of each domain [m,C,H,W]."""
    target_features: list[Tensor]
    target_spread: Tensor
    """[N] mean distance of two real latents of a domain."""
    do_nothing: Tensor
    """[P] energy distance between sources and targets."""
    range_spread: Tensor
    """[N] mean distance of two real latents of a domain in their range alone."""
    range_nothing: Tensor
    """[P] energy distance between sources and targets in their range alone."""
    n: int

    @functools.cached_property
    def references(self) -> dict[str, dict[str, float]]:
        """What doing nothing and the channel transfer get, as `eval/*`: a model that is worth something beats both."""
        subjects = {"nothing": _Nothing(), "transfer": _Transfer()}
        found = {name: self.measure_subject(subject) for name, subject in subjects.items()}
        return {name: {f"eval/{key}": value for key, value in values.items()} for name, values in found.items()}

    @classmethod
    def build(cls, bank: Bank, config: Config, cache_dir: str | Path | None = None) -> Ruler:
        """Trains the features on the bank's training latents (seconds), or reads them from `cache_dir`.

        Raises:
            RaystarError: a domain with too few held-out latents.
        """
        check_holdout(bank)
        features = _cached_features(bank, config, cache_dir)
        return cls._assemble(features, bank, config)

    @classmethod
    def _assemble(cls, features: _Features, bank: Bank, config: Config) -> Ruler:
        settings, scale = config.ruler, config.training.latent_scale
        rng = np.random.default_rng(_SEED)
        N = len(bank.domains)
        targets = [bank.rows(rng.permutation(rows)[: settings.targets]) * scale for rows in bank.held]
        n = min(settings.sources, *map(len, targets))
        pairs = [(i, j) for i in range(N) for j in range(N) if i != j]
        content = torch.cat([targets[i][:n] for i, _ in pairs])
        y_trg = torch.tensor([j for _, j in pairs]).repeat_interleave(n)
        reference = torch.from_numpy(np.concatenate([rng.permutation(len(targets[j]))[:n] for _, j in pairs]))
        shape = (settings.styles, len(pairs) * n, config.model.latent_dim)
        noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        found = [_in_chunks(features, x) for x in targets]
        spread = torch.stack([_mean_pairwise(f) for f in found])
        # Domains that look the same to the features would divide by nothing; a twentieth of the spread is the floor.
        nothing = torch.stack([energy_distance(found[i][:n], found[j]).clamp_min(0.05 * spread[j]) for i, j in pairs])
        ranges = [features.range_of(f) for f in found]
        range_spread = torch.stack([_mean_pairwise(f) for f in ranges]).clamp_min(1e-6)
        range_nothing = torch.stack([energy_distance(ranges[i][:n], ranges[j]) for i, j in pairs])
        return cls(
            features, bank.domains, content, y_trg, reference, noise, targets, found, spread, nothing, range_spread,
            range_nothing, n,
        )  # fmt: skip

    def to(self, device: torch.device) -> Ruler:
        """Moves everything that `measure` reads to `device`; returns itself."""
        self.features.to(device)
        moved = (
            "content",
            "y_trg",
            "reference",
            "noise",
            "target_spread",
            "do_nothing",
            "range_spread",
            "range_nothing",
        )
        for name in moved:
            setattr(self, name, getattr(self, name).to(device))
        self.targets = [t.to(device) for t in self.targets]
        self.target_features = [t.to(device) for t in self.target_features]
        return self

    def measure(self, nets: Nets, config: Config) -> dict[str, float]:
        """The metrics `METRICS` of a model, in the precision it trains in."""
        return self.measure_subject(_NetsSubject(nets, config))

    @torch.inference_mode()
    def measure_subject(self, subject: Subject) -> dict[str, float]:
        """The metrics `METRICS` of anything that translates."""
        N, pairs = len(self.domains), len(self.do_nothing)
        codes = [  # [m,S] a domain: each reference is encoded once, however many pairs use it
            torch.cat([subject.encode(x, torch.full((len(x),), y, device=x.device)) for x in t.split(_CHUNK)])
            for y, t in enumerate(self.targets)
        ]
        by_reference = torch.stack(
            [codes[y][r] for y, r in zip(self.y_trg.tolist(), self.reference.tolist(), strict=True)]
        )
        by_noise = subject.sample(self.noise.flatten(0, 1), self.y_trg.repeat(len(self.noise)))
        by_noise = by_noise.unflatten(0, (len(self.noise), -1))  # [styles, P*n, S]

        found, changed, right, moved = [], [], [], []
        for rows in torch.arange(len(self.content), device=self.content.device).split(_CHUNK):
            x = self.content[rows]
            styles = torch.cat([by_reference[rows], by_noise[0, rows]])
            fake = subject.translate(x, styles)  # [2 * chunk, C, H, W]
            features, logits = self.features.examine(fake)
            found.append(features.unflatten(0, (2, -1)))
            moved.append((features - self.features(x).repeat(2, 1)).norm(dim=1))
            changed.append(content_distance(fake, x.repeat(2, 1, 1, 1)).unflatten(0, (2, -1)))
            right.append(logits.argmax(1).unflatten(0, (2, -1)) == self.y_trg[rows])
        features = torch.cat(found, dim=1).unflatten(1, (pairs, self.n))  # [2, P, n, d]
        C = torch.cat(changed, dim=1).unflatten(1, (pairs, self.n)).mean(dim=(0, 2))  # [P]
        target_of = self.y_trg[:: self.n].tolist()
        S = torch.stack(
            [
                torch.stack([self._style(path[pair], pair, target) for path in features]).mean()
                for pair, target in enumerate(target_of)
            ]
        ).clamp_min(0)  # [P]
        V = self._diversity(subject, by_noise, features[1], target_of)
        per_pair = (1 + S) * (1 + C)
        score = per_pair.mean() + (DIVERSITY_WANTED - V).clamp_min(0)
        movement = torch.cat(moved).mean() / self.target_spread.mean()
        right_share = torch.cat(right, dim=1).float().mean()
        values = (score, S.mean(), C.mean(), V, per_pair.max(), right_share, movement, score)
        assert pairs == N * (N - 1)
        return dict(zip(METRICS, torch.stack(values).tolist(), strict=True))

    def _diversity(self, subject: Subject, by_noise: Tensor, first: Tensor, target_of: list[int]) -> Tensor:
        """V: two contents of each pair under several noises; `first` [P,n,d] are the features under the first."""
        K, contents = len(by_noise), min(2, self.n)
        rows = torch.cat([torch.arange(contents) + p * self.n for p in range(len(target_of))])
        rows = rows.to(self.content.device)
        found = [first[:, :contents].flatten(0, 1)[None]]
        others = []
        for chunk in rows.split(_CHUNK):
            fake = subject.translate(self.content[chunk], by_noise[1:, chunk].flatten(0, 1))
            others.append(self.features(fake).unflatten(0, (K - 1, -1)))
        found.append(torch.cat(others, dim=1))
        features = torch.cat(found).transpose(0, 1)  # [P * contents, K, d]
        each = _distances(features, features).sum(dim=(1, 2)) / (K * (K - 1))
        wanted = self.target_spread[torch.tensor(target_of, device=each.device)].repeat_interleave(contents)
        return (each / wanted).mean().clamp_max(1.0)

    def style(self, translated: Tensor, source_domain: int, target_domain: int) -> float:
        """S of any scaled latents [n,C,H,W] for one ordered pair, not clamped; for tests and reports."""
        found = _in_chunks(self.features, translated)
        pairs = [(i, j) for i in range(len(self.domains)) for j in range(len(self.domains)) if i != j]
        return float(self._style(found, pairs.index((source_domain, target_domain)), target_domain))

    def _style(self, found: Tensor, pair: int, target: int) -> Tensor:
        """S of the features [n,d] of translations, 0-d, not clamped."""
        wanted, range_of = self.target_features[target], self.features.range_of
        beyond = energy_distance(range_of(found), range_of(wanted)) - self.range_nothing[pair]
        share = energy_distance(found, wanted) / self.do_nothing[pair]
        return share + beyond.clamp_min(0) / self.range_spread[target]


def check_holdout(bank: Bank) -> None:
    """Raises `RaystarError` if a domain has too few held-out latents to measure with."""
    for domain, rows in zip(bank.domains, bank.held, strict=True):
        if len(rows) < MIN_HELD_OUT:
            raise RaystarError(
                f"data.holdout: the ruler needs {MIN_HELD_OUT} held-out latents of every domain, '{domain}' has "
                f"{len(rows)}; raise data.holdout or name data.eval_data_root"
            )


def _in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([function(chunk) for chunk in x.split(_CHUNK)])


def features_file(bank: Bank, config: Config, cache_dir: str | Path) -> Path:
    """Where `Ruler.build` keeps the features that it has trained."""
    facts = [_VERSION, bank.digest, list(bank.domains), config.training.latent_scale]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Path(cache_dir) / f"ruler-{key}.safetensors"


def measured_by(bank: Bank, config: Config) -> str:
    """A key of what is measured on what, by which sources and noises: scores under one key can be compared."""
    facts = [_VERSION, bank.digest, list(bank.domains), config.training.latent_scale, config.model.latent_dim]
    facts += [config.ruler.sources, config.ruler.targets, config.ruler.styles]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _cached_features(bank: Bank, config: Config, cache_dir: str | Path | None) -> _Features:
    scale = config.training.latent_scale
    if cache_dir is None:
        return _fresh_features(bank, scale)
    path = features_file(bank, config, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One process of the node makes it, the others wait for the file.
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _read_features(path, bank)
        if found is not None:
            return found
        features = _fresh_features(bank, scale)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        state = {k: v.contiguous() for k, v in sorted(features.state_dict().items())}
        save_file(state, temporary, metadata={"digest": digest(state)})
        os.replace(temporary, path)
    return features


def _read_features(path: Path, bank: Bank) -> _Features | None:
    """Cached features; None if they are not there, or damaged and to be made again."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in sorted(file.keys())}
            recorded = (file.metadata() or {}).get("digest")
        if digest(state) != recorded:  # one bit, and trials would be measured with another ruler
            return None
        features = _Features(bank.shape[0], len(bank.domains))
        features.load_state_dict(state)
        return features.eval().requires_grad_(False)
    # Whatever a damaged file makes its reader raise, it is made again.
    except Exception:
        return None


def _fresh_features(bank: Bank, scale: float) -> _Features:
    rows = [np.sort(np.random.default_rng(_SEED).permutation(r)[:_MAX_TRAIN]) for r in bank.train]
    trained = _train_features([bank.rows(r) * scale for r in rows], len(bank.domains))
    # Laid out in memory as one that is read back: another layout adds in another order, and scores differ by bits.
    features = _Features(bank.shape[0], len(bank.domains))
    features.load_state_dict(trained.state_dict())
    return features.eval().requires_grad_(False)
