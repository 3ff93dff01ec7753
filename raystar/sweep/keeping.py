"""A sweep's files while it runs, and how long its processes wait."""

from __future__ import annotations

import time
from pathlib import Path

from raystar.base.files import wait_for_space
from raystar.base.journal import Journal
from raystar.record.events import TrialReport
from raystar.record.retention import Janitor
from raystar.record.summary import Summary, TrialRecord
from raystar.tracking.tracker import Tracker


class Keeper:
    """Keeps `summary.json` and `summary.csv` current, and what was recorded safe from a power cut."""

    def __init__(self, folder: Path, summary: Summary, tracker: Tracker, journal: Journal, janitor: Janitor) -> None:
        self.folder = folder
        self.summary = summary
        self.tracker = tracker
        self.journal = journal
        self.janitor = janitor
        self._written = 0.0
        self._every = 1.0

    def write(self, *, now: bool = False) -> None:
        """Writes if it is time: seldom enough that a long sweep does nothing else; or in any case, `now`."""
        began = time.time()
        if not now and began - self._written < self._every:
            return
        for record in self.summary.trials.values():
            record.run_id = record.run_id or self.tracker.run_id(record.trial)
            record.checkpoint = self.janitor.checkpoint(record)
        wait_for_space(self.folder, lambda: self.summary.write(self.folder))
        self.journal.sync()
        self.tracker.sync()
        self._written = time.time()
        self._every = max(1.0, 20 * (self._written - began))


class IdleClock:
    """How long processes train nothing between the trial before and the next one's first step."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], tuple[str, float]] = {}  # by process: trial and time

    @property
    def running(self) -> bool:
        """Whether anybody has reported."""
        return bool(self._last)

    def heard(self, record: TrialRecord, report: TrialReport) -> None:
        """A trial has reported; what its process had lost before goes into its record."""
        process, first_step, now = (report["host"], report["pid"]), report.get("first_step_at"), time.time()
        before = self._last.get(process)
        if before is not None and before[0] != record.trial and first_step is not None:
            record.idle_s = round(max(0.0, first_step - before[1]), 3)
        self._last[process] = (record.trial, now)
