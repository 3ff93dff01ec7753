"""A trial in its process: what it needs is opened once, and trained."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import logging
import os
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from raystar.backend.placing import ensure_local
from raystar.backend.reporting import Reporter, Request
from raystar.base.console import note, show
from raystar.base.errors import RaystarError, TrialDiverged, TrialOutOfMemory, in_short
from raystar.config.load import from_mapping, override, to_yaml
from raystar.config.schema import Config, DataConfig, ModelConfig
from raystar.data.bank import Bank, reopen_bank
from raystar.model.device import out_of_memory, resolve_device
from raystar.pictures.codec import Codec, open_codec
from raystar.record.statuses import DIVERGED, FAILED, OUT_OF_MEMORY
from raystar.ruler.ruler import Ruler
from raystar.training.resume import initial_state
from raystar.training.speed import measure
from raystar.training.trainer import Trainer
from raystar.training.workers import ALONE, Group

_POISONED = 86  # exit status of a process whose CUDA context is of no use any more

logger = logging.getLogger(__name__)


def train_loop(settings: dict[str, Any]) -> None:
    """Trains one configuration and reports every epoch; ends with a report, whatever happens."""
    request: Request = settings["request"]
    report = Reporter(request, settings["trial"])
    _settle_process()
    torch.set_num_threads(request.cpus)
    try:
        train(settings, report, ALONE)
    # Whatever a trial raises is that trial's result: the sweep continues, and the trace is kept for the curious.
    except Exception as error:
        _leave_if_poisoned()
        if not isinstance(error, RaystarError):
            report.files.save_error(traceback.format_exc())
        report.ended(*what_ended(error))
    finally:
        # The process goes on to the next trial: nothing of this one may stay in its memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _return_free_memory()


def _return_free_memory() -> None:
    """Gives the allocator's free pages back to the system, where it is glibc's.

    It would keep them, in the pieces that one trial's sizes left: the next trial's do not fit into all of them.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _leave_if_poisoned() -> None:
    """Ends the process where CUDA has failed for good: every later trial in it would fail as well.

    To the driver it is a process that died: the trial resumes in another one, as often as such trials do.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        traceback.print_exc()
        os._exit(_POISONED)


def what_ended(error: Exception) -> tuple[str, str]:
    """Status and reason of a trial that raised `error`."""
    if isinstance(error, RaystarError):
        status = {TrialDiverged: DIVERGED, TrialOutOfMemory: OUT_OF_MEMORY}.get(type(error), FAILED)
        return status, str(error)
    if out_of_memory(error):  # outside of a step: while the networks, the latents or the ruler are put on the device
        return OUT_OF_MEMORY, f"{in_short(error)}; lower training.batch_size or model.base_dim, or run fewer trials"
    return FAILED, in_short(error)


@functools.cache
def _settle_process() -> None:
    """Takes what the imports left out of the collector's sight, once: it would be searched between all trials."""
    gc.collect()
    gc.freeze()


def train(settings: dict[str, Any], report: Reporter, group: Group) -> None:
    """Trains one configuration, alone or as one of a group of workers; whatever goes wrong is raised."""
    show()  # a trial's process has no other way to tell
    request: Request = settings["request"]
    config = override(from_mapping(request.config, "sweep"), settings["params"], "trial")
    if 0 < request.gpu_share < 1:
        # A trial that shares its GPU fails on its own share instead of taking its neighbour's.
        torch.cuda.set_per_process_memory_fraction(request.gpu_share)
    if request.placed is not None:
        cache = ensure_local(request.placed)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
        request = dataclasses.replace(request, cache_dir=str(cache))
    bank = _bank(config, request)
    if not request.purpose.models:
        for epoch, (metrics, labels) in enumerate(
            measure(config, from_mapping(request.config, "sweep"), bank), start=1
        ):
            report.speed(epoch, metrics, labels)
        return
    first = group.rank == 0
    ruler = _ruler(config, request) if first else None
    codec = _codec(config) if first and config.grid_every else None
    restored = report.repeat()
    if first:
        report.files.save_config(to_yaml(config))
    where = report.files.storage.at(f"trials/{settings['trial']}")
    state = None
    if restored.checkpoint is None and config.checkpoint.init_from is not None:
        start = Path(request.cache_dir) / request.starts[config.checkpoint.init_from]
        state = initial_state(config, resolve_device(config), group, init_from=start)
    trainer = Trainer(
        config, bank, ruler, codec, state,
        checkpoint=restored.checkpoint, source=where, group=group, measure_at=request.measure_at,
    )  # fmt: skip
    for progress in trainer.run():
        report.epoch(progress, trainer.first_step_at)


# A reused process opens these once, not once a trial. Configurations that differ only in what a sweep may
# search give the same bank; the ruler also depends on the noise's length and the latents' scale. Of the latents of
# `data.max_samples` both know nothing.


def _bank(config: Config, request: Request) -> Bank:
    return _open_bank(Config(data=_all(config)), request.cache_dir, request.bank_key)


def _ruler(config: Config, request: Request) -> Ruler:
    kept = Config(data=_all(config), model=_plain(config), ruler=config.ruler)
    return _build_ruler(kept, config.training.latent_scale, request.cache_dir, request.bank_key)


def _all(config: Config) -> DataConfig:
    return dataclasses.replace(config.data, max_samples=None)


def _codec(config: Config) -> Codec | None:
    kept = Config(visualization=config.visualization, model=ModelConfig(latent_channels=config.model.latent_channels))
    return _open_codec(kept, str(resolve_device(config)))


def _plain(config: Config) -> Any:
    return override(
        Config(data=config.data),
        {"model.latent_channels": config.model.latent_channels, "model.latent_dim": config.model.latent_dim},
    ).model


@functools.lru_cache(maxsize=2)
def _open_bank(config: Config, cache_dir: str, key: str) -> Bank:
    return reopen_bank(config, cache_dir, key)


@functools.lru_cache(maxsize=2)
def _build_ruler(config: Config, latent_scale: float, cache_dir: str, key: str) -> Ruler:
    config = override(config, {"training.latent_scale": latent_scale})
    return Ruler.build(_open_bank(Config(data=config.data), cache_dir, key), config, cache_dir)


@functools.lru_cache(maxsize=2)
def _open_codec(config: Config, device: str) -> Codec | None:
    codec, missing = open_codec(config, device)
    if missing is not None:  # the driver has it, or has looked for it and noted that; this node lacks it
        note(logger, missing)
    return codec
