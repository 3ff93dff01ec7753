"""Which store a tracking URI names. MLflow's is the only kind there is; another one is chosen here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from raystar.tracking.mlflow import standing as mlflow_store
from raystar.tracking.mlflow.writer import MlflowStore
from raystar.tracking.relay import Relay, Store


def check_uri(uri: str, spool: Path) -> None:
    """Refuses a store that cannot be used, before anything starts.

    Args:
        spool: the file in which records wait, if it is there yet.

    Raises:
        RaystarError: what is wrong with the address, with the experiment or with the runs that are to be continued, and
            what to do.
    """
    mlflow_store.check(uri, spool)


def open_tracker(
    uri: str,
    spool: Path,
    *,
    artifacts: Path,
    dataset: Mapping[str, str],
    tags: Mapping[str, str],
    metric: str,
    lower_is_better: bool = True,
    columns: Sequence[str] = (),
) -> Relay:
    """A tracker that writes to the store at `uri`.

    Args:
        spool: the file in which records wait.
        artifacts: folder for the files of a store on this machine.
        dataset: `{"name", "digest", "source"}` of what is trained on.
        tags: set on every run.
        metric: what runs are sorted by.
        columns: parameters that a table of runs shows.
    """
    store: Store = MlflowStore(uri, artifacts, dataset, tags, metric, lower_is_better, columns)
    return Relay(store, spool)
