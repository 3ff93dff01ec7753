"""MLflow's client, quiet and patient."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from raystar.base.errors import RaystarError, show
from raystar.base.locks import hold
from raystar.tracking.mlflow.address import sqlite_file
from raystar.tracking.mlflow.moved import ARTIFACTS, settle
from raystar.tracking.tracker import DEFAULT_EXPERIMENT

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it would look for the network
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

_LONGEST_NAME = 500  # MLflow's


def set_environment() -> None:
    """Sets the variables that MLflow reads. Call it before threads begin: setting one beside a reader can crash."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Its own attempts would create a second run where only the answer was lost; `_persist` looks first.
    if os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES") != "0":
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"


def connect(uri: str, artifacts: Path | None = None) -> Any:
    """MLflow's client for a store, without its chatter; alembic would tell of every migration of a new store.

    Of several processes that open a new SQLite store, one makes it. One that was moved or copied with its runs folder
    is told so (`moved.settle`).

    Args:
        artifacts: folder of a local store's files, by default beside the store.
    """
    set_environment()
    import mlflow
    from mlflow.tracking._tracking_service import utils

    # It remembers by a run's id where its files lie, which in a copy of the store is elsewhere.
    getattr(utils, "_artifact_repos_cache", {}).clear()
    for name in ("alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # what it logs as an error, with a trace, it raises as well
    warnings.filterwarnings("ignore", module="mlflow")
    file = sqlite_file(uri)
    if file is None or not os.access(file.parent, os.W_OK):
        return mlflow.MlflowClient(tracking_uri=uri)
    with hold(file.with_name(f".{file.name}.lock")):
        client = mlflow.MlflowClient(tracking_uri=uri)
        settle(file, artifacts or file.parent / ARTIFACTS)
        return client


def experiment_name() -> str:
    """The name of raystar's experiment.

    Raises:
        RaystarError: `MLFLOW_EXPERIMENT_NAME` is set to what cannot be one.
    """
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT)
    if not name.strip() or len(name) > _LONGEST_NAME:
        raise RaystarError(
            f"MLFLOW_EXPERIMENT_NAME: expected 1 to {_LONGEST_NAME} characters, found {show(name)}; correct or unset it"
        )
    return name


def experiment(client: Any, uri: str, artifacts: Path) -> str:
    """The id of raystar's experiment (`MLFLOW_EXPERIMENT_NAME`), which is made if it is not there.

    Args:
        artifacts: folder of a new local experiment's artifacts.

    Raises:
        RaystarError: `MLFLOW_EXPERIMENT_NAME` holds no name.
        ValueError: it is deleted there.
    """
    from mlflow.exceptions import MlflowException

    name = experiment_name()
    existing = client.get_experiment_by_name(name)
    if existing is None:
        location = artifacts.resolve().as_uri() if uri.startswith("sqlite") else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            existing = client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or existing is None:  # else another sweep was first
                raise
    if existing.lifecycle_stage != "active":
        raise ValueError(f"experiment {name} is deleted there; restore it, or set MLFLOW_EXPERIMENT_NAME")
    return str(existing.experiment_id)
