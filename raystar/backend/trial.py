"""One trial: a Ray Train `TorchTrainer` around a `Trainer`, reporting to Ray Tune."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import json
import os
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray.train
import torch
from ray import tune
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.placement_group import get_current_placement_group

from raystar.backend.nodes import Placed, ensure_local
from raystar.base.errors import RaystarError, TrialDiverged, TrialOutOfMemory, WorkerLost
from raystar.base.storage import Storage
from raystar.config.load import from_mapping, override
from raystar.config.schema import Config
from raystar.data.bank import Bank, reopen_bank
from raystar.model.device import resolve_device
from raystar.pictures.codec import Codec, open_codec
from raystar.record.statuses import DIVERGED, FAILED, OUT_OF_MEMORY, RUNNING, STARTING
from raystar.record.trial_files import Restored, TrialFiles
from raystar.ruler.ruler import Ruler
from raystar.training.speed import measure
from raystar.training.trainer import Progress, Trainer
from raystar.training.workers import ALONE, Group

WORST = 1e9
"""Told to Tune by a trial that has no score to give: its searchers stumble over a missing value."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What all trials of a sweep share; it travels to the workers, so it holds plain values only."""

    config: Mapping[str, Any]
    metric: str
    mode: str
    cache_dir: str
    """The driver's; on a cluster `placed` says which is this node's."""
    placed: Placed | None
    bank_key: str
    """Of the latents that the sweep began with."""
    storage: str
    """Path or URI of the sweep's folder in the storage."""
    scratch: str
    """A folder for what Ray itself writes about groups of workers; nothing is read back from it."""
    known: Mapping[str, int]
    """Epochs of each trial that the driver knew of when it began or went on."""
    gpu_share: float
    """Of each worker."""
    cpus: int
    """Of each worker."""
    workers: int
    measure_at: tuple[int, ...]
    """Epochs that are measured: ASHA's rungs. The last one always is."""
    speed: bool
    """Measure speed only: no ruler, no pictures, no checkpoints; the parity gate comes first."""


def run_trial(params: dict[str, Any], request: Request) -> None:
    """The Tune function. Local mode runs the loop in this process, which Tune reuses for the next trial."""
    settings = {"params": params, "request": request, "trial": tune.get_context().get_trial_name()}
    if request.workers > 1:
        _run_group(settings)
        return
    TorchTrainer(
        train_loop,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(num_workers=0, use_gpu=request.gpu_share > 0),
    ).fit()


def train_loop(settings: dict[str, Any]) -> None:
    """Trains one configuration and reports every epoch; ends with a report, whatever happens."""
    request: Request = settings["request"]
    report = _Report(request, settings["trial"])
    _settle_process()
    torch.set_num_threads(request.cpus)
    try:
        _train(settings, report, ALONE)
    # Whatever a trial raises is that trial's result: the sweep goes on, and the trace is kept for the curious.
    except Exception as error:
        if not isinstance(error, RaystarError):
            report.files.save_error(traceback.format_exc())
        report.ended(*_what_ended(error))
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


def _what_ended(error: Exception) -> tuple[str, str]:
    """Status and reason of a trial that raised `error`."""
    if isinstance(error, RaystarError):
        status = {TrialDiverged: DIVERGED, TrialOutOfMemory: OUT_OF_MEMORY}.get(type(error), FAILED)
        return status, str(error)
    return FAILED, _in_short(error)


def _in_short(error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {reason}"[:500]


@functools.cache
def _settle_process() -> None:
    """Takes what the imports left out of the collector's sight, once: it would be searched between all trials."""
    gc.collect()
    gc.freeze()


def _train(settings: dict[str, Any], report: _Report, group: Group) -> None:
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
    if request.speed:
        for epoch, (metrics, labels) in enumerate(
            measure(config, from_mapping(request.config, "sweep"), bank), start=1
        ):
            report.speed(epoch, metrics, labels)
        return
    first = group.rank == 0
    ruler = _ruler(config, request) if first else None
    codec = _codec(config) if first and config.grid_every else None
    restored = report.repeat()
    where = report.files.storage.at(f"trials/{settings['trial']}")
    trainer = Trainer(
        config, bank, ruler, codec,
        checkpoint=restored.checkpoint, source=where, group=group, measure_at=request.measure_at,
    )  # fmt: skip
    for progress in trainer.run():
        report.epoch(progress, trainer.first_step_at)


# -- several workers -------------------------------------------------------------------------------


class _GroupTrainer(TorchTrainer):  # type: ignore[misc]
    """A `TorchTrainer` without two actors that a trial has no use for, each a process of 100 MB and more.

    One loads Ray datasets; the other outlives every stopped trial, and is replaced by `Release`. Should Ray rename
    the method or the callbacks, they are merely started again.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
        return [found for found in super()._create_default_callbacks() if type(found).__name__ not in unused]


class _Delivery(TuneReportCallback):  # type: ignore[misc]
    """Carries the workers' reports to Tune, and behind them what this process has to add."""

    def send(self, result: dict[str, Any]) -> None:
        """Reports `result` when everything before it has been taken in."""
        self._training_actor_item_queue.put(result)

    def wait(self) -> None:
        """Returns when Tune has taken in all reports."""
        # Tune passes over an empty item, but takes it only when it has dealt with the one before. Without it, the
        # end of the trial, which goes another way, could overtake the last report and block the process for good.
        self.send({})
        while not self._training_actor_item_queue.empty():
            time.sleep(0.02)


def _run_group(settings: dict[str, Any]) -> None:
    """Runs `worker_loop` in a group of workers, and reports what no worker can: that they failed.

    Raises:
        ray.train.TrainingFailedError: a worker's process died; Tune starts the trial again from its last checkpoint.
    """
    request: Request = settings["request"]
    delivery = _Delivery()
    resources = {"CPU": request.cpus, **({"GPU": request.gpu_share} if request.gpu_share else {})}
    trainer = _GroupTrainer(
        worker_loop,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=request.workers, use_gpu=request.gpu_share > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=settings["trial"],
            storage_path=request.scratch,
            callbacks=[delivery],
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        failure = _failure(error.worker_failures)
        if failure is None:
            raise
        if not isinstance(failure, RaystarError):
            TrialFiles(Storage(request.storage), settings["trial"]).save_error(str(error))
        delivery.send(_ended(request, *_what_ended(failure)))
    delivery.wait()


def _failure(failures: Mapping[int, Exception]) -> Exception | None:
    """What ended a group of workers, of all that they raised; None if a process died, and the trial is to go on."""
    lost = (WorkerLost, RayActorError)
    found = [error for _, error in sorted(failures.items()) if not isinstance(error, lost)]
    # A trial's own reason comes first: the others' errors may follow from it.
    own = [error for error in found if isinstance(error, RaystarError)]
    if own:
        return own[0]
    return found[0] if len(found) == len(failures) else None


def worker_loop(settings: dict[str, Any]) -> None:
    """What each worker of a group runs. What it raises ends the group; `_run_group` reports it."""
    request: Request = settings["request"]
    torch.set_num_threads(request.cpus)
    group = Group.current()
    _train(settings, _GroupReport(request, settings["trial"], group), group)


# -- what a process opens --------------------------------------------------------------------------

# A reused process opens these once, not once a trial. Configurations that differ only in what a sweep may
# search give the same bank; the ruler also depends on the noise's length and the latents' scale.


def _bank(config: Config, request: Request) -> Bank:
    return _open_bank(Config(data=config.data), request.cache_dir, request.bank_key)


def _ruler(config: Config, request: Request) -> Ruler:
    kept = Config(data=config.data, model=_plain(config), ruler=config.ruler)
    return _build_ruler(kept, config.training.latent_scale, request.cache_dir, request.bank_key)


def _codec(config: Config) -> Codec:
    return _open_codec(Config(visualization=config.visualization), str(resolve_device(config)))


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
def _open_codec(config: Config, device: str) -> Codec:
    return open_codec(config, device)[0]  # the driver has told the user already


class _Report:
    """The seam between a trial and Ray: saves epochs and reports them to Tune, from the trial's own process."""

    def __init__(self, request: Request, trial: str) -> None:
        self.request = request
        self.trial = trial
        self.files = TrialFiles(Storage(request.storage), trial)
        self.value = _worst(request)
        """The metric as it was measured last, which Tune is told again at epochs that are not measured."""
        self.note: str | None = None

    def repeat(self) -> Restored:
        """Reports again what was saved and may not have been heard of; returns where to go on."""
        restored = self.files.restore()
        self.note = restored.note
        for report in self.files.reports(self.request.known.get(self.trial, 0), restored.epoch):
            self._send(report)
        for epoch in range(restored.epoch, 0, -1):
            (report,) = self.files.reports(epoch - 1, epoch)
            if self.request.metric in report["metrics"]:
                self.value = report["metrics"][self.request.metric]
                break
        return restored

    def epoch(self, progress: Progress, first_step_at: float | None) -> None:
        """Saves and reports one epoch."""
        pictures = {(key, progress.epoch): image for key, image in progress.images.items()}
        pictures |= {(key, 0): image for key, image in progress.first_images.items()}
        saved = {place: self.files.save_picture(place[0], image, place[1]) for place, image in pictures.items()}
        report = {
            "epoch": progress.epoch,
            "status": RUNNING,
            "metrics": progress.metrics,
            "images": {key: path for (key, epoch), path in saved.items() if epoch},
            "first_images": {key: path for (key, epoch), path in saved.items() if not epoch},
            "labels": progress.labels,
        }
        self.files.save(progress.epoch, report, progress.checkpoint)
        self._send(report | {"first_step_at": first_step_at}, saved=True)

    def speed(self, epoch: int, metrics: dict[str, float], labels: dict[str, str]) -> None:
        """Reports one epoch of a trial that measures speed: there is nothing to save."""
        self._send({"epoch": epoch, "status": RUNNING, "metrics": metrics, "labels": labels}, saved=True)

    def ended(self, status: str, reason: str) -> None:
        """The last report of a trial that did not come to its end."""
        self._tell(_ended(self.request, status, reason))

    def _send(self, report: dict[str, Any], *, saved: bool = False) -> None:
        note, self.note = self.note, None
        self.value = report["metrics"].get(self.request.metric, self.value)
        self._tell(_message(report | {"note": note}, self.request.metric, self.value) | {"saved": saved})

    def _tell(self, message: dict[str, Any]) -> None:
        tune.report(message)


class _GroupReport(_Report):
    """Reports to Ray Train, from one of several workers. All of them call it; the first one's report counts."""

    def __init__(self, request: Request, trial: str, group: Group) -> None:
        super().__init__(request, trial)
        self.first = group.rank == 0

    def repeat(self) -> Restored:
        """Tells the driver first what the group holds: a trial may be stopped before its first epoch."""
        self._tell(_ended(self.request, STARTING, ""))
        return super().repeat()

    def epoch(self, progress: Progress, first_step_at: float | None) -> None:
        """Saves and reports one epoch, in the first worker; the others wait for it."""
        if self.first:
            super().epoch(progress, first_step_at)
        else:
            ray.train.report({})

    def _tell(self, message: dict[str, Any]) -> None:
        held = {"placement_group": get_current_placement_group().id.hex()}  # for `driver.Release`
        ray.train.report(message | held if self.first else {})


def _message(report: dict[str, Any], metric: str, value: float) -> dict[str, Any]:
    """What Tune is told: the metric for its searchers, and the report in one piece, which it need not take apart."""
    who = {"pid": os.getpid(), "host": os.uname().nodename}
    return {"report": json.dumps(report | who), metric: value}


def _ended(request: Request, status: str, reason: str) -> dict[str, Any]:
    """A message without an epoch: the trial did not come to its end, or has not begun."""
    return _message({"status": status, "reason": reason}, request.metric, _worst(request))


def _worst(request: Request) -> float:
    return WORST if request.mode == "min" else -WORST
