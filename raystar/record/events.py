"""What the journal of a sweep holds, and what a trial's end comes to."""

from __future__ import annotations

from dataclasses import dataclass

SESSION, STARTED, EPOCH, NOTE, ENDED, ALONE = "session", "started", "epoch", "note", "ended", "alone"
REFERENCES, FINALS = "references", "finals"
"""Events: the sweep begins or goes on; a trial begins or goes on; an epoch; a remark; its end; its one retry; what
doing nothing gets from the ruler; which trials are trained again, and from which seeds."""


@dataclass(frozen=True)
class Verdict:
    """What follows from a trial's epoch."""

    ends: str | None = None
    """The status with which the trial is to end now; None to go on."""
    reason: str | None = None
