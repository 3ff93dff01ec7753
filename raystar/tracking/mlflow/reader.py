"""What the store holds: models, and the best run of a sweep."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raystar.base.errors import RaystarError
from raystar.base.files import found_in
from raystar.base.secrets import in_a_line, redact
from raystar.tracking.mlflow import models as registry
from raystar.tracking.mlflow.address import check_uri, sqlite_file
from raystar.tracking.mlflow.client import connect
from raystar.tracking.tracker import CHECKPOINT


@dataclass(frozen=True)
class StoredModel:
    """What a store has of a run's model."""

    export: Path | None
    """An export folder; None where the run has no model."""
    checkpoint: str | None
    """Where the run's checkpoint was, a path or an fsspec URI; only without `export`."""
    facts: dict[str, Any]
    """What the run says of itself: sweep, trial, run_id, params."""


def stored_model(uri: str, run_id: str, folder: Path) -> StoredModel:
    """The model of a run, fetched from its store; a sweep's run stands for its best trial's.

    Args:
        folder: where fetched files are put.

    Raises:
        RaystarError: no such store or run, or a run without a model or checkpoint; it names runs that have a model.
    """
    with _reading(uri):
        client = _existing(uri)
        run = _get_run(client, run_id)
        if run is not None and (best := run.data.tags.get("raystar.best_run")):
            run = _get_run(client, best)
        if run is None:
            raise RaystarError(
                f"--run {run_id}: the MLflow store at {redact(uri)} has no such run; {with_models(uri, run_id)}"
            )
        model = registry.find(client, run.info.run_id)
        if model is not None:
            return StoredModel(registry.fetch(uri, model, folder), None, {})
        place = run.data.tags.get(CHECKPOINT)
        if place is None:
            raise RaystarError(
                f"--run {run_id}: this run has neither a model nor a checkpoint; {with_models(uri, run_id)}"
            )
        tags, params = run.data.tags, run.data.params if "raystar.trial" in run.data.tags else {}
        facts = {"trial": run.info.run_name, "params": dict(params), "run_id": run.info.run_id}
        owner, file = tags.get("raystar.sweep", tags.get("raystar.run")), sqlite_file(uri)
        if owner is not None and file is not None and "://" not in place:
            place = found_in(place, file.parent / owner)  # moved with the store
        return StoredModel(None, place, facts | ({"sweep": tags["raystar.sweep"]} if "raystar.sweep" in tags else {}))


def best_run(uri: str, sweep: str) -> str | None:
    """The run of a sweep's best trial; None where the store, if there is one, does not know it."""
    if (file := sqlite_file(uri)) is not None and not file.is_file():
        return None
    with _reading(uri):
        client = _existing(uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        query = f"tags.`raystar.sweep` = '{sweep}' AND tags.`raystar.best_run` LIKE '%'"
        runs = client.search_runs(experiments, query, order_by=["attributes.start_time DESC"], max_results=1)
        return (runs[0].data.tags["raystar.best_run"] or None) if runs else None


def with_models(uri: str, near: str) -> str:
    """Which runs of a store have a model, in half a sentence; those of the sweep of the run `near` come first."""
    with _reading(uri):
        client = _existing(uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        run = _get_run(client, near)
        sweep = run.data.tags.get("raystar.sweep") if run is not None else None
        models = [model for model in client.search_logged_models(experiments) if registry.EPOCH in model.tags]
        models.sort(key=lambda model: model.tags.get("raystar.sweep") != sweep)
        if not models:
            return "no run there has a model: a sweep's finalists get one when it has finished"
        named = [
            f"{model.source_run_id} ({model.tags.get('raystar.trial')} of {model.tags.get('raystar.sweep')})"
            for model in models[:3]
        ]
        return f"runs with a model: {', '.join(named)}" + (f" and {len(models) - 3} more" if len(models) > 3 else "")


def _existing(uri: str) -> Any:
    """A client of a store that is there: MLflow would make a new one."""
    check_uri(uri, writes=False)
    if (file := sqlite_file(uri)) is not None and not file.is_file():
        raise RaystarError(f"no MLflow store at {redact(uri)}; name it with --tracking-uri")
    return connect(uri)


def _get_run(client: Any, run_id: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


@contextlib.contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Turns what a store raises while it is read into one line."""
    try:
        yield
    except RaystarError:
        raise
    except Exception as error:
        raise RaystarError(f"the MLflow store at {redact(uri)} cannot be read ({in_a_line(error)})") from None
