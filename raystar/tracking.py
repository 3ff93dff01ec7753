"""Where runs are recorded: the `Tracker` seam and its MLflow form. The only file that imports mlflow.

One writer: the driver. Calls are handed to a thread and return at once, so a slow or absent server never holds
up training; the thread keeps trying until the server is back.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from raystar import __version__
from raystar.errors import RaystarError

DEFAULT_EXPERIMENT = "raystar"
_VIEW = "raystar"  # key of the saved view
PARENT = ""
"""Name of the parent run, or of the only run, in calls that take a trial's name."""

_RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_LAST_ATTEMPTS = 12  # about forty seconds, once nothing else is left to do
_ENDED = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "interrupted": "KILLED",
    "failed": "FAILED",
    "diverged": "FAILED",
}


class Tracker(Protocol):
    """Records runs. `trial` is a trial's name, or `PARENT`."""

    def start(
        self,
        trial: str,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        text: Mapping[str, str],
        name: str | None = None,
    ) -> None:
        """Opens a run, shown as `name` or `trial`; `text` holds artifacts by name (`{"config.yaml": "..."}`)."""

    def log(self, trial: str, epoch: int, metrics: Mapping[str, float], images: Mapping[str, Path]) -> None:
        """Records one epoch; `images` are files that stay where they are until `close`."""

    def attach(
        self, trial: str, files: Mapping[str, Path], tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> None:
        """Adds files (by artifact name), tags and final metrics to a run."""

    def end(self, trial: str, status: str, reason: str | None) -> None:
        """Closes a run with raystar's status and reason."""

    def run_id(self, trial: str) -> str | None:
        """The run's id in the store, once it has one."""

    def close(self) -> None:
        """Writes what is left and closes every run that is still open."""


def default_uri(out: Path) -> str:
    """MLFLOW_TRACKING_URI, or the SQLite store in the output folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.resolve()}/mlflow.db"


def check_uri(uri: str) -> None:
    """Refuses a tracking URI that cannot work, before anything starts.

    Raises:
        RaystarError: a scheme that MLflow's tracking does not take here.
    """
    scheme = uri.partition(":")[0]
    if scheme in ("http", "https"):
        _check_server(uri)
        return
    if uri.startswith("sqlite:///"):
        _check_sqlite(Path(uri.removeprefix("sqlite:///")))
        return
    if scheme in ("postgresql", "mysql", "mssql") or "+" in scheme:
        return
    raise RaystarError(
        f"--tracking-uri {uri}: expected sqlite:///FILE, a database URI or http(s)://HOST:PORT; "
        "plain folders are no longer a store of MLflow's"
    )


def _check_sqlite(path: Path) -> None:
    """The file is a SQLite database or can become one."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(16) != b"SQLite format 3\0":
                raise RaystarError(f"--tracking-uri: {path}: expected a SQLite database, found another kind of file")
    elif path.is_dir():
        raise RaystarError(f"--tracking-uri: {path}: expected a SQLite database, found a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RaystarError(f"--tracking-uri: {path.parent}: cannot be made: {error.strerror}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RaystarError(f"--tracking-uri: {path}: cannot be written")


def _check_server(uri: str) -> None:
    parts = urlsplit(uri)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except (OSError, ValueError) as error:
        raise RaystarError(
            f"--tracking-uri {_redacted(uri)}: nothing answers there ({error}); start a server, for example "
            "mlflow server --backend-store-uri sqlite:///mlflow.db --port 5000"
        ) from None


class MlflowTracker:
    """Records to MLflow: experiment > parent run (sweep) > child runs (trials).

    Args:
        uri: the tracking URI.
        artifacts: folder of a new local experiment's artifacts.
        dataset: `{"name", "digest", "source"}` shown as every run's dataset.
        common_tags: set on every run.
        primary_metric: what the table of runs is sorted by, lower first if `lower_is_better`.
        columns: parameters that the table of runs shows.
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
        spool: Path | None = None,
    ) -> None:
        self.uri = uri
        self.artifacts = artifacts
        self.dataset = dict(dataset)
        self.common_tags = dict(common_tags)
        self.primary = (primary_metric, lower_is_better)
        self.columns = list(columns)
        self.experiment_id: str | None = None
        self._client: Any = None
        self._runs: dict[str, str] = {}
        self._open: set[str] = set()
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._connected = threading.Event()
        self._failure: RaystarError | None = None
        self._closing = False
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="raystar-tracking", daemon=True)

    def begin(self) -> None:
        """Starts the thread. Calls before that wait in its queue; importing mlflow takes seconds of a core."""
        if not self._thread.ident:
            self._thread.start()

    def wait_until_connected(self) -> None:
        """Returns once the store and the experiment are there.

        Raises:
            RaystarError: the store cannot be reached or opened.
        """
        self._connected.wait()
        if self._failure is not None:
            raise self._failure

    # -- the Tracker seam: each call is queued ------------------------------------------------------

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
        began = int(time.time() * 1000)
        copied = (dict(params), dict(tags), dict(text))
        self._tasks.put(lambda: self._start(trial, name or trial, began, *copied))

    def log(self, trial: str, epoch: int, metrics: Mapping[str, float], images: Mapping[str, Path]) -> None:
        """See `Tracker`."""
        at = int(time.time() * 1000)
        values, pictures = dict(metrics), dict(images)
        if values:
            self._tasks.put(lambda: self._log_metrics(trial, epoch, at, values))
        for key, path in pictures.items():
            self._tasks.put(functools.partial(self._log_image, trial, epoch, at, key, path))

    def attach(
        self, trial: str, files: Mapping[str, Path], tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> None:
        """See `Tracker`."""
        at = int(time.time() * 1000)
        copied = (dict(files), dict(tags), dict(metrics))
        self._tasks.put(lambda: self._attach(trial, at, *copied))

    def end(self, trial: str, status: str, reason: str | None) -> None:
        """See `Tracker`."""
        at = int(time.time() * 1000)
        self._tasks.put(lambda: self._end(trial, status, reason, at))

    def last_epoch(self, trial: str) -> int:
        return 0

    def run_id(self, trial: str) -> str | None:
        """See `Tracker`."""
        return self._runs.get(trial)

    def close(self) -> None:
        """See `Tracker`."""
        self.begin()
        self._connected.wait()
        if self._failure is not None or not self._thread.is_alive():
            return
        self._tasks.put(self._end_open)
        self._tasks.put(None)
        waiting = self._tasks.qsize()
        if waiting > 20:
            print(f"writing the last {waiting} records to MLflow", flush=True)
        self._closing = True
        self._thread.join()

    # -- the thread ---------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._connect()
        # Database drivers and HTTP clients raise their own kinds; the user sees one line instead.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._failure = RaystarError(
                f"the MLflow store at {_redacted(self.uri)} cannot be used ({reason[:300]}); "
                "start its server or choose another with --tracking-uri"
            )
        self._connected.set()
        if self._failure is not None:
            return
        while (task := self._tasks.get()) is not None:
            self._persist(task)

    def _persist(self, task: Callable[[], None]) -> None:
        """Runs `task` until it works; a server that is away is waited for, since nothing may be lost."""
        attempt = 0
        while not self._given_up:
            try:
                task()
                return
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
                if _is_final(error):
                    print(f"error: MLflow refuses a record: {reason}", file=sys.stderr, flush=True)
                    return
                if attempt == 2:
                    print(f"note: MLflow takes no records now ({reason}); trying again", file=sys.stderr, flush=True)
                if self._closing and attempt >= _LAST_ATTEMPTS:
                    lost = self._tasks.qsize()
                    print(
                        f"error: MLflow is away; {lost} records are not written: {reason}", file=sys.stderr, flush=True
                    )
                    self._given_up = True
                    return
                time.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
                attempt += 1

    def _connect(self) -> None:
        # Telemetry would look for the network; alembic tells of every migration of a new store.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        import mlflow

        for name in ("alembic", "mlflow", "urllib3"):
            logging.getLogger(name).setLevel(logging.ERROR)
        client = mlflow.MlflowClient(tracking_uri=self.uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            local = self.uri.startswith("sqlite:")
            location = self.artifacts.resolve().as_uri() if local else None
            self.experiment_id = client.create_experiment(name, artifact_location=location)
        else:
            if experiment.lifecycle_stage != "active":
                raise ValueError(f"experiment {name} is deleted there; restore it, or set MLFLOW_EXPERIMENT_NAME")
            self.experiment_id = experiment.experiment_id
        metric, lower = self.primary
        client.set_experiment_tag(self.experiment_id, "mlflow.experiment.primaryMetric.name", metric)
        greater = "false" if lower else "true"
        client.set_experiment_tag(self.experiment_id, "mlflow.experiment.primaryMetric.greaterIsBetter", greater)
        client.set_experiment_tag(self.experiment_id, "mlflow.experimentKind", "custom_model_development")
        client.set_experiment_tag(self.experiment_id, f"mlflow.sharedViewState.{_VIEW}", self._view())
        self._client = client

    def _view(self) -> str:
        """A saved view of the UI: every run in one table, best first, with the columns that matter.

        The form is what MLflow 3.17 writes itself; another version ignores what it does not know.
        """
        now = int(time.time() * 1000)
        metric, lower = self.primary
        best = f"metrics.`best/{metric.partition('/')[2]}`"
        shown = [best, f"metrics.`{metric}`", "tags.`raystar.status`", "tags.`raystar.sweep`"]
        state = {
            "orderByKey": best,
            "orderByAsc": lower,
            "runsHiddenMode": "SHOW_ALL",
            "selectedColumns": [*shown, *(f"params.`{column}`" for column in self.columns)],
        }
        return json.dumps({"name": "raystar", "createdAt": now, "updatedAt": now, "state": json.dumps(state)})

    def how_to_compare(self) -> tuple[str, str]:
        """The command that starts the MLflow UI, empty where a server is running, and the address of the trials."""
        page = f"#/experiments/{self.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={_VIEW}"
        if self.uri.startswith("http"):
            return "", f"{_redacted(self.uri).rstrip('/')}/{page}"
        return f"mlflow ui --backend-store-uri {_redacted(self.uri)}", f"http://127.0.0.1:5000/{page}"

    def _start(
        self, trial: str, name: str, began: int, params: dict[str, Any], tags: dict[str, str], text: dict[str, str]
    ) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        if trial not in self._runs:
            every = {**self.common_tags, **tags, "raystar.status": "running"}
            if trial != PARENT and PARENT in self._runs:
                every["mlflow.parentRunId"] = self._runs[PARENT]
            every["mlflow.user"] = _user()
            run = self._client.create_run(self.experiment_id, start_time=began, tags=every, run_name=name)
            self._runs[trial] = run.info.run_id
            self._open.add(trial)
        run_id = self._runs[trial]
        self._client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
        for name, content in text.items():
            self._client.log_text(run_id, content, name)
        source = json.dumps({"uri": self.dataset["source"]})
        dataset = Dataset(self.dataset["name"], self.dataset["digest"], "local", source)
        context = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(run_id, datasets=[DatasetInput(dataset, [context])])

    def _log_metrics(self, trial: str, epoch: int, at: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        first = self.primary[0]  # the UI lists metrics in the order in which they came
        ordered = sorted(values, key=lambda name: name != first)
        self._client.log_batch(self._runs[trial], metrics=[Metric(k, values[k], at, epoch) for k in ordered])

    def _log_image(self, trial: str, epoch: int, at: int, key: str, path: Path) -> None:
        from PIL import Image

        with Image.open(path) as picture:
            picture.load()
            self._client.log_image(
                self._runs[trial], picture, key=key, step=epoch, timestamp=at, synchronous=True
            )  # fmt: skip

    def _attach(
        self, trial: str, at: int, files: dict[str, Path], tags: dict[str, str], metrics: dict[str, float]
    ) -> None:
        from mlflow.entities import Metric, RunTag

        run_id = self._runs[trial]
        for name, path in files.items():
            folder = str(Path(name).parent)
            self._client.log_artifact(run_id, str(path), None if folder == "." else folder)
        values = [Metric(key, value, at, 0) for key, value in metrics.items()]
        self._client.log_batch(run_id, metrics=values, tags=[RunTag(key, value) for key, value in tags.items()])

    def _end(self, trial: str, status: str, reason: str | None, at: int) -> None:
        if trial not in self._open:
            return
        run_id = self._runs[trial]
        self._client.set_tag(run_id, "raystar.status", status)
        if reason is not None:
            self._client.set_tag(run_id, "raystar.reason", reason[:4000])
        self._client.set_terminated(run_id, _ENDED.get(status, "FAILED"), end_time=at)
        self._open.discard(trial)

    def _end_open(self) -> None:
        now = int(time.time() * 1000)
        for trial in sorted(self._open, reverse=True):  # the parent's name sorts first, so it is closed last
            self._end(trial, "interrupted", None, now)


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help: the record itself is wrong, not the way to the server."""
    wrong = isinstance(error, KeyError | ValueError | TypeError | FileNotFoundError)
    return wrong or getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"


def provenance() -> dict[str, str]:
    """Tags that say what ran: raystar's version, the command line's program and the git commit, if there is one."""
    tags = {"raystar.version": __version__, "mlflow.source.name": "raystar", "mlflow.source.type": "LOCAL"}
    package = Path(__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            ["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        tags["mlflow.source.git.commit"] = found.stdout.strip()
    return tags


def _user() -> str:
    import getpass

    with contextlib.suppress(OSError, KeyError, ImportError):
        return getpass.getuser()
    return "unknown"


def _redacted(uri: str) -> str:
    """The URI without a password."""
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return uri.replace(f":{parts.password}@", ":***@")
