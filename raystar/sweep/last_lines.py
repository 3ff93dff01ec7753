"""What a sweep says when it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from raystar.base.command import below, command
from raystar.base.console import duration
from raystar.config.load import get_value
from raystar.record import finals, results
from raystar.record.results import REPORT
from raystar.record.statuses import BROKEN, FINISHED, UNFINISHED
from raystar.record.summary import Summary, TrialRecord
from raystar.search.space import SEED
from raystar.sweep.live_table import ranking, reference_lines
from raystar.sweep.plan import Plan

logger = logging.getLogger(__name__)


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
    logger.info(f"\nsweep {summary.status} in {duration(summary.wall_s)}: {counts}")
    if error is not None:
        logger.error(error)
    output = plan.folder / plan.purpose.output
    for line in (
        *_troubles(summary),
        *(ranking(summary, plan.purpose.table) if plan.purpose.table else []),
        *_best(plan, summary, output, registered),
        *_next_commands(plan, summary, how_to_compare, output),
    ):
        logger.info(line)


def _troubles(summary: Summary) -> Iterator[str]:
    """Trials that went wrong, and what is to be known of others."""
    for record in summary.trials.values():
        if record.status in BROKEN:
            out = f" (left out of the mean of {record.parent})" if record.parent in summary.finalists else ""
            yield f"  {record.trial} {record.status}: {record.reason}{out}"
        if record.note is not None:
            yield f"  {record.trial}: {record.note}"


def _best(plan: Plan, summary: Summary, output: Path, registered: str | None) -> Iterator[str]:
    """Who is best, by how much, and what there is of it."""
    best = summary.best
    if best is None or best.score is None:
        yield "no trial has a score"
        return
    yield _in_a_line(summary, best, best.score)
    # What was searched, not the seed of the winner's best run.
    searched = {key: value for key, value in summary.changed(best).items() if key != SEED or best.parent is None}
    if summary.baseline is None and plan.space.experiments:  # few of their keys are set by one of them
        searched = {key: value for key, value in searched.items() if value != get_value(plan.config, key)}
    yield "  " + "  ".join(f"{key}={value}" for key, value in searched.items())
    yield from _finalists(plan, summary)
    yield from reference_lines(summary)
    if (standing := summary.standing) is not None:
        yield standing
    if plan.purpose.models and (rungs := results.read(plan.folder).foresight()):
        yield rungs[0].words
    if output.exists():
        of = f" (of {best.trial}: {summary.short_metric} {best.score:.4f})" if summary.finals is not None else ""
        yield f"  {plan.purpose.called}: {output}{of}"
    if registered is not None:
        yield f"  model: {registered}"


def _next_commands(
    plan: Plan, summary: Summary, how_to_compare: tuple[str, str, str | None], output: Path
) -> Iterator[str]:
    """The commands that come next, each at its place."""
    waiting = any(record.status in UNFINISHED for record in summary.trials.values())
    finals_wait = bool(plan.seeds) and not summary.repeats and summary.best is not None
    if waiting or finals_wait or len(summary.trials) < summary.expected:
        yield f"resume:  {command('tune', ('--resume', plan.name), *below('--out', plan.out))}"
    if (page := plan.folder / REPORT).exists():
        yield f"report:  {page}"
    interface, address, pictures = how_to_compare
    yield f"compare: {interface or address}"
    if interface:
        yield f"         then open {address}"
    if pictures is not None:
        yield f"         pictures: {pictures}"
    if not plan.purpose.models and output.exists():
        yield f"use it:  {command('tune', ('--overlay', output))} --space ..."
    elif output.exists():
        words = (("--sweep", plan.name), *below("--runs", plan.out), ("--out", "my_model"))
        yield f"export:  {command('export', *words)}"


def _finalists(plan: Plan, summary: Summary) -> list[str]:
    """A line for each finalist, or what was in the way of the finals."""
    if summary.finals is None:
        statuses = [summary.trials[name].status for name in summary.repeats]
        if not plan.seeds:
            return []
        if not statuses:
            return ["  the finals have not begun: trials are ranked by one seed"]
        if all(status in BROKEN for status in statuses):
            return ["  the finals are not decided: none of their trials ran to the end"]
        ended = sum(status in (FINISHED, *BROKEN) for status in statuses)
        return [f"  the finals are not decided: {ended} of their {len(statuses)} trials have ended"]
    lines = []
    wide = max(6, *map(len, summary.finalists))
    for finalist in summary.finals.ranked:
        scores = "  ".join(f"{score:.4f}" for score in finalist.scores)
        lines.append(f"  {finalist.trial:{wide}}{finals.around(finalist):>18}  of {scores}")
    for name in summary.finalists:
        if summary.finals.of(name) is None:
            lines.append(f"  {name:{wide}} is out of the finals: none of its repeats ran to the end")
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
