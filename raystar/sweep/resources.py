"""What a trial gets of the machine, and what may not be asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from raystar.base.errors import RaystarError
from raystar.base.machine import gpu_memory, usable_cpus
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.model.device import resolve_device
from raystar.search.space import Space
from raystar.training.memory import CONTEXT, advice, step_bytes, step_key

logger = logging.getLogger(__name__)


def share_of_gpu(config: Config, space: Space, gpu_count: int) -> float:
    """GPUs of each worker of a trial, where there are so many."""
    gpus = space.resources.gpus
    if gpus == "auto":
        whole = space.purpose.alone or space.resources.workers > 1
        gpus = (1.0 if whole else 0.5) if gpu_count and config.training.device != "cpu" else 0.0
    return float(gpus)


def fitted_share(
    share: float, config: Config, space: Space, points: Iterable[Mapping[str, Any]], shape: tuple[int, int, int]
) -> float:
    """`share`, or a whole GPU where `auto` would have put two trials on one that has no room for both.

    Args:
        points: the values of the trials that are known.
        shape: (C, H, W) of a latent.
    """
    memory = min(gpu_memory(), default=None)
    if space.resources.gpus != "auto" or not share or memory is None:
        return share
    trials = {step_key(trial): trial for trial in (override(config, point, space.source) for point in (*points, {}))}
    largest = max(trials.values(), key=lambda trial: step_bytes(trial, shape))
    needed = step_bytes(largest, shape) + CONTEXT
    if needed > memory:
        logger.warning(f"the largest trial may not fit a GPU: {advice(largest, shape, memory - CONTEXT)}")
    if share < 1 and 2 * needed > memory:
        logger.info(
            f"one trial at a time on a GPU: the largest takes about {needed / 2**30:.1f} of its {memory / 2**30:.1f} "
            "GiB (resources.gpus: 0.5 puts two on it all the same)"
        )
        return 1.0
    return share


def trial_resources(config: Config, space: Space, address: str | None) -> tuple[float, int]:
    """GPUs and processors that each worker of a trial gets; checked against this machine, if trials run here."""
    gpu_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    alone, workers = space.purpose.alone, space.resources.workers
    trial = "a trial wants" if workers == 1 else f"{workers} workers want"
    gpus, cpus = share_of_gpu(config, space, gpu_count), space.resources.cpus
    if address is not None:
        if alone:
            raise RaystarError("--address: a speed sweep measures one machine; run it there, without --address")
        _check_shares(config, space)
        return gpus, 1 if cpus == "auto" else int(cpus)
    if cpus == "auto":
        cpus = usable_cpus() // workers if alone and not gpus else 1
    cpus = max(1, int(cpus))
    if cpus * workers > usable_cpus():
        raise RaystarError(
            f"{space.source}: resources.cpus: {trial} {cpus * workers}, this machine has {usable_cpus()}"
        )
    _check_shares(config, space)
    if gpus * workers > gpu_count:
        raise RaystarError(
            f"{space.source}: resources.gpus: {trial} {gpus * workers:g}, this machine has {gpu_count}; "
            + ("use auto or 0" if workers == 1 else "lower resources.workers, or set gpus: 0")
        )
    if alone and 0 < gpus < 1:
        raise RaystarError(f"{space.source}: resources.gpus: speed is measured on a whole GPU; found {gpus:g}")
    if gpus == 0 and config.training.device == "cuda":
        raise RaystarError(
            "training.device: cuda was asked for, but resources.gpus gives trials no GPU; set it to auto"
        )
    resolve_device(config)
    return gpus, cpus


def _check_shares(config: Config, space: Space) -> None:
    """Every batch size that a trial may have leaves each worker something to do."""
    workers = space.resources.workers
    swept = space.space.get("training.batch_size")
    sizes = [config.training.batch_size] if swept is None or space.baseline else []
    sizes += [e.overrides.get("training.batch_size", config.training.batch_size) for e in space.experiments]
    smallest = min([*sizes, *(swept.values if swept is not None else ())])
    if smallest < workers:
        raise RaystarError(
            f"{space.source}: resources.workers: {workers} workers share every batch, and training.batch_size can be "
            f"{smallest}; lower workers or raise it"
        )
