"""The record of a sweep: what every trial did, which is best, and the files and lines that say so."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from raystar import __version__
from raystar.base.files import write_whole
from raystar.record.statuses import COMPARABLE, PENDING, RUNNING
from raystar.ruler.ruler import NOTHING, TRANSFER, UNMOVED

_MOVEMENT = "eval/movement"

REFERENCES = {NOTHING: "doing nothing", TRANSFER: "channel transfer"}
"""What a model has to beat (`ruler.ruler.Ruler.references`), in words."""


@dataclass
class TrialRecord:
    """One trial, as `summary.json` lists it."""

    trial: str
    params: dict[str, Any]
    status: str = PENDING
    epochs: int = 0
    score: float | None = None
    """The sweep's metric as it was measured last: the minimum over epochs would be the luckiest of many."""
    score_epoch: int | None = None
    """The epoch of that measurement; the weights that are exported are those of it, too."""
    wall_s: float = 0.0
    idle_s: float | None = None
    """Seconds from the last report of the trial before it in the same process to this one's first step."""
    run_id: str | None = None
    checkpoint: str | None = None
    """Of `score_epoch`, relative to the sweep's folder."""
    reason: str | None = None
    note: str | None = None
    """What went other than asked for without failing: a network that would not compile."""
    metrics: dict[str, float] = field(default_factory=dict)
    """At `score_epoch`."""
    parent: str | None = None
    """The trial whose values these are, of one that trains them again from another seed."""
    unmoved: bool = False
    """Whether, measured last, its translations could not be distinguished from their sources."""


@dataclass(frozen=True)
class Finalist:
    """A configuration that was trained from several seeds."""

    trial: str
    """The trial of the search that had it first."""
    runs: list[str]
    """Trials that count: those of it that ran to the end."""
    scores: list[float]
    mean: float
    error: float | None
    """Half the width of the interval around the mean; None where nothing tells how far seeds differ."""


@dataclass(frozen=True)
class Finals:
    """What training the best configurations again from other seeds says (`finals.decide`)."""

    interval: float
    """The probability that `error` and `gain_error` stand for."""
    spread: float | None
    """Standard deviation of a configuration's scores over seeds, pooled over all finalists."""
    ranked: list[Finalist]
    """By mean, best first."""
    winner: str
    gain: float | None
    """By what share of the baseline's mean the winner's is better."""
    gain_error: float | None
    chance: float | None
    """That the winner is truly better than the baseline; None where the baseline wins, or nothing tells."""
    over_next: float | None
    """The same against the second."""

    def of(self, trial: str) -> Finalist | None:
        """The finalist whose configuration `trial` had first."""
        return next((finalist for finalist in self.ranked if finalist.trial == trial), None)


@dataclass
class Ended:
    """Of the search's trials that neither run nor wait."""

    trials: int = 0
    epochs: int = 0


@dataclass
class Summary:
    """A sweep as it stands; `write` keeps `summary.json` and `summary.csv` current."""

    sweep: str
    metric: str
    mode: str
    planned: int
    """Trials of the search."""
    baseline_trial: str | None
    status: str = RUNNING
    started: float = field(default_factory=time.time)
    """Unix time; of a resumed sweep, less the seconds that it ran before."""
    over: float | None = None
    """Unix time of its end, from which on `wall_s` stands still."""
    trials: dict[str, TrialRecord] = field(default_factory=dict)
    running: dict[str, TrialRecord] = field(default_factory=dict)
    ended: Ended = field(default_factory=Ended)
    epochs_done: int = 0
    references: dict[str, dict[str, float]] = field(default_factory=dict)
    """What the ruler says of `nothing` and `transfer`, beside which a model has to be worth something."""
    finalists: list[str] = field(default_factory=list)
    """Trials of the search whose configurations are trained again, from `seeds`."""
    seeds: list[int] = field(default_factory=list)
    repeats: list[str] = field(default_factory=list)
    """Trials that train a finalist again."""
    finals: Finals | None = None
    """Once all repeats have ended."""
    _best: str | None = None
    _counts: Counter[str] = field(default_factory=Counter)

    def add(self, trial: str, params: dict[str, Any], parent: str | None = None) -> TrialRecord:
        """The record of a trial, made where there is none."""
        record = self.trials.get(trial)
        if record is None:
            record = self.trials[trial] = TrialRecord(trial, params, parent=parent)
            self._counts[PENDING] += 1
            if parent is not None:
                self.repeats.append(trial)
        return record

    def drop(self, trial: str) -> None:
        """Takes out a repeat that has not begun."""
        self._counts[self.trials.pop(trial).status] -= 1
        self.repeats.remove(trial)

    def better(self, a: float, b: float | None) -> bool:
        """Whether `a` beats `b` in this sweep's mode; anything finite beats None."""
        if not math.isfinite(a):
            return False
        return b is None or (a < b if self.mode == "min" else a > b)

    def report(self, trial: str, epoch: int, metrics: dict[str, float]) -> None:
        """Takes in one epoch of a trial. Where it was measured, that is its score; what is not finite is none."""
        record = self.trials[trial]
        self.epochs_done += max(0, epoch - record.epochs)
        record.epochs = max(record.epochs, epoch)
        if (movement := metrics.get(_MOVEMENT)) is not None:
            record.unmoved = movement < UNMOVED
        value = metrics.get(self.metric)
        if value is None:
            return
        if math.isfinite(value):
            record.score, record.score_epoch, record.metrics = value, epoch, dict(metrics)
        else:
            record.score, record.score_epoch, record.metrics = None, None, {}
        self._rank_again(record)

    def set_aside(self, record: TrialRecord) -> None:
        """Takes a trial's score from it: it was measured by another ruler."""
        record.score, record.score_epoch, record.metrics, record.unmoved = None, None, {}, False
        self._rank_again(record)

    def settle(self, trial: str, status: str, reason: str | None = None) -> None:
        """Gives a trial its status and what led to it."""
        record = self.trials[trial]
        self._counts[record.status] -= 1
        self._counts[status] += 1
        if status == RUNNING:
            self.running[trial] = record
        else:
            self.running.pop(trial, None)
        for was, sign in ((record.status, -1), (status, 1)):
            if was not in (PENDING, RUNNING) and record.parent is None:
                self.ended.trials += sign
                self.ended.epochs += sign * record.epochs
        record.status, record.reason = status, reason
        self._rank_again(record)

    def _rank_again(self, record: TrialRecord) -> None:
        """After a change of `record`'s score or status."""
        if self._best != record.trial:
            self._rank(record)
            return
        self._best = None
        for other in self.trials.values():
            self._rank(other)

    def _rank(self, record: TrialRecord) -> None:
        best, score = self.trials.get(self._best or ""), record.score
        if score is None or record.status not in COMPARABLE:
            return
        # Of equals the first by name: who reports first is chance.
        if best is None or self.better(score, best.score) or (score == best.score and record.trial < best.trial):
            self._best = record.trial

    @property
    def best(self) -> TrialRecord | None:
        """The run that is exported: the trial with the best score among those that are `COMPARABLE`; of equals the
        first by name. After the finals, the best run of the configuration that won them."""
        if self.finals is not None:
            return self.best_run(self.finals.ranked[0])
        return self.trials[self._best] if self._best is not None else None

    def best_run(self, finalist: Finalist) -> TrialRecord:
        """The run of a finalist that has the best score; of equals the first."""
        place = finalist.scores.index((min if self.mode == "min" else max)(finalist.scores))
        return self.trials[finalist.runs[place]]

    @property
    def winner(self) -> TrialRecord | None:
        """The trial of the search whose configuration is best."""
        best = self.best
        return self.trials[best.parent] if best is not None and best.parent is not None else best

    def value(self, record: TrialRecord) -> float | None:
        """What a trial's configuration is worth: its mean over seeds after the finals, else the trial's score."""
        finalist = self.finals.of(record.parent or record.trial) if self.finals is not None else None
        return finalist.mean if finalist is not None else record.score

    @property
    def expected(self) -> int:
        """All trials: the search's, and those that train its finalists again."""
        return self.planned + len(self.repeats)

    @property
    def baseline(self) -> TrialRecord | None:
        """The trial that ran the configuration as it stands, if the sweep has one."""
        return self.trials.get(self.baseline_trial) if self.baseline_trial else None

    @property
    def gain(self) -> float | None:
        """By what share of the baseline's score the best is better; 0 where the baseline is best, None without one.

        After the finals, of the means.
        """
        if self.finals is not None:
            return self.finals.gain
        best, baseline = self.best, self.baseline
        if best is None or best.score is None or baseline is None or baseline.score is None:
            return None
        if baseline.status not in COMPARABLE:
            return None
        return abs(best.score - baseline.score) / max(abs(baseline.score), 1e-12)

    def reference(self, name: str) -> float | None:
        """The sweep's metric of one of `REFERENCES`, where it is measured."""
        return self.references.get(name, {}).get(self.metric)

    def reference_records(self) -> list[TrialRecord]:
        """The references as rows of a table of trials; none where the sweep's metric is not measured of them."""
        known = ((words, self.references.get(name, {})) for name, words in REFERENCES.items())
        return [
            TrialRecord(words, {}, "reference", score=values[self.metric], metrics=dict(values))
            for words, values in known
            if self.metric in values
        ]

    def good(self, record: TrialRecord) -> bool | None:
        """Whether a trial's configuration is better than all references; None where nobody knows."""
        value, known = self.value(record), [self.reference(name) for name in REFERENCES]
        if value is None or None in known:
            return None
        # What cannot be distinguished from doing nothing is ahead of it, or behind, by rounding alone.
        return not record.unmoved and all(self.better(value, reference) for reference in known)

    @property
    def standing(self) -> str | None:
        """How the best stands beside doing nothing and the channel transfer, in a line; None where nobody knows."""
        winner = self.winner
        value = self.value(winner) if winner is not None else None
        nothing, transfer = (self.reference(name) for name in REFERENCES)
        if winner is None or value is None or nothing is None or transfer is None:
            return None
        beside = f"doing nothing ({nothing:.4f})"
        if winner.unmoved or not self.better(value, nothing):
            return f"no trial beats {beside}"
        but = "and" if self.better(value, transfer) else "but not"
        return f"{winner.trial} beats {beside} {but} the channel transfer ({transfer:.4f})"

    @property
    def wall_s(self) -> float:
        """Seconds that it has run."""
        return round((self.over or time.time()) - self.started, 3)

    @property
    def short_metric(self) -> str:
        """The metric's name without its group: `score` for `eval/score`."""
        return self.metric.rpartition("/")[2]

    def changed(self, record: TrialRecord) -> dict[str, Any]:
        """The swept values of `record` that are not the baseline's; all of them where there is none to compare."""
        baseline = self.baseline
        if baseline is None or baseline is record:
            return record.params
        return {key: value for key, value in record.params.items() if value != baseline.params.get(key)}

    def ranked(self) -> list[TrialRecord]:
        """The comparable trials that have a score, best first."""
        records = [r for r in self.trials.values() if r.status in COMPARABLE and r.score is not None]
        return sorted(records, key=lambda r: (r.score or 0.0) * (1 if self.mode == "min" else -1))

    def counts(self) -> dict[str, int]:
        """Trials by status, in the order in which trials got there first."""
        return {status: n for status, n in self._counts.items() if n}

    def to_mapping(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        return {
            "sweep": self.sweep,
            "status": self.status,
            "metric": self.metric,
            "mode": self.mode,
            "wall_s": self.wall_s,
            "best": asdict(self.best) if self.best else None,
            "baseline": asdict(self.baseline) if self.baseline else None,
            "references": self.references,
            "finals": asdict(self.finals) if self.finals else None,
            "trials": [asdict(record) for record in self.trials.values()],
            "raystar": __version__,
        }

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], planned: int) -> Summary:
        """A summary as `to_mapping` gave it; later versions' further facts of a trial are left out.

        Raises:
            KeyError, TypeError: it is not one.
        """
        baseline = content["baseline"]
        summary = cls(
            content["sweep"],
            content["metric"],
            content["mode"],
            planned,
            baseline["trial"] if baseline else None,
            content["status"],
            started=1.0,
            over=1.0 + content["wall_s"],
        )
        known = {attribute.name for attribute in fields(TrialRecord)}
        for trial in content["trials"]:
            record = TrialRecord(**{key: value for key, value in trial.items() if key in known})
            summary.trials[record.trial] = record
            if record.parent is not None:
                summary.repeats.append(record.trial)
            summary._counts[PENDING] += 1
            status, record.status = record.status, PENDING
            summary.settle(record.trial, status, record.reason)
        summary.references = content.get("references", {})
        if (finals := content.get("finals")) is not None:
            summary.finals = Finals(**{**finals, "ranked": [Finalist(**finalist) for finalist in finals["ranked"]]})
        summary.finalists = list(dict.fromkeys(str(summary.trials[name].parent) for name in summary.repeats))
        summary.epochs_done = sum(record.epochs for record in summary.trials.values())
        return summary

    def to_csv(self) -> str:
        """The trials as a table, swept keys as columns, best first, and what a model has to beat."""
        keys = sorted({key for record in self.trials.values() for key in record.params})
        columns = [
            "trial",
            "status",
            "epochs",
            "score",
            "score_epoch",
            "unmoved",
            "parent",
            "wall_s",
            "run_id",
            "reason",
        ]
        columns += keys
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        sign = 1 if self.mode == "min" else -1
        last = math.inf
        ordered = sorted(self.trials.values(), key=lambda r: last if r.score is None else sign * r.score)
        for record in (*ordered, *self.reference_records()):
            row = asdict(record) | record.params
            table.writerow({column: row.get(column) for column in columns})
        return text.getvalue()

    def write(self, folder: Path) -> None:
        """Writes `summary.json` and `summary.csv` into `folder`, each whole or not at all."""
        write_whole(folder / "summary.json", json.dumps(self.to_mapping(), indent=1) + "\n")
        write_whole(folder / "summary.csv", self.to_csv())
