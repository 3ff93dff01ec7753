"""What a store has of an experiment and of runs is found before anything starts."""

from __future__ import annotations

import http.server
import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raystar import train, tune
from raystar.base.errors import RaystarError
from raystar.base.journal import Journal
from raystar.tracking.mlflow import standing as standing_module
from raystar.tracking.mlflow.client import connect
from raystar.tracking.mlflow.standing import standing
from raystar.tracking.stores import check_uri
from raystar.tracking.tracker import SPOOL
from tests.sweep.test_tune_requests import Files, refusal


@pytest.fixture(autouse=True)
def _by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A store with an experiment `here` and its run, a deleted one `gone` and its run; runs by experiment."""
    folder = tmp_path_factory.mktemp("store")
    client = connect(f"sqlite:///{folder}/mlflow.db")
    ids = {name: client.create_experiment(name, str(folder / "artifacts")) for name in ("here", "gone")}
    runs = {name: client.create_run(ids[name]).info.run_id for name in ids}
    client.delete_experiment(ids["gone"])
    return folder / "mlflow.db", runs


@pytest.fixture
def store(made: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    shutil.copy(made[0], tmp_path)
    return tmp_path / "mlflow.db"


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as MLflow's server does for the store of `made`."""

    runs: dict[str, str]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        name = query.partition("=")[2]
        stages = {"here": "active", "gone": "deleted"}
        if path == "/version":
            self.answer(200, "3.17.2")
        elif path.endswith("experiments/get-by-name") and name in stages:
            self.answer(200, json.dumps({"experiment": {"name": name, "lifecycle_stage": stages[name]}}))
        elif path.endswith("runs/get") and name in self.runs.values():
            stage = "deleted" if name == self.runs["gone"] else "active"
            self.answer(200, json.dumps({"run": {"info": {"run_id": name, "lifecycle_stage": stage}}}))
        elif name == "broken":
            self.answer(500, "<html>")
        else:
            self.answer(404, json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": ""}))

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture(params=["file", "database", "server"])
def uri(
    request: pytest.FixtureRequest, made: tuple[Path, dict[str, str]], store: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    if request.param == "server":
        handler = type("Handler", (Server,), {"runs": made[1]})
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
        return
    if request.param == "database":  # of any kind that MLflow knows
        monkeypatch.setattr(standing_module, "sqlite_file", lambda uri: None)
    yield f"sqlite:///{store}"


def test_every_kind_of_store_tells(uri: str, made: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    _, runs = made
    for kind, names in {"experiment": {"here": "here", "gone": "gone"}, "run": runs}.items():
        assert standing(uri, kind, names["here"]) == "active"  # type: ignore[arg-type]
        assert standing(uri, kind, names["gone"]) == "deleted"  # type: ignore[arg-type]
        assert standing(uri, kind, "0" * 32) == "absent"  # type: ignore[arg-type]
    spool = tmp_path / SPOOL
    check_uri(uri, spool)  # nothing is to be continued: the experiment raystar can be made
    for name, refused in (("here", False), ("gone", True)):
        Journal(tmp_path / "spool.done.jsonl").append({"n": 1, "runs": {"": runs[name]}})
        if refused:
            with pytest.raises(RaystarError, match=f"has no run {runs[name]}, which {spool} continues; name the store"):
                check_uri(uri, spool)
        else:
            check_uri(uri, spool)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone", "experiment gone is deleted there; restore it"),
        ("", "MLFLOW_EXPERIMENT_NAME: expected 1 to 500 characters, found ''; correct or unset it"),
        ("  ", "MLFLOW_EXPERIMENT_NAME: expected 1 to 500 characters"),
        ("x" * 501, "MLFLOW_EXPERIMENT_NAME: expected 1 to 500 characters"),
    ],
)
def test_an_experiment_that_takes_nothing_is_one_line(
    name: str, said: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    with pytest.raises(RaystarError, match=said):
        check_uri(uri, tmp_path / SPOOL)


def test_sweeps_and_runs_are_refused_before_they_start(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = Files(tmp_path)
    at = ["--tracking-uri", f"sqlite:///{store}"]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    for more in ([], ["--dry-run"]):
        assert "experiment gone is deleted" in refusal(tune.main, files.arguments(*at, "--name", "s", *more), capsys)
    run = ["--config", str(files.config), "--out", str(files.out), "--name", "r"]
    assert "experiment gone is deleted" in refusal(train.main, [*run, *at], capsys)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "")
    assert "MLFLOW_EXPERIMENT_NAME: expected" in refusal(tune.main, files.arguments("--name", "s"), capsys)
    assert not (files.out / "s").exists()


def test_what_cannot_be_told_is_left_to_whoever_connects(tmp_path: Path, store: Path) -> None:
    with sqlite3.connect(tmp_path / "odd.db") as database:
        database.execute("create table experiments (experiment_id integer primary key)")
    assert standing(f"sqlite:///{tmp_path}/odd.db", "experiment", "here") is None
    held = sqlite3.connect(store, isolation_level=None)
    held.execute("BEGIN EXCLUSIVE")
    assert standing(f"sqlite:///{store}", "experiment", "here") is None
    held.close()
    assert standing(f"sqlite:///{tmp_path}/new.db", "experiment", "here") == "absent"
    assert not (tmp_path / "new.db").exists()
    assert standing("http://127.0.0.1:9", "run", "x") is None
