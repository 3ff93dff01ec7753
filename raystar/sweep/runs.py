"""A sweep's runs in the tracker: what the parent and each trial are opened with, and the score a trial ends with."""

from __future__ import annotations

from raystar.base import markdown
from raystar.base.errors import RaystarError
from raystar.config.load import override, signature, to_yaml
from raystar.record.summary import Summary, TrialRecord
from raystar.record.sweep_file import RECORD
from raystar.ruler.samples import labels
from raystar.sweep.plan import Plan
from raystar.tracking.tracker import PARENT, Tracker


def open_parent(tracker: Tracker, plan: Plan, epochs: int) -> None:
    """The sweep's own run."""
    tracker.start(
        PARENT,
        name=plan.name,
        params={"trials": plan.record["trials"], "epochs": epochs, "search": plan.space.searched_by},
        tags={
            "raystar.signature": signature(plan.config),
            "raystar.seed": str(plan.config.training.seed),
            **(labels(plan.config) if plan.purpose.models else {}),
            **({"mlflow.note.content": markdown.paragraphs(plan.space.description)} if plan.space.description else {}),
        },
        text={"config.yaml": to_yaml(plan.config), RECORD: (plan.folder / RECORD).read_text(encoding="utf-8")},
    )


def open_trial(tracker: Tracker, plan: Plan, summary: Summary, record: TrialRecord) -> None:
    """A trial's run."""
    try:
        config = override(plan.config, record.params, "trial")
    except RaystarError:  # a combination that the search made up as it went: the trial fails and says why
        config = plan.config
    tracker.start(
        record.trial,
        params=record.params,
        tags={
            "raystar.trial": record.trial,
            "raystar.signature": signature(config),
            "raystar.seed": str(config.training.seed),
            **(labels(config) if plan.purpose.models else {}),
            "raystar.baseline": str(record.trial == summary.baseline_trial).lower(),
            **({"raystar.parent": record.parent} if record.parent is not None else {}),
        },
        text={"config.yaml": to_yaml(config)},
    )


def lacks_score(tracker: Tracker, summary: Summary, record: TrialRecord) -> bool:
    """Whether the trial's run was never given its score, by a process that died or by version 0.1."""
    return f"final/{summary.short_metric}" not in tracker.final(record.trial)


def set_aside(tracker: Tracker, record: TrialRecord) -> None:
    """Says in the trial's run that what it holds was measured by another ruler."""
    tracker.attach(record.trial, {}, {"mlflow.note.content": markdown.escaped(record.note or "")}, {})


def give_score(tracker: Tracker, summary: Summary, record: TrialRecord, *, models: bool) -> None:
    """The trial's score, which the summary ranks by, where MLflow's tables can sort by it too."""
    if record.score is None or record.score_epoch is None:
        return
    values = {f"final/{summary.short_metric}": record.score, "final/epoch": float(record.score_epoch)}
    note = f"{record.status}: {summary.short_metric} {record.score:.4f} after epoch {record.score_epoch}"
    note += f" of {record.epochs}" + (f"; {record.reason}" if record.reason else "")
    tags = {"mlflow.note.content": markdown.escaped(note)}
    if models:
        tags["raystar.unmoved"] = str(record.unmoved).lower()
    tracker.attach(record.trial, {}, tags, values)
