"""The driver's side of Ray Tune: what hears of trials, decides, and frees what they held.

Module-level classes, since Tune pickles what it is given; what belongs to the running driver stays out of that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raystar.backend.reporting import from_tune
from raystar.base.console import note
from raystar.record.events import TrialReport

T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Times that a trial's process may die, without an epoch saved in between, and be started again."""


class TrialNames:
    """Names trials in the order in which Tune first asks.

    Tune gives every trial a copy of this, several times: a copy holds nothing, or thousands of trials would each hold
    the names of all.
    """

    names: ClassVar[list[str]] = []
    numbers: ClassVar[dict[str, int]] = {}

    def __init__(self, names: Sequence[str]) -> None:
        self.names[:] = names
        self.numbers.clear()

    def __call__(self, trial: Trial) -> str:
        return self.names[self.numbers.setdefault(trial.trial_id, len(self.numbers))]


class Silent(TrialProgressCallback):  # type: ignore[misc]
    """Takes the place of Tune's own lines about trials, some of which its settings do not suppress."""

    def on_trial_result(self, *args: Any, **info: Any) -> None:
        """See `ray.tune.Callback`."""

    def on_trial_error(self, *args: Any, **info: Any) -> None:
        """See `ray.tune.Callback`."""

    def on_trial_complete(self, *args: Any, **info: Any) -> None:
        """See `ray.tune.Callback`."""


class Listener(Protocol):
    """Who hears what happens to trials, and says what is to become of them."""

    @property
    def stopping(self) -> bool:
        """Whether no trial is to be begun, and those that run are to end with their next report."""

    @property
    def stop_now(self) -> bool:
        """Whether the running trials are to end at once."""

    def trial_started(self, name: str, params: dict[str, Any]) -> None:
        """A trial begins, or begins again after its process died."""

    def trial_reported(self, name: str, report: TrialReport) -> bool:
        """A trial reports an epoch, or that it cannot continue; returns whether it may."""

    def trial_ended(self, name: str, deaths: int | None) -> None:
        """A trial is over; `deaths` of its process ended it, or None."""


class Heard:
    """A listener whose first error is kept, and ends the trials.

    What Tune's hooks raise comes out of Tune as text, with all of its trace, or not at all: some it tries again.

    Args:
        listener: who hears.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.error: Exception | None = None

    @property
    def stopping(self) -> bool:
        """See `Listener`."""
        return self.error is not None or self._kept(lambda: self.listener.stopping)

    @property
    def stop_now(self) -> bool:
        """See `Listener`."""
        return self.error is not None or self._kept(lambda: self.listener.stop_now)

    def trial_started(self, name: str, params: dict[str, Any]) -> None:
        """See `Listener`."""
        self._kept(lambda: self.listener.trial_started(name, params))

    def trial_reported(self, name: str, report: TrialReport) -> bool:
        """See `Listener`."""
        return self._kept(lambda: self.listener.trial_reported(name, report))

    def trial_ended(self, name: str, deaths: int | None) -> None:
        """See `Listener`."""
        self._kept(lambda: self.listener.trial_ended(name, deaths))

    def _kept(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except Exception as error:
            self.error = self.error or error
            raise


class Warden(FIFOScheduler):  # type: ignore[misc]
    """Asks the listener about every report. Trials begin in their order, and none while the sweep is stopping."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.listener = listener

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """See `ray.tune.schedulers.TrialScheduler`."""
        report: TrialReport = json.loads(result.get("report", "{}"))  # there is none if the trial ended without one
        for text in report.pop("notes", []):  # a word for all trials whose processes say it
            note(logger, text)
        continues = not report or self.listener.trial_reported(str(trial), report)
        return str(TrialScheduler.CONTINUE if continues and not self.listener.stopping else TrialScheduler.STOP)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """See `ray.tune.schedulers.TrialScheduler`. Tune starts pending trials by itself, in their order."""
        if self.listener.stopping:
            tune_controller.search_alg.set_finished()
            for trial in list(tune_controller.get_live_trials()):
                if trial.status == Trial.PENDING:
                    tune_controller.stop_trial(trial)
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Stop(tune.Stopper):  # type: ignore[misc]
    """Ends all trials when the listener wants that."""

    def __init__(self, listener: Listener) -> None:
        self.listener: Listener | None = listener

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """See `ray.tune.Stopper`."""
        return self.listener is not None and self.listener.stop_now

    def __getstate__(self) -> dict[str, Any]:
        return {"listener": None}


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


class Recorder(tune.Callback):  # type: ignore[misc]
    """Hands Tune's events to the listener, and counts deaths: a process that dies begins again, but not for ever.

    What Tune would keep of each trial to the sweep's end, and nothing reads, goes as soon as it may.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.deaths: dict[str, int] = {}  # of a trial's process since its last report

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self.listener.trial_started(str(trial), from_tune(trial.config))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """See `ray.tune.Callback`. `Warden` has dealt with the report itself."""
        if result.get("saved"):
            self.deaths.pop(str(trial), None)
            trial.max_failures = -1
        result.pop("report", None)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        deaths = self.deaths[str(trial)] = self.deaths.get(str(trial), 0) + 1
        if deaths >= MAX_DEATHS:
            trial.max_failures = trial.num_failures  # the next one is the last

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self.listener.trial_ended(str(trial), None)
        self._forget(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self.listener.trial_ended(str(trial), self.deaths.pop(str(trial), 0) + 1)
        self._forget(trial)

    @staticmethod
    def _forget(trial: Trial) -> None:
        trial.metric_analysis.clear()
        trial.metric_n_steps.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # the listener belongs to the running driver, not to Tune's saved state
