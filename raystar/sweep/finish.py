"""What a sweep leaves behind: the exported best, or the fastest settings as an overlay, and its last lines."""

from __future__ import annotations

import logging
import platform
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from raystar.base import markdown
from raystar.base.command import below, command
from raystar.base.errors import RaystarError
from raystar.base.files import wait_for_space, write_whole
from raystar.base.secrets import redact
from raystar.config.load import overlay_yaml
from raystar.exported import model
from raystar.exported.model_card import versions
from raystar.model import checkpoint as checkpoints
from raystar.model.networks import Nets
from raystar.model.users import config_of
from raystar.page import page as page_module
from raystar.pictures import grid
from raystar.pictures.codec import need_codec
from raystar.record import finals
from raystar.record.results import CONTACT_SHEET, REPORT
from raystar.record.statuses import FINISHED
from raystar.record.summary import Summary, TrialRecord
from raystar.record.trial_files import checkpoint_name, picture_name, saved_epochs
from raystar.ruler.samples import measured_by
from raystar.sweep.plan import Plan
from raystar.tracking.mlflow import models as registry
from raystar.tracking.tracker import CHECKPOINT, PARENT, Tracker

logger = logging.getLogger(__name__)

FINALISTS = "finalists"


def leave(plan: Plan, summary: Summary, best: TrialRecord) -> dict[str, Path]:
    """Writes `best/`, or a speed sweep's `fastest.yaml`; returns what belongs to the record, by artifact name."""
    output = plan.purpose.output
    if not plan.purpose.models:
        _write_overlay(plan, summary, best, plan.folder / output)
        return {output: plan.folder / output}
    _export(plan, summary, best, plan.folder / output)
    return {f"{output}/{name}": plan.folder / output / name for name in (model.GRID, model.INTERPOLATION)}


def report(plan: Plan) -> dict[str, Path]:
    """Writes the sweep's page and contact sheet from what lies in its folder; returns them by artifact name.

    What keeps them from being made is logged in a line: it costs no sweep its result.
    """
    try:
        page_module.write(plan.folder, plan.storage)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        again = command("report", ("--sweep", plan.name), *below("--runs", plan.out))
        logger.warning(f"the report could not be made: {type(error).__name__}: {redact(first)}; {again} tries again")
    return {name: plan.folder / name for name in (REPORT, CONTACT_SHEET) if (plan.folder / name).is_file()}


def _export(plan: Plan, summary: Summary, best: TrialRecord, folder: Path) -> None:
    """Writes the folder from the best trial's scored checkpoint."""
    if best.score_epoch is None or best.score_epoch not in saved_epochs(plan.storage, best.trial):
        return
    _write_model(plan, summary, best, best.score_epoch, folder, strip=True)


def _write_model(
    plan: Plan, summary: Summary, record: TrialRecord, epoch: int, folder: Path, strip: bool = False
) -> None:
    """Writes an export of a trial's checkpoint of `epoch`, its scored one; with `strip`, its interpolation as well."""
    baseline = summary.baseline
    facts = {
        "sweep": plan.name,
        "trial": record.trial,
        "epoch": epoch,
        "metric": summary.metric,
        "mode": summary.mode,
        "score": record.score,
        "metrics": record.metrics,
        "params": record.params,
        "run_id": record.run_id,
        "trials": len(summary.trials),
        "baseline": {"trial": baseline.trial, "score": baseline.score} if baseline is not None else None,
        "finals": finals.line(summary, summary.finals) if summary.finals is not None else None,
        "references": {name: value for name in summary.references if (value := summary.reference(name)) is not None},
        "standing": summary.standing,
        "data": {"name": Path(plan.bank.root).name or "latents", **plan.record["data"]},
        "versions": versions(),
        "git_commit": plan.record["git_commit"],
    }
    picture = picture_name(record.trial, "grid_ref", epoch)
    with ExitStack() as files:
        checkpoint = checkpoints.load(files.enter_context(plan.storage.fetched(checkpoint_name(record.trial, epoch))))
        has_grid = Path(picture).name in plan.storage.list(str(Path(picture).parent))
        pictures = {model.GRID: files.enter_context(plan.storage.fetched(picture))} if has_grid else {}
        if strip and has_grid:
            drawn = Path(files.enter_context(tempfile.TemporaryDirectory()), model.INTERPOLATION)
            try:
                _interpolation(plan, checkpoint).save(drawn)
                pictures[model.INTERPOLATION] = drawn
            # A VAE that is gone, or more memory than there is: that costs a picture, not the model.
            except (RaystarError, OSError, RuntimeError) as error:
                logger.warning(f"{model.INTERPOLATION} could not be drawn: {redact(str(error))}")
        model.write(folder, checkpoint, facts, pictures)


def _interpolation(plan: Plan, checkpoint: Mapping[str, Any]) -> Image.Image:
    """The grids' sources on their way through each domain's styles, on the first GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config_of(checkpoint, "checkpoint")
    nets = Nets.of(config.model, config.num_domains, checkpoints.shown_weights(checkpoint), "checkpoint")
    codec, _ = need_codec(plan.config, device)  # why it is not the one asked for has been logged
    return grid.interpolation(nets.to(device), config, grid.choose(plan.bank, config, codec), codec)


def finalists(plan: Plan, summary: Summary) -> list[tuple[TrialRecord, int]]:
    """The trials whose models go into the store, each with its scored epoch, best first: of each finalist its best run,
    or without finals the best trials."""
    if not plan.purpose.models:
        return []
    top = plan.space.finalists.top
    ranked = (
        summary.ranked()[:top]
        if summary.finals is None
        else [summary.best_run(finalist) for finalist in summary.finals.ranked[:top]]
    )
    scored = [(record, record.score_epoch) for record in ranked]
    return [(r, epoch) for r, epoch in scored if epoch is not None and epoch in saved_epochs(plan.storage, r.trial)]


def stage(plan: Plan, summary: Summary, record: TrialRecord, epoch: int) -> Path:
    """Writes the export of a finalist where the tracker finds it, maybe in a later session; returns its folder.

    Its name holds the epoch: what an earlier session has left there for MLflow is another model.
    """
    folder = plan.folder / FINALISTS / f"{record.trial}_{epoch:04d}" / registry.EXPORT
    folder.parent.mkdir(parents=True, exist_ok=True)
    wait_for_space(plan.folder, lambda: _write_model(plan, summary, record, epoch, folder))
    return folder


def _write_overlay(plan: Plan, summary: Summary, best: TrialRecord, path: Path) -> None:
    """The best trial's settings as an overlay for `--overlay`."""
    metrics = best.metrics
    text = (
        f"# The fastest of {len(summary.trials)} settings in sweep {plan.name} ({best.trial}): "
        f"{metrics['perf/steady_samples_per_s']:.4g} samples/s, {metrics['perf/speedup']:.2f} times eager.\n"
        f"# Measured on {platform.machine()} with torch {version('torch')}; use it with --overlay.\n"
    )
    write_whole(path, text + overlay_yaml(best.params))


def close_parent(plan: Plan, summary: Summary, tracker: Tracker, files: Mapping[str, Path], error: str | None) -> None:
    """Gives the sweep's own run what it leaves behind, features the best trials' pictures, and closes the run."""
    best = summary.best
    files = {**files, **{name: plan.folder / name for name in ("summary.json", "summary.csv")}}
    tags = {"raystar.best_trial": best.trial, "raystar.best_run": best.run_id or ""} if best else {}
    metrics = {f"final/{summary.short_metric}": best.score} if best and best.score is not None else {}
    known = {name: summary.reference(name) for name in summary.references}
    metrics |= {f"reference/{name}": value for name, value in known.items() if value is not None}
    if summary.finals is not None:
        tags["raystar.winner"] = summary.finals.winner
        metrics["final/mean"] = summary.finals.ranked[0].mean
    tracker.attach(PARENT, {k: v for k, v in files.items() if v.is_file()}, tags, metrics)
    tracker.feature([record.trial for record in finals.featured(summary)])
    tracker.end(PARENT, summary.status, error)


def hand_in_models(
    plan: Plan, summary: Summary, tracker: Tracker, checkpoint: Callable[[TrialRecord], str | None]
) -> None:
    """Gives the finalists' models to MLflow, and says of other trials where their checkpoints lie.

    Last of all records: a store that has no place for models has everything else by then.

    Args:
        checkpoint: the name of a trial's best checkpoint in the storage; None if it has none.
    """
    for record in summary.ranked():
        if (name := checkpoint(record)) is not None:
            tracker.attach(record.trial, {}, {CHECKPOINT: plan.storage.at(name)}, {})
    if summary.status != FINISHED:  # a resumed sweep's finalists may be others
        return
    models = finalists(plan, summary)
    for record, epoch in models:
        if tracker.model_epoch(record.trial) != epoch:
            try:
                folder = stage(plan, summary, record, epoch)
            except (RaystarError, FileNotFoundError) as missing:
                logger.warning(f"{record.trial} is not handed in as a model: {missing}")
                continue
            tracker.log_model(record.trial, epoch, folder, record.params, {"raystar.trial": record.trial})
    best = summary.best
    if models and models[0][0] is best and best.score is not None:
        comparable = f"{summary.metric}-{summary.mode}-{measured_by(plan.bank, plan.config)}"
        tracker.register(best.trial, models[0][1], best.score, _description(plan, summary, *models[0]), comparable)


def _description(plan: Plan, summary: Summary, best: TrialRecord, epoch: int) -> str:
    """Of a registered model, for who finds it in the store; Markdown."""
    text = f"Trial {best.trial} of sweep {plan.name} after epoch {epoch}: {summary.short_metric} {best.score:.4f}."
    if summary.finals is not None:
        winner = summary.finals.ranked[0]
        text += f" Mean of {len(winner.runs)} seeds: {finals.around(winner)}."
    if (standing := summary.standing) is not None:
        text += f" Beside the references: {standing}."
    return markdown.escaped(text)
