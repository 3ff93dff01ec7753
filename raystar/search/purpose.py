"""What a sweep is for: the quality of trained models, or the speed of a training step. Asked here, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from raystar.base.metrics import METRICS
from raystar.training.compile import SPEED_KEYS


@dataclass(frozen=True)
class Column:
    """A column of the table that a sweep ends with."""

    metric: str
    title: str
    form: str
    """As Python formats the value, with its width."""
    unit: str = ""


@dataclass(frozen=True)
class Purpose:
    """What trials measure, what they need for it and what the sweep leaves behind."""

    name: str
    """As a space file spells it."""
    metric: str
    """What is searched for, where the space file names nothing else."""
    mode: str
    metrics: tuple[str, ...]
    """All that a trial reports."""
    group: str
    """The metrics that the report compares begin so."""
    front: tuple[str, str | None]
    """What the report draws trials over; None for the sweep's own metric."""
    models: bool
    """Whether trials train models: these are measured by the ruler, drawn, saved, trained again from other seeds and
    handed in. Otherwise only the step is timed, once its results have passed the parity gate."""
    alone: bool
    """Whether a trial has the machine's devices to itself, in one process of its own, one trial at a time."""
    keys: tuple[str, ...] | None
    """Keys that may be searched; None for any."""
    output: str
    """The folder or file that the best trial leaves in the sweep's folder."""
    called: str
    """What that is, in the last lines."""
    table: tuple[Column, ...] = ()
    """Columns of the table of all trials in the last lines; without them only the best are listed."""


QUALITY = Purpose(
    name="quality",
    metric="eval/score",
    mode="min",
    metrics=tuple(name for name, metric in METRICS.items() if metric.quality),
    group="eval/",
    front=("eval/style", "eval/content"),
    models=True,
    alone=False,
    keys=None,
    output="best",
    called="files",
)
SPEED = Purpose(
    name="speed",
    metric="perf/speedup",
    mode="max",
    metrics=tuple(name for name, metric in METRICS.items() if metric.speed),
    group="perf/",
    front=("perf/compile_s", None),
    models=False,
    alone=True,
    keys=SPEED_KEYS,
    output="fastest.yaml",
    called="overlay",
    table=(
        Column("perf/speedup", "x eager", "9.2f"),
        Column("perf/steady_samples_per_s", "samples/s", "11.1f"),
        Column("perf/compile_s", "compiling", "9.0f", " s"),
    ),
)
PURPOSES = {purpose.name: purpose for purpose in (QUALITY, SPEED)}
