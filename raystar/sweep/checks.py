"""What must hold of a request's latents, disk and trials before anything starts."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from raystar.base.errors import RaystarError
from raystar.base.machine import usable_cpus
from raystar.base.scratch import check_takes
from raystar.base.secrets import in_a_line, redact
from raystar.base.storage import Storage
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import Bank
from raystar.data.batches import check_epoch
from raystar.pictures.codec import check_codec
from raystar.ruler.samples import caution, unmeasured
from raystar.search.space import SEED, Space, hashable
from raystar.sweep.disk import check_space, checkpoint_bytes, needed_bytes

logger = logging.getLogger(__name__)


def check_latents(
    config: Config, space: Space, points: Iterable[Mapping[str, Any]], bank: Bank, *, resumed: bool
) -> None:
    """Refuses trials whose epochs would have no step; says what their latents do to scores.

    Raises:
        RaystarError: an epoch has less than a batch.
    """
    for point in (*points, {}):
        check_epoch(bank, override(config, point, space.source))
    if space.purpose.models and (note := caution(config)):
        logger.warning(note)
    if not resumed and "data.max_samples" in space.keys and config.training.epoch_size is None:
        logger.warning(
            f"{space.source}: space: data.max_samples: without training.epoch_size an epoch of fewer latents has fewer "
            "steps; set it, so that trials differ in their latents alone"
        )


def check_pictures(config: Config) -> None:
    """Refuses latents that the ruler cannot look at, and a VAE that is not for them, before they are read.

    Raises:
        RaystarError: what does not fit.
    """
    if (why := unmeasured(config)) is not None:
        raise RaystarError(f"{why}; a sweep ranks trials by it: train single runs, which go without a score")
    check_codec(config)


def check_room(config: Config, space: Space, storage: Storage, cpus: int, trials: int) -> None:
    """Refuses a storage that takes no files, or has no room for them, and finals of seeds that there are not.

    Raises:
        RaystarError: nothing can be written, too little is free, or the last seed would be too large a number.
    """
    at_a_time = max(1, usable_cpus() // (cpus * space.resources.workers))
    top, seeds = space.finalists.top, space.finalists.seeds
    final = top + 1 if top and seeds else 0  # with the baseline
    if final:
        override(config, {SEED: config.training.seed + seeds}, f"{space.source}: finalists")
    needed = needed_bytes(checkpoint_bytes(config), at_a_time, space.keep + final, trials + final * seeds)
    check_space(storage, needed)
    _check_storage(storage)


def _check_storage(storage: Storage) -> None:
    where = f"--storage {redact(storage.uri)}"
    if storage.path is not None:
        check_takes(storage.path, where, "choose another folder")
        return
    probe = f"probe-{secrets.token_hex(4)}"
    try:
        storage.write(probe, b"raystar")
        storage.delete(probe)
    # Every kind of storage has its own kinds of errors.
    except Exception as error:
        raise RaystarError(f"{where}: nothing can be written there ({in_a_line(error)})") from None


def note_idle(space: Space, content: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> None:
    """Says what has no effect in this sweep, and which experiments are the same."""
    idle = [key for key in ("trials", "search", "seed") if key in content]
    if not space.space and idle:
        verb = "has" if len(idle) == 1 else "have"
        logger.warning(f"{space.source}: {', '.join(idle)} {verb} no effect: the file draws no trials")
    alike: dict[tuple[Any, ...], list[str]] = {}
    for experiment in space.experiments:
        alike.setdefault(hashable(known[experiment.name]), []).append(experiment.name)
    for names in alike.values():
        if len(names) > 1:
            logger.warning(f"{space.source}: experiments {', '.join(names)} are the same; each of them runs")
