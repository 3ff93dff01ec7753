"""What a sweep leaves behind: the exported best, or the fastest settings as an overlay, and its last lines."""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from raystar import checkpoint as checkpoints
from raystar import export, finals, grid, registry, results
from raystar.card import versions
from raystar.codec import open_codec
from raystar.config import from_mapping, overlay_yaml
from raystar.errors import RaystarError, redact
from raystar.journal import wait_for_space
from raystar.model import Nets
from raystar.plan import Plan
from raystar.results import CONTACT_SHEET, REPORT
from raystar.saved import checkpoint_name, picture_name, saved_epochs
from raystar.summary import BROKEN, FINISHED, UNFINISHED, Summary, TrialRecord, duration, write_whole
from raystar.table import announce, ranking, reference_lines

BEST, FASTEST, FINALISTS = "best", "fastest.yaml", "finalists"


def leave(plan: Plan, summary: Summary, best: TrialRecord) -> dict[str, Path]:
    """Writes `best/`, or a speed sweep's `fastest.yaml`; returns what belongs to the record, by artifact name."""
    if plan.speed:
        return {FASTEST: _write_fastest(plan, summary, best)}
    _export(plan, summary, best)
    return {f"{BEST}/{name}": plan.folder / BEST / name for name in (export.GRID, export.INTERPOLATION)}


def report(plan: Plan) -> dict[str, Path]:
    """Writes the sweep's page and contact sheet from what lies in its folder; returns them by artifact name.

    Whatever is in the way of them is told in a line: it costs no sweep its result.
    """
    try:
        from raystar import report as page  # its libraries take seconds to import, which a sweep need not begin with

        page.write(plan.folder, plan.storage)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        runs = "" if plan.out == Path("runs") else f" --runs {plan.out}"
        print(
            f"note: the report could not be made: {type(error).__name__}: {redact(first)}; "
            f"python -m raystar.report --sweep {plan.name}{runs} tries again",
            file=sys.stderr,
            flush=True,
        )
    return {name: plan.folder / name for name in (REPORT, CONTACT_SHEET) if (plan.folder / name).is_file()}


def _export(plan: Plan, summary: Summary, best: TrialRecord) -> None:
    """Writes `best/` from the best trial's scored checkpoint."""
    if best.score_epoch is None or best.score_epoch not in saved_epochs(plan.storage, best.trial):
        return
    _write_model(plan, summary, best, best.score_epoch, plan.folder / BEST, strip=True)


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
        there = Path(picture).name in plan.storage.list(str(Path(picture).parent))
        pictures = {export.GRID: files.enter_context(plan.storage.fetched(picture))} if there else {}
        if strip and there:
            drawn = Path(files.enter_context(tempfile.TemporaryDirectory()), export.INTERPOLATION)
            try:
                _interpolation(plan, checkpoint).save(drawn)
                pictures[export.INTERPOLATION] = drawn
            # A VAE that is gone, or more memory than there is: that costs a picture, not the model.
            except (RaystarError, OSError, RuntimeError) as error:
                print(f"note: {export.INTERPOLATION} could not be drawn: {redact(str(error))}", file=sys.stderr)
        export.write(folder, checkpoint, facts, pictures)


def _interpolation(plan: Plan, checkpoint: Mapping[str, Any]) -> Image.Image:
    """The grids' sources on their way through each domain's styles, on the first GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = from_mapping(checkpoint["config"], "checkpoint")
    nets = Nets.of(config.model, config.num_domains, checkpoints.shown_weights(checkpoint), "checkpoint")
    codec, _ = open_codec(plan.config, device)  # what is in its way has been told
    return grid.interpolation(nets.to(device), config, grid.choose(plan.bank, config, codec), codec)


def finalists(plan: Plan, summary: Summary) -> list[tuple[TrialRecord, int]]:
    """The trials whose models go into the store, each with its scored epoch, best first: of each finalist its best run,
    or without finals the best trials."""
    if plan.speed:
        return []
    top = plan.space.finalists.top
    ranked = (
        summary.ranked()[:top]
        if summary.finals is None
        else [summary.best_run(finalist) for finalist in summary.finals.ranked[:top]]
    )
    found = [(record, record.score_epoch) for record in ranked]
    return [(r, epoch) for r, epoch in found if epoch is not None and epoch in saved_epochs(plan.storage, r.trial)]


def stage(plan: Plan, summary: Summary, record: TrialRecord, epoch: int) -> Path:
    """Writes the export of a finalist where the tracker finds it, maybe in a later session; returns its folder.

    Its name holds the epoch: what an earlier session has left there for MLflow is another model.
    """
    folder = plan.folder / FINALISTS / f"{record.trial}_{epoch:04d}" / registry.EXPORT
    folder.parent.mkdir(parents=True, exist_ok=True)
    wait_for_space(plan.folder, lambda: _write_model(plan, summary, record, epoch, folder))
    return folder


def _write_fastest(plan: Plan, summary: Summary, best: TrialRecord) -> Path:
    """The best trial's settings as an overlay for `--overlay`."""
    found = best.metrics
    text = (
        f"# The fastest of {len(summary.trials)} settings in sweep {plan.name} ({best.trial}): "
        f"{found['perf/steady_samples_per_s']:.4g} samples/s, {found['perf/speedup']:.2f} times eager.\n"
        f"# Measured on {platform.machine()} with torch {version('torch')}; use it with --overlay.\n"
    )
    path = plan.folder / FASTEST
    write_whole(path, text + overlay_yaml(best.params))
    return path


def tell(
    plan: Plan,
    summary: Summary,
    how_to_compare: tuple[str, str, str | None],
    registered: str | None,
    error: str | None,
) -> None:
    """The last lines: what happened to the trials, which is best and by how much, and what to do next.

    Args:
        how_to_compare: the command that opens the MLflow UI, empty where a server runs; the address of the trials, and
            of the best ones' pictures.
    """
    counts = ", ".join(f"{n} {status}" for status, n in summary.counts().items())
    announce(f"\nsweep {summary.status} in {duration(summary.wall_s)}: {counts}")
    if error is not None:
        print(f"error: {error}", file=sys.stderr, flush=True)
    for record in summary.trials.values():
        if record.status in BROKEN:
            out = f" (left out of the mean of {record.parent})" if record.parent in summary.finalists else ""
            announce(f"  {record.trial} {record.status}: {record.reason}{out}")
        if record.note is not None:
            announce(f"  {record.trial}: {record.note}")
    if plan.speed:
        for line in ranking(summary):
            announce(line)
    best = summary.best
    left = plan.folder / (FASTEST if plan.speed else BEST)
    if best is None or best.score is None:
        announce("no trial has a score")
    else:
        announce(_in_a_line(summary, best, best.score))
        searched = {key: value for key, value in summary.changed(best).items() if key != finals.SEED or not best.parent}
        announce("  " + "  ".join(f"{key}={value}" for key, value in searched.items()))
        for line in (*_finalists(plan, summary), *reference_lines(summary)):
            announce(line)
        if (standing := summary.standing) is not None:
            announce(standing)
        if not plan.speed and (rungs := results.read(plan.folder).foresight()):
            announce(rungs[0].words)
        if left.exists():
            of = f" (of {best.trial}: {summary.short_metric} {best.score:.4f})" if summary.finals is not None else ""
            announce(f"  {'overlay' if plan.speed else 'files'}: {left}{of}")
        if registered is not None:
            announce(f"  model: {registered}")
    waiting = any(record.status in UNFINISHED for record in summary.trials.values())
    finals_wait = bool(plan.seeds) and not summary.repeats and best is not None
    if waiting or finals_wait or len(summary.trials) < summary.expected:
        out = "" if plan.out == Path("runs") else f" --out {plan.out}"
        announce(f"go on:   python -m raystar.tune --resume {plan.name}{out}")
    if (page := plan.folder / REPORT).exists():
        announce(f"report:  {page}")
    command, address, pictures = how_to_compare
    announce(f"compare: {command}".rstrip() if command else f"compare: {address}")
    if command:
        announce(f"         then open {address}")
    if pictures is not None:
        announce(f"         pictures: {pictures}")
    if plan.speed and left.exists():
        announce(f"use it:  python -m raystar.tune --overlay {left} --space ...")
    elif left.exists():
        runs = "" if plan.out == Path("runs") else f" --runs {plan.out}"
        announce(f"export:  python -m raystar.export --sweep {plan.name}{runs} --out my_model")


def _finalists(plan: Plan, summary: Summary) -> list[str]:
    """A line for each finalist, or what was in the way of the finals."""
    if summary.finals is None:
        wanted = [summary.trials[name].status for name in summary.repeats]
        if not plan.seeds:
            return []
        if not wanted:
            return ["  the finals have not begun: trials are ranked by one seed"]
        if all(status in BROKEN for status in wanted):
            return ["  the finals are not decided: none of their trials ran to the end"]
        ended = sum(status in (FINISHED, *BROKEN) for status in wanted)
        return [f"  the finals are not decided: {ended} of their {len(wanted)} trials have ended"]
    lines = []
    for finalist in summary.finals.ranked:
        scores = "  ".join(f"{score:.4f}" for score in finalist.scores)
        lines.append(f"  {finalist.trial:6}{finals.around(finalist):>18}  of {scores}")
    for name in summary.finalists:
        if summary.finals.of(name) is None:
            lines.append(f"  {name:6} is out of the finals: none of its repeats ran to the end")
    return lines


def _in_a_line(summary: Summary, best: TrialRecord, score: float) -> str:
    if summary.finals is not None:
        return finals.line(summary, summary.finals)
    line = f"best {best.trial}: {summary.short_metric} {score:.4f} after epoch {best.score_epoch}"
    baseline = summary.baseline
    if baseline is None or baseline.score is None:
        return line
    if best is baseline:
        return line + "; it is the baseline: no other trial beats it"
    if summary.gain is None:
        return line + f"; the baseline is {baseline.status}"
    return line + f"; baseline {baseline.score:.4f}, {summary.gain:.1%} better"
