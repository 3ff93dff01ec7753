"""One trial: a Ray Train `TorchTrainer` around a `Trainer`, reporting to Ray Tune."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import ray.train
import torch
from ray import tune
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from raystar import checkpoint as checkpoints
from raystar.codec import Codec, open_codec
from raystar.config import Config, from_mapping, override
from raystar.dataset import Bank, reopen_bank
from raystar.distributed import ALONE, Group
from raystar.errors import RaystarError, TrialDiverged, WorkerLost
from raystar.ruler import Ruler
from raystar.speed import measure
from raystar.step import resolve_device
from raystar.summary import DIVERGED, FAILED, RUNNING, trial_name
from raystar.trainer import Progress, Trainer

CHECKPOINT, META = "checkpoint.pt", "meta.json"
WORST = 1e9
"""Reported by a trial that has no score to give: ASHA never stops a NaN, and stumbles over a missing value."""


@dataclass(frozen=True)
class Request:
    """What all trials of a sweep share; it travels to the workers, so it holds plain values only."""

    config: Mapping[str, Any]
    metric: str
    mode: str
    cache_dir: str
    bank_key: str
    """Of the latents that the sweep began with."""
    pictures_dir: str
    trials_dir: str
    """Where every trial has a folder by its name."""
    gpu_share: float
    """Of each worker."""
    cpus: int
    """Of each worker."""
    workers: int
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
    except TrialDiverged as error:
        report.ended(DIVERGED, str(error))
    except RaystarError as error:
        report.ended(FAILED, str(error))
    # Whatever a trial raises is that trial's result: the sweep goes on, and the trace is kept for the curious.
    except Exception as error:
        folder = Path(tune.get_context().get_trial_dir())
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        report.ended(FAILED, _in_short(error))
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
    trainer = Trainer(config, bank, ruler, codec, checkpoint=report.restored(), group=group)
    for progress in trainer.run():
        report.epoch(progress, trainer.first_step_at)


# -- several workers -------------------------------------------------------------------------------

_AHEAD = 3
"""Epochs that a group may have saved and the driver not yet heard of: one on its way, one in the queue, one before it.

They may be better than the best that the driver knows, whose checkpoint must outlast them: it is the one to export
should the trial be stopped here.
"""


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
            # The trial's own folder: a trial that starts again finds there what it has saved.
            name=settings["trial"],
            storage_path=request.trials_dir,
            callbacks=[delivery],
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1 + _AHEAD, checkpoint_score_attribute=request.metric, checkpoint_score_order=request.mode
            ),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        failure = _failure(error.worker_failures)
        if failure is None:
            raise
        folder = Path(request.trials_dir) / settings["trial"]
        if not isinstance(failure, RaystarError):
            (folder / "error.txt").write_text(str(error), encoding="utf-8")
        status = DIVERGED if isinstance(failure, TrialDiverged) else FAILED
        reason = str(failure) if isinstance(failure, RaystarError) else _in_short(failure)
        delivery.send(_ended(request, status, reason, _last_epoch(folder) + 1))
    delivery.wait()


def _last_epoch(folder: Path) -> int:
    """The last epoch that a trial saved, 0 before its first."""
    return max((json.loads(meta.read_text())["epoch"] for meta in folder.glob(f"checkpoint_*/{META}")), default=0)


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
    """The seam between a trial and Ray: reports to Tune, from the trial's own process."""

    def __init__(self, request: Request, trial: str) -> None:
        self.request = request
        self.trial = trial
        self.last: dict[str, float] = {}
        self.epoch_number = 0

    def restored(self) -> dict[str, Any] | None:
        """The checkpoint that this trial starts again from, after its process died."""
        return _read(tune.get_checkpoint())

    def epoch(self, progress: Progress, first_step_at: float | None) -> None:
        """Saves and reports one epoch. Epochs that the ruler left out repeat its last metrics, for ASHA's sake."""
        self.epoch_number = progress.epoch
        self.last = {key: value for key, value in self.last.items() if key.startswith("eval/")} | progress.metrics
        images = {key: self._save_picture(key, image, progress.epoch) for key, image in progress.images.items()}
        first_images = {key: self._save_picture(key, image, 0) for key, image in progress.first_images.items()}
        result = {
            **self.last,
            "epoch": progress.epoch,
            "status": RUNNING,
            "images": images,
            "first_images": first_images,
            "labels": progress.labels,
            "first_step_at": first_step_at,
            "pid": os.getpid(),
        }
        with tempfile.TemporaryDirectory(prefix="raystar-") as folder:
            checkpoints.save(Path(folder) / CHECKPOINT, progress.checkpoint)
            meta = {"epoch": progress.epoch, self.request.metric: self.last[self.request.metric]}
            (Path(folder) / META).write_text(json.dumps(meta), encoding="utf-8")
            self._send(result, folder)

    def speed(self, epoch: int, metrics: dict[str, float], labels: dict[str, str]) -> None:
        """Reports one epoch of a trial that measures speed: there is nothing to save."""
        self.epoch_number = epoch
        tune.report({**metrics, "epoch": epoch, "status": RUNNING, "labels": labels, "pid": os.getpid()})

    def _send(self, result: dict[str, Any], folder: str) -> None:
        tune.report(result, checkpoint=tune.Checkpoint.from_directory(folder))

    def ended(self, status: str, reason: str) -> None:
        """The last report of a trial that did not come to its end."""
        tune.report(_ended(self.request, status, reason, self.epoch_number + 1))

    def _save_picture(self, key: str, image: Any, epoch: int) -> str:
        folder = Path(self.request.pictures_dir) / self.trial
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{key}_{epoch:04d}.png"
        image.save(path, compress_level=1)  # MLflow writes it again; time matters here, not bytes
        return str(path)


class _GroupReport(_Report):
    """Reports to Ray Train, from one of several workers. All of them call it; the first one's report counts."""

    def __init__(self, request: Request, trial: str, group: Group) -> None:
        super().__init__(request, trial)
        self.first = group.rank == 0

    def restored(self) -> dict[str, Any] | None:
        """The checkpoint that this trial starts again from, after one of its processes died."""
        return _read(ray.train.get_checkpoint())

    def epoch(self, progress: Progress, first_step_at: float | None) -> None:
        """Saves and reports one epoch, in the first worker; the others wait for it."""
        if self.first:
            super().epoch(progress, first_step_at)
        else:
            ray.train.report({})

    def _send(self, result: dict[str, Any], folder: str) -> None:
        held = {"placement_group": get_current_placement_group().id.hex()}  # for `Release`
        ray.train.report(result | held, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _read(found: Any) -> dict[str, Any] | None:
    """What Ray kept of a trial that starts again, if anything."""
    if found is None:
        return None
    with found.as_directory() as folder:
        return checkpoints.load(Path(folder) / CHECKPOINT)


def _ended(request: Request, status: str, reason: str, epoch: int) -> dict[str, Any]:
    """The last report of a trial that did not come to its end."""
    return {
        request.metric: WORST if request.mode == "min" else -WORST,
        # A later epoch than the last, so that ASHA sees it; its metric is nobody's best.
        "epoch": epoch,
        "status": status,
        "reason": reason,
        "pid": os.getpid(),
    }


# -- the driver's side of Tune: module-level, since Tune pickles what it is given -------------------


class TrialNames:
    """Names trials in the order in which Tune first asks. Tune asks copies of this, hence the shared dictionary."""

    numbers: ClassVar[dict[str, int]] = {}

    def __init__(self, trials: int) -> None:
        self.trials = trials
        self.numbers.clear()

    def __call__(self, trial: Trial) -> str:
        return trial_name(self.numbers.setdefault(trial.trial_id, len(self.numbers)), self.trials)


class Asha(ASHAScheduler):  # type: ignore[misc]
    """ASHA that lets one trial, the baseline, run to its end: the others are measured against it.

    Its results still count in the rungs.
    """

    def __init__(self, exempt: str | None, **settings: Any) -> None:
        super().__init__(**settings)
        self.exempt = exempt
        self.last_epoch = settings["max_t"]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """See `ray.tune.schedulers.TrialScheduler`."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if str(trial) == self.exempt and result["epoch"] < self.last_epoch:
            return str(TrialScheduler.CONTINUE)
        return decision


class Release(tune.Callback):  # type: ignore[misc]
    """Gives back what a group of workers holds when its trial ends.

    Ray keeps the placement group of a trial that Tune stops, or whose process is killed: later trials would wait for
    its processors for ever. Taking it away also ends the workers.
    """

    def __init__(self) -> None:
        self.held: dict[str, str] = {}  # placement group by trial

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """See `ray.tune.Callback`."""
        if "placement_group" in result:
            self.held[str(trial)] = result["placement_group"]

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self._release(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self._release(trial)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self._release(trial)

    def _release(self, trial: Trial) -> None:
        held = self.held.pop(str(trial), None)
        if held is not None:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(held))))


class Listener(Protocol):
    """Who hears what happens to trials."""

    def trial_started(self, name: str, params: dict[str, Any]) -> None:
        """A trial begins, or begins again after its process died."""

    def trial_reported(self, name: str, result: dict[str, Any]) -> None:
        """A trial reports an epoch, or that it cannot go on."""

    def trial_ended(self, name: str, reason: str | None, failed: bool) -> None:
        """A trial is over."""


class Recorder(tune.Callback):  # type: ignore[misc]
    """Hands Tune's events to a listener in the driver."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self.listener.trial_started(str(trial), dict(trial.config))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """See `ray.tune.Callback`."""
        self.listener.trial_reported(str(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self.listener.trial_ended(str(trial), None, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self.listener.trial_ended(str(trial), f"its process died {trial.num_failures} times", failed=True)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # the listener belongs to the running driver, not to Tune's saved state
