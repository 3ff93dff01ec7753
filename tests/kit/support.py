"""What several test files need: where the shared data lies, small latents and small configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raystar.config.load import from_mapping, override
from raystar.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
"""Data beside the repository that cannot ship with it; whatever reads it is marked `shared` (tests/conftest.py)."""

TINY: dict[str, Any] = {
    "model.base_dim": 8,
    "model.n_res_blocks": 1,
    "model.style_dim": 6,
    "model.latent_dim": 5,
    "model.mapping_hidden_dim": 12,
    "model.mapping_shared_layers": 2,
    "training.batch_size": 4,
    "training.epoch_size": 16,
    "training.epochs": 2,
    "training.use_amp": False,
    "training.device": "cpu",
    "training.progress_style": "off",
    "data.holdout": 0.25,
    "ruler.sources": 3,
}


def write_latents(
    root: Path,
    domains: tuple[str, ...] = ("a", "b", "c"),
    count: int = 20,
    size: int | tuple[int, int] = 16,
    seed: int = 3,
) -> Path:
    """Folders of random latents that differ by domain in mean and grain, so that a ruler can tell them apart.

    Args:
        size: of both sides, or height and width.
    """
    sides = size if isinstance(size, tuple) else (size, size)
    rng = np.random.default_rng(seed)
    for number, domain in enumerate(domains):
        folder = root / domain
        folder.mkdir(parents=True)
        for i in range(count):
            latent = rng.standard_normal((4, *sides)) * (3 + number) + 2 * number
            np.save(folder / f"picture{i:02d}x.npy", latent.astype(np.float16))
    return root


def tiny_config(root: Path | str, domains: tuple[str, ...] = ("a", "b", "c"), **changed: Any) -> Config:
    """A configuration that trains in a second; keyword arguments use `__` for the dot."""
    values = TINY | {"data.data_root": str(root), "data.domains": list(domains)}
    values |= {key.replace("__", "."): value for key, value in changed.items()}
    return override(from_mapping({}, "tiny"), values)
