"""One session of a sweep: Ray Tune runs what is left to run, this process decides and keeps the record.

Trials know nothing of any of this: `driver` carries their reports here, and the answers back.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from raystar.backend import placing
from raystar.base.console import announce
from raystar.base.errors import RaystarError
from raystar.base.files import wait_for_space
from raystar.base.journal import Journal
from raystar.config.load import get_value, override, signature, to_mapping, to_yaml
from raystar.record import finals
from raystar.record.events import ALONE, ENDED, EPOCH, FINALS, NOTE, REFERENCES, SESSION, STARTED, Verdict
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
)
from raystar.record.summary import TrialRecord
from raystar.record.sweep_file import JOURNAL, RECORD
from raystar.ruler.ruler import measured_by
from raystar.sweep import finish as outcome
from raystar.sweep import last_lines
from raystar.sweep.disk import DiskWatch, checkpoint_bytes
from raystar.sweep.live_table import Board
from raystar.sweep.plan import Plan
from raystar.tracking.mlflow.writer import MlflowTracker
from raystar.tracking.tracker import CHECKPOINT, PARENT

_LEARNING = 8  # trials at a time on a cluster, for a search that learns


class Session:
    """A sweep from when it begins, or goes on, to when it ends: what happens goes to journal, MLflow and screen.

    Args:
        placed: on a cluster, the files that nodes must hold.
        ruler_ready: returns when the ruler has been made, with its references; raises what was in its way.
    """

    def __init__(
        self,
        plan: Plan,
        tracker: MlflowTracker,
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
        self.interrupts = 0
        self.given_up: str | None = None
        """Why the sweep ends before its trials do, where nobody asked for that."""
        self.refused: RaystarError | None = None
        self._fitting = False
        self._finishing = False
        self._deadline = time.time() + plan.time_budget_s if plan.time_budget_s is not None else math.inf
        self._begun: set[str] = set()  # trials, in this session
        self._ends: dict[str, tuple[str, str | None]] = {}  # status and reason that a trial's end will have
        self._last_report: dict[tuple[str, int], tuple[str, float]] = {}  # by process: trial and time
        self._written = 0.0
        self._write_every = 1.0

    # -- the run ------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs what is left to run, then writes what is left to write; returns the exit status."""
        plan = self.plan
        self._open_parent()
        self._happened(SESSION)
        if plan.resumed:
            self._catch_up()
        error: str | None = None
        restore_signals = self._catch_signals()
        self.board.start()
        watch = DiskWatch(plan.storage, checkpoint_bytes(plan.config))
        try:
            self._run_trials()
        except KeyboardInterrupt:
            self.interrupts = max(self.interrupts, 1)
        # Tune's own failures, not a trial's: what is done is kept and recorded, then the reason is told.
        except Exception as failure:
            if self.refused is not None:
                raise self.refused from None
            trace = plan.folder / "error.txt"
            trace.write_text(traceback.format_exc(), encoding="utf-8")
            error = f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]} (all of it in {trace})"
        finally:
            watch.close()
            self.board.stop()
        self._finishing = True
        try:
            return self._finish(error or self.given_up)
        finally:
            restore_signals()

    def _open_parent(self) -> None:
        plan = self.plan
        self.tracker.start(
            PARENT,
            name=plan.name,
            params={"trials": plan.record["trials"], "epochs": self.ledger.epochs, "search": plan.space.search},
            tags={
                "raystar.signature": signature(plan.config),
                "raystar.seed": str(plan.config.training.seed),
                **({"mlflow.note.content": plan.space.description} if plan.space.description else {}),
            },
            text={"config.yaml": to_yaml(plan.config), RECORD: (plan.folder / RECORD).read_text(encoding="utf-8")},
        )

    def _catch_up(self) -> None:
        """Does what a process that was killed between two lines left undone."""
        for event in self.journal:
            name = event.get("trial", PARENT)
            if event["event"] == EPOCH and event["epoch"] > self.tracker.last_epoch(name):
                self._track_epoch(name, event)
        for name, verdict in list(self.ledger.due.items()):
            self._begun.add(name)
            self._end(name, str(verdict.ends), verdict.reason)
        for record in self.summary.trials.values():
            if record.status in (*BROKEN, FINISHED, STOPPED, INTERRUPTED):
                self.tracker.end(record.trial, record.status, record.reason)
            self.janitor.known(record)

    def _run_trials(self) -> None:
        """Runs the search, then its finals."""
        records = self.summary.trials
        fresh = [name for name in map(self.plan.trial_name, range(self.plan.trials)) if name not in records]
        names = self._to_run(repeats=False)
        if names or fresh:
            n = self.plan.at_a_time
            how_many = "" if self.plan.address else f"{n} trial{'s' if n > 1 else ''} at a time; "
            better = "lower" if self.plan.space.mode == "min" else "higher"
            announce(f"{how_many}{self.plan.space.metric}, {better} is better")
        self._fit_all(names, fresh)
        if self.plan.seeds and not self.stopping and self._choose_finalists():
            self._fit_all(self._to_run(repeats=True), [])

    def _to_run(self, *, repeats: bool) -> list[str]:
        """Trials of the search, or of the finals, that are known and can go on."""
        wanted = finals.repeats(self.summary.finalists, self.summary.seeds)
        return [n for n in self.ledger.unfinished() if (n in wanted if repeats else n not in self.summary.repeats)]

    def _fit_all(self, names: list[str], fresh: list[str]) -> None:
        """Runs trials, then those alone that were out of memory beside others."""
        beside = [name for name in names if name not in self.ledger.alone]
        if beside or fresh:
            self._fit(beside, fresh)
        for name in sorted({*names, *fresh} & self.ledger.alone):
            if not self.stopping:
                announce(f"{name} was out of memory beside others and is tried again by itself")
                self._fit([name], [])

    def _choose_finalists(self) -> bool:
        """Plans the finals; returns whether there are any. Chosen as before, they are those that are under way."""
        summary, seeds = self.summary, self.plan.seeds
        chosen = finals.choose(
            summary.trials.values(), summary.mode, self.plan.space.finalists.top, summary.baseline_trial
        )
        if not chosen:
            return False
        wanted = finals.repeats(chosen, seeds)
        for name in summary.repeats:
            record = summary.trials[name]
            if name not in wanted and record.status == INTERRUPTED:  # nobody will go on with it
                reason = f"{record.parent} is no finalist any more"
                self._happened(ENDED, trial=name, status=STOPPED, reason=reason)
                self.tracker.attach(name, {}, {"raystar.status": STOPPED, "raystar.reason": reason}, {})
        if (chosen, seeds) != (summary.finalists, summary.seeds):
            self._happened(FINALS, finalists=chosen, seeds=seeds)
        if left := len(self._to_run(repeats=True)):
            numbers = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            announce(f"the finals: {', '.join(chosen)} again from {numbers}; {left} trials to go")
        return True

    def _fit(self, names: list[str], fresh: list[str]) -> None:
        """Has Tune run the trials `names`, whose values are known, and `fresh` ones, whose values it searches."""
        from ray import tune

        from raystar.backend.reporting import Request
        from raystar.backend.trial import run_trial
        from raystar.backend.tune_hooks import Recorder, Release, Silent, Stop, TrialNames, Warden

        plan, space = self.plan, self.plan.space
        alone = bool(names) and names[0] in self.ledger.alone
        grouped = space.resources.workers > 1
        gpu_share = math.ceil(plan.gpu_share) if alone else plan.gpu_share
        # A group of workers asks for its own; the function that steers it must ask for something, or Tune refuses it.
        resources: dict[str, float] = {"cpu": 0.01 if grouped else plan.cpus}
        if gpu_share and not grouped:
            resources["gpu"] = gpu_share
        # On a cluster all trials are handed to Ray, which gives each to the first node that has room, also a new one.
        at_a_time = 1 if alone else plan.max_concurrent or 0 if plan.address else plan.at_a_time
        with tempfile.TemporaryDirectory(prefix="raystar-ray-", ignore_cleanup_errors=True) as scratch:
            request = Request(
                config=to_mapping(plan.config),
                metric=space.metric,
                mode=space.mode,
                cache_dir=str(plan.cache_dir),
                placed=self.placed,
                bank_key=plan.bank.key,
                storage=plan.storage.uri,
                scratch=scratch,
                known={name: record.epochs for name, record in self.summary.trials.items() if record.epochs},
                gpu_share=gpu_share,
                cpus=plan.cpus,
                workers=space.resources.workers,
                measure_at=tuple(self.ledger.rungs.places) if self.ledger.rungs is not None else (),
                speed=plan.speed,
            )
            # What was chosen before need not lie in a range: a baseline's null cannot even be compared with one.
            values = {
                key: d.to_ray() if fresh else tune.choice([self.summary.trials[n].params[key] for n in names])
                for key, d in space.space.items()
            }
            if seeds := sorted(
                {self.summary.trials[n].params[finals.SEED] for n in names if n in self.summary.repeats}
            ):
                values[finals.SEED] = tune.choice(seeds)
            tuner = tune.Tuner(
                tune.with_resources(tune.with_parameters(run_trial, request=request), resources),
                param_space=values,
                tune_config=tune.TuneConfig(
                    search_alg=self._search(names, fresh, at_a_time),
                    scheduler=Warden(self),
                    num_samples=len(names) + len(fresh),
                    # The function of a stopped trial still waits for its group of workers: it ends with its process.
                    # And what one setting compiled would be in the next one's way, and in its memory.
                    reuse_actors=not grouped and not plan.speed,
                    trial_name_creator=TrialNames([*names, *fresh]),
                    trial_dirname_creator=str,
                ),
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=scratch,
                    verbose=0,
                    stop=Stop(self),
                    callbacks=[Silent(), Release(), Recorder(self)],
                    # A process that dies starts again from its trial's last checkpoint, as often as `Recorder` says;
                    # what a trial raises never comes here.
                    failure_config=tune.FailureConfig(max_failures=-1),
                ),
            )
            self._fitting = True
            try:
                tuner.fit()
            finally:
                self._fitting = False

    def _search(self, names: list[str], fresh: list[str], at_a_time: int) -> Any:
        points = [dict(self.summary.trials[name].params) for name in names]
        if not fresh:
            from ray.tune.search.basic_variant import BasicVariantGenerator

            # Drawn and checked by `Space.points`, or chosen before: Tune only hands them out.
            return BasicVariantGenerator(points_to_evaluate=points, max_concurrent=at_a_time)
        from ray.tune.search import ConcurrencyLimiter
        from ray.tune.search.optuna import OptunaSearch
        from ray.tune.search.search_generator import SearchGenerator

        plan, space = self.plan, self.plan.space
        # It tells of every study it opens, and warns of a baseline that lies outside the searched ranges.
        logging.getLogger("optuna").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="optuna")
        if space.baseline and plan.trial_name(0) in fresh:
            points.append({key: get_value(plan.config, key) for key in space.space})
        told = [
            r for r in self.summary.trials.values()
            if r.trial not in names and r.score is not None and r.parent is None
        ]  # fmt: skip
        search = OptunaSearch(
            space={key: d.to_ray() for key, d in space.space.items()},
            metric=space.metric,
            mode=space.mode,
            points_to_evaluate=points or None,
            # Begun anew with the same seed, it would first propose what it proposed before.
            seed=space.seed + len(told) + len(names),
        )
        for record in told:
            search.add_evaluated_point(record.params, record.score)
        # A search that learns has little to go on if all its trials begin at once.
        return SearchGenerator(ConcurrencyLimiter(search, max_concurrent=at_a_time or _LEARNING))

    def _catch_signals(self) -> Callable[[], None]:
        """The first Ctrl-C or SIGTERM stops after saving, a third at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.interrupts += 1
            if self._finishing:  # what is known is being written, which takes a moment and leaves no run open
                if self.interrupts >= 3:
                    self.tracker.hurry()
                if self.interrupts >= 4:
                    raise KeyboardInterrupt
                return
            if not self._fitting or self.interrupts >= 3:
                raise KeyboardInterrupt
            if self.interrupts == 1:
                print(
                    "\nstopping when each running trial has saved its epoch; press Ctrl-C twice more to stop at once",
                    file=sys.stderr,
                    flush=True,
                )

        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in old.items():
                signal.signal(number, handler)

        return restore

    # -- what `driver` asks --------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Whether no trial is to be begun, and those that run are to end with their next report."""
        return bool(self.interrupts) or self.given_up is not None or time.time() > self._deadline

    @property
    def stop_now(self) -> bool:
        """Whether the running trials are to end at once."""
        if self.given_up is not None or time.time() > self._deadline:
            return True
        return bool(self.interrupts) and not self.summary.counts().get(RUNNING)

    # -- what `driver` tells -------------------------------------------------------------------------

    def trial_started(self, name: str, params: dict[str, Any]) -> None:
        """A trial begins, or begins again after its process died."""
        if not self._begun:  # until now, the cores were busy with what the first step waits for
            self.tracker.begin()
        self._happened(STARTED, trial=name, params=params)
        if name in self._begun:
            return
        self._begun.add(name)
        try:
            config = override(self.plan.config, params, "trial")
        except RaystarError:  # a combination that the search made up as it went: the trial fails and says why
            config = self.plan.config
        parent = self.summary.trials[name].parent
        self.tracker.start(
            name,
            params=params,
            tags={
                "raystar.trial": name,
                "raystar.signature": signature(config),
                "raystar.seed": str(config.training.seed),
                "raystar.baseline": str(name == self.summary.baseline_trial).lower(),
                **({"raystar.parent": parent} if parent is not None else {}),
            },
            text={"config.yaml": to_yaml(config)},
        )
        self.board.changed(self.summary.trials[name])

    def trial_reported(self, name: str, report: dict[str, Any]) -> bool:
        """A trial reports an epoch, or that it cannot go on; returns whether it may."""
        if not self._last_report:  # what started beside Ray must have worked before the first result counts
            try:
                self.tracker.wait_until_connected()
                references = self.ruler_ready()
            except RaystarError as refused:
                self.refused = refused  # Tune wraps what its callbacks raise
                raise
            if references and not self.summary.references:
                self._happened(REFERENCES, values=references)
                self.board.told_references()
        record = self.summary.trials[name]
        self._measure_idle(record, report)
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
        verdict = self._happened(EPOCH, trial=name, epoch=epoch, idle_s=record.idle_s, **kept)
        self._track_epoch(name, {"epoch": epoch, **kept})
        if not self.plan.speed:
            self.janitor.epoch(record, epoch)
        self.board.changed(record, report["metrics"].get(self.summary.metric))
        self._write()
        if verdict.ends is not None:
            self._ends[name] = (verdict.ends, verdict.reason)
        return verdict.ends is None

    def _track_epoch(self, name: str, event: Mapping[str, Any]) -> None:
        epoch, labels = int(event["epoch"]), event.get("labels")
        if labels and epoch == 1:
            self.tracker.attach(name, {}, labels, {})
            if note := labels.get("raystar.compile_note"):
                self._happened(NOTE, trial=name, note=note)
        if event.get("first_images"):
            self.tracker.log(name, 0, {}, event["first_images"])
        self.tracker.log(name, epoch, event["metrics"], event.get("images", {}))

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
            status, reason = INTERRUPTED, self._why_stopping()
        else:
            status, reason = FAILED, f"ended after epoch {record.epochs} of {self.ledger.epochs} without a word"
        if status == OUT_OF_MEMORY and name not in self.ledger.alone:
            self._happened(ALONE, trial=name, reason=reason)
            self._begun.discard(name)
            self.tracker.end(name, INTERRUPTED, f"{reason}; it is tried again by itself")
            self.board.changed(record)
            return
        self._end(name, status, reason)

    def _why_stopping(self) -> str:
        if self.interrupts:
            return "interrupted"
        return f"the sweep gave up: {self.given_up}" if self.given_up is not None else "the time budget was used up"

    def _end(self, name: str, status: str, reason: str | None) -> None:
        record = self.summary.trials[name]
        self._happened(ENDED, trial=name, status=status, reason=reason)
        record.run_id = self.tracker.run_id(name)
        self._record_score(record)
        self.tracker.end(name, status, reason)
        self.janitor.ended(record)
        self.board.changed(record)
        broken, limit = self.ledger.broken_in_a_row, self.plan.space.abort_after
        if limit and len(broken) >= limit and not self.stopping:
            first = self.summary.trials[broken[0]]
            self.given_up = f"{len(broken)} trials in a row went wrong, the first, {first.trial}: {first.reason}"
        self._write()

    def _record_score(self, record: TrialRecord) -> None:
        """The trial's score, which the summary ranks by, where MLflow's tables can sort by it too."""
        if record.score is None or record.score_epoch is None:
            return
        found = {f"final/{self.summary.short_metric}": record.score, "final/epoch": float(record.score_epoch)}
        note = f"{record.status}: {self.summary.short_metric} {record.score:.4f} after epoch {record.score_epoch}"
        note += f" of {record.epochs}" + (f"; {record.reason}" if record.reason else "")
        tags = {"mlflow.note.content": note}
        if not self.plan.speed:
            tags["raystar.unmoved"] = str(record.unmoved).lower()
        self.tracker.attach(record.trial, {}, tags, found)

    def _measure_idle(self, record: TrialRecord, report: Mapping[str, Any]) -> None:
        """How long the trial's process trained nothing between the trial before and this one's first step."""
        process, first_step, now = (report["host"], report["pid"]), report.get("first_step_at"), time.time()
        before = self._last_report.get(process)
        if before is not None and before[0] != record.trial and first_step is not None:
            record.idle_s = round(max(0.0, first_step - before[1]), 3)
        self._last_report[process] = (record.trial, now)

    def _happened(self, event: str, **facts: Any) -> Verdict:
        """Writes an event to the journal, then takes it in."""
        record = {"event": event, "at": time.time(), **facts}
        self.journal.append(record)
        return self.ledger.apply(record)

    def _write(self, *, now: bool = False) -> None:
        """Keeps the files current, seldom enough that a long sweep does nothing else."""
        began = time.time()
        if not now and began - self._written < self._write_every:
            return
        for record in self.summary.trials.values():
            record.run_id = record.run_id or self.tracker.run_id(record.trial)
            record.checkpoint = self.janitor.checkpoint(record)
        wait_for_space(self.plan.folder, lambda: self.summary.write(self.plan.folder))
        self.journal.sync()
        self.tracker.sync()
        self._written = time.time()
        self._write_every = max(1.0, 20 * (self._written - began))

    # -- the end ------------------------------------------------------------------------------------

    def _finish(self, error: str | None) -> int:
        summary, plan = self.summary, self.plan
        for record in summary.trials.values():
            if record.status == RUNNING:
                reason = self._why_stopping() if self.stopping else error
                self._end(record.trial, INTERRUPTED, reason)
            elif record.status == PENDING and not self.stopping and error is None:
                self._happened(ENDED, trial=record.trial, status=FAILED, reason="Ray did not run it")
        self.janitor.close()
        done = [r for r in summary.trials.values() if r.status in (FINISHED, STOPPED)]
        late = time.time() > self._deadline
        summary.status = INTERRUPTED if self.interrupts else FINISHED if (done or late) and not error else FAILED
        summary.over = time.time()
        best = summary.best
        files: dict[str, Path] = {}
        if best is not None:
            files = outcome.leave(plan, summary, best)
        self._write(now=True)
        if self.interrupts < 3:  # who wants to leave at once does not wait for it
            files |= outcome.report(plan)  # from the files that have just been written
        files |= {name: plan.folder / name for name in ("summary.json", "summary.csv")}
        tags = {"raystar.best_trial": best.trial, "raystar.best_run": best.run_id or ""} if best else {}
        metrics = {f"final/{self.summary.short_metric}": best.score} if best and best.score is not None else {}
        known = {name: summary.reference(name) for name in summary.references}
        metrics |= {f"reference/{name}": value for name, value in known.items() if value is not None}
        if summary.finals is not None:
            tags["raystar.winner"] = summary.finals.winner
            metrics["final/mean"] = summary.finals.ranked[0].mean
        self.tracker.attach(PARENT, {k: v for k, v in files.items() if v.is_file()}, tags, metrics)
        self.tracker.feature([record.trial for record in finals.featured(summary)])
        self.tracker.end(PARENT, summary.status, error)
        self._hand_in_models()
        self.tracker.close()
        if not self.tracker.waiting:
            shutil.rmtree(plan.folder / outcome.FINALISTS, ignore_errors=True)
        self._write(now=True)
        self.journal.close()
        addresses = (*self.tracker.how_to_compare(), self.tracker.grids_address())
        last_lines.tell(plan, summary, addresses, self.tracker.registered, error)
        if self.interrupts:
            return 130
        return 0 if summary.status == FINISHED else 1

    def _hand_in_models(self) -> None:
        """Gives the finalists' models to MLflow, and says of other trials where their checkpoints lie.

        Last of all records: a store that has no place for models has everything else by then.
        """
        summary, plan = self.summary, self.plan
        for record in summary.ranked():
            if (name := self.janitor.checkpoint(record)) is not None:
                self.tracker.attach(record.trial, {}, {CHECKPOINT: plan.storage.at(name)}, {})
        if summary.status != FINISHED:  # a resumed sweep's finalists may be others
            return
        found = outcome.finalists(plan, summary)
        for record, epoch in found:
            if self.tracker.model_epoch(record.trial) != epoch:
                try:
                    folder = outcome.stage(plan, summary, record, epoch)
                except (RaystarError, FileNotFoundError) as missing:
                    print(f"note: {record.trial} is not handed in as a model: {missing}", file=sys.stderr, flush=True)
                    continue
                tags = {"raystar.trial": record.trial}
                self.tracker.log_model(record.trial, epoch, folder, record.params, tags)
        best = summary.best
        if found and found[0][0] is best and best.score is not None:
            short = f"{summary.short_metric} {best.score:.4f}"
            description = f"Trial {best.trial} of sweep {plan.name} after epoch {found[0][1]}: {short}."
            if summary.finals is not None:
                winner = summary.finals.ranked[0]
                description += f" Mean of {len(winner.runs)} seeds: {finals.around(winner)}."
            if (standing := summary.standing) is not None:
                description += f" Beside the references: {standing}."
            comparable = f"{summary.metric}-{summary.mode}-{measured_by(plan.bank, plan.config)}"
            self.tracker.register(best.trial, found[0][1], best.score, description, comparable)
