"""What the journal of a sweep holds, and what a trial's end comes to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

SESSION, STARTED, EPOCH, NOTE, ENDED, ALONE = "session", "started", "epoch", "note", "ended", "alone"
REFERENCES, FINALS, RULER = "references", "finals", "ruler"
"""Events: the sweep begins or is resumed; a trial begins or is resumed; an epoch; a remark; its end; its one retry;
what doing nothing gets from the ruler; which trials are trained again, and from which seeds; another ruler measures
from here on."""


@dataclass(frozen=True)
class Verdict:
    """What follows from a trial's epoch."""

    ends: str | None = None
    """The status with which the trial is to end now; None to continue."""
    reason: str | None = None


class TrialReport(TypedDict):
    """What a trial reports to the driver, as JSON: an epoch; or that its group is there, or that it cannot continue."""

    status: str
    pid: NotRequired[int]
    host: NotRequired[str]
    reason: NotRequired[str | None]
    """Why it cannot continue."""
    epoch: NotRequired[int]
    step: NotRequired[int]
    """Optimiser steps of the whole run until the epoch's end."""
    metrics: NotRequired[dict[str, float]]
    images: NotRequired[dict[str, str]]
    """Where the epoch's pictures lie, by key."""
    first_images: NotRequired[dict[str, str]]
    """Those of the untrained networks."""
    labels: NotRequired[dict[str, str]]
    """How it runs, as tags."""
    note: NotRequired[str | None]
    """On the trial."""
    notes: NotRequired[list[str]]
    """On its process or machine."""
    first_step_at: NotRequired[float | None]


class Event(TypedDict):
    """A line of a sweep's journal. Which keys there are depends on `event`."""

    event: str
    at: float
    trial: NotRequired[str]
    params: NotRequired[Mapping[str, Any]]
    """STARTED: the trial's values."""
    epoch: NotRequired[int]
    """EPOCH, with the keys of a `TrialReport` that are not empty."""
    metrics: NotRequired[dict[str, float]]
    images: NotRequired[dict[str, str]]
    """By their names in the sweep's storage; 0.1 wrote paths."""
    first_images: NotRequired[dict[str, str]]
    labels: NotRequired[dict[str, str]]
    idle_s: NotRequired[float | None]
    note: NotRequired[str]
    """NOTE."""
    status: NotRequired[str]
    """ENDED."""
    reason: NotRequired[str | None]
    """ENDED, ALONE."""
    values: NotRequired[Mapping[str, Mapping[str, float]]]
    """REFERENCES: the ruler's metrics by name of the reference."""
    finalists: NotRequired[list[str]]
    """FINALS, with the seeds."""
    seeds: NotRequired[list[int]]
    ruler: NotRequired[str]
    """RULER: the key under which scores are comparable."""


def read_events(lines: Iterable[Mapping[str, Any]]) -> Iterator[Event]:
    """A journal's lines as events."""
    for line in lines:
        yield cast(Event, line)
