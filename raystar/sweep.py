"""A sweep: Ray Tune runs the trials, this process keeps the record of them.

One driver callback takes in every result: it updates the summary's files, the table and, through a thread,
MLflow. Trials know nothing of any of these.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from raystar import __version__, outcome
from raystar.codec import open_codec, say
from raystar.config import Config, get_value, override, signature, to_mapping, to_yaml
from raystar.errors import RaystarError
from raystar.plan import Plan, usable_cpus
from raystar.ruler import Ruler
from raystar.summary import (
    DIVERGED,
    FAILED,
    FINISHED,
    INTERRUPTED,
    PENDING,
    RUNNING,
    STOPPED,
    Summary,
    TrialRecord,
    trial_name,
    write_whole,
)
from raystar.table import Board, announce
from raystar.tracking import PARENT, SPOOL, MlflowTracker, provenance

_OBJECT_STORE_BYTES = 128 * 2**20  # trials exchange nothing but small results

# Read by Ray while it is imported; why each is needed is written down in the design's facts.
_RAY_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Tune gives a stopped trial's thread two seconds to leave before it reuses the process, and on a busy machine
    # drops the next trial without a word when that is too short (LOG.md). It leaves by itself: wait for it.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
    # For trials of several workers: reports are passed on five times a second, a group waits as long as it must for
    # its processors, and nobody watches for a cloud that takes machines back (one more process a trial).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run(plan: Plan, command: list[str]) -> int:
    """Runs a checked sweep to its end; returns the exit status of `python -m raystar.tune`.

    Raises:
        RaystarError: Ray, the ruler or the tracking store cannot be started.
    """
    space, config = plan.space, plan.config
    plan.folder.mkdir(parents=True, exist_ok=False)
    announce(
        f"sweep {plan.name}: {plan.trials} trials of up to {config.training.epochs} epochs, "
        f"{len(plan.bank.domains)} domains, {sum(map(len, plan.bank.train))} latents; "
        f"starting Ray, MLflow{'' if plan.speed else ', the ruler'}"
    )
    _write_request(plan, command)
    tracker = MlflowTracker(
        plan.tracking_uri,
        plan.out / "artifacts",
        {"name": Path(plan.bank.root).name or "latents", "digest": plan.bank.digest, "source": plan.bank.root},
        {**provenance(), "raystar.sweep": plan.name},
        space.metric,
        space.mode == "min",
        columns=list(space.space),
        spool=plan.folder / SPOOL,
    )
    # Made while Ray starts and the trials' processes import; a trial that comes first waits for its file.
    ruler = _Background(lambda: None if plan.speed else Ruler.build(plan.bank, config, plan.cache_dir))
    try:
        _start_ray(plan)
        if not plan.speed:
            config, note = _settle_codec(config)
            say(note)
        return _Sweep(dataclasses.replace(plan, config=config), tracker, ruler.result).run()
    except RaystarError:
        tracker.close()
        if not (plan.folder / "summary.json").exists():  # refused before any result: the name stays free
            shutil.rmtree(plan.folder)
        raise
    finally:
        _stop_ray()


def _write_request(plan: Plan, command: list[str]) -> None:
    request = {
        "name": plan.name,
        "command": shlex.join(["python", *command]),
        "config": to_mapping(plan.config),
        "space": dataclasses.asdict(plan.space),
        "trials": plan.trials,
        "gpus_per_trial": plan.gpu_share * plan.space.resources.workers,
        "signature": signature(plan.config),
        "data": {"root": plan.bank.root, "digest": plan.bank.digest, "latents": len(plan.bank.names)},
        "git_commit": provenance().get("mlflow.source.git.commit"),
        "versions": {
            "python": platform.python_version(),
            "raystar": __version__,
            **{name: version(name) for name in ("torch", "ray", "mlflow", "numpy")},
        },
    }
    write_whole(plan.folder / "sweep.json", json.dumps(request, indent=1, default=str) + "\n")


class _Background:
    """Runs a function in a thread; `result` waits for it and raises what it raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self._value = function()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


def _start_ray(plan: Plan) -> None:
    os.environ.update(_RAY_ENVIRONMENT)
    # Trials compile once a sweep, not once each; the cache is shared by every sweep below --out.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(plan.cache_dir / "inductor"))
    import ray

    # Tune's imports take two seconds, most of which ray.init spends waiting for its processes.
    imports = _Background(lambda: importlib.import_module("raystar.trial"))
    try:
        ray.init(
            # What steers a group of workers takes a hundredth beside them; how many groups fit, Plan.at_a_time says.
            num_cpus=usable_cpus() + (1 if plan.space.resources.workers > 1 else 0),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            namespace="raystar",
        )
    except (RuntimeError, ConnectionError, OSError, ValueError) as error:
        raise RaystarError(f"Ray cannot be started: {(str(error).splitlines() or ['unknown reason'])[0]}") from None
    imports.result()
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _stop_ray() -> None:
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


def _settle_codec(config: Config) -> tuple[Config, str | None]:
    """Tries the codec once for all trials: one that cannot be had is looked for, and told of, a single time."""
    if config.visualization.vae_model_name_or_path is None or not config.grid_every:
        return config, None
    _, note = open_codec(config)
    if note is None:
        return config, None
    return override(config, {"visualization.vae_model_name_or_path": None}, "codec"), note


class _Sweep:
    """The driver's side of a running sweep."""

    def __init__(self, plan: Plan, tracker: MlflowTracker, ruler_ready: Callable[[], Any]) -> None:
        self.plan = plan
        self.tracker = tracker
        self.ruler_ready = ruler_ready
        space = plan.space
        self.baseline = trial_name(0, plan.trials) if space.baseline else None
        self.summary = Summary(plan.name, space.metric, space.mode, plan.trials, self.baseline)
        for number, point in enumerate(plan.points or []):
            name = trial_name(number, plan.trials)
            self.summary.trials[name] = TrialRecord(name, dict(point))
        self.board = Board(self.summary, plan.config.training.epochs)
        self.pictures = plan.folder / "pictures"
        self.interrupts = 0
        self.refused: RaystarError | None = None
        self._began: dict[str, float] = {}
        self._last_report: dict[int, tuple[str, float]] = {}  # by process: trial and time
        self._written = 0.0

    # -- the run ------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs the trials, then writes what is left to write; returns the exit status."""
        plan = self.plan
        self._open_parent()
        announce(
            f"{plan.at_a_time} trial{'s' if plan.at_a_time > 1 else ''} at a time; "
            f"{plan.space.metric}, {'lower' if plan.space.mode == 'min' else 'higher'} is better"
        )
        error: str | None = None
        restore_signals = self._catch_signals()
        self.board.start()
        try:
            self._fit()
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
            self.board.stop()
            restore_signals()
        return self._finish(error)

    def _open_parent(self) -> None:
        plan = self.plan
        self.tracker.start(
            PARENT,
            name=plan.name,
            params={"trials": plan.trials, "epochs": plan.config.training.epochs, "search": plan.space.search},
            tags={
                "raystar.signature": signature(plan.config),
                "raystar.seed": str(plan.config.training.seed),
                **({"mlflow.note.content": plan.space.description} if plan.space.description else {}),
            },
            text={
                "config.yaml": to_yaml(plan.config),
                "sweep.json": (plan.folder / "sweep.json").read_text(encoding="utf-8"),
            },
        )

    def _fit(self) -> None:
        from ray import tune
        from ray.tune.schedulers import FIFOScheduler

        from raystar.trial import Asha, Recorder, Release, Request, TrialNames, run_trial

        plan, space = self.plan, self.plan.space
        request = Request(
            config=to_mapping(plan.config),
            metric=space.metric,
            mode=space.mode,
            cache_dir=str(plan.cache_dir),
            bank_key=plan.bank.key,
            pictures_dir=str(self.pictures.resolve()),
            trials_dir=str(plan.folder.resolve() / "trials"),
            gpu_share=plan.gpu_share,
            cpus=plan.cpus,
            workers=space.resources.workers,
            speed=plan.speed,
        )
        grouped = space.resources.workers > 1
        # A group of workers asks for its own; the function that steers it must ask for something, or Tune refuses it.
        resources: dict[str, float] = {"cpu": 0.01 if grouped else plan.cpus}
        if plan.gpu_share and not grouped:
            resources["gpu"] = plan.gpu_share
        scheduler: Any = FIFOScheduler()
        if space.scheduler.type == "asha":
            scheduler = Asha(
                self.baseline,
                time_attr="epoch",
                metric=space.metric,
                mode=space.mode,
                max_t=plan.config.training.epochs,
                grace_period=space.scheduler.grace_epochs,
                reduction_factor=space.scheduler.reduction_factor,
            )
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, request=request), resources),
            param_space={key: d.to_ray() for key, d in space.space.items()},
            tune_config=tune.TuneConfig(
                search_alg=self._search(),
                scheduler=scheduler,
                num_samples=plan.trials,
                # The function of a stopped trial still waits for its group of workers: it ends with its process.
                # And what one setting compiled would be in the next one's way, and in its memory.
                reuse_actors=not grouped and not plan.speed,
                time_budget_s=plan.time_budget_s,
                trial_name_creator=TrialNames(plan.trials),
                trial_dirname_creator=str,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(plan.folder.resolve()),
                verbose=0,
                callbacks=[Release(), Recorder(self)],
                # A process that dies starts again from its trial's last checkpoint; exceptions never come here.
                failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(
                    num_to_keep=1, checkpoint_score_attribute=space.metric, checkpoint_score_order=space.mode
                ),
            ),
        )
        tuner.fit()

    def _search(self) -> Any:
        plan, space = self.plan, self.plan.space
        if space.search == "tpe":
            from ray.tune.search import ConcurrencyLimiter
            from ray.tune.search.optuna import OptunaSearch

            # It tells of every study it opens, and warns of a baseline that lies outside the searched ranges.
            logging.getLogger("optuna").setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module="optuna")
            start = [{key: get_value(plan.config, key) for key in space.space}] if space.baseline else None
            search = OptunaSearch(metric=space.metric, mode=space.mode, points_to_evaluate=start, seed=space.seed)
            return ConcurrencyLimiter(search, max_concurrent=plan.at_a_time)
        from ray.tune.search.basic_variant import BasicVariantGenerator

        # Drawn and checked by `Space.points`: Tune only hands them out.
        return BasicVariantGenerator(points_to_evaluate=plan.points, max_concurrent=plan.at_a_time)

    def _catch_signals(self) -> Callable[[], None]:
        """The first Ctrl-C or SIGTERM stops after saving, a third at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.interrupts += 1
            if signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN:
                raise KeyboardInterrupt  # Tune has not begun, so there is nothing to save
            if self.interrupts == 1:
                print("\nstopping after saving; press Ctrl-C twice more to stop at once", file=sys.stderr, flush=True)
                signal.raise_signal(signal.SIGUSR1)  # Tune saves its state and ends the run on this one
            elif self.interrupts >= 3:
                raise KeyboardInterrupt

        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        # Until Tune takes it, SIGUSR1 would end the process.
        old[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.SIG_IGN)

        def restore() -> None:
            for number, handler in old.items():
                signal.signal(number, handler)

        return restore

    # -- what the callback tells --------------------------------------------------------------------

    def trial_started(self, name: str, params: dict[str, Any]) -> None:
        """A trial begins, or begins again after its process died."""
        if not self._began:  # until now, the cores were busy with what the first step waits for
            self.tracker.begin()
        record = self.summary.trials.setdefault(name, TrialRecord(name, dict(params)))
        again = name in self._began
        record.status = RUNNING
        self._began.setdefault(name, time.time())
        if again:
            return
        try:
            config = override(self.plan.config, params, "trial")
        except RaystarError:  # a combination that the search made up as it went: the trial fails and says why
            config = self.plan.config
        self.tracker.start(
            name,
            params=params,
            tags={
                "raystar.trial": name,
                "raystar.signature": signature(config),
                "raystar.seed": str(config.training.seed),
                "raystar.baseline": str(name == self.baseline).lower(),
            },
            text={"config.yaml": to_yaml(config)},
        )
        self.board.changed(record)

    def trial_reported(self, name: str, result: dict[str, Any]) -> None:
        """A trial reports an epoch, or that it cannot go on."""
        if not self._last_report:  # what started beside Ray must have worked before the first result counts
            try:
                self.tracker.wait_until_connected()
                self.ruler_ready()
            except RaystarError as refused:
                self.refused = refused  # Tune wraps what its callbacks raise
                raise
        record = self.summary.trials[name]
        now = time.time()
        record.wall_s = round(now - self._began[name], 3)
        self._measure_idle(record, result, now)
        if result["status"] in (DIVERGED, FAILED):
            record.status, record.reason = result["status"], result["reason"]
            return
        epoch = int(result["epoch"])
        if epoch <= record.epochs:  # its process died after this report and repeats it, bit for bit
            return
        metrics = {key: float(value) for key, value in result.items() if "/" in key and isinstance(value, int | float)}
        labels = result.get("labels")
        if labels and epoch == 1:
            record.note = labels.get("raystar.compile_note")
            self.tracker.attach(name, {}, labels, {})
        # Tune names what it keeps itself; of what a group of workers has saved, Ray Train gives the path.
        kept = result.get("checkpoint_dir_name") or Path(result.get("checkpoint_path", "")).name
        if self.summary.report(name, epoch, metrics) and kept:
            record.checkpoint = f"trials/{name}/{kept}/checkpoint.pt"
        for step, key in ((0, "first_images"), (epoch, "images")):
            pictures = {name: Path(path) for name, path in (result.get(key) or {}).items()}
            if pictures or step:
                self.tracker.log(name, step, metrics if step else {}, pictures)
        self.board.changed(record, metrics.get(self.summary.metric))
        self._write(now)

    def trial_ended(self, name: str, reason: str | None, failed: bool) -> None:
        """A trial is over: at its end, stopped by the scheduler, or failed."""
        record = self.summary.trials[name]
        if failed:
            record.status, record.reason = FAILED, reason
        elif record.status == RUNNING:
            whole = record.epochs >= self.plan.config.training.epochs
            record.status = FINISHED if whole else STOPPED
            if not whole:
                budget = self.plan.time_budget_s
                late = budget is not None and time.time() - self.summary.started >= budget
                record.reason = "the time budget was used up" if late else f"stopped early after epoch {record.epochs}"
        record.run_id = self.tracker.run_id(name)
        self._record_best(record)
        self.tracker.end(name, record.status, record.reason)
        self.board.changed(record)
        self._write(0.0)

    def _record_best(self, record: TrialRecord) -> None:
        """The trial's best, which the summary ranks by, where MLflow's tables can sort by it too."""
        if record.score is None or record.score_epoch is None:
            return
        found = {f"best/{self.summary.short_metric}": record.score, "best/epoch": float(record.score_epoch)}
        note = f"{record.status}: best {self.summary.short_metric} {record.score:.4f} at epoch {record.score_epoch}"
        note += f" of {record.epochs}" + (f"; {record.reason}" if record.reason else "")
        self.tracker.attach(record.trial, {}, {"mlflow.note.content": note}, found)

    def _measure_idle(self, record: TrialRecord, result: dict[str, Any], now: float) -> None:
        """How long the trial's process trained nothing between the trial before and this one's first step."""
        pid, first_step = result.get("pid"), result.get("first_step_at")
        if pid is None:
            return
        before = self._last_report.get(pid)
        if before is not None and before[0] != record.trial and first_step is not None:
            record.idle_s = round(max(0.0, first_step - before[1]), 3)
        self._last_report[pid] = (record.trial, now)

    def _write(self, now: float) -> None:
        """Keeps the files current; at most once a second, however many trials report."""
        if now and now - self._written < 1.0:
            return
        for record in self.summary.trials.values():
            record.run_id = record.run_id or self.tracker.run_id(record.trial)
        self.summary.write(self.plan.folder)
        self._written = now or time.time()

    # -- the end ------------------------------------------------------------------------------------

    def _finish(self, error: str | None) -> int:
        summary, plan = self.summary, self.plan
        for record in summary.trials.values():
            if record.status == RUNNING:
                record.status = INTERRUPTED if self.interrupts else FAILED
                record.reason = record.reason or ("interrupted" if self.interrupts else error)
                self._record_best(record)
                self.tracker.end(record.trial, record.status, record.reason)
            elif record.status == PENDING and self._all_should_have_run():
                record.status, record.reason = FAILED, f"Ray did not run it (see trials/{record.trial}/error.txt)"
        done = [r for r in summary.trials.values() if r.status in (FINISHED, STOPPED)]
        summary.status = INTERRUPTED if self.interrupts else FINISHED if done and not error else FAILED
        best = summary.best
        files: dict[str, Path] = {}
        if best is not None:
            files = outcome.leave(plan, summary, best, self.pictures)
        self._write(0.0)
        files |= {name: plan.folder / name for name in ("summary.json", "summary.csv")}
        tags = {"raystar.best_trial": best.trial, "raystar.best_run": best.run_id or ""} if best else {}
        metrics = {f"best/{self.summary.short_metric}": best.score} if best and best.score is not None else {}
        self.tracker.attach(PARENT, {k: v for k, v in files.items() if v.is_file()}, tags, metrics)
        self.tracker.end(PARENT, summary.status, error)
        self.tracker.close()
        self._write(0.0)
        outcome.tell(plan, summary, self.tracker.how_to_compare(), error)
        if self.interrupts:
            return 130
        return 0 if done else 1

    def _all_should_have_run(self) -> bool:
        budget = self.plan.time_budget_s
        return not self.interrupts and (budget is None or time.time() - self.summary.started < budget)
