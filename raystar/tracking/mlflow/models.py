"""Trained models in an MLflow store: saved with a signature, logged to their runs, registered, and fetched again.

A model is an export folder and three lines of code that name `raystar.pyfunc`: nothing is pickled, and what loads it
needs raystar but not Ray. Every function takes an MLflow client, and may be called twice without a trace.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from raystar import __version__
from raystar.base.errors import RaystarError
from raystar.tracking.mlflow.address import sqlite_file

CHAMPION = "champion"
"""Alias of the registered model's version that is to be used."""

EXPORT = "model"
"""Name of the export folder among a model's artifacts."""

EPOCH, MARK = "raystar.epoch", "raystar.record"
"""Tags: the epoch whose weights a model has, and the record that asked for it."""

_SCORE, _KEY, _METRIC = "raystar.score", "raystar.comparable", "raystar.metric"
_CODE = (
    "# Code of the model: a picture or a latent and a domain in, a picture out. See raystar.pyfunc.\n"
    "from mlflow.models import set_model\n\nfrom raystar.pyfunc import StyleModel\n\nset_model(StyleModel())\n"
)


def model_name(experiment: str, dataset: str) -> str:
    """Name of the registered model of everything that an experiment trains on a dataset: `raystar-latents`."""
    return re.sub(r"[^\w.]+", "-", f"{experiment}-{dataset.rpartition(':')[2]}").strip("-.")


def save(folder: Path, export: Path, **identity: Any) -> None:
    """Writes an MLflow model into `folder`, which is not there yet.

    Args:
        export: an export folder.
        identity: `model_id` and `run_id` that the model is to know of itself.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    text, latent = DataType.string, Array(Array(Array(DataType.double)))
    signature = ModelSignature(
        inputs=Schema([
            ColSpec(text, "picture", required=False),
            ColSpec(latent, "latent", required=False),
            ColSpec(text, "domain"),
            ColSpec(text, "reference", required=False),
            ColSpec(latent, "reference_latent", required=False),
        ]),
        outputs=Schema([ColSpec(text, "picture"), ColSpec(latent, "latent", required=False)]),
        params=ParamSchema([ParamSpec("seed", DataType.long, 0), ParamSpec("latents", DataType.boolean, False)]),
    )  # fmt: skip
    needed = [f"raystar=={__version__}"]
    # A build's own mark ("+cpu") is on no index.
    needed += [f"{name}=={version(name).partition('+')[0]}" for name in ("mlflow", "torch", "numpy", "pillow")]
    with tempfile.TemporaryDirectory() as scratch:
        code = Path(scratch) / "raystar_model.py"
        code.write_text(_CODE, encoding="utf-8")
        save_model(
            path=str(folder),
            python_model=str(code),
            artifacts={"export": export.resolve().as_uri()},  # of a path, MLflow would take %20 for a space
            signature=signature,
            pip_requirements=needed,
            model_config={"vae": None},
            mlflow_model=Model(model_uuid=identity.get("model_id"), **identity),
        )


def log(
    client: Any,
    run_id: str,
    export: Path,
    *,
    mark: str,
    name: str,
    epoch: int,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> str:
    """Logs an export as a model of a run, with the run's metrics of that epoch; returns the model's id.

    Args:
        mark: of the record that asks for it: what an attempt before this one has made is found by it.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    logged = client.search_logged_models([experiment], f"tags.`{MARK}` = '{mark}'", max_results=1)
    if logged and logged[0].status == "READY":
        return str(logged[0].model_id)
    model = logged[0] if logged else client.create_logged_model(
        experiment, name, run_id, {**tags, EPOCH: str(epoch), MARK: mark}, dict(params), "style translation"
    )  # fmt: skip
    model_id = str(model.model_id)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "saved"
        save(folder, export, model_id=model_id, run_id=run_id)
        client.log_model_artifacts(model_id, str(folder))
    histories = (client.get_metric_history(run_id, key) for key in run.data.metrics if key.startswith("eval/"))
    metrics = [
        Metric(metric.key, metric.value, metric.timestamp, metric.step, model_id=model_id)
        for history in histories
        for metric in history
        if metric.step == epoch
    ]
    known = {metric.key for metric in model.metrics or []}
    client.log_batch(run_id, metrics=[metric for metric in metrics if metric.key not in known])
    outputs = run.outputs.model_outputs if run.outputs else []
    if model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, epoch)])
    client.finalize_logged_model(model_id, "READY")
    return model_id


def find(client: Any, run_id: str, epoch: int | None = None) -> Any | None:
    """The model that was logged to a run, the latest where there are several; None if there is none."""
    experiment = client.get_run(run_id).info.experiment_id
    query = f"source_run_id = '{run_id}'" + (f" AND tags.`{EPOCH}` = '{epoch}'" if epoch is not None else "")
    order = [{"field_name": "creation_timestamp", "ascending": False}]
    models = client.search_logged_models([experiment], query, order_by=order)
    return next((model for model in models if model.status == "READY"), None)


def register(
    client: Any,
    run_id: str,
    *,
    name: str,
    epoch: int,
    description: str,
    metric: str,
    lower: bool,
    score: float,
    comparable: str,
) -> str:
    """Registers the model of a run and epoch, and makes it the champion if it is better than the one there is.

    Scores of the same data, ruler and metric (`comparable`) can be compared across sweeps, and there the better one
    is champion. Where they cannot, the newer one is: what it was trained on is what there is now.

    Returns:
        What was done, in a line.

    Raises:
        RaystarError: the run has no model of that epoch.
    """
    model = find(client, run_id, epoch)
    if model is None:
        raise RaystarError(f"run {run_id} has no model of epoch {epoch} to register")
    _make_registered_model(client, name)
    versions = client.search_model_versions(f"name = '{name}'")
    registered = next((v for v in versions if v.run_id == run_id and v.tags.get(EPOCH) == str(epoch)), None)
    if registered is None:
        tags = {EPOCH: str(epoch), _SCORE: repr(score), _KEY: comparable, _METRIC: metric}
        # Not models:/ID, which MLflow would look up in its process's own store instead of the client's.
        place = model.artifact_location
        registered = client.create_model_version(name, place, run_id, tags, None, description, model_id=model.model_id)
    number = str(registered.version)
    known = client.get_registered_model(name).aliases
    holder = next((v for v in versions if str(v.version) == str(known.get(CHAMPION))), None)
    if holder is not None and str(holder.version) == number:
        return f"models:/{name}@{CHAMPION} (version {number})"
    why = ""
    if holder is not None and holder.tags.get(_KEY) == comparable:
        theirs = float(holder.tags[_SCORE])
        if not (score < theirs if lower else score > theirs):
            stays = f"stays version {holder.version}, {metric.rpartition('/')[2]} {theirs:.4f}"
            return f"models:/{name}/{number}; models:/{name}@{CHAMPION} {stays}"
        why = f"; version {holder.version} was, {theirs:.4f}"
    elif holder is not None:
        why = f"; version {holder.version} was, on other data or by another measure"
    client.set_registered_model_alias(name, CHAMPION, number)
    return f"models:/{name}@{CHAMPION} (version {number}{why})"


def _make_registered_model(client: Any, name: str) -> None:
    """Makes it, unless it is there."""
    from mlflow.exceptions import MlflowException

    meaning = "Made by raystar sweeps; the alias champion is the best that they found."
    try:
        client.create_registered_model(name, description=meaning)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def fetch(uri: str, model: Any, folder: Path) -> Path:
    """Brings a logged model's export folder into `folder`; returns where it lies.

    Raises:
        RaystarError: its files are gone.
    """
    from mlflow.artifacts import download_artifacts

    place = f"{model.artifact_location.rstrip('/')}/artifacts"
    if place.startswith("file:"):
        files = _moved(Path(unquote(place.removeprefix("file://"))), uri)
        if not (files / EXPORT).is_dir():
            raise RaystarError(f"{files}: expected the files of model {model.model_id}, found none")
        place = files.resolve().as_uri()
    return Path(download_artifacts(artifact_uri=f"{place}/{EXPORT}", dst_path=str(folder), tracking_uri=uri))


def _moved(place: Path, uri: str) -> Path:
    """Where a local store's file lies now: a store that was moved as a whole still names the old folder."""
    file = sqlite_file(uri)
    if place.exists() or file is None:
        return place
    _, _, below = str(place).rpartition("/artifacts/models/")
    return file.parent / "artifacts/models" / below
