"""Where runs are recorded: the `Tracker` seam and its MLflow form. The only file that imports mlflow.

One writer: the driver. A call puts its record into a file and returns, so a slow or absent server never holds up
training. A thread takes the records from there to MLflow, and keeps trying until the server is back; what it could not
deliver, the next process on the same file does.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raystar.base.errors import RaystarError
from raystar.base.secrets import redact, redact_value
from raystar.tracking.mlflow import models as registry
from raystar.tracking.mlflow.client import connect, in_a_line, set_environment
from raystar.tracking.mlflow.views import PICTURED_RUNS, RANK, SHOWN, VIEW, pictured, saved_view
from raystar.tracking.spool import Spool
from raystar.tracking.tracker import DEFAULT_EXPERIMENT, PARENT, user

_RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_LAST_S = 40.0  # how long a record is tried once nothing else is left to do
_TOLD = 2  # attempts before anything is said
_READ_ATTEMPTS = 6  # of a picture that is no picture: it may be about to be written again
_MARK = "raystar.record"  # tag by which a run is found whose creation was not answered
_ENDED = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "interrupted": "KILLED",
}
"""MLflow's statuses of raystar's; all others are FAILED."""
_DECLINES = {
    "PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "ENDPOINT_NOT_FOUND", "NOT_FOUND",
    "RESOURCE_DOES_NOT_EXIST", "FEATURE_DISABLED", "NOT_IMPLEMENTED", "BAD_REQUEST", "INVALID_PARAMETER_VALUE",
}  # fmt: skip


class _Refused(Exception):  # noqa: N818
    """A record that cannot be written, whatever the store does."""


class _Declined(Exception):  # noqa: N818
    """What the store does not do, and nobody needs in order to go on."""


class _Unreadable(Exception):  # noqa: N818
    """A picture that does not decode."""


class MlflowTracker:
    """Records to MLflow: experiment > parent run (sweep) > child runs (trials).

    Args:
        uri: the tracking URI.
        artifacts: folder of a new local experiment's artifacts.
        dataset: `{"name", "digest", "source"}` shown as every run's dataset.
        common_tags: set on every run.
        primary_metric: what the table of runs is sorted by, lower first if `lower_is_better`.
        columns: parameters that the table of runs shows.
        spool: the file that holds records until MLflow has taken them. One that is there already is gone on with:
            what waits in it is written first, and its trials keep their runs.
    """

    def __init__(
        self,
        uri: str,
        artifacts: Path,
        dataset: Mapping[str, str],
        common_tags: Mapping[str, str],
        primary_metric: str,
        lower_is_better: bool,
        columns: Sequence[str] = (),
        *,
        spool: Path,
    ) -> None:
        set_environment()
        self.uri = uri
        self.artifacts = artifacts
        self.dataset = dict(dataset)
        self.common_tags = dict(common_tags)
        self.primary = (primary_metric, lower_is_better)
        self.columns = list(columns)
        self.experiment_id: str | None = None
        self._featured = False
        self.registered: str | None = None
        """What was done with the last model that was registered, in a line."""
        self._client: Any = None
        self._spool = Spool(spool)
        self._connected = threading.Event()
        self._failure: RaystarError | None = None
        self._closing_since: float | None = None
        self._patience_s = _LAST_S
        self._given_up = False
        self._inherited = False  # whether the record is one of an earlier process, which may have written it
        self._attempt = 0
        self._new_run: str | None = None  # of the record
        self._pictures: tuple[str, list[str]] = ("", [])  # of a run, while it is uncertain which it has
        self._thread = threading.Thread(target=self._work, name="raystar-tracking", daemon=True)

    @property
    def waiting(self) -> int:
        """How many records MLflow has not taken yet."""
        return self._spool.waiting

    def begin(self) -> None:
        """Starts the thread. Calls before that wait in the file; importing mlflow takes seconds of a core."""
        if not self._thread.ident:
            self._thread.start()

    def wait_until_connected(self) -> None:
        """Returns once the store and the experiment are there.

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
        if self._spool.told(trial).started:
            self._spool.add("reopen", trial)
            return
        self._spool.add(
            "start",
            trial,
            name=name or trial,
            mark=uuid.uuid4().hex,
            params={key: redact_value(key, str(value)) for key, value in params.items()},
            tags=_without_credentials(tags),
            text={key: redact(value) for key, value in text.items()},
        )

    def log(self, trial: str, epoch: int, metrics: Mapping[str, float], images: Mapping[str, str | Path]) -> None:
        """See `Tracker`."""
        told = self._spool.told(trial)
        if told.untrained if epoch == 0 else epoch <= told.epoch:
            return
        values = {key: float(value) for key, value in metrics.items()}
        self._spool.add("log", trial, epoch=epoch, metrics=values, images=_places(images))

    def attach(
        self, trial: str, files: Mapping[str, str | Path], tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> None:
        """See `Tracker`."""
        final = self._spool.told(trial).final
        values = {key: float(value) for key, value in metrics.items() if final.get(key) != value}
        if files or tags or values:
            self._spool.add(
                "attach", trial, files=_places(files), tags=_without_credentials(tags), metrics=values
            )  # fmt: skip

    def end(self, trial: str, status: str, reason: str | None) -> None:
        """See `Tracker`."""
        if self._spool.told(trial).open:
            self._spool.add("end", trial, status=status, reason=None if reason is None else redact(reason))

    def log_model(
        self, trial: str, epoch: int, export: Path, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        """See `Tracker`."""
        if self._spool.told(trial).model == epoch:
            return
        self._spool.add(
            "model",
            trial,
            epoch=epoch,
            mark=uuid.uuid4().hex,
            export=os.path.abspath(export),
            params={key: redact_value(key, str(value)) for key, value in params.items()},
            tags=_without_credentials({**self.common_tags, **tags}),
        )

    def register(self, trial: str, epoch: int, score: float, description: str, comparable: str) -> None:
        """See `Tracker`."""
        if self._spool.told(trial).registered != epoch:
            self._spool.add(
                "register", trial, epoch=epoch, score=score, description=redact(description), comparable=comparable
            )

    def feature(self, trials: Sequence[str]) -> None:
        """See `Tracker`. A view of its own, which `grids_address` opens."""
        shown = [trial for trial in trials if self._spool.told(trial).pictured][:PICTURED_RUNS]
        for trial, told in self._spool.trials.items():
            if trial not in shown and RANK in told.final:  # it was among them, before the sweep was made longer
                self.attach(trial, {}, {SHOWN: ""}, {})
        for rank, trial in enumerate(shown, start=1):
            self.attach(trial, {}, {SHOWN: self._view_name}, {RANK: float(rank)})
        if shown:
            common = min(self._spool.told(trial).pictured for trial in shown)
            self._spool.add("view", PARENT, epoch=common)
            self._featured = True

    def model_epoch(self, trial: str) -> int:
        """See `Tracker`."""
        return self._spool.told(trial).model

    def run_id(self, trial: str) -> str | None:
        """See `Tracker`."""
        return self._spool.runs.get(trial)

    def last_epoch(self, trial: str) -> int:
        """See `Tracker`."""
        return self._spool.told(trial).epoch

    def sync(self) -> None:
        """See `Tracker`."""
        self._spool.sync()

    def close(self) -> None:
        """See `Tracker`."""
        self.begin()
        self._connected.wait()
        if self._thread.is_alive():
            still_open = [trial for trial, told in self._spool.trials.items() if told.open]
            for trial in sorted(still_open, reverse=True):  # the parent's name sorts first, so it is closed last
                self.end(trial, "interrupted", None)
            if self.waiting > 20:
                print(f"writing the last {self.waiting} records to MLflow", flush=True)
            self._closing_since = time.monotonic()
            self._spool.finish()
            self._thread.join()
        self._spool.close()

    # -- the thread ---------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._connect()
        except RaystarError as error:
            self._failure = error
        # Database drivers and HTTP clients raise their own kinds; the user sees one line instead.
        except Exception as error:
            self._failure = RaystarError(
                f"the MLflow store at {redact(self.uri)} cannot be used ({in_a_line(error)}); "
                "start its server or choose another with --tracking-uri"
            )
        self._connected.set()
        if self._failure is not None:
            return
        try:
            for record in self._spool.take():
                self._inherited = record["n"] <= self._spool.inherited
                self._new_run = None
                for step in self._steps(record):
                    self._persist(step)
                    if self._given_up:
                        return
                self._spool.taken(record, self._new_run)
        except OSError as error:  # of the spool's own files
            self._give_up(f"the record cannot be kept ({in_a_line(error)})")

    def _steps(self, record: dict[str, Any]) -> Iterator[Callable[[], None]]:
        """What a record asks of MLflow, in order. Each step may be done twice without a trace."""
        trial, at = record["trial"], record["at"]
        if record["do"] == "start":
            yield lambda: self._start(record)
        elif record["do"] == "reopen":
            yield lambda: self._reopen(trial)
        elif record["do"] == "attach":
            for name, place in record["files"].items():
                yield functools.partial(self._attach_file, trial, name, place)
            yield lambda: self._attach(trial, at, record["tags"], record["metrics"])
        elif record["do"] == "end":
            yield lambda: self._end(trial, record["status"], record["reason"], at)
        elif record["do"] == "model":
            yield lambda: self._log_model(record)
        elif record["do"] == "view":
            yield lambda: self._save_grids_view(record["epoch"])
        elif record["do"] == "register":
            yield lambda: self._register(record)
        else:
            if record["metrics"]:
                yield lambda: self._log_metrics(trial, record["epoch"], at, record["metrics"])
            for key, place in record["images"].items():
                yield functools.partial(self._log_image, trial, record["epoch"], at, key, place)

    def _persist(self, step: Callable[[], None]) -> None:
        """Runs `step` until it works; a server that is away is waited for, since nothing may be lost."""
        began = time.monotonic()
        for attempt in itertools.count():
            self._attempt = attempt
            try:
                step()
                if attempt > _TOLD:
                    print("note: MLflow takes records again", file=sys.stderr, flush=True)
                return
            except _Declined as declined:
                print(f"note: {declined}", file=sys.stderr, flush=True)
                return
            except Exception as error:
                reason = in_a_line(error)
                if _is_final(error, attempt):
                    print(f"error: MLflow refuses a record: {reason}", file=sys.stderr, flush=True)
                    return
            if attempt == _TOLD:
                print(f"note: MLflow takes no records now ({reason}); trying again", file=sys.stderr, flush=True)
            if (
                self._closing_since is not None
                and time.monotonic() - max(began, self._closing_since) >= self._patience_s
            ):
                self._give_up(f"MLflow is away ({reason})")
                return
            time.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])

    @property
    def _uncertain(self) -> bool:
        """Whether MLflow may have what is to be written already."""
        return self._inherited or self._attempt > 0

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        print(
            f"error: {reason}; {self.waiting} records wait in {self._spool.path} and are not lost: "
            f"{self._how_to_resume()} writes them",
            file=sys.stderr,
            flush=True,
        )

    def _how_to_resume(self) -> str:
        sweep, run = (self.common_tags.get(f"raystar.{kind}") for kind in ("sweep", "run"))
        if sweep is not None:
            return f"python -m raystar.tune --resume {sweep}"
        return f"python -m raystar.train ... --name {run} --resume" if run is not None else "going on with that file"

    def _connect(self) -> None:
        client = connect(self.uri)
        self.experiment_id = self._known_experiment(client) or self._experiment(client)
        metric, lower = self.primary
        client.set_experiment_tag(self.experiment_id, "mlflow.experiment.primaryMetric.name", metric)
        greater = "false" if lower else "true"
        client.set_experiment_tag(self.experiment_id, "mlflow.experiment.primaryMetric.greaterIsBetter", greater)
        client.set_experiment_tag(self.experiment_id, "mlflow.experimentKind", "custom_model_development")
        self._save_view(client)
        self._client = client

    def _experiment(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT)
        found = client.get_experiment_by_name(name)
        if found is None:
            location = self.artifacts.resolve().as_uri() if self.uri.startswith("sqlite:") else None
            try:
                return client.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                found = client.get_experiment_by_name(name)
                if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:  # else another sweep was first
                    raise
        if found.lifecycle_stage != "active":
            raise ValueError(f"experiment {name} is deleted there; restore it, or set MLFLOW_EXPERIMENT_NAME")
        return found.experiment_id

    def _known_experiment(self, client: Any) -> str | None:
        """Where the runs of an existing spool lie."""
        from mlflow.exceptions import MlflowException

        for run_id in list(self._spool.runs.values())[:1]:
            try:
                run = client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                run = None
            if run is None or run.info.lifecycle_stage != "active":
                raise RaystarError(
                    f"the MLflow store at {redact(self.uri)} has no run {run_id}, where {self._spool.path} goes on; "
                    "name the store that it began in with --tracking-uri, or restore the run there"
                )
            return run.info.experiment_id
        return None

    def _save_view(self, client: Any) -> None:
        client.set_experiment_tag(self.experiment_id, f"mlflow.sharedViewState.{VIEW}", self._view())

    def _view(self) -> str:
        """A saved view of the UI: every run in one table, best first, with the columns that matter.

        Its charts begin with the grids, large and all at one epoch, the last to which every trial came, instead of
        ending with them: at the last of all, trials that were stopped early would show nothing.
        The form is what MLflow 3.17 writes itself; another version ignores what it does not know.
        """
        metric, lower = self.primary
        final = f"metrics.`final/{metric.partition('/')[2]}`"
        shown = [final, f"metrics.`{metric}`", "tags.`raystar.status`", "tags.`raystar.sweep`"]
        state = {
            "orderByKey": final,
            "orderByAsc": lower,
            "runsHiddenMode": "SHOW_ALL",
            "selectedColumns": [*shown, *(f"params.`{column}`" for column in self.columns)],
        }
        if not metric.startswith("perf/"):  # who measures speed draws nothing
            state |= pictured(min((told.pictured for told in self._spool.trials.values() if told.pictured), default=0))
        return saved_view(VIEW, state)

    @property
    def _view_name(self) -> str:
        return f"{VIEW}-{self.common_tags.get('raystar.sweep', 'run')}"

    def _save_grids_view(self, epoch: int) -> None:
        """A saved view of nothing but the featured runs, at one epoch.

        MLflow 3.17 draws the first ten runs of its table, from the last to the first: so these are sorted backwards,
        and stand in the charts with the best at the left. Pinned and hidden runs would be simpler, but a view that is
        opened by its address leaves those out.
        """
        metric, _ = self.primary
        shown = [f"metrics.`{RANK}`", f"metrics.`final/{metric.partition('/')[2]}`", "tags.`raystar.status`"]
        state = {
            "searchFilter": f"tags.`{SHOWN}` = '{self._view_name}'",
            "orderByKey": shown[0],
            "orderByAsc": False,
            "runsHiddenMode": "SHOW_ALL",
            "selectedColumns": [*shown, *(f"params.`{column}`" for column in self.columns)],
            **pictured(epoch),
        }
        view = saved_view(self._view_name, state)
        self._client.set_experiment_tag(self.experiment_id, f"mlflow.sharedViewState.{self._view_name}", view)

    def grids_address(self) -> str | None:
        """The address of the featured runs' pictures in the MLflow UI; None where no run is featured."""
        if not self._featured:
            return None
        return f"{self._page(self._view_name)}&compareRunsMode=CHART"

    def _page(self, view: str) -> str:
        server = redact(self.uri).rstrip("/") if self.uri.startswith("http") else "http://127.0.0.1:5000"
        page = f"#/experiments/{self.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={view}"
        return f"{server}/{page}"

    def how_to_compare(self) -> tuple[str, str]:
        """The command that starts the MLflow UI, empty where a server is running, and the address of the trials."""
        command = "" if self.uri.startswith("http") else f"mlflow ui --backend-store-uri {redact(self.uri)}"
        return command, self._page(VIEW)

    def _run(self, trial: str) -> str:
        if trial not in self._spool.runs:
            raise _Refused(f"it belongs to {trial or 'a parent'}, which has no run")
        return self._spool.runs[trial]

    def _start(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        trial = record["trial"]
        run_id = self._new_run or self._created(record["mark"])
        if run_id is None:
            tags = {**_without_credentials(self.common_tags), **record["tags"]}
            tags |= {"raystar.status": "running", _MARK: record["mark"], "mlflow.user": user()}
            if trial != PARENT and PARENT in self._spool.runs:
                tags["mlflow.parentRunId"] = self._spool.runs[PARENT]
            run = self._client.create_run(
                self.experiment_id, start_time=record["at"], tags=tags, run_name=record["name"]
            )  # fmt: skip
            run_id = run.info.run_id
        self._new_run = run_id
        params = [Param(key, value) for key, value in record["params"].items()]
        self._client.log_batch(run_id, params=params)
        for name, content in record["text"].items():
            self._client.log_text(run_id, content, name)
        source = json.dumps({"uri": redact(self.dataset["source"])})
        dataset = Dataset(self.dataset["name"], self.dataset["digest"], "local", source)
        context = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(run_id, datasets=[DatasetInput(dataset, [context])])

    def _created(self, mark: str) -> str | None:
        """The run that an earlier attempt has created, if there was one."""
        if not self._uncertain:
            return None
        found = self._client.search_runs([self.experiment_id], f"tags.`{_MARK}` = '{mark}'", max_results=1)
        return found[0].info.run_id if found else None

    def _reopen(self, trial: str) -> None:
        from mlflow.exceptions import MlflowException

        run_id = self._run(trial)
        self._client.update_run(run_id, status="RUNNING")  # it keeps the time of its end until it ends again
        self._client.set_tag(run_id, "raystar.status", "running")
        try:
            self._client.delete_tag(run_id, "raystar.reason")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def _log_metrics(self, trial: str, epoch: int, at: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        first = self.primary[0]  # the UI lists metrics in the order in which they came
        ordered = sorted(values, key=lambda name: name != first)
        # MLflow drops what it has already: same key, step, time and value.
        self._client.log_batch(self._run(trial), metrics=[Metric(k, values[k], at, epoch) for k in ordered])

    def _log_image(self, trial: str, epoch: int, at: int, key: str, place: str) -> None:
        from PIL import Image

        run_id = self._run(trial)
        with _local(place) as path:
            try:
                with Image.open(path) as picture:
                    picture.load()
            except (OSError, SyntaxError, ValueError) as error:
                raise _Unreadable(f"{redact(place)} is no picture ({in_a_line(error)})") from None
        name = self._image_name(run_id, key, epoch)
        if name is None:
            self._client.log_image(run_id, picture, key=key, step=epoch, timestamp=at, synchronous=True)
            return
        # An earlier attempt got so far; MLflow would choose another name and show both.
        from mlflow.tracking.multimedia import compress_image_size
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES

        with tempfile.TemporaryDirectory() as folder:
            for suffix, image in ((".png", picture), ("+compressed.webp", compress_image_size(picture))):
                image.save(Path(folder) / f"{name}{suffix}")
                self._client.log_artifact(run_id, str(Path(folder) / f"{name}{suffix}"), "images")
        self._client.set_tag(run_id, MLFLOW_LOGGED_IMAGES, True)

    def _image_name(self, run_id: str, key: str, epoch: int) -> str | None:
        """The name, without its suffix, that MLflow gave a picture in an earlier attempt."""
        if not self._uncertain:
            return None
        if self._attempt or self._pictures[0] != run_id:  # records of earlier processes ask once a run
            found = self._client.list_artifacts(run_id, "images")
            self._pictures = (run_id, [Path(file.path).name for file in found])
        name = re.compile(rf"({re.escape(key.replace('/', '~'))}\+step\+{epoch}\+.*?)(\+compressed)?\.\w+")
        return min((found[1] for found in map(name.fullmatch, self._pictures[1]) if found), default=None)

    def _attach_file(self, trial: str, name: str, place: str) -> None:
        folder = str(Path(name).parent)
        with _local(place, Path(name).name) as path:
            self._client.log_artifact(self._run(trial), str(path), None if folder == "." else folder)

    def _attach(self, trial: str, at: int, tags: dict[str, str], metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric, RunTag

        values = [Metric(key, value, at, 0) for key, value in metrics.items()]
        self._client.log_batch(
            self._run(trial), metrics=values, tags=[RunTag(key, value) for key, value in tags.items()]
        )  # fmt: skip

    def _log_model(self, record: dict[str, Any]) -> None:
        export = Path(record["export"])
        if not export.is_dir():
            raise _Refused(f"{export}: no such folder")
        with _unless_declined("takes no models"):
            registry.log(
                self._client, self._run(record["trial"]), export, mark=record["mark"],
                name=re.sub(r"[^\w-]", "-", f"{self.common_tags.get('raystar.sweep', 'model')}-{record['trial']}"),
                epoch=record["epoch"], params=record["params"], tags=record["tags"],
            )  # fmt: skip

    def _register(self, record: dict[str, Any]) -> None:
        metric, lower = self.primary
        name = registry.model_name(self._client.get_experiment(self.experiment_id).name, self.dataset["name"])
        with _unless_declined("does not register models"):
            self.registered = registry.register(
                self._client, self._run(record["trial"]), name=name, epoch=record["epoch"],
                description=record["description"], metric=metric, lower=lower, score=record["score"],
                comparable=record["comparable"],
            )  # fmt: skip

    def _end(self, trial: str, status: str, reason: str | None, at: int) -> None:
        run_id = self._run(trial)
        self._client.set_tag(run_id, "raystar.status", status)
        if reason is not None:
            self._client.set_tag(run_id, "raystar.reason", reason[:4000])
        self._client.set_terminated(run_id, _ENDED.get(status, "FAILED"), end_time=at)
        if trial == PARENT:
            self._save_view(self._client)


@contextlib.contextmanager
def _unless_declined(what: str) -> Iterator[None]:
    """Models are an extra: a server that is too old for them, or does not let us, costs them and nothing else."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RaystarError) or getattr(error, "error_code", "") in _DECLINES:
            raise _Declined(f"MLflow {what} ({in_a_line(error)})") from None
        raise


def _is_final(error: Exception, attempt: int) -> bool:
    """Whether trying again cannot help: the record itself is wrong, not the way to the server."""
    if isinstance(error, _Unreadable):
        return attempt + 1 >= _READ_ATTEMPTS
    if isinstance(error, OSError | UnicodeError | json.JSONDecodeError):  # half an answer is a ValueError, too
        return False
    wrong = isinstance(error, _Refused | ValueError | TypeError)
    return wrong or getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"


def _without_credentials(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: redact_value(key, str(value)) for key, value in tags.items()}


def _places(files: Mapping[str, str | Path]) -> dict[str, str]:
    """Paths that mean the same wherever a later process runs, and URIs as they are."""
    places = {name: str(place) for name, place in files.items()}
    return {name: place if "://" in place else os.path.abspath(place) for name, place in places.items()}


@contextlib.contextmanager
def _local(place: str, name: str = "picture") -> Iterator[Path]:
    """The file at `place` on this machine; what an fsspec URI means is fetched, under `name`."""
    if "://" not in place:
        if not Path(place).is_file():
            raise _Refused(f"{place}: no such file")
        yield Path(place)
        return
    import fsspec

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        try:
            with fsspec.open(place, "rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        except (FileNotFoundError, ImportError, ValueError) as error:  # not there, or nothing here can read it
            raise _Refused(f"{redact(place)}: {in_a_line(error)}") from None
        yield path
