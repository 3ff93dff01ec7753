"""The MLflow tracker on a real store: order, interruptions, and what it refuses."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import random
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raystar.base.errors import RaystarError
from raystar.base.journal import Journal
from raystar.base.locks import hold
from raystar.tracking import relay
from raystar.tracking.mlflow import client as client_module
from raystar.tracking.mlflow.address import check_uri, sqlite_file, sqlite_uri
from raystar.tracking.mlflow.writer import MlflowStore
from raystar.tracking.relay import Relay
from raystar.tracking.spool import Spool
from raystar.tracking.tracker import PARENT
from tests.kit.support import ROOT


class Flaky:
    """A client whose server is away for its next `missing` calls."""

    def __init__(self, client: Any, missing: int) -> None:
        self.client = client
        self.missing = missing

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.missing:
                self.missing -= 1
                raise ConnectionError("nobody there")
            return real(*args, **kwargs)

        return call


class Mute(Flaky):
    """A client whose server does what it is asked, but `missing` percent of the answers are lost."""

    def __init__(self, client: Any, missing: int) -> None:
        super().__init__(client, missing)
        self.lost: list[str] = []
        self.dice = random.Random(3)

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = real(*args, **kwargs)
            if self.dice.random() * 100 < self.missing:
                self.lost.append(name)
                raise ConnectionError("no answer")
            return answer

        return call


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh SQLite store: MLflow takes a second to make one."""
    folder = tmp_path_factory.mktemp("store")
    made = opened(folder)
    made.close()
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_RETRY_S", (0.01,))
    monkeypatch.setenv("RAYSTAR_LAST_RECORDS_TIMEOUT_S", "0.5")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path) -> Path:
    copy_store(empty_store, tmp_path)
    return tmp_path


def copy_store(store: Path, folder: Path) -> None:
    (folder / "mlflow.db").write_bytes(store.read_bytes())
    with sqlite3.connect(folder / "mlflow.db") as database:
        place = (folder / "artifacts").as_uri()
        database.execute("update experiments set artifact_location = ? where name = 'raystar'", (place,))


@pytest.fixture
def tracker(folder: Path) -> Relay:
    return opened(folder)


def opened(folder: Path, uri: str | None = None, **changed: Any) -> Relay:
    """A tracker on the store and the spool in `folder`."""
    dataset = {"name": "d", "digest": "abc", "source": "here"}
    spool = changed.pop("spool", folder / "spool.jsonl")
    arguments: dict[str, Any] = {"common_tags": {"raystar.sweep": "s"}} | changed
    store = MlflowStore(
        uri or sqlite_uri(folder / "mlflow.db"), folder / "artifacts", dataset,
        primary_metric="eval/score", lower_is_better=True, **arguments,
    )  # fmt: skip
    made = Relay(store, spool)
    made.begin()
    made.wait_until_connected()
    return made


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    return sqlite3.connect(folder / "mlflow.db").execute(query).fetchall()


def record(tracker: Relay, folder: Path) -> None:
    """A parent, a trial with two epochs and a picture, and a trial that nobody ends."""
    picture = folder / "grid.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(picture)
    tracker.start(PARENT, params={}, tags={}, text={}, name="s")
    for trial in ("t00", "t01"):
        tracker.start(trial, params={"loss.w_cyc": 1.5}, tags={"raystar.trial": trial}, text={"config.yaml": "a: 1"})
    tracker.log("t00", 1, {"train/g_loss": 3.0, "eval/score": 2.0}, {"grid_ref": picture})
    tracker.log("t00", 2, {"train/g_loss": 2.0, "eval/score": 1.5}, {})
    tracker.end("t00", "diverged", "a loss became NaN")


def test_a_server_that_is_away_for_a_while_loses_nothing(tracker: Relay, tmp_path: Path) -> None:
    tracker.store.client = Flaky(tracker.store.client, missing=6)
    record(tracker, tmp_path)
    tracker.close()
    assert rows(tmp_path, "select step, value from metrics where key = 'eval/score' order by step") == [
        (1, 2.0),
        (2, 1.5),
    ]
    names = dict(rows(tmp_path, "select name, status from runs"))
    assert names == {"s": "KILLED", "t00": "FAILED", "t01": "KILLED"}  # nothing is left RUNNING
    assert ("raystar.reason", "a loss became NaN") in rows(tmp_path, "select key, value from tags")
    pictures = list((tmp_path / "artifacts").rglob("grid_ref*.png"))
    assert len(pictures) == 1
    assert {value for (value,) in rows(tmp_path, "select value from tags where key = 'mlflow.parentRunId'")} == {
        tracker.run_id(PARENT)
    }


def test_a_record_that_mlflow_refuses_is_told_and_holds_up_nothing(
    tracker: Relay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker.start(PARENT, params={}, tags={}, text={}, name="s")
    tracker.log(PARENT, 1, {"not a key!": 1.0}, {"grid_ref": tmp_path / "gone.png"})
    tracker.log(PARENT, 2, {"eval/score": 1.0}, {})
    tracker.close()
    assert rows(tmp_path, "select step, value from metrics") == [(2, 1.0)]
    assert capsys.readouterr().err.count("error: MLflow refuses a record") == 2


def test_the_experiment_opens_on_the_metric_that_is_searched(tracker: Relay, tmp_path: Path) -> None:
    record(tracker, tmp_path)
    tracker.start("t02", params={}, tags={}, text={})
    for epoch in (1, 2, 3):  # t00 has been drawn after its first epoch only: there, all can be compared
        tracker.log("t02", epoch, {"eval/score": 2.0}, {"grid_ref": tmp_path / "grid.png"})
    tracker.end(PARENT, "finished", None)
    tracker.close()
    tags = dict(rows(tmp_path, "select key, value from experiment_tags"))
    assert tags["mlflow.experiment.primaryMetric.name"] == "eval/score"
    state = json.loads(json.loads(tags["mlflow.sharedViewState.raystar"])["state"])
    assert state["orderByKey"] == "metrics.`final/score`"
    assert [(chart["imageKeys"], chart["step"]) for chart in state["compareRunCharts"]] == [
        (["grid_ref"], 1), (["grid_noise"], 1),
    ]  # fmt: skip
    command, address = tracker.how_to_compare()
    assert command == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    assert f"#/experiments/{tracker.store.experiment_id}/runs?" in address


def test_the_best_runs_have_a_view_of_their_pictures(tracker: Relay, tmp_path: Path) -> None:
    """The order in which the store gives them is the reverse of that in which MLflow's charts draw them."""
    record(tracker, tmp_path)
    for name, epochs in (("t02", 3), ("t03", 4), ("t04", 0)):
        tracker.start(name, params={}, tags={}, text={})
        for epoch in range(1, epochs + 1):
            tracker.log(name, epoch, {"eval/score": 2.0}, {"grid_ref": tmp_path / "grid.png"})
    assert tracker.grids_address() is None
    tracker.feature(["t03", "t00", "t04"])
    tracker.feature(["t03", "t02", "t04"])  # t04 has no pictures, and t00 is among the best no more
    tracker.close()
    address = tracker.grids_address()
    assert address is not None
    key = re.search(r"viewStateShareKey=([^&]+)&compareRunsMode=CHART", address)[1]  # type: ignore[index]
    tags = dict(rows(tmp_path, "select key, value from experiment_tags"))
    state = json.loads(json.loads(tags[f"mlflow.sharedViewState.{key}"])["state"])
    assert [chart["step"] for chart in state["compareRunCharts"]] == [3, 3]  # where both have pictures
    client = client_module.connect(f"sqlite:///{tmp_path}/mlflow.db")
    order = f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"
    found = client.search_runs([tracker.store.experiment_id], state["searchFilter"], order_by=[order])
    assert [run.info.run_name for run in found] == ["t02", "t03"]


@pytest.mark.parametrize(
    "name", ["what?runs", "50%25", "100%", "my runs", "#1", "Müller's", "a;b&c=d", "a\\b", "sqlite:", "a?uri=true"]
)
def test_a_store_lies_where_it_is_asked_for(name: str, tmp_path: Path, empty_store: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    copy_store(empty_store, folder)
    tracker = opened(folder)
    record(tracker, folder)
    tracker.close()
    command, _ = tracker.how_to_compare()
    assert command.isprintable()
    assert shlex.split(command)[:3] == ["mlflow", "ui", "--backend-store-uri"]
    (uri,) = shlex.split(command)[3:]
    assert sqlite_file(uri) == folder / "mlflow.db"
    assert client_module.connect(uri).get_run(str(tracker.run_id("t00"))).data.tags["raystar.sweep"] == "s"
    assert rows(folder, "select count(*) from runs") == [(3,)]
    assert list((folder / "artifacts").rglob("grid_ref*.png"))
    assert list(tmp_path.iterdir()) == [folder]


def test_stores_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database")
    for uri, words in {
        f"sqlite:///{tmp_path}/text.db": "another kind of file",
        f"sqlite:///{tmp_path}": "found a folder",
        f"sqlite:///{tmp_path}/text.db/deeper/mlflow.db": "cannot be made",
        str(tmp_path): "expected sqlite",
        "http://user:secret@127.0.0.1:9": "nothing answers",
    }.items():
        with pytest.raises(RaystarError, match=words) as caught:
            check_uri(uri)
        assert "secret" not in str(caught.value)


# -- others at the same store ----------------------------------------------------------------------

FIRST = """
import sys, time
from pathlib import Path
from tests.tracking.test_tracking import opened

folder, name, at = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
import mlflow
time.sleep(max(0, at - time.time()))
tracker = opened(folder, spool=folder / f"{name}.jsonl")
tracker.start("", params={}, tags={}, text={}, name=name)
tracker.close()
"""


def test_one_makes_a_store_and_others_wait_for_it(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    opening = threading.Thread(target=client_module.connect, args=(uri,))
    with hold(tmp_path / ".mlflow.db.lock"):
        opening.start()
        opening.join(timeout=1)
        assert opening.is_alive()
        assert not (tmp_path / "mlflow.db").exists()
    opening.join(timeout=60)
    assert (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_several_make_a_store_at_once(tmp_path: Path) -> None:
    at = str(time.time() + 8)  # when all have imported MLflow
    names = ("a", "b", "c")
    making = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST, str(tmp_path), name, at], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for name in names
    ]
    assert [process.communicate(timeout=120)[1] for process in making] == ["", "", ""]
    assert sorted(rows(tmp_path, "select name, status from runs")) == [(name, "KILLED") for name in names]
    assert rows(tmp_path, "select count(*) from experiments where name = 'raystar'") == [(1,)]


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps a store locked, as a backup or another program may."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has MLflow find out soon that a store is locked."""
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3.dbapi2, "connect", lambda *args, **kwargs: connect(*args, **kwargs, timeout=0.2))


@pytest.mark.usefixtures("impatient")
def test_a_store_that_is_locked_at_the_start_is_waited_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(folder):
        tracker = opened(folder)  # it returns: a sweep goes on meanwhile
        record(tracker, folder)
        told = capsys.readouterr().err.splitlines()
        assert told == [
            f"note: MLflow takes no records yet (another process has locked it); they wait in {folder}/spool.jsonl"
        ]
        assert tracker.waiting == 6
        assert tracker.how_to_compare()[1].endswith("/#/experiments")
    tracker.close()
    assert not tracker.waiting
    assert capsys.readouterr().err == "note: MLflow takes records now\n"
    assert len(content(folder)["runs"]) == 3
    with held(folder):
        opened(folder).close()
    assert "are not lost" not in capsys.readouterr().err  # nothing waits


@pytest.mark.usefixtures("impatient")
def test_a_store_that_stays_locked_loses_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(folder):
        tracker = opened(folder)
        record(tracker, folder)
        tracker.close()
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(
        f"error: MLflow is away (another process has locked it); 8 records wait in {folder}/spool.jsonl and are not "
        "lost: python -m raystar.tune --resume s"
    )
    assert len(told) == 2
    opened(folder).close()
    assert len(content(folder)["runs"]) == 3


@pytest.mark.slow
def test_a_store_that_is_locked_in_mid_run_leaves_no_trace(
    folder: Path, tracker: Relay, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "_TOLD", 0)
    record(tracker, folder)
    with held(folder):
        tracker.log("t00", 3, {"train/g_loss": 3.0}, {})
        time.sleep(25)  # MLflow itself waits for 20 s
    tracker.close()
    told = capfd.readouterr().err.splitlines()
    assert [line for line in told if "takes no records now" in line]
    assert all(line.startswith(("note: MLflow takes", "writing the last")) for line in told), told
    assert (3,) in rows(folder, "select step from metrics where key = 'train/g_loss'")


# -- nothing lost, nothing twice ------------------------------------------------------------------


def content(folder: Path) -> dict[str, Any]:
    """All that a user sees in a store, with names for run ids; images by name without MLflow's random part."""
    names = dict(rows(folder, "select run_uuid, name from runs"))
    found: dict[str, Any] = {
        "runs": rows(folder, "select name, status, start_time, end_time from runs order by start_time, name"),
        "metrics": rows(
            folder,
            "select name, key, step, value, timestamp from metrics join runs using (run_uuid) order by 1, 2, 3, 5",
        ),
        "params": rows(folder, "select name, key, value from params join runs using (run_uuid) order by 1, 2"),
        "tags": [
            (*row, names.get(value, value))
            for *row, value in rows(
                folder, "select name, key, value from tags join runs using (run_uuid) order by 1, 2"
            )
        ],
        "inputs": len(rows(folder, "select * from inputs")),
    }
    files = [path for path in (folder / "artifacts").rglob("*") if path.is_file()]
    found["files"] = sorted(
        (next(names[part] for part in path.parts if part in names), re.sub(r"\\+[0-9a-f-]{36}", "", path.name))
        for path in files
    )
    for path in files:
        if path.suffix in (".png", ".webp"):
            Image.open(path).load()
    return found


def test_a_server_whose_answers_are_lost_gets_nothing_twice(
    tracker: Relay, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker._patience_s = 600.0  # on a busy machine
    tracker.store.client = client = Mute(tracker.store.client, missing=50)
    record(tracker, folder)
    tracker.close()
    assert {"create_run", "search_runs", "log_batch", "log_text", "log_image"} <= set(client.lost)
    found = content(folder)
    assert [name for name, *_ in found["runs"]] == ["s", "t00", "t01"]
    assert [row[:4] for row in found["metrics"]] == [
        ("t00", "eval/score", 1, 2.0), ("t00", "eval/score", 2, 1.5),
        ("t00", "train/g_loss", 1, 3.0), ("t00", "train/g_loss", 2, 2.0),
    ]  # fmt: skip
    assert len([name for _, name in found["files"] if name.startswith("grid_ref")]) == 2  # full size and preview
    assert found["inputs"] == 3


def test_records_that_were_taken_but_not_marked_are_not_written_twice(tracker: Relay, folder: Path) -> None:
    """As if every mark was lost: all records are written again, into the same runs."""
    record(tracker, folder)
    tracker.attach("t00", {"more/grid.png": folder / "grid.png"}, {"a": "b"}, {"final/score": 1.5})
    while tracker.waiting:
        time.sleep(0.01)
    lines = (folder / "spool.jsonl").read_bytes()
    tracker.close()
    whole = content(folder)
    ends = [line for line in lines.splitlines(keepends=True) if b'"do":"end"' in line]
    assert len(ends) == 1
    (folder / "spool.jsonl").write_bytes(lines)
    (folder / "spool.done.jsonl").unlink()
    for picture in (folder / "artifacts").rglob("*+compressed.webp"):
        picture.unlink()  # killed between a picture and its preview
    again = opened(folder)
    assert again.last_epoch("t00") == 2
    again.close()
    told = content(folder)
    for name, _, _, ended in told["runs"]:  # what was open is closed again, later
        assert ended >= next(row[3] for row in whole["runs"] if row[0] == name)
    assert [row[:3] for row in told.pop("runs")] == [row[:3] for row in whole.pop("runs")]
    assert told == whole
    assert again.run_id("t00") in {path.name for path in (folder / "artifacts").iterdir()}


def test_a_resumed_sweep_continues_its_runs(tracker: Relay, folder: Path) -> None:
    record(tracker, folder)
    tracker.attach("t00", {}, {}, {"final/score": 1.5})
    tracker.end(PARENT, "interrupted", "Ctrl-C")
    tracker.close()
    assert (folder / "spool.jsonl").read_bytes() == b""
    assert len((folder / "spool.done.jsonl").read_text().splitlines()) == 1
    with (folder / "spool.jsonl").open("ab") as file:
        file.write(b'{"n":99,"do":"log","tri')
    before = content(folder)
    for reached in (2, 3):
        again = opened(folder)
        assert again.run_id("t00") == tracker.run_id("t00")
        assert (again.last_epoch("t00"), again.last_epoch("t01"), again.last_epoch("new")) == (reached, 0, 0)
        again.start(PARENT, params={"other": 1}, tags={"x": "y"}, text={}, name="s")
        again.start("t00", params={"loss.w_cyc": 9}, tags={}, text={})
        while again.waiting:
            time.sleep(0.01)
        assert rows(folder, "select name from runs where status = 'RUNNING' order by name") == [("s",), ("t00",)]
        assert not rows(folder, "select * from tags where key = 'raystar.reason'")
        for epoch in (1, 2, 3):
            again.log("t00", epoch, {"eval/score": 1.0}, {"grid_ref": folder / "grid.png"})
        again.attach("t00", {}, {}, {"final/score": 1.5})
        again.end("t00", "finished", None)
        again.end(PARENT, "finished", None)
        again.close()
        after = content(folder)
        assert after["params"] == before["params"]
        assert [row[2:4] for row in after["metrics"] if row[1] == "eval/score"] == [(1, 2.0), (2, 1.5), (3, 1.0)]
        assert [row[2:4] for row in after["metrics"] if row[1] == "final/score"] == [(0, 1.5)]
        assert [row[:2] for row in after["runs"]] == [("s", "FINISHED"), ("t00", "FINISHED"), ("t01", "KILLED")]


def test_what_waits_at_the_end_is_told_and_written_by_the_next(
    tracker: Relay, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker.store.client = Flaky(tracker.store.client, missing=10**9)
    record(tracker, folder)
    tracker.close()
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == (
        f"error: MLflow is away (nobody there); 8 records wait in {folder}/spool.jsonl and are not lost: "
        f"python -m raystar.tune --resume s --out {folder.parent} writes them"
    )
    assert rows(folder, "select * from runs") == []
    began = time.time()
    opened(folder).close()
    found = content(folder)
    assert [row[:2] for row in found["runs"]] == [("s", "KILLED"), ("t00", "FAILED"), ("t01", "KILLED")]
    assert len([name for _, name in found["files"] if name.startswith("grid_ref")]) == 2
    assert all(row[4] <= began * 1000 for row in found["metrics"])  # the time when it happened, not when it was written


def test_another_store_is_refused(tracker: Relay, folder: Path, empty_store: Path) -> None:
    record(tracker, folder)
    tracker.close()
    copy_store(empty_store, folder)
    with pytest.raises(RaystarError, match=r"has no run [0-9a-f]{32}, which .*spool.jsonl continues; name the store"):
        opened(folder)


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import mlflow  # once, for all that are forked
from PIL import Image
from raystar.tracking.mlflow.writer import MlflowStore
from raystar.tracking.relay import Relay
from raystar.tracking.tracker import PARENT

folder, trials, epochs = Path(sys.argv[1]), ("t00", "t01"), 20

def write():
    store = MlflowStore(
        f"sqlite:///{folder}/mlflow.db", folder / "artifacts", {"name": "d", "digest": "d", "source": "d"},
        {"raystar.sweep": "s"}, "eval/score", True,
    )
    tracker = Relay(store, folder / "spool.jsonl")
    tracker.begin()
    tracker.start(PARENT, params={"trials": 2}, tags={}, text={"config.yaml": "a: 1"}, name="s")
    for trial in trials:
        tracker.start(trial, params={"p": trial}, tags={"raystar.trial": trial}, text={"config.yaml": "a: 1"})
    for epoch in range(epochs + 1):
        for trial in trials:
            pictures = {"grid": folder / "grid.png"} if epoch % 5 == 0 else {}
            tracker.log(trial, epoch, {"eval/score": 1 / (epoch + 1)} if epoch else {}, pictures)
        time.sleep(0.01)
    for trial in trials:
        tracker.attach(trial, {"grid.png": folder / "grid.png"}, {}, {"final/score": 0.5})
        tracker.end(trial, "finished", None)
    tracker.end(PARENT, "finished", None)
    tracker.close()
    print("done", tracker.waiting, flush=True)

kills, wait = 0, random.Random(int(sys.argv[2]))
while True:
    child = os.fork()
    if child == 0:
        try:
            write()
        finally:
            os._exit(0)
    if kills < 5:
        marks = folder / "spool.done.jsonl"
        size = marks.stat().st_size if marks.exists() else 0
        while not marks.exists() or marks.stat().st_size == size:  # until it writes to MLflow
            time.sleep(0.002)
        time.sleep(wait.random() * 0.4)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    else:
        os.waitpid(child, 0)
        break
"""


def test_kill_9_at_any_moment_leaves_every_record_once(folder: Path) -> None:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "grid.png")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), "7"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "done 0", done.stdout + done.stderr
    found = content(folder)
    assert [row[:2] for row in found["runs"]] == [(name, "FINISHED") for name in ("s", "t00", "t01")]
    for trial in ("t00", "t01"):
        by_time = sorted((row for row in found["metrics"] if row[0] == trial), key=lambda row: (row[4], row[2]))
        assert [row[1:3] for row in by_time] == [("eval/score", n) for n in range(1, 21)] + [("final/score", 0)]
        images = sorted(name for run, name in found["files"] if run == trial and name.endswith(".png"))
        steps = sorted(int(name.split("+")[2]) for name in images if "+" in name)
        assert steps == list(range(0, 21, 5))
        assert len([name for run, name in found["files"] if run == trial]) == 2 * 5 + 2
    assert found["params"] == [("s", "trials", "2"), ("t00", "p", "t00"), ("t01", "p", "t01")]
    assert found["inputs"] == 3


def test_waiting_records_take_no_memory(tracker: Relay, folder: Path) -> None:
    tracker.store.client = Flaky(tracker.store.client, missing=10**9)
    tracker.start(PARENT, params={}, tags={}, text={}, name="s")
    metrics = {f"train/loss_{n}": 0.5 for n in range(10)}
    for epoch in range(1, 101):
        tracker.log(PARENT, epoch, metrics, {})
    tracemalloc.start()
    began = time.perf_counter()
    for epoch in range(101, 20_101):
        tracker.log(PARENT, epoch, metrics, {"grid": folder / "grid.png"})
    seconds = time.perf_counter() - began
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tracker.close()
    assert tracker.waiting == 20_102
    assert (folder / "spool.jsonl").stat().st_size > 4e6
    assert grown < 200_000
    assert seconds < 20  # a fraction of a millisecond each, even while memory is traced
    began = time.perf_counter()
    assert Spool(folder / "spool.jsonl").waiting == 20_102
    assert time.perf_counter() - began < 5


def test_a_full_disk_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Store, artifacts and spool on one small disk: all of them wait, and nothing is lost."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True)
    if made.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        monkeypatch.setattr("raystar.base.files._FULL_S", 0.05)
        monkeypatch.setenv("RAYSTAR_LAST_RECORDS_TIMEOUT_S", "20.0")
        copy_store(empty_store, tmp_path)
        tracker = opened(tmp_path)
        ballast = tmp_path / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        threading.Timer(1.0, ballast.unlink).start()
        picture = tmp_path.parent / f"{tmp_path.name}.png"
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(picture)
        tracker.start(PARENT, params={}, tags={}, text={}, name="s")
        for epoch in range(1, 31):
            tracker.log(PARENT, epoch, {"eval/score": 1.0}, {} if epoch % 10 else {"grid": picture})
        tracker.end(PARENT, "finished", None)
        tracker.close()
        told = capsys.readouterr().err
        assert told.count("is full; waiting") == told.count("has space again") == 1
        found = content(tmp_path)
        assert [row[2] for row in found["metrics"]] == list(range(1, 31))
        assert len(found["files"]) == 6
        assert tracker.waiting == 0
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


# -- servers --------------------------------------------------------------------------------------


class Server:
    """An `mlflow server` of its own process group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
                "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1",
                "--artifacts-destination", str(self.folder / "artifacts"),
            ],
            cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip

    def wait(self) -> None:
        for _ in range(600):
            try:
                check_uri(self.uri)
                return
            except RaystarError:
                time.sleep(0.1)
        raise AssertionError("the server does not start")

    def stop(self, how: signal.Signals) -> None:
        os.killpg(self.process.pid, how)
        self.process.wait()


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    made = Server(folder)
    made.start()
    made.wait()
    yield made
    made.stop(signal.SIGKILL)


@pytest.mark.slow
def test_a_real_server_that_is_killed_in_mid_run(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while it is written to, away for a while, started again: every record once, in order, in the same run."""
    monkeypatch.setattr(relay, "_RETRY_S", (0.05, 0.1, 0.2))
    monkeypatch.setenv("RAYSTAR_LAST_RECORDS_TIMEOUT_S", "60.0")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "served")  # artifacts go through the server as well
    tracker = opened(folder, server.uri)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "grid.png")
    tracker.start(PARENT, params={"a": 1}, tags={}, text={"config.yaml": "a: 1"}, name="s")
    for epoch in range(1, 41):
        tracker.log(PARENT, epoch, {"eval/score": 1 / epoch}, {} if epoch % 4 else {"grid": folder / "grid.png"})
    while tracker.waiting > 30:
        time.sleep(0.001)
    server.stop(signal.SIGKILL)
    before = tracker.run_id(PARENT)
    tracker.log(PARENT, 41, {"eval/score": 0.0}, {})
    server.start()
    tracker.end(PARENT, "finished", None)
    tracker.close()
    assert tracker.waiting == 0
    assert tracker.run_id(PARENT) == before
    found = content(folder)
    assert [row[:2] for row in found["runs"]] == [("s", "FINISHED")]
    by_time = sorted(found["metrics"], key=lambda row: (row[4], row[2]))
    assert [row[2] for row in by_time] == list(range(1, 42))
    steps = sorted(int(name.split("+")[2]) for _, name in found["files"] if name.endswith(".png"))
    assert steps == list(range(4, 41, 4))
    assert len(found["files"]) == 2 * 10 + 1
    told = capsys.readouterr()
    first, second = told.err.splitlines()
    assert first.startswith("note: MLflow takes no records now")
    assert second == "note: MLflow takes records again"
    assert told.out == "writing the last 32 records to MLflow\n" or not told.out


class Answers(http.server.BaseHTTPRequestHandler):
    """A server that wants a password, and says what its path asks for."""

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "")
        good = "Basic " + base64.b64encode(b"me:right").decode()
        status, text = {
            "/version": (200, "3.17.2"),
            "/private/version": (200, "3.17.2") if given == good else (403 if given else 401, "no"),
            "/host/version": (403, "Invalid Host header - possible DNS rebinding attack detected"),
            "/ray/version": (200, json.dumps({"version": "4", "ray": "2.60"})),
            "/broken/version": (503, "later"),
        }.get(self.path, (404, "not here"))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def test_which_servers_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"127.0.0.1:{server.server_port}"
        check_uri(f"http://{here}/")
        for path, words in {
            "private": "asks for credentials; set MLFLOW_TRACKING_USERNAME",
            "host": "refuses this host name; start it with --allowed-hosts",
            "ray": "no MLflow server",
            "other": r"no MLflow server \(HTTP status 404",
            "broken": "out of order",
        }.items():
            with pytest.raises(RaystarError, match=words):
                check_uri(f"http://{here}/{path}")
        check_uri(f"http://me:right@{here}/private")
        with pytest.raises(RaystarError, match=rf"http://\*\*\*@{here}/private: the server refuses these credentials"):
            check_uri(f"http://me:hunter2@{here}/private")
        (tmp_path / ".mlflow").mkdir()
        (tmp_path / ".mlflow/credentials").write_text(
            "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = right\n"
        )
        check_uri(f"http://{here}/private")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
        with pytest.raises(RaystarError, match="refuses these"):
            check_uri(f"http://{here}/private")
        server.shutdown()
    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("RAYSTAR_MLFLOW_TIMEOUT_S", "0.2")
    with pytest.raises(RaystarError, match="nothing answers there"):
        check_uri(f"http://127.0.0.1:{silent.getsockname()[1]}")
    silent.close()


# -- what is written ------------------------------------------------------------------------------


def test_pictures_and_files_behind_uris(tracker: Relay, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fsspec

    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(folder / "a.png")
    with fsspec.open("memory://pictures/a.png", "wb") as file:
        file.write((folder / "a.png").read_bytes())
    (folder / "no.png").write_text("no picture")
    tracker.start(PARENT, params={}, tags={}, text={}, name="s")
    pictures = {
        "far": "memory://pictures/a.png", "near": folder / "a.png", "file": f"file://{folder}/a.png",
        "gone": "memory://pictures/b.png", "what": "nosuchscheme://user:hunter2@host/a.png", "no": folder / "no.png",
    }  # fmt: skip
    tracker.log(PARENT, 1, {}, pictures)
    tracker.attach(PARENT, {"best/grid.png": "memory://pictures/a.png"}, {}, {})
    tracker.close()
    found = [path.relative_to(folder / "artifacts") for path in (folder / "artifacts").rglob("*.png")]
    assert sorted(path.name.split("+")[0] for path in found) == ["far", "file", "grid.png", "near"]
    assert str(next(path for path in found if path.name == "grid.png")).endswith("/artifacts/best/grid.png")
    told = capsys.readouterr().err
    assert told.count("refuses a record") == 3
    assert "hunter2" not in told


def test_credentials_reach_neither_the_store_nor_the_spool(folder: Path) -> None:
    tracker = opened(folder, common_tags={"raystar.sweep": "s", "command": "tune --tracking-uri http://a:hunter2@b"})
    tracker.store.client = Flaky(tracker.store.client, missing=1000)
    uri = "s3://key:hunter2@bucket"
    tracker.start(
        PARENT,
        params={"data.root": uri, "data.hf_token": "hunter2", "p": 1},
        tags={"note": f"from {uri}", "raystar.signature": "0123"},
        text={"config.yaml": f"root: {uri}\napi_key: hunter2\nn: 1\n"},
    )
    tracker.attach(PARENT, {}, {"more": "password=hunter2"}, {})
    tracker.end(PARENT, "failed", f"no access to {uri}")
    assert b"hunter2" not in (folder / "spool.jsonl").read_bytes()
    tracker.store.client.missing = 0
    tracker.close()
    assert ("raystar.signature", "0123") in rows(folder, "select key, value from tags")
    texts = [path.read_bytes() for path in (folder / "artifacts").rglob("*") if path.is_file()]
    assert [text for text in texts if b"n: 1" in text]
    for held in ((folder / "mlflow.db").read_bytes(), (folder / "spool.done.jsonl").read_bytes(), *texts):
        assert b"hunter2" not in held


def test_a_spool_outlives_power_cuts(tmp_path: Path) -> None:
    """Lost marks cost a second writing, lost records are not mistaken for taken ones."""
    spool = Spool(tmp_path / "s.jsonl")
    for epoch in range(1, 6):
        spool.add("log", "t", epoch=epoch)
    for record in spool.take():
        spool.taken(record, "run" if record["n"] == 1 else None)
        if record["n"] == 3:
            break
    kept = (tmp_path / "s.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "s.jsonl").write_bytes(b"".join(kept[:2]))  # of five records, two were on the disk
    found = Spool(tmp_path / "s.jsonl")
    assert found.waiting == 0
    assert found.runs == {"t": "run"}
    found.add("log", "t", epoch=3)
    assert found.waiting == 1
    found.finish()
    assert [record["epoch"] for record in found.take()] == [3]
    assert [record["n"] for record in Journal(tmp_path / "s.jsonl")] == [1, 2, 4]
