"""When a sweep stops trials early, and what ranks them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raystar.base.errors import RaystarError, misspelt
from raystar.base.metrics import RULER, higher_is_better
from raystar.search.fields import number, one_of, section, whole

_SCORE, _OUTLOOK = "eval/score", "eval/outlook"


@dataclass(frozen=True)
class Scheduler:
    """When trials are stopped: ASHA on epochs, or never (`none`)."""

    type: str = "asha"
    max_epochs: int | None = None
    """Epochs of a trial that is never stopped; by default `training.epochs`."""
    grace_epochs: int | None = None
    """The first rung; see `grace`."""
    reduction_factor: float = 2
    metric: str | None = None
    """What ranks trials at rungs, in full; None where the file leaves that open (`ranking`)."""

    def grace(self, epochs: int) -> int:
        """Epochs before a trial may be stopped: by default a fifth of its run.

        By then the outlook's rank correlation with the final score is above 0.8 (benchmarks/RESULTS.md).
        """
        return self.grace_epochs if self.grace_epochs is not None else -(-epochs // 5)


def alone(content: Mapping[str, Any]) -> bool:
    """Whether a space file holds experiments and draws nothing."""
    return "experiments" in content and content.get("space") in (None, {})


def ranking(scheduler: Scheduler, metric: str, mode: str, source: str) -> tuple[str, str]:
    """What ranks trials at rungs, and which way, in a sweep for `metric`.

    The score is for the end: whatever begins to move looks worse before it gets better, and the ruler's outlook allows
    for that.

    Raises:
        RaystarError: a metric of which nobody knows which way is better.
    """
    rung_metric = scheduler.metric or (_OUTLOOK if metric == _SCORE else metric)
    if rung_metric == metric:
        return rung_metric, mode
    group, _, name = rung_metric.partition("/")
    if group != "eval":
        raise RaystarError(
            f"{source}: scheduler.metric: {rung_metric}: whether more of it is better is not known; expected a metric "
            f"of the ruler's ({', '.join(RULER)}) or the sweep's own, {metric}"
        )
    return rung_metric, "max" if higher_is_better(f"eval/{name}") else "min"


def read_scheduler(space_file: Mapping[str, Any], metrics: Sequence[str], source: str) -> Scheduler:
    """The scheduler of a space file, whose sweep can report `metrics`.

    Experiments alone are all to be seen to their ends: nothing is stopped early unless the section says how.
    """
    where, content = f"{source}: scheduler", space_file.get("scheduler", {})
    section(content, ("type", "max_epochs", "grace_epochs", "reduction_factor", "metric"), where)
    most, grace, metric = (content.get(key) for key in ("max_epochs", "grace_epochs", "metric"))
    usual = "none" if alone(space_file) and not content.keys() - {"max_epochs"} else "asha"
    scheduler = Scheduler(
        type=one_of(content.get("type", usual), ("asha", "none"), f"{where}.type"),
        max_epochs=None if most is None else whole(most, f"{where}.max_epochs", 1),
        grace_epochs=None if grace is None else whole(grace, f"{where}.grace_epochs", 1),
        reduction_factor=number(content.get("reduction_factor", 2), f"{where}.reduction_factor"),
        metric=None if metric is None else full_name(metric, metrics, f"{where}.metric"),
    )
    if scheduler.reduction_factor <= 1:
        raise RaystarError(f"{where}.reduction_factor: expected more than 1, found {scheduler.reduction_factor:g}")
    if scheduler.max_epochs is not None and (scheduler.grace_epochs or 0) > scheduler.max_epochs:
        raise RaystarError(
            f"{where}.grace_epochs: expected at most max_epochs {scheduler.max_epochs}, found {scheduler.grace_epochs}"
        )
    return scheduler


def full_name(name: Any, metrics: Sequence[str], where: str) -> str:
    """The full name of a metric given in full or by its last part.

    Raises:
        RaystarError: none of `metrics` is meant.
    """
    for metric in metrics:
        if name in (metric, metric.partition("/")[2]):
            return metric
    tails = [metric.partition("/")[2] for metric in metrics]
    raise RaystarError(f"{where}: unknown {misspelt(name, tails)}; known: {', '.join(tails)}")
