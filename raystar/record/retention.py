"""Disk space: which checkpoints a sweep keeps, how much room they need, and what is said when there is none."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from raystar.base.errors import RaystarError
from raystar.base.storage import Storage
from raystar.config.load import Config
from raystar.model.networks import AVERAGED, NAMES, Nets
from raystar.record import finals
from raystar.record.summary import FINISHED, STOPPED, UNFINISHED, TrialRecord
from raystar.record.trial_files import checkpoint_name, saved_epochs

_RECENT = 2  # checkpoints of a trial that can still go on: should the last one be damaged, the one before it serves
_EXTRA_BYTES = 1 << 20  # a trial's pictures and records, about
_LOOK_S = 2.0


def checkpoint_bytes(config: Config) -> int:
    """Size of a trial's checkpoint: weights, AdamW's two moments and, where they are on, averages, all float32."""
    with torch.device("meta"):
        nets = Nets(config.model, len(config.data.domains))
    averaged = AVERAGED if config.training.ema_epochs > 0 else ()
    copies = {name: 4 if name in averaged else 3 for name in NAMES}
    return 4 * sum(copies[name] * parameter.numel() for name, net in nets.items() for parameter in net.parameters())


def check_space(storage: Storage, needed: int) -> None:
    """Refuses a sweep that would fill the disk.

    Raises:
        RaystarError: less than `needed` bytes are free.
    """
    free = storage.free_bytes()
    if free is not None and free < needed:
        raise RaystarError(
            f"{storage.uri}: {_size(free)} are free, and this sweep's checkpoints take about {_size(needed)}; free "
            "some space, choose another --out or --storage, or lower keep in the space file"
        )


def needed_bytes(checkpoint: int, at_a_time: int, keep: int, trials: int) -> int:
    """What a sweep's checkpoints and pictures take at most, about. `keep`: those that stay, `trials`: all of them."""
    return checkpoint * (at_a_time * (_RECENT + 2) + min(keep, trials)) + trials * _EXTRA_BYTES


class Janitor:
    """Keeps each trial's latest and measured checkpoints while it can go on, and afterwards those of the best trials.

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
        self._there: dict[str, list[int]] = {}  # epochs with a checkpoint, by trial, as the driver knows them
        self._ended: list[TrialRecord] = []  # those whose checkpoints may stay
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raystar-janitor")

    def known(self, record: TrialRecord) -> None:
        """Takes in a trial of a sweep that goes on."""
        if record.epochs:
            self._there[record.trial] = saved_epochs(self.storage, record.trial)
            self.ended(record)

    def epoch(self, record: TrialRecord, epoch: int) -> None:
        """A trial has saved `epoch`."""
        there = self._there.setdefault(record.trial, [])
        there.append(epoch)
        recent = there[-_RECENT:]
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
        if record.score_epoch is None or record.score_epoch not in self._there.get(record.trial, []):
            return None
        return checkpoint_name(record.trial, record.score_epoch)

    def close(self) -> None:
        """Returns when everything is removed that is to be."""
        self._thread.shutdown()

    def _reduce(self, trial: str, keep: Sequence[int]) -> None:
        there = self._there.get(trial, [])
        gone = [epoch for epoch in there if epoch not in keep]
        if gone:
            self._there[trial] = [epoch for epoch in there if epoch in keep]
            self._thread.submit(self._remove, trial, gone)

    def _remove(self, trial: str, epochs: Sequence[int]) -> None:
        try:
            for epoch in epochs:
                self.storage.delete(checkpoint_name(trial, epoch))
        except OSError as error:  # costs space, nothing else
            print(f"note: old checkpoints of {trial} cannot be removed: {error}", file=sys.stderr, flush=True)


class DiskWatch:
    """Says when the disk that trials save to is full, since they wait then, and when it is not any more."""

    def __init__(self, storage: Storage, needed: int) -> None:
        self.storage = storage
        self.needed = needed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="raystar-disk", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        full = False
        while not self._over.wait(_LOOK_S):
            free = self.storage.free_bytes()
            if free is None:  # nobody knows
                return
            if (free < self.needed) != full:
                full = not full
                print(
                    f"note: the disk that holds {self.storage.uri} is full ({_size(free)} free, a checkpoint takes "
                    f"{_size(self.needed)}); trials wait until there is space again"
                    if full
                    else f"note: the disk that holds {self.storage.uri} has space again; trials go on",
                    file=sys.stderr,
                    flush=True,
                )

    def close(self) -> None:
        """Stops looking."""
        self._over.set()
        self._thread.join()


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
