"""Records on their way to a store that may be away: a file holds them, in order, until the store has taken them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast

from raystar.base.files import found_in, sync_folder
from raystar.base.journal import Journal

Do = Literal["start", "reopen", "log", "attach", "end", "model", "register", "view"]
"""What a record asks of the store: the members of `Tracker`; `reopen` continues a run, `view` is `feature`'s."""


class Values(TypedDict, total=False):
    """What a record says, by what it does; for meanings see `Tracker`."""

    name: str
    """start: the run's."""
    mark: str
    """start, model: a tag by which the store finds what it made without being heard."""
    params: Mapping[str, str]
    """start, model."""
    tags: Mapping[str, str]
    """start, attach, model."""
    text: Mapping[str, str]
    """start: contents of text files, by name."""
    epoch: int
    """log, model, register; view: the epoch whose pictures it shows."""
    metrics: Mapping[str, float]
    """log, attach."""
    images: Mapping[str, str]
    """log: where pictures lie, by key; a relative path starts at the spool's folder."""
    files: Mapping[str, str]
    """attach: where files lie, by name in the run."""
    status: str
    """end."""
    reason: str | None
    """end."""
    export: str
    """model: the folder."""
    score: float
    """register."""
    description: str
    """register."""
    comparable: str
    """register."""


class Record(Values):
    """A line of the spool."""

    n: int
    """Its number, from 1."""
    at: int
    """When it was added, in milliseconds of Unix time."""
    do: Do
    trial: str


@dataclass
class TrialProgress:
    """What was said of a trial so far, by this process and by those before it."""

    started: bool = False
    open: bool = False
    epoch: int = 0
    """The highest epoch."""
    pictured: int = 0
    """The highest epoch with pictures."""
    untrained: bool = False
    """Whether epoch 0 is there, which may come after others."""
    final: dict[str, float] = field(default_factory=dict)
    """Metrics without an epoch."""
    model: int = 0
    """The epoch whose model came last."""
    registered: int = 0
    """The epoch whose model was to be registered last."""


def known_runs(path: Path) -> dict[str, str]:
    """Where the store keeps the trials whose records went through the spool at `path`, by trial."""
    runs: dict[str, str] = {}
    for line in Journal(_done(path)):
        runs |= line.get("runs", {})
    return runs


def _done(path: Path) -> Path:
    """The file that says how far the store has taken the records in `path`."""
    return path.with_suffix(".done.jsonl")


V = TypeVar("V", bound=Values)


def _with_places(values: V, change: Callable[[str], str]) -> V:
    """What a record says, with the places that it names changed."""
    changed = values.copy()
    if "images" in values:
        changed["images"] = {key: change(place) for key, place in values["images"].items()}
    if "files" in values:
        changed["files"] = {name: change(place) for name, place in values["files"].items()}
    if "export" in values:
        changed["export"] = change(values["export"])
    return changed


class Spool:
    """A queue in a file that outlives its process; one thread adds, another takes.

    `NAME.jsonl` holds the records. `NAME.done.jsonl`, beside it, says how far the store has taken them and in which
    runs, and what was recorded of the trials whose records are gone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = Path(os.path.abspath(path.parent))
        self.trials: dict[str, TrialProgress] = {}
        self.runs: dict[str, str] = {}
        """Where the store keeps a trial."""
        self._records = Journal(path)
        self._done = Journal(_done(path))
        self._taken = self._last = self._start = self._end = 0
        gone = 0
        for line in self._done:
            self._taken = max(self._taken, line["n"])
            self.runs |= line.get("runs", {})
            if "trials" in line:
                gone = line["n"]
                self.trials = {trial: TrialProgress(**progress) for trial, progress in line["trials"].items()}
        self._last = self._taken
        for record, end in self._records.read():
            self._last, self._end = max(self._last, record["n"]), end
            if record["n"] <= self._taken:
                self._start = end
            if record["n"] > gone:
                self._remember(cast(Record, record))
        self.inherited = self._last
        """The last record of earlier processes. The store may have one of them that is not marked as taken."""
        self._adding = threading.Lock()
        self._news = threading.Condition()
        self._finished = False

    @property
    def waiting(self) -> int:
        """How many records the store has not taken."""
        return self._last - self._taken

    def progress(self, trial: str) -> TrialProgress:
        """What was said of `trial` so far."""
        return self.trials.get(trial, TrialProgress())

    def add(self, do: Do, trial: str, **values: Unpack[Values]) -> None:
        """Puts a record at the end. It is safe from this process's death at once, from a power cut after `sync`."""
        with self._adding:
            kept = _with_places(values, self._kept)
            record: Record = {"n": self._last + 1, "at": int(time.time() * 1000), "do": do, "trial": trial, **kept}
            end = self._records.append(record)
            self._remember(record)
            with self._news:
                self._last, self._end = record["n"], end
                self._news.notify_all()

    def _kept(self, place: str) -> str:
        """A place that means the same wherever a later process runs: relative below this folder, which may be moved."""
        return place if "://" in place else os.path.abspath(place).removeprefix(f"{self._folder}/")

    def _found(self, place: str) -> str:
        """The same as it is now. Earlier versions wrote whole paths, and the folder may have moved since."""
        if "://" in place:
            return place
        return found_in(place, self._folder) if os.path.isabs(place) else str(self._folder / place)

    def _remember(self, record: Record) -> None:
        progress = self.trials.setdefault(record["trial"], TrialProgress())
        if record["do"] in ("start", "reopen"):
            progress.started = progress.open = True
        elif record["do"] == "end":
            progress.open = False
        elif record["do"] == "attach":
            progress.final |= record["metrics"]
        elif record["do"] == "model":
            progress.model = record["epoch"]
        elif record["do"] == "register":
            progress.registered = record["epoch"]
        elif record["do"] == "view":
            return
        elif record["epoch"]:
            progress.epoch = max(progress.epoch, record["epoch"])
            if record.get("images"):
                progress.pictured = max(progress.pictured, record["epoch"])
        else:
            progress.untrained = True

    def sync(self) -> None:
        """Returns once every record survives a power cut."""
        self._records.sync()

    def take(self) -> Iterator[Record]:
        """What the store has not taken, oldest first; waits for more until `finish` is called.

        A record is on the disk before it is handed out, so that the store never knows one that the file does not.
        """
        position = self._start
        while True:
            with self._news:
                while self._end == position and not self._finished:
                    self._news.wait()
                end = self._end
            if position == end:
                return
            self.sync()
            for record, behind in self._records.read(position):
                if record["n"] > self._taken:
                    yield _with_places(cast(Record, record), self._found)
                if behind >= end:
                    break
            position = end

    def taken(self, record: Record, run: str | None = None) -> None:
        """Marks a record as taken by the store, where `run` is the trial's from now on."""
        done: dict[str, Any] = {"n": record["n"]}
        if run is not None:
            done["runs"] = {record["trial"]: run}
            self.runs[record["trial"]] = run
        self._done.append(done)
        if run is not None:  # a record taken twice does no harm, a trial without its run would
            self._done.sync()
        self._taken = record["n"]

    def finish(self) -> None:
        """Lets `take` end once nothing is left."""
        with self._news:
            self._finished = True
            self._news.notify_all()

    def close(self) -> None:
        """Gives the files back. Once everything is taken, they keep only what a later process must know."""
        if self._end and not self.waiting:
            self._compact()
            self._start = self._end = 0
        self._records.close()
        self._done.close()

    def _compact(self) -> None:
        whole = self._done.path
        part = Journal(whole.with_suffix(".part"))
        part.path.unlink(missing_ok=True)
        trials = {trial: asdict(progress) for trial, progress in self.trials.items()}
        part.append({"n": self._taken, "runs": self.runs, "trials": trials})
        part.sync()
        part.close()
        self._done.close()
        os.replace(part.path, whole)
        sync_folder(whole.parent)
        if self.path.exists():
            os.truncate(self.path, 0)
