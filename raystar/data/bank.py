"""Latents on disk -> checked, packed, memory-mapped bank -> batches that are a pure function of (seed, epoch, step).

A dataset is `<root>/<domain>/*.pt|*.npy`, one unscaled latent [C,H,W] (or [1,C,H,W]) a file, or one packed
`.safetensors` file with a tensor [n,C,H,W] per domain. Every file is read and checked once; the good ones are
packed into a single memory-mapped file below the cache folder, which every process of the node then shares.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystar.base.errors import RaystarError
from raystar.base.scratch import check_takes
from raystar.config.schema import Config, DataConfig
from raystar.data.holdout import pictures_held
from raystar.data.listing import data_root, list_parts, stat_digest
from raystar.data.pack import Packed, open_packed, pack


@dataclass(frozen=True)
class Bank:
    """All latents of a dataset, packed, and who may see them.

    `latents` is a memory-mapped [n,C,H,W] tensor, unscaled, fp16 or fp32; a process that opens it adds no copy.
    """

    latents: Tensor
    domains: tuple[str, ...]
    names: tuple[str, ...]
    """Name of each row, `<domain>/<path of its file below the domain's folder>`."""
    train: tuple[NDArray[np.int64], ...]
    """Rows of each domain that training may draw from."""
    train_turns: tuple[NDArray[np.int64], ...]
    """Of each row of `train` the place of its picture in the order in which `data.max_samples` takes them."""
    held: tuple[NDArray[np.int64], ...]
    """Rows of each domain that only the ruler and the grids see."""
    digest: str
    """Hash of the latents' content and of the split."""
    root: str
    key: str
    """What `reopen_bank` opens it by."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        return tuple(self.latents.shape[1:])  # type: ignore[return-value]

    def rows(self, rows: NDArray[np.int64]) -> Tensor:
        """[len(rows),C,H,W] float32 unscaled latents."""
        return self.latents[torch.from_numpy(rows)].float()


def open_bank(config: Config, cache_dir: str | Path, *, verbose: bool = True) -> Bank:
    """Opens the dataset of `config.data`, checking and packing it the first time.

    Args:
        cache_dir: where the packed file lies or will lie.
        verbose: say on stderr what takes longer than two seconds.

    Raises:
        RaystarError: a missing or empty folder, or all bad files with their reasons.
    """
    data = config.data
    parts = list_parts(data.data_root, data.domains, "data.data_root", held=False, verbose=verbose)
    if data.eval_data_root is not None:
        _check_apart(data)
        parts += list_parts(data.eval_data_root, data.domains, "data.eval_data_root", held=True, verbose=verbose)
    key = stat_digest(parts, data.domains, config.model.latent_channels)
    cache = Path(cache_dir)
    array_path, index_path = cache / f"latents-{key}.npy", cache / f"latents-{key}.json"
    sizes = [part.size for part in parts]
    packed = open_packed(cache, key, data)
    if packed is None or [len(part.names) for part in packed.parts] != sizes:
        check_takes(cache, "packed latents", "name another folder in data.cache_dir")
        pack(parts, config.model.latent_channels, array_path, index_path, verbose)
        packed = open_packed(cache, key, data)
    if packed is None:
        raise RaystarError(f"{array_path}: cannot be read back after it was written; is the disk sound?")
    return _split(packed, key, data)


def _check_apart(data: DataConfig) -> None:
    """Refuses held-out latents that are found among those to train on as well."""
    root, held = (data_root(str(place)).resolve() for place in (data.data_root, data.eval_data_root))
    if held == root:
        raise RaystarError("data.eval_data_root: is data.data_root itself; held-out latents must be others")
    for domain in data.domains:
        if (root / domain).resolve() in (held, *held.parents):
            raise RaystarError(
                f"data.eval_data_root: {held} lies in the folder of domain '{domain}' below data.data_root, where all "
                "latents are trained on; move it elsewhere"
            )


def reopen_bank(config: Config, cache_dir: str | Path, key: str) -> Bank:
    """Opens the bank that `open_bank` gave as `Bank.key`, whatever has happened to its files since.

    All trials of a sweep see the latents that it began with, and none looks at thousands of files again.

    Raises:
        RaystarError: the packed file is gone or damaged.
    """
    packed = open_packed(Path(cache_dir), key, config.data)
    if packed is None:
        raise RaystarError(
            f"{Path(cache_dir) / f'latents-{key}.npy'}: the packed latents are gone or damaged; start again"
        )
    return _split(packed, key, config.data)


def _split(packed: Packed, key: str, data: DataConfig) -> Bank:
    train: list[NDArray[np.int64]] = []
    train_turns: list[NDArray[np.int64]] = []
    held: list[NDArray[np.int64]] = []
    names: list[str] = []
    for part in packed.parts:
        rows = np.arange(len(part.names)) + len(names)
        names += part.names
        if part.held:
            held.append(rows)
            continue
        turns = np.array(part.turns, np.int64)
        kept = turns < (0 if data.eval_data_root is not None else pictures_held(turns, data.holdout))
        train.append(rows[~kept])
        train_turns.append(turns[~kept])
        if data.eval_data_root is None:
            held.append(rows[kept])
        if not len(train[-1]):
            domain = data.domains[part.domain]
            raise RaystarError(f"data: domain '{domain}' has {len(rows)} latents, none left for training")
    # The packed digest is of numbers alone, and latents of 8x12 may have those of 12x8. Square ones keep the digest
    # that they always had.
    H, W = packed.latents.shape[2:]
    shape = [] if H == W else [[H, W]]
    facts = [packed.digest, [h.tolist() for h in held], *shape]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Bank(
        packed.latents, data.domains, tuple(names), tuple(train), tuple(train_turns), tuple(held), digest,
        data.data_root, key,
    )  # fmt: skip
