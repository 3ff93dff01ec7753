"""What a store has of an experiment or a run, asked before anything starts; mostly without MLflow, which is slow."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from raystar.base.errors import RaystarError
from raystar.base.secrets import in_a_line, redact
from raystar.tracking.mlflow.address import ask, check_uri, sqlite_file
from raystar.tracking.mlflow.client import connect, experiment_name
from raystar.tracking.spool import known_runs

Standing = Literal["absent", "active", "deleted"]

_QUERIES = {
    "experiment": "SELECT lifecycle_stage FROM experiments WHERE name = ?",
    "run": "SELECT lifecycle_stage FROM runs WHERE run_uuid = ?",
}
_PATHS = {
    "experiment": ("experiments/get-by-name", "experiment_name", ("experiment",)),
    "run": ("runs/get", "run_id", ("run", "info")),
}
_ANSWER_BYTES = 50_000_000  # a run with all its metrics


def check(uri: str, spool: Path) -> None:
    """Refuses a store that nothing can be recorded in, or that has not the runs which are to be continued.

    Raises:
        RaystarError: the address cannot be used, `MLFLOW_EXPERIMENT_NAME` holds no name, the experiment is deleted, or
            the runs of the spool are not there.
    """
    check_uri(uri)
    run_id = next(iter(known_runs(spool).values()), None)
    if run_id is not None:
        if standing(uri, "run", run_id) in ("absent", "deleted"):
            raise no_run(uri, run_id, spool)
    elif standing(uri, "experiment", name := experiment_name()) == "deleted":
        raise RaystarError(
            f"the MLflow store at {redact(uri)}: experiment {name} is deleted there; restore it (mlflow experiments "
            "restore), or choose another with MLFLOW_EXPERIMENT_NAME"
        )


def has_runs(uri: str, runs: Mapping[str, str]) -> bool:
    """Whether a store has the runs of a spool; no runs are in any.

    Raises:
        RaystarError: a database that is no SQLite file cannot be used.
    """
    run_id = next(iter(runs.values()), None)
    return run_id is None or standing(uri, "run", run_id) == "active"


def no_run(uri: str, run_id: str, spool: Path) -> RaystarError:
    """What is said of a run that is not there, or deleted with its experiment."""
    return RaystarError(
        f"the MLflow store at {redact(uri)} has no run {run_id}, which {spool} continues; "
        "name the store that it began in with --tracking-uri, or restore the run there"
    )


def cannot_be_used(uri: str, error: Exception) -> RaystarError:
    """What is said of a store that cannot be opened."""
    return RaystarError(
        f"the MLflow store at {redact(uri)} cannot be used ({in_a_line(error)}); start its server or choose another "
        "with --tracking-uri"
    )


def standing(uri: str, kind: Literal["experiment", "run"], name: str) -> Standing | None:
    """Whether a store has an experiment of that name, or a run of that id; None where only connecting tells.

    Raises:
        RaystarError: a database that is no SQLite file cannot be used.
    """
    file = sqlite_file(uri)
    if file is not None:
        return _of_file(file, kind, name)
    return _of_server(uri, kind, name) if uri.startswith("http") else _of_database(uri, kind, name)


def _of_file(file: Path, kind: str, name: str) -> Standing | None:
    if not file.is_file():
        return "absent"
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(os.fsencode(file))}?mode=ro", uri=True, timeout=1)
        ) as database:
            found = database.execute(_QUERIES[kind], (name,)).fetchone()
    except sqlite3.Error:  # just being made, locked, or of another version: whoever connects waits, or says so
        return None
    return _stage(found[0] if found else None)


def _of_server(uri: str, kind: str, name: str) -> Standing | None:
    path, key, below = _PATHS[kind]
    try:
        status, body = ask(uri, f"api/2.0/mlflow/{path}", {key: name}, most=_ANSWER_BYTES)
        answer: Any = json.loads(body)
        if status == 404 and answer["error_code"] == "RESOURCE_DOES_NOT_EXIST":
            return "absent"
        if status != 200:
            return None
        for part in below:
            answer = answer[part]
        return _stage(answer["lifecycle_stage"])
    except (OSError, ValueError, KeyError, TypeError):  # whoever connects says what is wrong with the server
        return None


def _of_database(uri: str, kind: str, name: str) -> Standing:
    from mlflow.exceptions import MlflowException

    try:
        client = connect(uri)
        if kind == "experiment":
            found = client.get_experiment_by_name(name)
            return _stage(found.lifecycle_stage if found is not None else None)
        return _stage(client.get_run(name).info.lifecycle_stage)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return "absent"
        raise cannot_be_used(uri, error) from None
    except Exception as error:  # database drivers raise their own kinds
        raise cannot_be_used(uri, error) from None


def _stage(found: str | None) -> Standing:
    return "absent" if found is None else "active" if found == "active" else "deleted"
