"""What a trial is asked to do, and how it reports."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray.train
from ray import tune
from ray.util.placement_group import get_current_placement_group

from raystar.backend.placing import Placed
from raystar.base.console import noted
from raystar.base.storage import Storage
from raystar.record.events import TrialReport
from raystar.record.statuses import RUNNING, STARTING
from raystar.record.trial_files import Restored, TrialFiles
from raystar.search.purpose import Purpose
from raystar.training.trainer import Progress
from raystar.training.workers import Group

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
    starts: Mapping[str, str]
    """Files in the cache that trials start from, by `checkpoint.init_from`."""
    storage: str
    """Path or URI of the sweep's folder in the storage."""
    scratch: str
    """A folder for what Ray itself writes about groups of workers; nothing is read back from it."""
    known: Mapping[str, int]
    """Epochs of each trial that the driver knew of when it began or was resumed."""
    gpu_share: float
    """Of each worker."""
    cpus: int
    """Of each worker."""
    workers: int
    measure_at: tuple[int, ...]
    """Epochs that are measured: ASHA's rungs. The last one always is."""
    purpose: Purpose


def for_tune(params: Mapping[str, Any]) -> dict[str, Any]:
    """Swept values as Tune takes them: within a list it would look for further values to search, so lists are text."""
    return {key: json.dumps(value) if isinstance(value, list | tuple) else value for key, value in params.items()}


def from_tune(params: Mapping[str, Any]) -> dict[str, Any]:
    """What `for_tune` was given, with lists for tuples."""
    return {
        key: json.loads(value) if isinstance(value, str) and value.startswith("[") else value
        for key, value in params.items()
    }


class Reporter:
    """The seam between a trial and Ray: saves epochs and reports them to Tune, from the trial's own process."""

    def __init__(self, request: Request, trial: str) -> None:
        self.request = request
        self.trial = trial
        self.files = TrialFiles(Storage(request.storage), trial)
        self.value = _worst(request)
        """The metric as it was measured last, which Tune gets again at epochs that are not measured."""
        self.note: str | None = None
        self._noted = 0  # of this process's notes, how many have been sent

    def repeat(self) -> Restored:
        """Reports again what was saved and may not have arrived; returns where to continue."""
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
        report: TrialReport = {
            "epoch": progress.epoch,
            "step": progress.step,
            "status": RUNNING,
            "metrics": progress.metrics,
            "images": {key: path for (key, epoch), path in saved.items() if epoch},
            "first_images": {key: path for (key, epoch), path in saved.items() if not epoch},
            "labels": progress.labels,
        }
        self.files.save(progress.epoch, report, progress.checkpoint)
        self._send({**report, "first_step_at": first_step_at}, saved=True)

    def speed(self, epoch: int, metrics: dict[str, float], labels: dict[str, str]) -> None:
        """Reports one epoch of a trial that measures speed: there is nothing to save."""
        self._send({"epoch": epoch, "status": RUNNING, "metrics": metrics, "labels": labels}, saved=True)

    def ended(self, status: str, reason: str) -> None:
        """The last report of a trial that did not come to its end."""
        self._tell(ended(self.request, status, reason, self._notes()))

    def _notes(self) -> list[str]:
        """What this process has to say that it has not said for this trial."""
        notes = noted()[self._noted :]
        self._noted += len(notes)
        return notes

    def _send(self, report: TrialReport, *, saved: bool = False) -> None:
        note, self.note = self.note, None
        self.value = report["metrics"].get(self.request.metric, self.value)
        report = {**report, "note": note, "notes": self._notes()}
        self._tell(message(report, self.request.metric, self.value) | {"saved": saved})

    def _tell(self, message: dict[str, Any]) -> None:
        tune.report(message)


class GroupReporter(Reporter):
    """Reports to Ray Train, from one of several workers. All of them call it; the first one's report counts."""

    def __init__(self, request: Request, trial: str, group: Group) -> None:
        super().__init__(request, trial)
        self.first = group.rank == 0

    def repeat(self) -> Restored:
        """Tells the driver first what the group holds: a trial may be stopped before its first epoch."""
        self._tell(ended(self.request, STARTING, ""))
        return super().repeat()

    def epoch(self, progress: Progress, first_step_at: float | None) -> None:
        """Saves and reports one epoch, in the first worker; the others wait for it."""
        if self.first:
            super().epoch(progress, first_step_at)
        else:
            ray.train.report({})

    def _tell(self, message: dict[str, Any]) -> None:
        held = {"placement_group": get_current_placement_group().id.hex()}  # for `tune_hooks.Release`
        ray.train.report(message | held if self.first else {})


def message(report: TrialReport, metric: str, value: float) -> dict[str, Any]:
    """What Tune gets: the metric for its searchers, and the report in one piece, which it need not take apart."""
    who = {"pid": os.getpid(), "host": os.uname().nodename}
    return {"report": json.dumps({**report, **who}), metric: value}


def ended(request: Request, status: str, reason: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    """A message without an epoch: the trial did not come to its end, or has not begun."""
    return message({"status": status, "reason": reason, "notes": list(notes)}, request.metric, _worst(request))


def _worst(request: Request) -> float:
    return WORST if request.mode == "min" else -WORST
