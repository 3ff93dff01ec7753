"""A sweep as its folder tells it, while it runs and ever after: without Ray, MLflow or the latents."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raystar.base.errors import RaystarError, nearest
from raystar.base.journal import Journal
from raystar.record.events import EPOCH, RULER
from raystar.record.finals import rank_correlation
from raystar.record.statuses import FINISHED
from raystar.record.summary import Summary, TrialRecord
from raystar.record.sweep_file import JOURNAL, RECORD, as_meant, of_0_1
from raystar.ruler.ruler import UNMOVED
from raystar.search.asha import Rungs
from raystar.search.distributions import KINDS, Choice, Distribution
from raystar.search.purpose import PURPOSES, QUALITY, Purpose
from raystar.search.scheduling import Scheduler, ranking, read_scheduler

_FEW = 4  # runs below which nothing is said of a rung
_WARNED, _DOUBTFUL = 5, 0.5  # runs from which on a rung is doubted, below that correlation
SUMMARY, REPORT, CONTACT_SHEET = "summary.json", "report.html", "contact_sheet.png"
"""Files of a sweep's folder."""


@dataclass(frozen=True)
class Foresight:
    """How well a rung's ranking is that of the end, over the runs that came there."""

    epoch: int
    metric: str
    runs: int
    correlation: float
    """Spearman's, of what ranks at the rung with the final score: 1 the same order, 0 none, below 0 the reverse."""

    @property
    def doubtful(self) -> bool:
        """Whether there are enough runs to say that the rung stops the wrong trials."""
        return self.runs >= _WARNED and self.known and self.correlation < _DOUBTFUL

    @property
    def known(self) -> bool:
        """Whether there is anything to say."""
        return self.runs >= _FEW and math.isfinite(self.correlation)

    @property
    def words(self) -> str:
        """In a line."""
        name = self.metric.rpartition("/")[2]
        if not self.known:
            return f"rung at epoch {self.epoch}: too few to say what it is worth (runs to the end: {self.runs})"
        line = (
            f"rung at epoch {self.epoch}: rank correlation of {name} with the final score {self.correlation:+.2f} "
            f"over {self.runs} runs"
        )
        if not self.doubtful:
            return line
        return f"{line}; it says little of the end: raise scheduler.grace_epochs, or rank by another scheduler.metric"


@dataclass(frozen=True)
class Results:
    """What a sweep has found so far."""

    summary: Summary
    record: Mapping[str, Any]
    """`sweep.json`."""
    curves: Mapping[str, Mapping[int, Mapping[str, float]]]
    """Metrics of each trial by epoch, up to the epoch that the summary knows."""

    @property
    def purpose(self) -> Purpose:
        """Of the sweep."""
        return PURPOSES[self.record["space"].get("purpose", QUALITY.name)]

    @property
    def of_0_1(self) -> bool:
        """Whether version 0.1 ran it, whose ruler was another, and where a trial's score was its best over epochs."""
        return of_0_1(self.record)

    @property
    def epochs(self) -> int:
        """Of a trial that runs to its end."""
        return int(self.record["config"]["training"]["epochs"])

    @property
    def drawn(self) -> Mapping[str, tuple[type[Distribution], Any]]:
        """How each swept key was drawn, and its range or choices; of one that experiments alone set, what they set."""
        spelt = {key: next(iter(how.items())) for key, how in (self.record["space"].get("space") or {}).items()}
        drawn = {key: (KINDS[kind], values) for key, (kind, values) in spelt.items()}
        for key in self.record.get("keys", ()):
            if key not in drawn:
                tried = dict.fromkeys(r.params.get(key) for r in self.summary.trials.values() if r.parent is None)
                drawn[key] = (Choice, list(tried))
        return drawn

    @property
    def rungs(self) -> list[int]:
        """Epochs at which ASHA could stop a trial, in order; none where it did not run."""
        scheduler = self._scheduler
        if scheduler.type != "asha":
            return []
        return Rungs(self.summary.mode, scheduler.grace(self.epochs), scheduler.reduction_factor, self.epochs).places

    @property
    def ranking(self) -> tuple[str, str]:
        """What ranked trials at rungs, and its mode."""
        return ranking(self._scheduler, self.summary.metric, self.summary.mode, RECORD)

    @property
    def _scheduler(self) -> Scheduler:
        space = as_meant(self.record["space"], self.record)
        return read_scheduler(space, self.purpose.metrics, RECORD)

    def curve(self, trial: str, metric: str | None = None) -> dict[int, float]:
        """One metric of a trial by epoch, by default the sweep's, where it is finite."""
        metric = metric or self.summary.metric
        values = {epoch: metrics.get(metric) for epoch, metrics in self.curves.get(trial, {}).items()}
        return {epoch: value for epoch, value in values.items() if value is not None and math.isfinite(value)}

    def foresight(self) -> list[Foresight]:
        """What each rung says of the end, in order of their epochs; who has not moved is last at both, as for ASHA."""
        ended = [r for r in self.summary.trials.values() if r.status == FINISHED and r.score is not None]
        metric, mode = self.ranking
        foresights = []
        for epoch in self.rungs:
            places = []
            for record in ended:
                value = self.curve(record.trial, metric).get(epoch)
                if value is None:
                    continue
                unmoved = self.curve(record.trial, "eval/movement").get(epoch, math.inf) < UNMOVED
                places.append(
                    (_place(value, mode, unmoved), _place(record.score or 0.0, self.summary.mode, record.unmoved))
                )
            correlation = rank_correlation(*zip(*places, strict=True)) if len(places) > 1 else math.nan
            foresights.append(Foresight(epoch, metric, len(places), correlation))
        return foresights

    def by_score(self) -> list[TrialRecord]:
        """All trials: those that may be best, best first, then the others by name."""
        ranked = self.summary.ranked()
        names = {record.trial for record in ranked}
        return ranked + sorted((r for r in self.summary.trials.values() if r.trial not in names), key=lambda r: r.trial)


def _place(value: float, mode: str, unmoved: bool) -> float:
    """What trials are ranked by: lower is better, and whoever has not moved is last."""
    if unmoved:
        return math.inf
    return value if mode == "min" else -value


def find(runs: Path, name: str) -> Path:
    """The folder of a sweep below `runs`.

    Raises:
        RaystarError: there is none of that name.
    """
    folder = runs / name
    if not (folder / RECORD).is_file():
        known = sorted(path.parent.name for path in runs.glob(f"*/{RECORD}"))
        hint = f"; there are {', '.join(known[:20])}" if known else ""
        raise RaystarError(f"--sweep {name}: no such sweep in {runs}{nearest(name, known)}{hint}")
    return folder


def read(folder: Path) -> Results:
    """Reads a sweep's folder, `runs/<name>`.

    Raises:
        RaystarError: a file is missing or damaged.
    """
    content, record = _json(folder / SUMMARY), _json(folder / RECORD)
    try:
        results = Results(Summary.from_mapping(content, int(record["trials"])), record, _curves(folder, content))
        _ = results.purpose, results.of_0_1, results.drawn, results.rungs, results.ranking
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RaystarError(
            f"{folder}: {SUMMARY} and {RECORD} are not those of a sweep of raystar: {type(error).__name__}: {error}"
        ) from None
    return results


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        begins = "; a sweep that has just begun writes it with its first epoch" if path.name == SUMMARY else ""
        raise RaystarError(f"{path} is not there{begins}") from None
    except (OSError, ValueError) as error:
        raise RaystarError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise RaystarError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _curves(folder: Path, content: Mapping[str, Any]) -> dict[str, dict[int, dict[str, float]]]:
    """What the journal says of the epochs that the summary knows: of a running sweep it knows more."""
    known = {trial["trial"]: int(trial["epochs"]) for trial in content["trials"]}
    curves: dict[str, dict[int, dict[str, float]]] = {name: {} for name in known}
    for event in Journal(folder / JOURNAL):
        if event["event"] == EPOCH and event["epoch"] <= known.get(event["trial"], 0):
            curves[event["trial"]].setdefault(int(event["epoch"]), dict(event["metrics"]))
        elif event["event"] == RULER:  # what another one measured lies on no line with what comes
            for curve in curves.values():
                for metrics in curve.values():
                    for name in [name for name in metrics if name.startswith("eval/")]:
                        del metrics[name]
    return curves
