"""One trial: a Ray Train `TorchTrainer` around a `Trainer`, reporting to Ray Tune."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray.train
import torch
from ray import tune
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from raystar.backend.loop import train, train_loop, what_ended
from raystar.backend.reporting import GroupReporter, Request, ended, from_tune
from raystar.base.errors import RaystarError, WorkerLost
from raystar.base.storage import Storage
from raystar.record.trial_files import TrialFiles
from raystar.training.workers import Group


def run_trial(params: dict[str, Any], request: Request) -> None:
    """The Tune function. Local mode runs the loop in this process, which Tune reuses for the next trial."""
    settings = {"params": from_tune(params), "request": request, "trial": tune.get_context().get_trial_name()}
    if request.workers > 1:
        _run_group(settings)
        return
    TorchTrainer(
        train_loop,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(num_workers=0, use_gpu=request.gpu_share > 0),
    ).fit()


# -- several workers -------------------------------------------------------------------------------


class _GroupTrainer(TorchTrainer):  # type: ignore[misc]
    """A `TorchTrainer` without two actors that a trial has no use for, each a process of 100 MB and more.

    One loads Ray datasets; the other outlives every stopped trial, and is replaced by `Release`. Should Ray rename
    the method or the callbacks, they are merely started again.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
        return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in unused]


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
        delivery.send(ended(request, *what_ended(failure)))
    delivery.wait()


def _failure(failures: Mapping[int, Exception]) -> Exception | None:
    """What ended a group of workers, of all that they raised; None if a process died, and the trial is to continue."""
    errors = [error for _, error in sorted(failures.items()) if not _lost(error)]
    # A trial's own reason comes first: the others' errors may follow from it.
    reasons = [error for error in errors if isinstance(error, RaystarError)]
    if reasons:
        return reasons[0]
    return errors[0] if len(errors) == len(failures) else None


def _lost(error: Exception) -> bool:
    """Whether a worker ended without a reason of its own: its process died or hangs, or it missed another that did.

    Ray says so with the actor's error or, if it was asking the worker how it is when it died, with that error inside
    another one, which it does not export.
    """
    within = getattr(error, "health_check_failure", error)
    return isinstance(within, WorkerLost | RayActorError) or type(error).__name__ == "WorkerHealthCheckTimeoutError"


def worker_loop(settings: dict[str, Any]) -> None:
    """What each worker of a group runs. What it raises ends the group; `_run_group` reports it."""
    request: Request = settings["request"]
    torch.set_num_threads(request.cpus)
    group = Group.current()
    train(settings, GroupReporter(request, settings["trial"], group), group)
