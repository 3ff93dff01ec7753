"""What a sweep knows, as a fold over what happened: applied to its journal again, it knows the same.

`apply` takes one event, a plain mapping with a time, changes the summary and ASHA's rungs, and says what follows from
it. A running sweep writes each event to its journal before it applies it; a resumed one applies the journal first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raystar.record import finals
from raystar.record.events import ALONE, ENDED, EPOCH, FINALS, NOTE, REFERENCES, RULER, SESSION, STARTED, Event, Verdict
from raystar.record.statuses import BROKEN, COLLAPSED, FINISHED, INTERRUPTED, PENDING, RUNNING, STOPPED, UNFINISHED
from raystar.record.summary import Summary
from raystar.search.asha import Rungs
from raystar.search.space import SEED, Collapse

INDISTINCT = "its translations cannot be distinguished from their sources"
"""What `unmoved` means, in words."""


@dataclass
class Ledger:
    """The state of a sweep.

    Args:
        rungs: None where no trial is stopped early.
        epochs: of a trial that runs to its end.
    """

    summary: Summary
    rungs: Rungs | None
    epochs: int
    collapse: Collapse
    ranking: str | None = None
    """The metric that ranks trials at rungs; by default the sweep's."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """The configuration's values of all swept keys, for trials that set some of these alone."""
    alone: set[str] = field(default_factory=set)
    """Trials that were out of memory beside others, and get one more try by themselves."""
    broken_in_a_row: list[str] = field(default_factory=list)
    """The trials that went wrong since the last that did not."""
    due: dict[str, Verdict] = field(default_factory=dict)
    """Trials that had to end and have not been recorded as ended: the sweep broke off in between."""
    ruler: str | None = None
    """The key of what measures, where that has changed since the sweep began."""
    aside: set[str] = field(default_factory=set)
    """Trials with epochs that another ruler measured."""
    _alike: dict[str, int] = field(default_factory=dict)  # measured epochs in a row without diversity
    _since: dict[str, float] = field(default_factory=dict)  # up to when a trial's seconds are counted
    _last: float | None = None  # time of the last event
    _ran: float = 0.0  # seconds of the sessions before this one
    _session: float = 0.0

    def replay(self, events: Iterable[Event]) -> None:
        """Takes in what happened before. Trials that were running when it broke off are `INTERRUPTED`."""
        for event in events:
            self.apply(event)
        self._break_off()
        self.broken_in_a_row.clear()

    def apply(self, event: Event) -> Verdict:
        """Takes in one event."""
        at = float(event["at"])
        verdict = Verdict()
        if event["event"] == SESSION:
            self._begin_session(at)
        elif event["event"] == STARTED:
            self._start(event["trial"], dict(event["params"]), at)
        elif event["event"] == EPOCH:
            verdict = self._epoch(event["trial"], int(event["epoch"]), dict(event["metrics"]), at)
            self.summary.trials[event["trial"]].idle_s = event.get("idle_s")
            if verdict.ends is not None:
                self.due[event["trial"]] = verdict
        elif event["event"] == NOTE:
            self.summary.trials[event["trial"]].note = event["note"]
        elif event["event"] == ALONE:
            self.alone.add(event["trial"])
            self._clock(event["trial"], at)
            self.summary.settle(event["trial"], PENDING, event["reason"])
        elif event["event"] == ENDED:
            self._clock(event["trial"], at)
            self._end(event["trial"], event["status"], event["reason"])
        elif event["event"] == REFERENCES:
            self.summary.references = {name: dict(values) for name, values in event["values"].items()}
        elif event["event"] == FINALS:
            self._begin_finals(list(event["finalists"]), list(event["seeds"]))
        elif event["event"] == RULER:
            self._change_ruler(event["ruler"])
            return verdict  # it happens between sessions, whose time does not count
        if event["event"] not in (EPOCH, NOTE) and self.summary.finalists:
            self.summary.finals = finals.decide(self.summary)
        self._last = at
        return verdict

    def unfinished(self) -> list[str]:
        """Trials that are known and can continue: the search's in the order of the summary, then repeats by name."""
        names = [name for name, record in self.summary.trials.items() if record.status in UNFINISHED]
        return sorted(names, key=lambda name: name if self.summary.trials[name].parent is not None else "")

    def _begin_finals(self, finalists: list[str], seeds: list[int]) -> None:
        """Plans the finals' trials. Those that an earlier choice has run stay; of what it has not, nothing is left."""
        summary = self.summary
        summary.finalists, summary.seeds = finalists, seeds
        repeats = finals.repeats(finalists, seeds)
        for name in list(summary.repeats):
            if summary.trials[name].status == PENDING and name not in repeats:
                summary.drop(name)
        for name, (finalist, seed) in repeats.items():
            record = summary.add(name, {**summary.trials[finalist].params, SEED: seed}, finalist)
            if record.status == STOPPED:  # by a choice that left it out
                summary.settle(name, PENDING)

    def _change_ruler(self, ruler: str) -> None:
        """Sets aside what was measured until now: at no rung and in no table does it stand beside other scores."""
        self.ruler = ruler
        for record in self.summary.trials.values():
            if record.epochs:
                self.aside.add(record.trial)
                value = "" if record.score is None else f", {self.summary.short_metric} {record.score:.4f}"
                remark = f"another ruler measured it up to epoch {record.epochs}{value}"
                record.note = f"{record.note}; {remark}" if record.note else remark
            self.summary.set_aside(record)
        self.summary.references = {}
        self._alike.clear()
        if self.rungs is not None:
            self.rungs.clear()

    def _begin_session(self, at: float) -> None:
        if self._last is not None:
            self._ran += self._last - self._session
        self._session = at
        self.summary.started = at - self._ran
        self._break_off()

    def _break_off(self) -> None:
        for record in self.summary.trials.values():
            if record.status == RUNNING:
                self.summary.settle(record.trial, INTERRUPTED, "its sweep ended")

    def _start(self, name: str, params: dict[str, Any], at: float) -> None:
        params = {**self.settled, **params}
        self.summary.add(name, params).params = params
        self.summary.settle(name, RUNNING)
        self._since[name] = at

    def _clock(self, name: str, at: float) -> None:
        """Counts the seconds since a running trial was last heard of."""
        record = self.summary.trials[name]
        if record.status == RUNNING:
            record.wall_s = round(record.wall_s + at - self._since[name], 3)
            self._since[name] = at

    def _epoch(self, name: str, epoch: int, metrics: dict[str, float], at: float) -> Verdict:
        record = self.summary.trials[name]
        self._clock(name, at)
        if epoch <= record.epochs:
            return Verdict()
        self.summary.report(name, epoch, metrics)
        if self._has_collapsed(name, metrics):
            few = f"diversity below {self.collapse.diversity:g} in {self.collapse.epochs} measured epochs in a row"
            return Verdict(COLLAPSED, f"{few}, the last epoch {epoch}")
        value = metrics.get(self.ranking or self.summary.metric)
        if self.rungs is None or value is None or record.parent is not None:
            return Verdict()
        if self.rungs.take(name, epoch, value, record.unmoved) or epoch >= self.epochs:
            return Verdict()
        why = f": {INDISTINCT}" if record.unmoved else ""
        return Verdict(STOPPED, f"stopped early after epoch {epoch}{why}")

    def _has_collapsed(self, name: str, metrics: Mapping[str, float]) -> bool:
        diversity = metrics.get("eval/diversity")
        if diversity is not None:
            # Who does nothing does so under every noise: that is another matter.
            alike = diversity < self.collapse.diversity and not self.summary.trials[name].unmoved
            self._alike[name] = self._alike.get(name, 0) + 1 if alike else 0
        return 0 < self.collapse.epochs <= self._alike.get(name, 0)

    def _end(self, name: str, status: str, reason: str | None) -> None:
        self.due.pop(name, None)
        self.summary.settle(name, status, reason)
        if status in BROKEN:
            self.broken_in_a_row.append(name)
        elif status in (FINISHED, STOPPED):
            self.broken_in_a_row.clear()
