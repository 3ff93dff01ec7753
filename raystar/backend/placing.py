"""A sweep's data on every node that trains: placed once, fetched where it is missing."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raystar.backend.nodes import on_every_node
from raystar.base.errors import RaystarError
from raystar.base.files import cache_dir as own_cache
from raystar.base.limits import PLACING
from raystar.base.locks import hold
from raystar.base.secrets import redact
from raystar.base.storage import Storage
from raystar.config.load import from_mapping
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.data.listing import data_root


@dataclass(frozen=True)
class Placed:
    """Files that every node's cache folder must hold, and where a node that lacks them finds them."""

    storage: str
    """Path or URI of the folder that holds copies."""
    files: tuple[tuple[str, int, str], ...]
    """Name, size and SHA-256 of each."""
    driver_cache: str
    """The driver's cache folder: also a node's, where it sees those files there."""
    named_cache: str | None
    """`data.cache_dir`."""

    def folder(self) -> Path:
        """The cache folder of the node that asks."""
        if self.named_cache is not None:
            return Path(self.named_cache).expanduser()
        driver = Path(self.driver_cache)
        return driver if self.held(driver) else own_cache()

    def held(self, folder: Path) -> bool:
        """Whether a folder holds all files, going by their sizes: each was checked before it got its name."""
        try:
            return all((folder / name).stat().st_size == size for name, size, _ in self.files)
        except OSError:
            return False


def place_data(config: Mapping[str, Any], bank: Bank, cache: Path, others: Iterable[Path], storage: Storage) -> Placed:
    """Copies the packed latents and other files of the cache into the storage, and has every node take them.

    Args:
        config: the configuration, as a mapping.
        cache: this process's cache folder, where `bank` was opened.
        others: more files in it that must be the same bits on all nodes: the ruler's features.

    Raises:
        RaystarError: a node holds other latents under `data.data_root`, or cannot take the files.
    """
    paths = [cache / f"latents-{bank.key}.npy", cache / f"latents-{bank.key}.json", *others]
    placed = Placed(
        storage.uri,
        tuple((path.name, path.stat().st_size, _sha256(path)) for path in paths),
        str(cache),
        from_mapping(config, "sweep").data.cache_dir,
    )
    for path in paths:
        storage.fill(path.name, functools.partial(shutil.copyfile, path))
    on_every_node(_place_here, placed, config, bank.key, bank.digest, what="placing the latents", wait=PLACING)
    return placed


def ensure_local(placed: Placed, *, thorough: bool = False) -> Path:
    """The cache folder of this node, which holds all files afterwards; what is missing is copied from the storage.

    Args:
        thorough: read the files that are there, and replace those that are not as they should be.

    Raises:
        RaystarError: what the storage holds is not what was placed there.
    """
    folder = placed.folder()
    if not thorough and placed.held(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # One process of the node copies, the others wait for it.
    with hold(folder / "placing.lock"):
        for name, size, digest in placed.files:
            path = folder / name
            present = path.is_file() and path.stat().st_size == size
            if not present or (thorough and _sha256(path) != digest):
                _fetch(Storage(placed.storage), name, digest, path)
    return folder


def _fetch(storage: Storage, name: str, digest: str, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with storage.fetched(name) as source:
            shutil.copyfile(source, temporary)
        actual = _sha256(temporary)
        if actual != digest:
            raise RaystarError(
                f"{redact(storage.at(name))}: arrived with SHA-256 {actual[:16]}, expected {digest[:16]}"
            )
        os.replace(temporary, path)
    except FileNotFoundError:
        raise RaystarError(f"{redact(storage.at(name))}: is gone from the storage; start again") from None
    finally:
        temporary.unlink(missing_ok=True)


def _place_here(placed: Placed, mapping: Mapping[str, Any], key: str, digest: str) -> str:
    """What each node does in `place_data`; its cache folder."""
    config = from_mapping(mapping, "sweep")
    folder = placed.folder()
    if folder != Path(placed.driver_cache) or not placed.held(folder):
        _check_roots(config, digest, key, folder)
    return str(ensure_local(placed, thorough=True))


def _check_roots(config: Config, digest: str, key: str, folder: Path) -> None:
    """Latents that this node has are the driver's; packed here, they need not be copied."""
    roots = [config.data.data_root, *([config.data.eval_data_root] if config.data.eval_data_root is not None else [])]
    if not all(data_root(root).exists() for root in roots):
        return
    bank = open_bank(config, folder, verbose=False)
    if bank.digest != digest:
        raise RaystarError(
            f"data.data_root: {data_root(roots[0])} holds other latents (digest {bank.digest}) than the driver's "
            f"({digest}); make them the same, or move them away: the driver's are then copied"
        )
    for suffix in ("npy", "json"):
        with suppress(FileExistsError):
            os.link(folder / f"latents-{bank.key}.{suffix}", folder / f"latents-{key}.{suffix}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
