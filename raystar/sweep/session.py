"""One session of a sweep: Ray Tune runs what is left to run, this process decides and keeps the record.

Trials know nothing of any of this: `backend.tune_hooks` carries their reports here, and the answers back.
"""

from __future__ import annotations

import logging
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, cast

from raystar.backend import placing
from raystar.base.errors import RaystarError, in_short
from raystar.base.journal import Journal
from raystar.record import finals
from raystar.record.events import (
    ALONE,
    ENDED,
    EPOCH,
    FINALS,
    NOTE,
    REFERENCES,
    SESSION,
    STARTED,
    Event,
    TrialReport,
    Verdict,
    read_events,
)
from raystar.record.retention import Janitor
from raystar.record.state import Ledger
from raystar.record.statuses import (
    BROKEN,
    FAILED,
    FINISHED,
    INTERRUPTED,
    KILLED,
    OUT_OF_MEMORY,
    PENDING,
    RUNNING,
    STARTING,
    STOPPED,
    UNFINISHED,
)
from raystar.record.sweep_file import JOURNAL
from raystar.sweep import finish as outcome
from raystar.sweep import last_lines, runs
from raystar.sweep.disk import DiskWatch, checkpoint_bytes
from raystar.sweep.ending import Ending
from raystar.sweep.keeping import IdleClock, Keeper
from raystar.sweep.live_table import Board
from raystar.sweep.plan import Plan
from raystar.tracking.tracker import PARENT, Tracker

logger = logging.getLogger(__name__)


class Session:
    """A sweep from when it begins, or is resumed, to when it ends: what happens goes to journal, MLflow and screen.

    Args:
        placed: on a cluster, the files that nodes must hold.
        ruler_ready: returns when the ruler has been made, with its references; raises what was in its way.
    """

    def __init__(
        self,
        plan: Plan,
        tracker: Tracker,
        ledger: Ledger,
        placed: placing.Placed | None,
        ruler_ready: Callable[[], Mapping[str, Mapping[str, float]]],
    ) -> None:
        self.plan = plan
        self.placed = placed
        self.tracker = tracker
        self.ledger = ledger
        self.ruler_ready = ruler_ready
        self.journal = Journal(plan.folder / JOURNAL)
        self.summary = ledger.summary
        self.board = Board(self.summary, plan.config.training.epochs, plan.repeats)
        top = plan.space.finalists.top if plan.seeds else 0
        self.janitor = Janitor(plan.storage, plan.space.keep, plan.space.mode, top, self.summary.baseline_trial)
        self.keeper = Keeper(plan.folder, self.summary, tracker, self.journal, self.janitor)
        self.ending = Ending(plan.time_budget_s, tracker.hurry)
        self.refused: RaystarError | None = None
        self._begun: set[str] = set()  # trials, in this session
        self._ends: dict[str, tuple[str, str | None]] = {}  # status and reason that a trial's end will have
        self.idle = IdleClock()

    # -- the run ------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs what is left to run, then writes what is left to write; returns the exit status."""
        plan = self.plan
        runs.open_parent(self.tracker, plan, self.ledger.epochs)
        self._happened(SESSION)
        if plan.resumed:
            self._catch_up()
        error: str | None = None
        restore_signals = self.ending.catch_signals()
        self.board.start()
        watch = DiskWatch(plan.storage, checkpoint_bytes(plan.config))
        try:
            self._run_trials()
        except KeyboardInterrupt:
            self.ending.interrupts = max(self.ending.interrupts, 1)
        # Tune's own failures, not a trial's: what is done is kept and recorded, then the reason is printed.
        except Exception as failure:
            if self.refused is not None:
                raise self.refused from None
            trace = plan.folder / "error.txt"
            trace.write_text(traceback.format_exc(), encoding="utf-8")
            error = f"{in_short(failure)} (all of it in {trace})"
        finally:
            watch.close()
            self.board.stop()
        self.ending.finishing = True
        try:
            return self._finish(error or self.ending.given_up)
        finally:
            restore_signals()

    def _catch_up(self) -> None:
        """Does what a process that was killed between two lines left undone."""
        for event in read_events(self.journal):
            name = event.get("trial", PARENT)
            if event["event"] == EPOCH and event["epoch"] > self.tracker.last_epoch(name):
                self._track_epoch(name, event)
        for name, verdict in list(self.ledger.due.items()):
            self._begun.add(name)
            self._end(name, str(verdict.ends), verdict.reason)
        for record in self.summary.trials.values():
            if record.trial in self.ledger.aside and record.score is None:
                runs.set_aside(self.tracker, record)
            if record.status in (*BROKEN, FINISHED, STOPPED, INTERRUPTED):
                if runs.lacks_score(self.tracker, self.summary, record):
                    runs.give_score(self.tracker, self.summary, record, models=self.plan.purpose.models)
                self.tracker.end(record.trial, record.status, record.reason)
            if record.trial not in self.ledger.aside or record.status in UNFINISHED:
                self.janitor.known(record)  # what is set aside is nobody's to remove

    def _run_trials(self) -> None:
        """Runs the search, then its finals."""
        fresh = [name for name in self.plan.names if name not in self.summary.trials]
        names = self._to_run(repeats=False)
        if names or fresh:
            n = self.plan.at_a_time
            how_many = "" if self.plan.address else f"{n} trial{'s' if n > 1 else ''} at a time; "
            better = "lower" if self.plan.space.mode == "min" else "higher"
            logger.info(f"{how_many}{self.plan.space.metric}, {better} is better")
        self._fit_all(names, fresh)
        if self.plan.seeds and not self.stopping and self._choose_finalists():
            self._fit_all(self._to_run(repeats=True), [])

    def _to_run(self, *, repeats: bool) -> list[str]:
        """Trials of the search, or of the finals, that are known and can continue."""
        planned = finals.repeats(self.summary.finalists, self.summary.seeds)
        return [n for n in self.ledger.unfinished() if (n in planned if repeats else n not in self.summary.repeats)]

    def _fit_all(self, names: list[str], fresh: list[str]) -> None:
        """Runs trials, then those alone that were out of memory beside others."""
        beside = [name for name in names if name not in self.ledger.alone]
        # What proposes values hands out those of its own keys alone, and experiments may set others.
        for go in [(beside, []), ([], fresh)] if self.plan.space.experiments else [(beside, fresh)]:
            if any(go) and not self.stopping:
                self._fit(*go)
        for name in [name for name in (*names, *fresh) if name in self.ledger.alone]:
            if not self.stopping:
                logger.info(f"{name} was out of memory beside others and is tried again by itself")
                self._fit([name], [])

    def _choose_finalists(self) -> bool:
        """Plans the finals; returns whether there are any. Chosen as before, they are those that are under way."""
        summary, seeds = self.summary, self.plan.seeds
        chosen = finals.choose(
            summary.trials.values(), summary.mode, self.plan.space.finalists.top, summary.baseline_trial
        )
        if not chosen:
            return False
        planned = finals.repeats(chosen, seeds)
        for name in summary.repeats:
            record = summary.trials[name]
            if name not in planned and record.status == INTERRUPTED:  # nobody will resume it
                reason = f"{record.parent} is no finalist any more"
                self._happened(ENDED, trial=name, status=STOPPED, reason=reason)
                self.tracker.attach(name, {}, {"raystar.status": STOPPED, "raystar.reason": reason}, {})
        if (chosen, seeds) != (summary.finalists, summary.seeds):
            self._happened(FINALS, finalists=chosen, seeds=seeds)
        if remaining := len(self._to_run(repeats=True)):
            numbers = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            logger.info(f"the finals: {', '.join(chosen)} again from {numbers}; {remaining} trials to go")
        return True

    def _fit(self, names: list[str], fresh: list[str]) -> None:
        """Has Tune run the trials `names`, whose values are known, and `fresh` ones, whose values it searches."""
        # Ray's modules take seconds to import, which `run` begins before anything needs them.
        from raystar.backend import tuner
        from raystar.sweep import assigning

        alone = bool(names) and names[0] in self.ledger.alone
        request = assigning.request(self.plan, self.ledger, self.placed, alone)
        assignment = assigning.assignment(self.plan, self.summary, names, fresh, alone)
        self.ending.fitting = True
        try:
            tuner.fit(self, request, self.plan.space, assignment)
        finally:
            self.ending.fitting = False

    # -- what Tune's hooks ask ----------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Whether no trial is to be begun, and those that run are to end with their next report."""
        return self.ending.near

    @property
    def stop_now(self) -> bool:
        """Whether the running trials are to end at once."""
        if self.ending.given_up is not None or self.ending.late:
            return True
        return bool(self.ending.interrupts) and not self.summary.counts().get(RUNNING)

    # -- what Tune's hooks tell ---------------------------------------------------------------------

    def trial_started(self, name: str, params: dict[str, Any]) -> None:
        """A trial begins, or begins again after its process died."""
        if not self._begun:  # until now, the cores were busy with what the first step waits for
            self.tracker.begin()
        self._happened(STARTED, trial=name, params=params)
        if name in self._begun:
            return
        self._begun.add(name)
        runs.open_trial(self.tracker, self.plan, self.summary, self.summary.trials[name])
        self.board.changed(self.summary.trials[name])

    def trial_reported(self, name: str, report: TrialReport) -> bool:
        """A trial reports an epoch, or that it cannot continue; returns whether it may."""
        if not self.idle.running:  # what started beside Ray must have worked before the first result counts
            try:
                self.tracker.wait_until_connected()
                references = self.ruler_ready()
            except RaystarError as refused:
                self.refused = refused  # Tune wraps what its callbacks raise
                raise
            if references and not self.summary.references:
                self._happened(REFERENCES, values=references)
                self.board.show_references()
        record = self.summary.trials[name]
        self.idle.heard(record, report)
        if report["status"] == STARTING:
            return True
        if report["status"] in BROKEN:
            self._ends[name] = (report["status"], report["reason"])
            return True
        if report.get("note"):
            self._happened(NOTE, trial=name, note=report["note"])
        epoch = int(report["epoch"])
        if epoch <= record.epochs:  # its process died after this report and repeats it, bit for bit
            return name not in self._ends
        kept = {key: report[key] for key in ("metrics", "images", "first_images", "labels") if report.get(key)}
        kept |= {key: self.plan.storage.names(report[key]) for key in ("images", "first_images") if report.get(key)}
        verdict = self._happened(EPOCH, trial=name, epoch=epoch, idle_s=record.idle_s, **kept)
        self._track_epoch(name, cast(Event, {"epoch": epoch, **kept}))
        if self.plan.purpose.models:
            self.janitor.epoch(record, epoch)
        self.board.changed(record, report["metrics"].get(self.summary.metric))
        self.keeper.write()
        if verdict.ends is not None:
            self._ends[name] = (verdict.ends, verdict.reason)
        return verdict.ends is None

    def _track_epoch(self, name: str, event: Event) -> None:
        epoch, labels = int(event["epoch"]), event.get("labels")
        if labels and epoch == 1:
            self.tracker.attach(name, {}, labels, {})
            if note := labels.get("raystar.compile_note"):
                self._happened(NOTE, trial=name, note=note)
        if first := event.get("first_images"):
            self.tracker.log(name, 0, {}, self.plan.storage.places(first))
        self.tracker.log(name, epoch, event["metrics"], self.plan.storage.places(event.get("images", {})))

    def trial_ended(self, name: str, deaths: int | None) -> None:
        """A trial is over: at its end, stopped, or broken."""
        record = self.summary.trials.get(name)
        if record is None or name not in self._begun or record.status != RUNNING:
            return  # it never ran
        status: str
        reason: str | None
        if deaths is not None:
            status, reason = KILLED, f"its process died {deaths} times without finishing an epoch in between"
        elif name in self._ends:
            status, reason = self._ends.pop(name)
        elif record.epochs >= self.ledger.epochs:
            status, reason = FINISHED, None
        elif self.stopping:
            status, reason = INTERRUPTED, self.ending.why
        else:
            status, reason = FAILED, f"ended after epoch {record.epochs} of {self.ledger.epochs} without a reason"
        if status == OUT_OF_MEMORY and name not in self.ledger.alone:
            self._happened(ALONE, trial=name, reason=reason)
            self._begun.discard(name)
            self.tracker.end(name, INTERRUPTED, f"{reason}; it is tried again by itself")
            self.board.changed(record)
            return
        self._end(name, status, reason)

    def _end(self, name: str, status: str, reason: str | None) -> None:
        record = self.summary.trials[name]
        self._happened(ENDED, trial=name, status=status, reason=reason)
        record.run_id = self.tracker.run_id(name)
        runs.give_score(self.tracker, self.summary, record, models=self.plan.purpose.models)
        self.tracker.end(name, status, reason)
        self.janitor.ended(record)
        self.board.changed(record)
        broken, limit = self.ledger.broken_in_a_row, self.plan.space.abort_after
        if limit and len(broken) >= limit and not self.stopping:
            first = self.summary.trials[broken[0]]
            self.ending.given_up = f"{len(broken)} trials in a row went wrong, the first, {first.trial}: {first.reason}"
        self.keeper.write()

    def _happened(self, event: str, **facts: Any) -> Verdict:
        """Writes an event to the journal, then takes it in."""
        record = {"event": event, "at": time.time(), **facts}
        self.journal.append(record)
        return self.ledger.apply(cast(Event, record))

    # -- the end ------------------------------------------------------------------------------------

    def _finish(self, error: str | None) -> int:
        summary, plan = self.summary, self.plan
        for record in summary.trials.values():
            if record.status == RUNNING:
                reason = self.ending.why if self.stopping else error
                self._end(record.trial, INTERRUPTED, reason)
            elif record.status == PENDING and not self.stopping and error is None:
                self._happened(ENDED, trial=record.trial, status=FAILED, reason="Ray did not run it")
        self.janitor.close()
        done = [r for r in summary.trials.values() if r.status in (FINISHED, STOPPED)]
        whole = bool(done or self.ending.late) and not error
        summary.status = INTERRUPTED if self.ending.interrupts else FINISHED if whole else FAILED
        summary.over = time.time()
        files = outcome.leave(plan, summary, summary.best) if summary.best is not None else {}
        self.keeper.write(now=True)
        if self.ending.interrupts < 3:  # who wants to leave at once does not wait for it
            files |= outcome.report(plan)  # from the files that have just been written
        outcome.close_parent(plan, summary, self.tracker, files, error)
        outcome.hand_in_models(plan, summary, self.tracker, self.janitor.checkpoint)
        self.tracker.close()
        if not self.tracker.waiting:
            shutil.rmtree(plan.folder / outcome.FINALISTS, ignore_errors=True)
        self.keeper.write(now=True)
        self.journal.close()
        addresses = (*self.tracker.how_to_compare(), self.tracker.grids_address())
        last_lines.tell(plan, summary, addresses, self.tracker.registered, error)
        return 130 if self.ending.interrupts else int(summary.status != FINISHED)
