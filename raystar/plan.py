"""A request for a sweep, checked in full before Ray starts."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any

import torch

from raystar.codec import check_codec
from raystar.config import Config, find_shipped, override, request_config
from raystar.dataset import Bank, open_bank
from raystar.errors import RaystarError
from raystar.ruler import check_holdout
from raystar.space import Space, load_space
from raystar.speed import check_steps
from raystar.step import resolve_device
from raystar.summary import cache_dir, check_name
from raystar.tracking import check_uri, default_uri


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request that has passed every check that can be made before Ray starts."""

    name: str
    folder: Path
    out: Path
    config: Config
    space: Space
    points: list[dict[str, Any]] | None
    trials: int
    gpu_share: float
    """GPUs of each of a trial's workers."""
    cpus: int
    """Processors of each."""
    max_concurrent: int | None
    time_budget_s: float | None
    tracking_uri: str
    bank: Bank

    @property
    def speed(self) -> bool:
        """Whether this sweep measures speed alone."""
        return self.space.purpose == "speed"

    @property
    def at_a_time(self) -> int:
        """Trials that run side by side: as many as fit on this machine, and no more than asked for."""
        workers = self.space.resources.workers
        fit = usable_cpus() // (self.cpus * workers)
        if self.gpu_share:
            fit = min(fit, int(torch.cuda.device_count() / (self.gpu_share * workers)))
        elif self.speed:
            fit = 1  # two trials on one device would measure each other
        return max(1, min(fit, self.max_concurrent or fit, self.trials))

    @property
    def cache_dir(self) -> Path:
        """Packed latents, the ruler and compiled code, shared by all sweeps below `out`."""
        return cache_dir(self.config, self.out)


def make_plan(args: argparse.Namespace) -> Plan:
    """Checks the whole request.

    Raises:
        RaystarError: the first thing that is wrong.
    """
    config = request_config(args.config, args.overlay, args.set)
    space = load_space(find_shipped(args.space), config)
    for flag, value in (
        ("--trials", args.trials),
        ("--epochs", args.epochs),
        ("--max-concurrent", args.max_concurrent),
    ):
        if value is not None and value < 1:
            raise RaystarError(f"{flag}: expected at least 1, found {value}")
    if args.trials is not None:
        if space.search == "grid":
            raise RaystarError("--trials: a grid search runs every combination; use search: random to choose a number")
        space = dataclasses.replace(space, trials=args.trials)
    epochs = args.epochs or space.scheduler.max_epochs
    if epochs is not None:
        config = override(config, {"training.epochs": epochs}, "--epochs")
    if space.scheduler.type == "asha" and space.scheduler.grace_epochs > config.training.epochs:
        raise RaystarError(
            f"{space.source}: scheduler.grace_epochs {space.scheduler.grace_epochs} is more than the "
            f"{config.training.epochs} epochs of a trial"
        )
    # In a sweep the terminal belongs to the table.
    config = override(config, {"training.progress_style": "off", "training.log_json": False}, "sweep")
    gpu_share, cpus = _resources(config, space)
    points = space.points(config, resolve_device(config))
    trials = len(points) if points is not None else space.trials

    name = args.name if args.name is not None else f"{Path(args.space).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_name(name)
    folder = args.out / name
    if folder.exists():
        raise RaystarError(f"--name {name}: {folder} is there already; choose another name or remove it")

    uri = args.tracking_uri or default_uri(args.out)
    check_uri(uri)
    budget = _time_budget(args.time_budget) if args.time_budget else None
    bank = open_bank(config, cache_dir(config, args.out))
    if space.purpose == "speed":
        check_steps(config, bank)
    else:
        check_holdout(bank)
        check_codec(config)
    return Plan(
        name, folder, args.out, config, space, points, trials, gpu_share, cpus, args.max_concurrent, budget, uri, bank
    )  # fmt: skip


def _resources(config: Config, space: Space) -> tuple[float, int]:
    """GPUs and processors that each worker of a trial gets; checked against this machine before anything starts."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    speed, workers = space.purpose == "speed", space.resources.workers
    trial = "a trial wants" if workers == 1 else f"{workers} workers want"
    gpus, cpus = space.resources.gpus, space.resources.cpus
    if gpus == "auto":
        gpus = (1.0 if speed or workers > 1 else 0.5) if there and config.training.device != "cpu" else 0.0
    gpus = float(gpus)
    if cpus == "auto":
        cpus = usable_cpus() // workers if speed and not gpus else 1
    cpus = max(1, int(cpus))
    if cpus * workers > usable_cpus():
        raise RaystarError(
            f"{space.source}: resources.cpus: {trial} {cpus * workers}, this machine has {usable_cpus()}"
        )
    _check_shares(config, space)
    if gpus * workers > there:
        raise RaystarError(
            f"{space.source}: resources.gpus: {trial} {gpus * workers:g}, this machine has {there}; "
            + ("use auto or 0" if workers == 1 else "lower resources.workers, or set gpus: 0")
        )
    if speed and 0 < gpus < 1:
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
    smallest = min([*sizes, *(swept.values if swept is not None else ())])
    if smallest < workers:
        raise RaystarError(
            f"{space.source}: resources.workers: {workers} workers share every batch, and training.batch_size can be "
            f"{smallest}; lower workers or raise it"
        )


def usable_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _time_budget(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or float(found[1]) <= 0:
        raise RaystarError(f"--time-budget {text}: expected a number and a unit, for example 90s, 30m, 4h or 2d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
