"""What is measured on what: the pictures, references and noises, and the key under which scores can be compared."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystar.base.errors import RaystarError
from raystar.config.schema import Config
from raystar.data.bank import Bank
from raystar.pictures import decoder as decoders
from raystar.pictures.autoencoders import CHANNELS
from raystar.ruler.feature_file import file_digest
from raystar.ruler.feature_file import load as load_features

MIN_HELD_OUT = 4
_VERSION = 3  # part of what scores are compared by: raise it when anything that is measured changes
SEED = 20_251_121


def unmeasured(config: Config) -> str | None:
    """Why there is no score of the configuration's latents; None where there is one."""
    if config.model.latent_channels == CHANNELS:
        return None
    return (
        f"model.latent_channels is {config.model.latent_channels}: the ruler looks at pictures, which Stable Diffusion "
        f"1.5's decoder makes of latents of {CHANNELS} channels"
    )


def check(bank: Bank, config: Config) -> None:
    """Refuses data and settings that the ruler cannot measure with.

    Raises:
        RaystarError: a domain with too few latents to measure on, latents that are not of four channels, or a feature
            file that is none.
    """
    if (why := unmeasured(config)) is not None:
        raise RaystarError(f"{why}; there is no score without it")
    if config.ruler.features is not None:
        load_features(config.ruler.features)
    if bank.shape[0] != CHANNELS or min(bank.shape[1:]) < 4:
        raise RaystarError(
            f"{bank.root}: the ruler looks at decoded pictures, and SD1.5's decoder takes latents [4,H,W] of 4 cells "
            f"or more; found {list(bank.shape)}"
        )
    for domain, rows in zip(bank.domains, measured(bank, config), strict=True):
        if len(rows) >= MIN_HELD_OUT:
            continue
        if not config.data.holds_out:
            raise RaystarError(
                f"{bank.root}: the ruler needs {MIN_HELD_OUT} latents of every domain, '{domain}' has {len(rows)}"
            )
        raise RaystarError(
            f"data.holdout: the ruler needs {MIN_HELD_OUT} held-out latents of every domain, '{domain}' has "
            f"{len(rows)}; raise data.holdout, name data.eval_data_root, or set data.holdout=0 to measure on training's"
        )


def measured(bank: Bank, config: Config) -> tuple[NDArray[np.int64], ...]:
    """Rows of each domain that the ruler looks at: what is held out; with `data.holdout` 0, what training may see."""
    return bank.held if config.data.holds_out else bank.train


def caution(config: Config) -> str | None:
    """What to say of scores that nothing was held out for; None of others."""
    if config.data.holds_out:
        return None
    return (
        "data.holdout is 0: the ruler measures on training latents, so the score is of pictures that training saw and "
        "says nothing about new ones"
    )


def labels(config: Config) -> dict[str, str]:
    """Tags of a run whose score is of training latents; none of others."""
    return {} if config.data.holds_out else {"raystar.measured_on": "training latents"}


def measured_by(bank: Bank, config: Config) -> str:
    """A key of what is measured on what, by which sources and noises: scores under one key can be compared."""
    facts = [_VERSION, _decoder_digest(), bank.digest, list(bank.domains), config.training.latent_scale]
    facts += [config.model.latent_dim, config.ruler.sources, config.ruler.targets, config.ruler.styles]
    facts += [] if config.ruler.features is None else [file_digest(config.ruler.features)]
    facts += [] if config.data.holds_out else ["training latents"]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@functools.cache
def _decoder_digest() -> str:
    return hashlib.sha256(decoders.PACKAGED.read_bytes()).hexdigest()[:16]


@dataclass
class Chosen:
    """What is drawn of the latents that are measured: the same in every process."""

    targets: list[Tensor]
    sources: Tensor
    reference: Tensor
    noise: Tensor


def choose(bank: Bank, config: Config) -> Chosen:
    """Draws what is measured of a bank's latents."""
    settings, scale = config.ruler, config.training.latent_scale
    rng = np.random.default_rng(SEED)
    N = len(bank.domains)
    targets = [bank.rows(rng.permutation(rows)[: settings.targets]) * scale for rows in measured(bank, config)]
    n = min(settings.sources, *map(len, targets))
    sources = torch.stack([t[:n] for t in targets])
    drawn = [rng.permutation(len(targets[j]))[:n] for i in range(N) for j in range(N) if i != j]
    noise = rng.standard_normal((settings.styles, N * (N - 1), n, config.model.latent_dim), dtype=np.float32)
    return Chosen(targets, sources, torch.from_numpy(np.stack(drawn)), torch.from_numpy(noise))
