"""Records as MLflow has them: experiment > parent run (sweep) > child runs (trials)."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raystar.base.errors import RaystarError
from raystar.base.secrets import in_a_line, redact
from raystar.tracking.files import local_file
from raystar.tracking.mlflow import models as registry
from raystar.tracking.mlflow.client import connect, experiment, set_environment
from raystar.tracking.mlflow.moved import check_place
from raystar.tracking.mlflow.standing import no_run
from raystar.tracking.mlflow.views import PICTURED_RUNS, RANK, SHOWN, VIEW, grids_state, saved_view, table_state
from raystar.tracking.relay import Busy, Declined, Delivery, Refused, Unreadable, without_credentials
from raystar.tracking.spool import Record, Spool, TrialProgress
from raystar.tracking.tracker import PARENT, user

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


class MlflowStore:
    """MLflow, as `Relay` writes to it.

    Args:
        uri: the tracking URI.
        artifacts: folder of a new local experiment's artifacts.
        dataset: `{"name", "digest", "source"}` shown as every run's dataset.
        common_tags: set on every run.
        primary_metric: what the table of runs is sorted by, lower first if `lower_is_better`.
        columns: parameters that the table of runs shows.
    """

    name = "MLflow"
    most_featured = PICTURED_RUNS

    def __init__(
        self,
        uri: str,
        artifacts: Path,
        dataset: Mapping[str, str],
        common_tags: Mapping[str, str],
        primary_metric: str,
        lower_is_better: bool,
        columns: Sequence[str] = (),
    ) -> None:
        set_environment()
        self.uri = uri
        self.place = redact(uri)
        self.artifacts = artifacts
        self.dataset = dict(dataset)
        self.common_tags = dict(common_tags)
        self.primary = (primary_metric, lower_is_better)
        self.columns = list(columns)
        self.experiment_id: str | None = None
        self.registered: str | None = None
        self.client: Any = None
        self._spool: Spool
        self._delivery: Delivery
        self._pictures: tuple[str, list[str]] = ("", [])  # of a run, while it is uncertain which it has

    def steps(self, delivery: Delivery) -> Iterator[Callable[[], None]]:
        """See `Store`."""
        self._delivery, record = delivery, delivery.record
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

    def refuses(self, error: Exception) -> bool:
        """See `Store`."""
        return getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"

    def connect(self, spool: Spool) -> None:
        """See `Store`."""
        self._spool = spool
        try:
            self._connect()
        except Exception as error:  # of SQLAlchemy's or MLflow's, by way of which it came
            if self.uri.startswith("sqlite") and "database is locked" in str(error):
                raise Busy("another process has locked it") from None
            raise

    def _connect(self) -> None:
        client = connect(self.uri, self.artifacts)
        self.experiment_id = self._known_experiment(client) or experiment(client, self.uri, self.artifacts)
        check_place(self.uri, client.get_experiment(self.experiment_id))
        metric, lower = self.primary
        client.set_experiment_tag(self.experiment_id, "mlflow.experiment.primaryMetric.name", metric)
        greater = "false" if lower else "true"
        client.set_experiment_tag(self.experiment_id, "mlflow.experiment.primaryMetric.greaterIsBetter", greater)
        client.set_experiment_tag(self.experiment_id, "mlflow.experimentKind", "custom_model_development")
        self._save_view(client)
        self.client = client

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
                raise no_run(self.uri, run_id, self._spool.path)
            return run.info.experiment_id
        return None

    def _save_view(self, client: Any) -> None:
        client.set_experiment_tag(self.experiment_id, f"mlflow.sharedViewState.{VIEW}", self._view())

    def _view(self) -> str:
        """A saved view of every run."""
        pictures = [progress.pictured for progress in self._spool.trials.values() if progress.pictured]
        return saved_view(VIEW, table_state(self.primary, self.columns, min(pictures, default=0)))

    @property
    def _view_name(self) -> str:
        return f"{VIEW}-{self.common_tags.get('raystar.sweep', 'run')}"

    def _save_grids_view(self, epoch: int) -> None:
        """A saved view of nothing but the featured runs, at one epoch."""
        view = saved_view(self._view_name, grids_state(self.primary, self.columns, self._view_name, epoch))
        self.client.set_experiment_tag(self.experiment_id, f"mlflow.sharedViewState.{self._view_name}", view)

    def marks(
        self, featured: Sequence[str], trials: Mapping[str, TrialProgress]
    ) -> Iterable[tuple[str, dict[str, str], dict[str, float]]]:
        """See `Store`."""
        for trial, progress in trials.items():
            if trial not in featured and RANK in progress.final:  # it was among them, before the sweep was made longer
                yield trial, {SHOWN: ""}, {}
        for rank, trial in enumerate(featured, start=1):
            yield trial, {SHOWN: self._view_name}, {RANK: float(rank)}

    def grids_address(self) -> str:
        """See `Tracker`."""
        return f"{self._page(self._view_name)}&compareRunsMode=CHART"

    def _page(self, view: str) -> str:
        server = redact(self.uri).rstrip("/") if self.uri.startswith("http") else "http://127.0.0.1:5000"
        if self.experiment_id is None:  # the store was locked all the time
            return f"{server}/#/experiments"
        page = f"#/experiments/{self.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={view}"
        return f"{server}/{page}"

    def how_to_compare(self) -> tuple[str, str]:
        """See `Tracker`."""
        words = ["mlflow", "ui", "--backend-store-uri", redact(self.uri)]
        return "" if self.uri.startswith("http") else shlex.join(words), self._page(VIEW)

    def _run(self, trial: str) -> str:
        if trial not in self._spool.runs:
            raise Refused(f"it belongs to {trial or 'a parent'}, which has no run")
        return self._spool.runs[trial]

    def _start(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        trial = record["trial"]
        run_id = self._delivery.run or self._created(record["mark"])
        if run_id is None:
            tags = {**without_credentials(self.common_tags), **record["tags"]}
            tags |= {"raystar.status": "running", _MARK: record["mark"], "mlflow.user": user()}
            if trial != PARENT and PARENT in self._spool.runs:
                tags["mlflow.parentRunId"] = self._spool.runs[PARENT]
            run = self.client.create_run(
                self.experiment_id, start_time=record["at"], tags=tags, run_name=record["name"]
            )  # fmt: skip
            run_id = run.info.run_id
        self._delivery.run = run_id
        params = [Param(key, value) for key, value in record["params"].items()]
        self.client.log_batch(run_id, params=params)
        for name, content in record["text"].items():
            self.client.log_text(run_id, content, name)
        source = json.dumps({"uri": redact(self.dataset["source"])})
        dataset = Dataset(self.dataset["name"], self.dataset["digest"], "local", source)
        context = InputTag("mlflow.data.context", "training")
        self.client.log_inputs(run_id, datasets=[DatasetInput(dataset, [context])])

    def _created(self, mark: str) -> str | None:
        """The run that an earlier attempt has created, if there was one."""
        if not self._delivery.uncertain:
            return None
        runs = self.client.search_runs([self.experiment_id], f"tags.`{_MARK}` = '{mark}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def _reopen(self, trial: str) -> None:
        from mlflow.exceptions import MlflowException

        run_id = self._run(trial)
        self.client.update_run(run_id, status="RUNNING")  # it keeps the time of its end until it ends again
        self.client.set_tag(run_id, "raystar.status", "running")
        try:
            self.client.delete_tag(run_id, "raystar.reason")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def _log_metrics(self, trial: str, epoch: int, at: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        first = self.primary[0]  # the UI lists metrics in the order in which they came
        ordered = sorted(values, key=lambda name: name != first)
        # MLflow drops what it has already: same key, step, time and value.
        self.client.log_batch(self._run(trial), metrics=[Metric(k, values[k], at, epoch) for k in ordered])

    def _log_image(self, trial: str, epoch: int, at: int, key: str, place: str) -> None:
        from PIL import Image

        run_id = self._run(trial)
        with local_file(place) as path:
            try:
                with Image.open(path) as picture:
                    picture.load()
            except (OSError, SyntaxError, ValueError) as error:
                raise Unreadable(f"{redact(place)} is no picture ({in_a_line(error)})") from None
        name = self._image_name(run_id, key, epoch)
        if name is None:
            self.client.log_image(run_id, picture, key=key, step=epoch, timestamp=at, synchronous=True)
            return
        # An earlier attempt got so far; MLflow would choose another name and show both.
        from mlflow.tracking.multimedia import compress_image_size
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES

        with tempfile.TemporaryDirectory() as folder:
            for suffix, image in ((".png", picture), ("+compressed.webp", compress_image_size(picture))):
                image.save(Path(folder) / f"{name}{suffix}")
                self.client.log_artifact(run_id, str(Path(folder) / f"{name}{suffix}"), "images")
        self.client.set_tag(run_id, MLFLOW_LOGGED_IMAGES, True)

    def _image_name(self, run_id: str, key: str, epoch: int) -> str | None:
        """The name, without its suffix, that MLflow gave a picture in an earlier attempt."""
        if not self._delivery.uncertain:
            return None
        if self._delivery.attempt or self._pictures[0] != run_id:  # records of earlier processes ask once a run
            files = self.client.list_artifacts(run_id, "images")
            self._pictures = (run_id, [Path(file.path).name for file in files])
        name = re.compile(rf"({re.escape(key.replace('/', '~'))}\+step\+{epoch}\+.*?)(\+compressed)?\.\w+")
        return min((match[1] for match in map(name.fullmatch, self._pictures[1]) if match), default=None)

    def _attach_file(self, trial: str, name: str, place: str) -> None:
        folder = str(Path(name).parent)
        with local_file(place, Path(name).name) as path:
            self.client.log_artifact(self._run(trial), str(path), None if folder == "." else folder)

    def _attach(self, trial: str, at: int, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric, RunTag

        values = [Metric(key, value, at, 0) for key, value in metrics.items()]
        self.client.log_batch(
            self._run(trial), metrics=values, tags=[RunTag(key, value) for key, value in tags.items()]
        )  # fmt: skip

    def _log_model(self, record: Record) -> None:
        export = Path(record["export"])
        if not export.is_dir():
            raise Refused(f"{export}: no such folder")
        with _unless_declined("takes no models"):
            registry.log(
                self.client, self._run(record["trial"]), export, mark=record["mark"],
                name=re.sub(r"[^\w-]", "-", f"{self.common_tags.get('raystar.sweep', 'model')}-{record['trial']}"),
                epoch=record["epoch"], params=record["params"], tags=record["tags"],
            )  # fmt: skip

    def _register(self, record: Record) -> None:
        metric, lower = self.primary
        name = registry.model_name(self.client.get_experiment(self.experiment_id).name, self.dataset["name"])
        with _unless_declined("does not register models"):
            self.registered = registry.register(
                self.client, self._run(record["trial"]), name=name, epoch=record["epoch"],
                description=record["description"], metric=metric, lower=lower, score=record["score"],
                comparable=record["comparable"],
            )  # fmt: skip

    def _end(self, trial: str, status: str, reason: str | None, at: int) -> None:
        run_id = self._run(trial)
        self.client.set_tag(run_id, "raystar.status", status)
        if reason is not None:
            self.client.set_tag(run_id, "raystar.reason", reason[:4000])
        self.client.set_terminated(run_id, _ENDED.get(status, "FAILED"), end_time=at)
        if trial == PARENT:
            self._save_view(self.client)


@contextlib.contextmanager
def _unless_declined(what: str) -> Iterator[None]:
    """Models are an extra: a server that is too old for them, or does not let us, costs them and nothing else."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RaystarError) or getattr(error, "error_code", "") in _DECLINES:
            raise Declined(f"MLflow {what} ({in_a_line(error)})") from None
        raise
