"""A sweep from its checked request to its exit status: prepares what a session needs, and runs it."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raystar.backend import nodes as cluster
from raystar.backend import placing, ray_start
from raystar.backend.ray_start import RAY_ENVIRONMENT
from raystar.base.errors import RaystarError, show
from raystar.base.journal import Journal
from raystar.base.locks import running
from raystar.base.machine import usable_cpus
from raystar.config.load import get_value, override, to_mapping
from raystar.config.schema import Config
from raystar.pictures.codec import open_codec
from raystar.record import finals
from raystar.record.events import RULER, Event, read_events
from raystar.record.state import Ledger
from raystar.record.statuses import UNFINISHED
from raystar.record.summary import Summary
from raystar.record.sweep_file import JOURNAL, write_record
from raystar.ruler.ruler import Ruler, ruler_file
from raystar.search.asha import Rungs
from raystar.sweep.plan import Plan
from raystar.sweep.resources import share_of_gpu
from raystar.sweep.session import Session
from raystar.tracking.mlflow import client
from raystar.tracking.stores import open_tracker
from raystar.tracking.tracker import SPOOL, provenance

logger = logging.getLogger(__name__)


def run(plan: Plan) -> int:
    """Runs a checked sweep, or the rest of one, to its end; returns the exit status of `python -m raystar.tune`.

    Raises:
        RaystarError: Ray, the ruler or the tracking store cannot be started, or the sweep is running already.
    """
    plan.folder.mkdir(parents=True, exist_ok=plan.resumed)
    with running(plan.folder):
        try:
            return _run(plan)
        except BaseException as ended:
            if not plan.resumed and not (plan.folder / "summary.json").exists():  # no result: the name stays free
                shutil.rmtree(plan.folder)
            if isinstance(ended, SystemExit):  # what Ray makes of SIGTERM while it starts
                raise KeyboardInterrupt from None
            raise


def _run(plan: Plan) -> int:
    ledger = _ledger(plan)
    write_record(plan.folder, plan.record)
    remaining = _left(plan, ledger)
    trials = f"{plan.trials} trial{'s' if plan.trials > 1 else ''}"
    again = f", the best {plan.space.finalists.top} again from other seeds" if plan.seeds else ""
    logger.info(
        f"sweep {plan.name}{' resumed' if plan.resumed else ''}: {trials} of up to "
        f"{plan.config.training.epochs} epochs{again}{f', {remaining} to go' if plan.resumed else ''}, "
        f"{len(plan.bank.domains)} domains, {sum(map(len, plan.bank.train))} latents"
        + (f"; starting Ray, MLflow{', the ruler' if plan.purpose.models else ''}" if remaining else "")
    )
    if not remaining:
        return _tracked(plan, ledger, None, dict)
    _set_environment(plan)
    # Made while Ray starts and the trials' processes import; a trial that comes first waits for its file.
    ruler = _Background(lambda: _references(plan))
    try:
        _start_ray(plan)
        placed = None
        if plan.address is not None:
            plan, placed = _on_the_cluster(plan, ruler)
        if plan.purpose.models:
            config, note = _settle_codec(plan.config)
            if note is not None:
                logger.warning(note)
            plan = dataclasses.replace(plan, config=config)
        return _tracked(plan, ledger, placed, ruler.result)
    finally:
        ray_start.stop()


def rehearse(plan: Plan) -> None:
    """What a dry run tries beyond the plan's checks: the ruler and the codec, which a sweep makes while Ray starts.

    The ruler stays in the cache, where the sweep finds it.

    Raises:
        RaystarError: what would end the sweep.
    """
    _references(plan)
    if plan.purpose.models and (note := _settle_codec(plan.config)[1]) is not None:
        logger.warning(note)


def _references(plan: Plan) -> dict[str, dict[str, float]]:
    """What the ruler says of a model that does nothing, and so on; makes its file on the way."""
    return Ruler.build(plan.bank, plan.config, plan.cache_dir).references if plan.purpose.models else {}


def _tracked(plan: Plan, ledger: Ledger, placed: placing.Placed | None, ruler_ready: Callable[[], Any]) -> int:
    tracker = open_tracker(
        plan.tracking_uri,
        plan.folder / SPOOL,
        artifacts=plan.out / "artifacts",
        dataset={"name": Path(plan.bank.root).name or "latents", "digest": plan.bank.digest, "source": plan.bank.root},
        tags={**provenance(), "raystar.sweep": plan.name},
        metric=plan.space.metric,
        lower_is_better=plan.space.mode == "min",
        columns=plan.space.keys,
    )
    try:
        return Session(plan, tracker, ledger, placed, ruler_ready).run()
    except RaystarError:
        tracker.close()
        raise


def _ledger(plan: Plan) -> Ledger:
    """What is known of the sweep: the trials that are planned, and what its journal says of them."""
    space, epochs = plan.space, plan.config.training.epochs
    summary = Summary(plan.name, space.metric, space.mode, plan.trials, plan.baseline)
    rungs = None
    if space.scheduler.type == "asha":
        scheduler, (_, mode) = space.scheduler, space.ranking
        rungs = Rungs(mode, scheduler.grace(epochs), scheduler.reduction_factor, epochs, plan.baseline)
    settled = {key: get_value(plan.config, key) for key in space.keys}
    ledger = Ledger(summary, rungs, epochs, space.collapse, space.ranking[0], settled)
    for name, values in plan.known.items():
        summary.add(name, dict(values))
    if plan.resumed:
        journal = Journal(plan.folder / JOURNAL)
        ledger.replay(read_events(journal))
        _check_experiments(plan, summary)
        if plan.purpose.models and (ledger.ruler or plan.record["first_ruler"]) != plan.record["ruler"]:
            _change_ruler(plan, ledger, journal)
        journal.close()
    return ledger


def _check_experiments(plan: Plan, summary: Summary) -> None:
    """An experiment that has begun keeps its values: what it was trained with stands in its record.

    Raises:
        RaystarError: the space file gives it others now.
    """
    for experiment in plan.space.experiments:
        began, planned = summary.trials[experiment.name].params, plan.known[experiment.name]
        for key in experiment.overrides:
            if (value := planned[key]) != began[key]:
                raise RaystarError(
                    f"--resume {plan.name}: {plan.space.source}: experiments: {experiment.name}: {key}: it has begun "
                    f"with {show(began[key])}, found {show(value)}; put that back, or give the new one another name"
                )


def _change_ruler(plan: Plan, ledger: Ledger, journal: Journal) -> None:
    """Sets aside what another ruler has measured, before anything else is written.

    Raises:
        RaystarError: nothing would be left to measure, or the finals compare what the other one measured.
    """
    trials = ledger.summary.trials
    if ledger.summary.repeats:
        raise RaystarError(f"--resume {plan.name}: its finals have begun, by another ruler's scores; start a new sweep")
    if not ledger.unfinished() and len(trials) >= plan.trials:
        raise RaystarError(
            f"--resume {plan.name}: another ruler measured all of its trials, and nothing is left to train; "
            "ask for more with --trials, or start a new sweep"
        )
    event: Event = {"event": RULER, "at": time.time(), "ruler": plan.record["ruler"]}
    journal.append(event)
    ledger.apply(event)
    many = f"{len(ledger.aside)} trial{'s' if len(ledger.aside) != 1 else ''}"
    logger.warning(f"scores of {many} are another ruler's and are set aside: only what is measured now is ranked")


def _left(plan: Plan, ledger: Ledger) -> int:
    """Trials that are still to be run, or run on."""
    trials = ledger.summary.trials

    def over(name: str) -> bool:
        return name in trials and (trials[name].status not in UNFINISHED or name in ledger.due)

    search = plan.trials - sum(over(name) for name, record in trials.items() if record.parent is None)
    if search:
        return search + plan.repeats
    settled = (
        dataclasses.replace(record, status=str(ledger.due[name].ends)) if name in ledger.due else record
        for name, record in trials.items()
    )
    chosen = finals.choose(settled, plan.space.mode, plan.space.finalists.top, ledger.summary.baseline_trial)
    return sum(not over(name) for name in finals.repeats(chosen, plan.seeds))


class _Background:
    """Runs a function in a thread; `result` waits for it and raises what it raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        # Not a daemon: one that is inside PyTorch while the interpreter ends makes Ray abort the process.
        self._thread = threading.Thread(target=self._run, args=(function,))
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


def _set_environment(plan: Plan) -> None:
    """Before any thread begins: where one sets a variable while another's C library reads one, the process crashes."""
    if plan.address is None:
        # Trials compile once a sweep, not once each; the cache is shared by every sweep below --out.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(plan.cache_dir / "inductor"))
    os.environ.update(RAY_ENVIRONMENT)
    client.set_environment()
    # Before anything imports Ray, which reads once whether there is a token; its servers would want one all the same.
    ray_start.settle_token(create=plan.address is None)


def _start_ray(plan: Plan) -> None:
    # Tune's imports take two seconds, most of which Ray spends waiting for its processes.
    imports = _Background(
        lambda: [importlib.import_module(f"raystar.backend.{name}") for name in ("trial", "tune_hooks")]
    )
    # What steers a group of workers takes a hundredth beside them; how many groups fit, Plan.at_a_time says.
    cpus = usable_cpus() + (1 if plan.space.resources.workers > 1 else 0)
    ray_start.start(plan.address, cpus=cpus, environment=RAY_ENVIRONMENT)
    imports.result()


def _on_the_cluster(plan: Plan, ruler: _Background) -> tuple[Plan, placing.Placed]:
    """Checks that the cluster's nodes can run the sweep, and gives them what trials need."""
    space = plan.space
    where = f"{space.source}: resources"
    cluster.check_tracking(plan.tracking_uri)
    gpus = share_of_gpu(plan.config, space, int(sum(node.gpus for node in cluster.nodes())))
    fit = cluster.check_resources(plan.cpus, gpus, space.resources.workers, where)
    cluster.probe_storage(plan.storage.uri)
    ruler.result()
    placed = placing.place_data(
        to_mapping(plan.config),
        plan.bank,
        plan.cache_dir,
        [
            *([ruler_file(plan.bank, plan.config, plan.cache_dir)] if plan.purpose.models else []),
            *(plan.cache_dir / name for name in plan.starts.values()),
        ],
        plan.storage.child("shared"),
    )
    nodes = cluster.nodes()
    logger.info(f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}, {fit} trials at a time; nodes that join are used")
    return dataclasses.replace(plan, gpu_share=gpus), placed


def _settle_codec(config: Config) -> tuple[Config, str | None]:
    """Tries the codec once for all trials: one that cannot be had is looked for, and noted, a single time."""
    if config.visualization.vae_model_name_or_path is None or not config.grid_every:
        return config, None
    _, note = open_codec(config)
    if note is None:
        return config, None
    return override(config, {"visualization.vae_model_name_or_path": None}, "codec"), note
