"""MLflow's client, quiet and patient."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it would look for the network
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def set_environment() -> None:
    """What MLflow is told by variables. To be called before threads begin: setting one beside a reader can crash."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Its own attempts would create a second run where only the answer was lost; `_persist` looks first.
    if os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES") != "0":
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"


def connect(uri: str) -> Any:
    """MLflow's client for a store, without its chatter; alembic would tell of every migration of a new store."""
    set_environment()
    import mlflow

    for name in ("alembic", "mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")
    return mlflow.MlflowClient(tracking_uri=uri)
