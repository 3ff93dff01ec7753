"""The checkpoints that trials start from (`checkpoint.init_from`): seen to fit, and kept as they are for the sweep."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raystar.base.errors import RaystarError
from raystar.base.files import is_file
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.search.space import Space
from raystar.training.resume import initial_state

logger = logging.getLogger(__name__)

KEY = "checkpoint.init_from"


def keep_starts(
    space: Space,
    config: Config,
    known: Mapping[str, Mapping[str, Any]],
    cache: Path,
    before: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Copies every checkpoint that a trial may start from into the cache; its file's name there, by its path.

    Trials that are resumed later, or run on another node, start from the same bits.

    Args:
        known: the values of the trials that are known, by name.
        before: the record of the sweep that is resumed; a file that is gone since has its copy.

    Raises:
        RaystarError: a file is not there, or does not fit a trial's networks.
    """
    paths = [config.checkpoint.init_from, *(values.get(KEY, config.checkpoint.init_from) for values in known.values())]
    paths += space.space[KEY].values if KEY in space.space else []
    kept = (before or {}).get("starts", {})
    starts = {path: _keep(path, cache, kept.get(path)) for path in dict.fromkeys(paths) if path is not None}
    _check_fit(space, config, known, {path: cache / name for path, name in starts.items()})
    return starts


def _keep(path: str, cache: Path, kept: str | None) -> str:
    file = Path(path).expanduser()
    if not is_file(file):
        if kept is None or not (cache / kept).is_file():
            raise RaystarError(f"{KEY}: {path}: expected a checkpoint, found nothing (looked for {file.absolute()})")
        logger.warning(f"{KEY}: {path} is not there any more; the sweep has a copy")
        return kept
    with file.open("rb") as opened:
        name = f"start-{hashlib.file_digest(opened, 'sha256').hexdigest()[:16]}.pt"
    if not (cache / name).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f".{name}.{os.getpid()}"
        shutil.copyfile(file, temporary)
        os.replace(temporary, cache / name)
    return name


def _check_fit(space: Space, config: Config, known: Mapping[str, Mapping[str, Any]], files: Mapping[str, Path]) -> None:
    """Makes each trial's first networks, once for all trials that have the same."""
    trials: Iterable[tuple[str, Mapping[str, Any]]] = known.items() if known else [("the configuration", {})]
    seen: set[tuple[Any, ...]] = set()
    for name, values in trials:
        trial = override(config, values, space.source)
        path = trial.checkpoint.init_from
        same = (path, trial.model, trial.training.latent_scale, trial.checkpoint)
        if path is None or same in seen:
            continue
        seen.add(same)
        try:
            initial_state(trial, "cpu", init_from=files[path])
        except RaystarError as error:
            raise RaystarError(f"{KEY}: {name}: {error}") from None
