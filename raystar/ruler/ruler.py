"""The score that loss weights cannot move: held-out pictures translated into every other domain, and looked at.

Losses cannot rank trials whose weights define them. The ruler decodes translations, by the decoder that comes with
raystar and at half its size, and asks three questions of the pictures, with the same sources, references and noise in
every trial and epoch. It never looks at latents: there the discriminator looks too, and what fools one fools the other.

- S, style: is the set of translations distributed like held-out pictures of the target domain? Per ordered pair of
  domains the unbiased energy distance (Szekely and Rizzo 2013) in `picture_stats.statistics`, as a share of the
  distance between source and target. Doing nothing is 1, real pictures of the target are 0 on average.
- C, content: is the layout of the source still there? `picture_stats.content_lost`: 0 for doing nothing, about 0.95 for
  another picture. Strokes, outlines and new colours count little, a tone that jumps from picture to picture does.
- V, diversity: do different noises give different translations of a picture? Their mean distance over that of two real
  pictures of the domain.

`score = mean over pairs of (0.1 + S)(1 + C) + I, plus (0.2 - V)(1 - S) where V lacks and V - 1 where it is too much`.
I is what keeps a model that ignores its sources from winning by handing out pictures of the target: nothing up to
0.6 of the C of unrelated pictures, and 1 from 0.85 of it. Lower is better: 0.1 is perfect, doing nothing scores 1.1.
The form is ArtFID's (Wright and Ommer 2022), whose first factor is far above 1, so that style counts in full; hence
0.1.

What it cannot see: anything finer than two pixels of 256, faces or things as such, beauty.

Shapes: n sources a pair, P ordered pairs, N domains, d features, C x H x W latents, S style code, Z noise.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raystar.base.errors import RaystarError, show
from raystar.base.locks import hold
from raystar.base.metrics import RULER
from raystar.base.scratch import check_takes
from raystar.config.schema import Config
from raystar.data.bank import Bank
from raystar.model.checkpoint import digest
from raystar.model.networks import Nets
from raystar.ruler.distances import channel_transfer, distances, energy_distance, mean_pairwise
from raystar.ruler.eye import CHUNK, Eye
from raystar.ruler.features import Features
from raystar.ruler.outlook import progress
from raystar.ruler.picture_stats import content_lost, statistics
from raystar.ruler.samples import SEED, check, choose, measured_by
from raystar.ruler.subjects import NetsSubject, Subject

NOTHING, TRANSFER = "nothing", "transfer"
"""Keys of `Ruler.references`."""

UNMOVED = 0.005
"""A model whose `movement` is below this cannot be distinguished from doing nothing. Generators that stay the
identity have up to 0.002, by rounding; those that moved later had more at a fifth of their run
(benchmarks/RESULTS.md)."""
_PERFECT = 0.1
_DIVERSITY_WANTED = 0.2
_IGNORED_FROM, _IGNORED_AT = 0.6, 0.85  # of what unrelated pictures lose; other renderings of one scene lose half of it
_ALIKE = "the ruler has nothing to measure by: all latents of {} give one and the same picture"
_LEAST_CONTENTS = 12  # pictures whose diversity is measured
_MAX_TRAIN = 96  # training pictures a domain that standardisation and classifier see


# -- the ruler -------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What is kept of pictures."""

    features: Tensor
    """[B,d]."""
    sketch: Tensor
    """[B,G,G]."""


@dataclass
class Ruler:
    """A built ruler; `measure` is a pure function of the model."""

    features: Features
    eye: Eye
    scale: float
    """Of the latents that networks see, to unscaled ones."""
    domains: tuple[str, ...]
    sources: Tensor
    """[N,n,C,H,W] scaled contents of each domain."""
    source_features: Tensor
    """[N,n,d]."""
    source_sketches: Tensor
    """[N,n,G,G]."""
    targets: list[Tensor]
    """Scaled held-out latents of each domain [m,C,H,W]: the references."""
    target_features: list[Tensor]
    """[m,d] of each domain."""
    reference: Tensor
    """[P,n] which row of the target domain's `targets` is the reference."""
    noise: Tensor
    """[styles,P,n,Z]."""
    target_spread: Tensor
    """[N] mean distance of two real pictures of a domain."""
    do_nothing: Tensor
    """[P] energy distance between sources and targets."""
    unrelated: Tensor
    """[P] the content that other pictures of the target domain lose."""
    references: dict[str, dict[str, float]] = field(default_factory=dict)
    """The metrics, as `eval/NAME`, of two things that no model is needed for: `NOTHING`, the untouched sources, and
    `TRANSFER`, the sources with the channel means and deviations of their references (AdaIN on latents, Huang and
    Belongie 2017). Diversity and what it does to the score are left out of both."""

    @classmethod
    def build(cls, bank: Bank, config: Config, cache_dir: str | Path | None = None) -> Ruler:
        """Looks at the bank's pictures (seconds), or reads from `cache_dir` what was seen of them.

        Raises:
            RaystarError: a domain with too few held-out latents, or with such as look all the same, latents that no
                SD1.5 decoder takes, a feature file that is none, or a cache that cannot be written.
        """
        check(bank, config)
        if cache_dir is None:
            return _fresh(cls, bank, config)
        path = ruler_file(bank, config, cache_dir)
        if (ruler := _read(path, bank, config)) is not None:
            return ruler
        check_takes(path.parent, "the ruler", "name another folder in data.cache_dir")
        path.parent.mkdir(parents=True, exist_ok=True)
        # One process of the node makes it, the others wait for the file.
        with hold(path.with_suffix(".lock")):
            ruler = _read(path, bank, config)
            if ruler is None:
                ruler = _fresh(cls, bank, config)
                _write(ruler, path)
        return ruler

    def to(self, device: torch.device) -> Ruler:
        """Moves everything that `measure` reads to `device`; returns itself."""
        self.features.to(device)
        self.eye.to(device)
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        self.targets = [t.to(device) for t in self.targets]
        self.target_features = [t.to(device) for t in self.target_features]
        return self

    def measure(self, nets: Nets, config: Config) -> dict[str, float]:
        """The metrics `base.metrics.RULER` of a model, in the precision it trains in."""
        return self.measure_subject(NetsSubject(nets, config))

    @torch.inference_mode()
    def measure_subject(self, subject: Subject) -> dict[str, float]:
        """The metrics `base.metrics.RULER` of anything that translates.

        Of each pair's n sources one half is translated by reference, the other by noise: two translations of one
        source would lie closer together than two pictures of a domain do, and the unbiased distance relies on that.
        """
        n, by_reference = self.sources.shape[1], self.sources.shape[1] // 2
        codes = [  # [m,S] a domain: each reference is encoded once, however many pairs use it
            torch.cat([subject.encode(x, torch.full((len(x),), y, device=x.device)) for x in t.split(CHUNK)])
            for y, t in enumerate(self.targets)
        ]
        fakes = []
        for pair, (source, target) in enumerate(self.pairs):
            s_ref = codes[target][self.reference[pair, :by_reference]]
            s_noise = self._sampled(subject, self.noise[0, pair, by_reference:], target)
            styles = torch.cat([s_ref, s_noise])
            x = self.sources[source]
            fakes.append(torch.cat([subject.translate(x[r], styles[r]) for r in torch.arange(n).split(CHUNK)]))
        seen = self._look(torch.cat(fakes))
        values = self._judge(seen, self._diversity(subject, seen)) | {"outlook": self._outlook(fakes)}
        return {name: values[name].item() for name in RULER}

    @torch.inference_mode()
    def measure_pictures(self, translations: Tensor) -> dict[str, float]:
        """The metrics of pictures made in any way, but for diversity and what it does to the score, and for outlook.

        Args:
            translations: [P*n,3,4H,4W] in [0,1], of the sources (`source_pictures`) in the order of `pairs`.
        """
        raw, sketches = zip(*map(self.eye.see, translations.split(CHUNK)), strict=True)
        values = self._judge(_Seen(self.features(torch.cat(raw)), torch.cat(sketches)), None)
        return {name: values[name].item() for name in RULER if name in values}

    @torch.inference_mode()
    def source_pictures(self) -> Tensor:
        """[P*n,3,4H,4W] in [0,1]: each pair's sources as they are."""
        each = [torch.cat(list(self.eye.pictures(x / self.scale))) for x in self.sources]
        return torch.cat([each[source] for source, _ in self.pairs])

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Source and target domain of each ordered pair."""
        N = len(self.domains)
        return [(i, j) for i in range(N) for j in range(N) if i != j]

    def _sampled(self, subject: Subject, noise: Tensor, target: int) -> Tensor:
        return subject.sample(noise, torch.full((len(noise),), target, device=noise.device))

    def _look(self, scaled: Tensor) -> _Seen:
        """Features and sketches of the pictures of scaled latents [B,C,H,W]."""
        raw, sketches = zip(*self.eye.look(scaled / self.scale), strict=True)
        return _Seen(self.features(torch.cat(raw)), torch.cat(sketches))

    def _judge(self, seen: _Seen, diversity: Tensor | None) -> dict[str, Tensor]:
        """The metrics, each 0-d, of the translations of all pairs; without `outlook`."""
        P, n = self.reference.shape
        features, sketches = seen.features.unflatten(0, (P, n)), seen.sketch.unflatten(0, (P, n))
        source, target = (torch.tensor(side, device=features.device) for side in zip(*self.pairs, strict=True))
        S = torch.stack([self._style(features[pair], pair) for pair in range(P)]).clamp_min(0)  # [P]
        C = content_lost(sketches, self.source_sketches[source])  # [P]
        ignored = ((C / self.unrelated - _IGNORED_FROM) / (_IGNORED_AT - _IGNORED_FROM)).clamp(0, 1)
        per_pair = (_PERFECT + S) * (1 + C) + ignored
        score = per_pair.mean()
        moved = (features - self.source_features[source]).norm(dim=2).mean(dim=1) / self.target_spread[source]  # [P]
        right = self.features.classify(seen.features).argmax(dim=1) == target.repeat_interleave(n)
        metrics = {"style": S.mean(), "content": C.mean(), "worst_pair": per_pair.max()}
        metrics |= {"accuracy": right.float().mean(), "movement": moved.mean()}
        if diversity is not None:
            metrics["diversity"] = diversity
            score = score + (_DIVERSITY_WANTED - diversity).clamp_min(0) * (1 - S.mean()).clamp_min(0)
            score = score + (diversity - 1).clamp_min(0)
        return metrics | {"score": score}

    def _outlook(self, fakes: list[Tensor]) -> Tensor:
        """1 - how far scaled translations [n,C,H,W], one tensor a pair, have come; 0-d."""
        gone = [
            progress(fake, self.sources[source], self.targets[target])
            for fake, (source, target) in zip(fakes, self.pairs, strict=True)
        ]
        return 1 - torch.stack(gone).mean()

    def _diversity(self, subject: Subject, first: _Seen) -> Tensor:
        """V: some contents of each pair under several noises; the first noise's are among what was seen."""
        P, n = self.reference.shape
        contents = min(n - n // 2, -(-_LEAST_CONTENTS // P))
        kept = first.features.unflatten(0, (P, n))[:, -contents:]  # [P,k,d]: by noise
        fakes = []
        for pair, (source, target) in enumerate(self.pairs):
            x = self.sources[source, -contents:]
            fakes += [subject.translate(x, self._sampled(subject, z, target)) for z in self.noise[1:, pair, -contents:]]
        others = self._look(torch.cat(fakes)).features.unflatten(0, (P, len(self.noise) - 1, contents))
        features = torch.cat([kept[:, None], others], dim=1).transpose(1, 2)  # [P,k,styles,d]
        K = features.shape[2]
        each = distances(features, features).sum(dim=(2, 3)) / (K * (K - 1))  # [P,k]
        targets = torch.tensor([target for _, target in self.pairs], device=each.device)
        return (each / self.target_spread[targets][:, None]).mean()

    @torch.inference_mode()
    def style(self, translated: Tensor, source_domain: int, target_domain: int) -> float:
        """S of any scaled latents [n,C,H,W] for one ordered pair, not clamped; for tests and reports."""
        pair = self.pairs.index((source_domain, target_domain))
        return float(self._style(self._look(translated).features, pair))

    def _style(self, features: Tensor, pair: int) -> Tensor:
        """S of the features [n,d] of translations, 0-d, not clamped."""
        target = self.pairs[pair][1]
        nothing = self.do_nothing[pair]
        # Domains that look the same would divide by nothing, or less; a twentieth of the spread is the floor.
        unit = nothing.maximum(0.05 * self.target_spread[target])
        return 1 + (energy_distance(features, self.target_features[target]) - nothing) / unit


# -- building --------------------------------------------------------------------------------------


@torch.inference_mode()
def _fresh(cls: type[Ruler], bank: Bank, config: Config) -> Ruler:
    with _one_thread():
        eye, scale = Eye(config.ruler.features), config.training.latent_scale
        rng = np.random.default_rng(SEED)
        train = [bank.rows(np.sort(rng.permutation(rows)[:_MAX_TRAIN])) for rows in bank.train]
        raw = [torch.cat([stats for stats, _ in eye.look(x)]) for x in train]
        chosen = choose(bank, config)
        for domain, target in zip(bank.domains, chosen.targets, strict=True):
            if (target == target[0]).all():
                raise RaystarError(f"{bank.root}: {_ALIKE.format(f'domain {show(domain)}')}")
        try:
            features = Features.fit(raw, _own_statistics(bank))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the stubs forget it
            raise RaystarError(f"{bank.root}: {_ALIKE.format('each domain')}") from None
        pairs = [(i, j) for i in range(len(bank.domains)) for j in range(len(bank.domains)) if i != j]
        looks = [list(zip(*eye.look(x / scale), strict=True)) for x in chosen.targets]
        seen = [_Seen(features(torch.cat(raw)), torch.cat(sketches)) for raw, sketches in looks]
        n = chosen.sources.shape[1]
        spread = torch.stack([mean_pairwise(s.features) for s in seen])
        nothing = torch.stack([energy_distance(seen[i].features[:n], seen[j].features) for i, j in pairs])
        sketches = torch.stack([s.sketch[:n] for s in seen])
        # Of each pair what other pictures lose, over all ways to put the two domains' pictures side by side in a ring.
        rings = ([content_lost(sketches[j].roll(k, 0), sketches[i]) for k in range(n)] for i, j in pairs)
        unrelated = torch.stack([torch.stack(ring).mean() for ring in rings])
        ruler = cls(
            features, eye, scale, bank.domains, chosen.sources, torch.stack([s.features[:n] for s in seen]),
            sketches, chosen.targets, [s.features for s in seen], chosen.reference, chosen.noise, spread, nothing,
            unrelated,
        )  # fmt: skip
        ruler.references = _references(ruler)
    return ruler


def _own_statistics(bank: Bank) -> int:
    """How many `statistics` a picture of this size has."""
    return statistics(torch.zeros(1, 3, 4 * bank.shape[1], 4 * bank.shape[2])).shape[1]


def _references(ruler: Ruler) -> dict[str, dict[str, float]]:
    untouched, transferred = [], []
    for pair, (source, target) in enumerate(ruler.pairs):
        untouched.append(ruler.sources[source])
        transferred.append(channel_transfer(ruler.sources[source], ruler.targets[target][ruler.reference[pair]]))
    references = {}
    for name, fakes in ((NOTHING, untouched), (TRANSFER, transferred)):
        measured = ruler._judge(ruler._look(torch.cat(fakes)), None) | {"outlook": ruler._outlook(fakes)}
        references[name] = {f"eval/{key}": measured[key].item() for key in RULER if key in measured}
    return references


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, so that a ruler is the same bits on any number of cores; and no cores taken from others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# -- the cache -------------------------------------------------------------------------------------

_KEPT = ("source_features", "source_sketches", "target_spread", "do_nothing", "unrelated")


def ruler_file(bank: Bank, config: Config, cache_dir: str | Path) -> Path:
    """Where `Ruler.build` keeps what it has seen."""
    return Path(cache_dir) / f"ruler-{measured_by(bank, config)}.safetensors"


def _write(ruler: Ruler, path: Path) -> None:
    state = {name: getattr(ruler, name) for name in _KEPT}
    state |= {f"features.{name}": value for name, value in ruler.features.state_dict().items()}
    state |= {f"target_features.{y}": value for y, value in enumerate(ruler.target_features)}
    state = {name: value.contiguous() for name, value in sorted(state.items())}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    references = json.dumps(ruler.references)
    facts = {"digest": digest(state | {"references": references}), "references": references}
    save_file(state, temporary, metadata=facts)
    os.replace(temporary, path)


def _read(path: Path, bank: Bank, config: Config) -> Ruler | None:
    """A cached ruler; None if it is not there, or damaged and to be made again."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in sorted(file.keys())}
            facts = file.metadata() or {}
        if (
            digest(state | {"references": facts["references"]}) != facts["digest"]
        ):  # one bit, and trials would be measured with another ruler
            return None
        features = Features(len(bank.domains), _own_statistics(bank), len(state["features.mean"]))
        features.load_state_dict({name.partition(".")[2]: v for name, v in state.items() if name[:9] == "features."})
        chosen = choose(bank, config)
        return Ruler(
            features=features.eval().requires_grad_(False),
            eye=Eye(config.ruler.features),
            scale=config.training.latent_scale,
            domains=bank.domains,
            sources=chosen.sources,
            targets=chosen.targets,
            target_features=[state[f"target_features.{y}"] for y in range(len(bank.domains))],
            reference=chosen.reference,
            noise=chosen.noise,
            references=json.loads(facts["references"]),
            **{name: state[name] for name in _KEPT},
        )
    # Whatever a damaged file makes its reader raise, it is made again.
    except Exception:
        return None
