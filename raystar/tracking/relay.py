"""A tracker over any store: one process writes, and a slow or absent server never holds up training.

A call puts its record into a file and returns. A thread takes the records from there to the store, and keeps trying
until the server is back; what it could not deliver, the next process on the same file does.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raystar.base.command import below, command
from raystar.base.errors import RaystarError
from raystar.base.limits import LAST_RECORDS, limit
from raystar.base.secrets import in_a_line, redact, redact_value
from raystar.tracking.spool import Record, Spool, TrialProgress
from raystar.tracking.tracker import PARENT

logger = logging.getLogger(__name__)

_RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_TOLD = 2  # attempts before anything is said
_READ_ATTEMPTS = 6  # of a picture that is no picture: it may be about to be written again


class Refused(Exception):  # noqa: N818
    """A record that cannot be written, whatever the store does."""


class Declined(Exception):  # noqa: N818
    """What the store does not do, and no sweep depends on."""


class Busy(Exception):  # noqa: N818
    """The store is there, and another process has locked it for now."""


class Unreadable(Exception):  # noqa: N818
    """A picture that does not decode."""


@dataclass
class Delivery:
    """A record on its way to the store."""

    record: Record
    inherited: bool
    """Whether it is one of an earlier process, which may have written it."""
    attempt: int = 0
    run: str | None = None
    """The run that the record has opened."""

    @property
    def uncertain(self) -> bool:
        """Whether the store may have what is to be written already."""
        return self.inherited or self.attempt > 0


class Store(Protocol):
    """What `Relay` writes to."""

    name: str
    """Of the kind of store, as messages have it."""
    place: str
    """Where it is, without credentials."""
    registered: str | None
    """See `Tracker`."""
    common_tags: dict[str, str]
    """Set on every run."""
    most_featured: int
    """Runs whose pictures it shows beside each other."""

    def connect(self, spool: Spool) -> None:
        """Opens the store, once; `spool` says which runs there are, and what was recorded of each.

        Raises:
            Busy: it cannot be opened now; it is tried again, and records wait.
            RaystarError: it does not know the runs of the spool. Whatever else is raised becomes one.
        """

    def steps(self, delivery: Delivery) -> Iterator[Callable[[], None]]:
        """What a record asks of the store, in order. Each step may be done twice without a trace.

        A step raises `Refused`, `Declined` or `Unreadable`; after anything else it is tried again.
        """

    def refuses(self, error: Exception) -> bool:
        """Whether an error says that the record itself is wrong, so that trying again cannot help."""

    def marks(
        self, featured: Sequence[str], trials: Mapping[str, TrialProgress]
    ) -> Iterable[tuple[str, dict[str, str], dict[str, float]]]:
        """Tags and metrics, by trial, by which a view finds the featured runs, and no longer finds others."""

    def how_to_compare(self) -> tuple[str, str]:
        """See `Tracker`."""

    def grids_address(self) -> str:
        """See `Tracker`."""


class Relay:
    """A `Tracker` whose records wait in a file until the store has taken them.

    Args:
        spool: the file that holds records. One that is there already is continued: what waits in it is written
            first, and its trials keep their runs.
    """

    def __init__(self, store: Store, spool: Path) -> None:
        self.store = store
        self._spool = Spool(spool)
        self._featured = False
        self._connected = threading.Event()
        self._failure: RaystarError | None = None
        self._closing_since: float | None = None
        self._patience_s = limit(LAST_RECORDS)
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="raystar-tracking", daemon=True)

    @property
    def registered(self) -> str | None:
        """See `Tracker`."""
        return self.store.registered

    @property
    def waiting(self) -> int:
        """How many records the store has not taken yet."""
        return self._spool.waiting

    def begin(self) -> None:
        """Starts the thread. Calls before that wait in the file; opening a store takes seconds of a core."""
        if not self._thread.ident:
            self._thread.start()

    def wait_until_connected(self) -> None:
        """Returns once the store and the experiment are there, or another process holds up the store.

        Raises:
            RaystarError: the store cannot be reached or opened, or does not know the runs of an existing spool.
        """
        self._connected.wait()
        if self._failure is not None:
            raise self._failure

    def hurry(self) -> None:
        """Has `close` wait no longer for a server that is away."""
        self._patience_s = 0.0

    # -- the Tracker seam: each call becomes a record -------------------------------------------------

    def start(
        self,
        trial: str,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        text: Mapping[str, str],
        name: str | None = None,
    ) -> None:
        """See `Tracker`."""
        if self._spool.progress(trial).started:
            self._spool.add("reopen", trial)
            return
        self._spool.add(
            "start",
            trial,
            name=name or trial,
            mark=uuid.uuid4().hex,
            params={key: redact_value(key, str(value)) for key, value in params.items()},
            tags=without_credentials(tags),
            text={key: redact(value) for key, value in text.items()},
        )

    def log(self, trial: str, epoch: int, metrics: Mapping[str, float], images: Mapping[str, str | Path]) -> None:
        """See `Tracker`."""
        progress = self._spool.progress(trial)
        if progress.untrained if epoch == 0 else epoch <= progress.epoch:
            return
        values = {key: float(value) for key, value in metrics.items()}
        self._spool.add("log", trial, epoch=epoch, metrics=values, images=_text(images))

    def attach(
        self, trial: str, files: Mapping[str, str | Path], tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> None:
        """See `Tracker`."""
        final = self._spool.progress(trial).final
        values = {key: float(value) for key, value in metrics.items() if final.get(key) != value}
        if files or tags or values:
            self._spool.add(
                "attach", trial, files=_text(files), tags=without_credentials(tags), metrics=values
            )  # fmt: skip

    def end(self, trial: str, status: str, reason: str | None) -> None:
        """See `Tracker`."""
        if self._spool.progress(trial).open:
            self._spool.add("end", trial, status=status, reason=None if reason is None else redact(reason))

    def log_model(
        self, trial: str, epoch: int, export: Path, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        """See `Tracker`."""
        if self._spool.progress(trial).model == epoch:
            return
        self._spool.add(
            "model",
            trial,
            epoch=epoch,
            mark=uuid.uuid4().hex,
            export=str(export),
            params={key: redact_value(key, str(value)) for key, value in params.items()},
            tags=without_credentials({**self.store.common_tags, **tags}),
        )

    def register(self, trial: str, epoch: int, score: float, description: str, comparable: str) -> None:
        """See `Tracker`."""
        if self._spool.progress(trial).registered != epoch:
            self._spool.add(
                "register", trial, epoch=epoch, score=score, description=redact(description), comparable=comparable
            )

    def feature(self, trials: Sequence[str]) -> None:
        """See `Tracker`. A view of its own, which `grids_address` opens."""
        featured = [trial for trial in trials if self._spool.progress(trial).pictured][: self.store.most_featured]
        for trial, tags, metrics in list(self.store.marks(featured, self._spool.trials)):
            self.attach(trial, {}, tags, metrics)
        if featured:
            common = min(self._spool.progress(trial).pictured for trial in featured)
            self._spool.add("view", PARENT, epoch=common)
            self._featured = True

    def grids_address(self) -> str | None:
        """See `Tracker`."""
        return self.store.grids_address() if self._featured else None

    def how_to_compare(self) -> tuple[str, str]:
        """See `Tracker`."""
        return self.store.how_to_compare()

    def model_epoch(self, trial: str) -> int:
        """See `Tracker`."""
        return self._spool.progress(trial).model

    def run_id(self, trial: str) -> str | None:
        """See `Tracker`."""
        return self._spool.runs.get(trial)

    def final(self, trial: str) -> Mapping[str, float]:
        """See `Tracker`."""
        return self._spool.progress(trial).final

    def last_epoch(self, trial: str) -> int:
        """See `Tracker`."""
        return self._spool.progress(trial).epoch

    def sync(self) -> None:
        """See `Tracker`."""
        self._spool.sync()

    def close(self) -> None:
        """See `Tracker`."""
        self.begin()
        self._connected.wait()
        if self._thread.is_alive():
            still_open = [trial for trial, progress in self._spool.trials.items() if progress.open]
            for trial in sorted(still_open, reverse=True):  # the parent's name sorts first, so it is closed last
                self.end(trial, "interrupted", None)
            if self.waiting > 20:
                logger.info(f"writing the last {self.waiting} records to {self.store.name}")
            self._closing_since = time.monotonic()
            self._spool.finish()
            self._thread.join()
        self._spool.close()

    # -- the thread ---------------------------------------------------------------------------------

    def _work(self) -> None:
        connected = self._connect()
        self._connected.set()
        if not connected:
            return
        try:
            for record in self._spool.take():
                delivery = Delivery(record, inherited=record["n"] <= self._spool.inherited)
                for step in self.store.steps(delivery):
                    self._persist(step, delivery)
                    if self._given_up:
                        return
                self._spool.taken(record, delivery.run)
        except OSError as error:  # of the spool's own files
            self._give_up(f"the record cannot be kept ({in_a_line(error)})")

    def _connect(self) -> bool:
        """Opens the store, whatever time another process keeps it locked; returns whether that came about."""
        attempt = 0
        while True:
            try:
                self.store.connect(self._spool)
            except Busy as busy:
                reason = str(busy)
            except RaystarError as error:
                return self._fail(error)
            # Database drivers and HTTP clients raise their own kinds; the user sees one line instead.
            except Exception as error:
                return self._fail(
                    RaystarError(
                        f"the {self.store.name} store at {self.store.place} cannot be used ({in_a_line(error)}); "
                        "start its server or choose another with --tracking-uri"
                    )
                )
            else:
                if attempt:
                    logger.warning(f"{self.store.name} takes records now")
                return True
            if not attempt:
                logger.warning(f"{self.store.name} takes no records yet ({reason}); they wait in {self._spool.path}")
                self._connected.set()
            if self._closing_since is not None and time.monotonic() - self._closing_since >= self._patience_s:
                if self.waiting:
                    self._give_up(f"{self.store.name} is away ({reason})")
                return False
            time.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
            attempt += 1

    def _fail(self, error: RaystarError) -> bool:
        """Has `wait_until_connected` raise; where that has returned, records wait for another process."""
        if self._connected.is_set():
            self._give_up(str(error))
        else:
            self._failure = error
        return False

    def _persist(self, step: Callable[[], None], delivery: Delivery) -> None:
        """Runs `step` until it works; a server that is away is waited for, since nothing may be lost."""
        began = time.monotonic()
        for attempt in itertools.count():
            delivery.attempt = attempt
            try:
                step()
                if attempt > _TOLD:
                    logger.warning(f"{self.store.name} takes records again")
                return
            except Declined as declined:
                logger.warning(declined)
                return
            except Exception as error:
                reason = in_a_line(error)
                if self._is_final(error, attempt):
                    logger.error(f"{self.store.name} refuses a record: {reason}")
                    return
            if attempt == _TOLD:
                logger.warning(f"{self.store.name} takes no records now ({reason}); trying again")
            if (
                self._closing_since is not None
                and time.monotonic() - max(began, self._closing_since) >= self._patience_s
            ):
                self._give_up(f"{self.store.name} is away ({reason})")
                return
            time.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])

    def _is_final(self, error: Exception, attempt: int) -> bool:
        """Whether trying again cannot help: the record itself is wrong, not the way to the server."""
        if isinstance(error, Unreadable):
            return attempt + 1 >= _READ_ATTEMPTS
        if isinstance(error, OSError | UnicodeError | json.JSONDecodeError):  # half an answer is a ValueError, too
            return False
        return isinstance(error, Refused | ValueError | TypeError) or self.store.refuses(error)

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        logger.error(
            f"{reason}; {self.waiting} records wait in {self._spool.path} and are not lost: "
            f"{self._how_to_resume()} writes them"
        )

    def _how_to_resume(self) -> str:
        sweep, run = (self.store.common_tags.get(f"raystar.{kind}") for kind in ("sweep", "run"))
        if sweep is not None:
            return command("tune", ("--resume", sweep), *below("--out", self._spool.path.parent.parent))
        return f"python -m raystar.train ... --name {run} --resume" if run is not None else "continuing with that file"


def without_credentials(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as text, with what looks like a secret hidden."""
    return {key: redact_value(key, str(value)) for key, value in tags.items()}


def _text(files: Mapping[str, str | Path]) -> dict[str, str]:
    return {name: str(place) for name, place in files.items()}
