"""Disk space: which checkpoints a sweep keeps, how much room they need, and what is said when there is none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from raystar.base.storage import Storage
from raystar.record import finals
from raystar.record.statuses import FINISHED, STOPPED, UNFINISHED
from raystar.record.summary import TrialRecord
from raystar.record.trial_files import checkpoint_name, saved_epochs

logger = logging.getLogger(__name__)

RECENT = 2  # checkpoints of a trial that can still continue: should the last one be damaged, the one before it serves


class Janitor:
    """Keeps a trial's latest and measured checkpoints while it can continue, and afterwards those of the best trials.

    Files are removed in a thread: a distant storage must not hold up the sweep.

    Args:
        keep: trials that have ended whose checkpoints stay, the best ones.
        top: beside them, the best run of each of so many finalists, and of the baseline.
    """

    def __init__(self, storage: Storage, keep: int, mode: str, top: int = 0, baseline: str | None = None) -> None:
        self.storage = storage
        self.keep = keep
        self.mode = mode
        self.top = top
        self.baseline = baseline
        self._saved: dict[str, list[int]] = {}  # epochs with a checkpoint, by trial, as the driver knows them
        self._ended: list[TrialRecord] = []  # those whose checkpoints may stay
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raystar-janitor")

    def known(self, record: TrialRecord) -> None:
        """Takes in a trial of a resumed sweep."""
        if record.epochs:
            self._saved[record.trial] = saved_epochs(self.storage, record.trial)
            self.ended(record)

    def epoch(self, record: TrialRecord, epoch: int) -> None:
        """A trial has saved `epoch`."""
        epochs = self._saved.setdefault(record.trial, [])
        epochs.append(epoch)
        recent = epochs[-RECENT:]
        self._reduce(record.trial, [*recent, *([record.score_epoch] if record.score_epoch else [])])

    def ended(self, record: TrialRecord) -> None:
        """A trial is over, for good or until the sweep is resumed."""
        if record.status in UNFINISHED:
            return
        if record.status not in (FINISHED, STOPPED) or record.score is None or record.score_epoch is None:
            self._reduce(record.trial, [])
            return
        self._reduce(record.trial, [record.score_epoch])
        self._ended = [other for other in self._ended if other is not record] + [record]
        chosen = finals.choose(self._ended, self.mode, self.top, self.baseline) if self.top else []
        # Who is left out now will be left out of every later choice, since scores of the past stay what they are.
        kept = {other.trial for other in sorted(self._ended, key=self._order)[: self.keep]}
        for name in chosen:
            runs = [other for other in self._ended if name in (other.trial, other.parent)]
            kept.add(min(runs, key=lambda run: (run.status != FINISHED, *self._order(run))).trial)
        for other in self._ended:
            if other.trial not in kept:
                self._reduce(other.trial, [])
        self._ended = [other for other in self._ended if other.trial in kept or other.trial in chosen]

    def _order(self, record: TrialRecord) -> tuple[float, str]:
        assert record.score is not None
        return record.score * (1 if self.mode == "min" else -1), record.trial

    def checkpoint(self, record: TrialRecord) -> str | None:
        """Where the checkpoint of a trial's score lies in the storage, if it is kept."""
        if record.score_epoch is None or record.score_epoch not in self._saved.get(record.trial, []):
            return None
        return checkpoint_name(record.trial, record.score_epoch)

    def close(self) -> None:
        """Returns when everything is removed that is to be."""
        self._thread.shutdown()

    def _reduce(self, trial: str, keep: Sequence[int]) -> None:
        epochs = self._saved.get(trial, [])
        gone = [epoch for epoch in epochs if epoch not in keep]
        if gone:
            self._saved[trial] = [epoch for epoch in epochs if epoch in keep]
            self._thread.submit(self._remove, trial, gone)

    def _remove(self, trial: str, epochs: Sequence[int]) -> None:
        try:
            for epoch in epochs:
                self.storage.delete(checkpoint_name(trial, epoch))
        except OSError as error:  # costs space, nothing else
            logger.warning(f"old checkpoints of {trial} cannot be removed: {error}")
