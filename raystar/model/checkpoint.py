"""Checkpoints: written whole or not at all, checked when read, in the form that users already have.

A checkpoint is a dictionary with `epoch`, `G`, `F`, `E`, `D` (state dictionaries), `opt_g`, `opt_d`, `config`
and, from raystar, `global_step`, `scaler`, `metrics`, `raystar`, where `training.ema_epochs` is on `ema` (the averages
of `G`, `F` and `E`), and a `digest` over all tensors. Files of the trainer that users come from are continued just as
well (`model.users`).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from raystar.base import torch_file as pt
from raystar.base.errors import RaystarError
from raystar.base.files import is_file, is_folder, looked_for
from raystar.config.assignment import assignment
from raystar.config.load import get_value
from raystar.config.schema import Config
from raystar.model import users
from raystar.model.networks import AVERAGED, NAMES

logger = logging.getLogger(__name__)


def networks_of(networks: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The entries `names` of a checkpoint; None for what it lacks."""
    return {name: networks.get(name) for name in names}


def shown_weights(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The weights, by network, of the model that a checkpoint holds: averages where it has any, and D."""
    return {**networks_of(checkpoint, NAMES), **checkpoint.get("ema", {})}


def check_function(checkpoint: Mapping[str, Any], config: Config, source: str) -> None:
    """Refuses weights that fit the networks of `config` and mean another function, such as another order of domains.

    Raises:
        RaystarError: all that differs and no key says is meant: there, here, and what to do.
    """
    meant = {
        "data.domains": config.checkpoint.map_domains,
        "training.latent_scale": config.checkpoint.other_latent_scale,
    }
    there = users.functions_of(checkpoint)
    here = {key: get_value(config, key) for key in there}
    if here.get("model.encoder_groups") == config.model.num_groups:
        here["model.encoder_groups"] = None  # which says the same
    differing = {key: value for key, value in there.items() if value != here[key] and not meant.get(key, False)}
    if config.model.norm != "adagn" and "model.norm" in differing:
        differing = {key: value for key, value in differing.items() if "groups" not in key}
    if not differing:
        return
    settings = {key: assignment(key, value) for key, value in differing.items()}
    words = [
        f"{setting.replace('=', ' ', 1)} there, {assignment(key, here[key]).partition('=')[2]} now"
        for key, setting in settings.items()
    ]
    remedy = f"set {' and '.join(settings.values())}"
    if "data.domains" in differing:
        remedy += ", or give each domain what the file has of its name with --map-domains (checkpoint.map_domains=true)"
    if "training.latent_scale" in differing:
        remedy += ", or say that the other scale is meant with checkpoint.other_latent_scale=true"
    raise RaystarError(f"{source}: does not fit the configuration: {'; '.join(words)}; {remedy}")


def save(path: str | Path, checkpoint: Mapping[str, Any], *, with_digest: bool = True) -> None:
    """Writes `checkpoint` to a temporary name, flushes it to the disk and renames it, with a digest inside."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary, checkpoint, with_digest=with_digest)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, checkpoint: Mapping[str, Any], *, with_digest: bool = True) -> None:
    """Writes `checkpoint` with a digest inside and flushes it to the disk; whoever calls it gives it its name.

    Raises:
        OSError: the disk is full, or the like.
    """
    with path.open("wb") as file:
        kept = _Reasons(file)
        try:
            extra = {"digest": digest(checkpoint)} if with_digest else {}
            torch.save({**checkpoint, **extra}, kept)  # type: ignore[arg-type]
        except RuntimeError:  # torch's writer hides the reason behind its own
            if kept.reason is not None:
                raise kept.reason from None
            raise
        file.flush()
        os.fsync(file.fileno())


class _Reasons:
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.reason: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.reason = error
            raise

    def flush(self) -> None:
        self._file.flush()


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, without running code from it; the names in it are raystar's afterwards.

    Raises:
        RaystarError: missing, truncated, damaged, not a checkpoint, or of networks that cannot be told.
    """
    path = Path(path)
    if not is_file(path):
        found = "a folder" if is_folder(path) else f"nothing{looked_for(path)}"
        raise RaystarError(f"{path}: expected a checkpoint, found {found}")
    try:
        checkpoint = pt.read(path)
    except ValueError as error:
        raise RaystarError(f"{path}: {error}") from None
    if not isinstance(checkpoint, dict) or any(name not in checkpoint for name in NAMES):
        raise RaystarError(f"{path}: expected a dictionary with the networks {', '.join(NAMES)}")
    _drop_prefixes(checkpoint, NAMES, f"{path}: network")
    if "ema" in checkpoint:
        if not isinstance(checkpoint["ema"], dict) or checkpoint["ema"].keys() != set(AVERAGED):
            raise RaystarError(f"{path}: ema: expected the averages of {', '.join(AVERAGED)}")
        _drop_prefixes(checkpoint["ema"], AVERAGED, f"{path}: ema: network")
    recorded = checkpoint.pop("digest", None)
    if recorded is not None and not _matches(checkpoint, recorded):
        raise RaystarError(f"{path}: damaged (its content does not match its digest)")
    if "raystar" not in checkpoint:
        users.adopt(checkpoint, str(path))
    return checkpoint


def _drop_prefixes(networks: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Networks that were saved from compiled modules carry the wrapper's name."""
    for name in names:
        if not isinstance(networks[name], dict) or not all(isinstance(key, str) for key in networks[name]):
            raise RaystarError(f"{where} {name} holds no weights")
        networks[name] = users.without_wrappers(networks[name], f"{where} {name}")


def _matches(checkpoint: Mapping[str, Any], recorded: Any) -> bool:
    try:
        return isinstance(recorded, str) and digest(checkpoint) == recorded
    except (RuntimeError, TypeError):  # tensors that have no bytes of their own are none that were saved with a digest
        return False


def load_latest(paths: list[Path]) -> tuple[dict[str, Any], Path]:
    """The first of `paths` (newest first) that loads; what was passed over is named on stderr.

    Raises:
        RaystarError: none loads; the reason of the newest.
    """
    first: RaystarError | None = None
    for path in paths:
        try:
            checkpoint = load(path)
        except RaystarError as error:
            first = first or error
            continue
        if first is not None:
            logger.warning(f"{first}; going back to {path}")
        return checkpoint, path
    raise first or RaystarError("no checkpoint was found")


def digest(checkpoint: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes of every tensor, and over every plain value."""
    hasher = hashlib.sha256()
    for name, value in leaves("", checkpoint):
        if isinstance(value, Tensor):
            hasher.update(f"{name}|{value.dtype}|{tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().flatten()
            hasher.update(flat.view(torch.uint8).numpy().data)
        else:
            hasher.update(f"{name}|{value!r}".encode())
    return hasher.hexdigest()


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value inside `value` with its path; a checkpoint's own digest is left out."""
    if isinstance(value, Mapping):
        for key in value:
            if name or key != "digest":
                yield from leaves(f"{name}.{key}", value[key])
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from leaves(f"{name}.{number}", item)
    else:
        yield name, value
