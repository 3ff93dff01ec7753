"""A store that is moved or copied with its runs folder goes on where it lies, and leaves the old place alone."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from raystar import export
from raystar.base.errors import RaystarError
from raystar.tracking.mlflow.address import sqlite_uri
from raystar.tracking.mlflow.client import connect
from raystar.tracking.mlflow.moved import settle
from raystar.tracking.relay import Relay
from raystar.tracking.tracker import CHECKPOINT, PARENT
from tests.tracking.test_tracking import Flaky, _quickly, copy_store, empty_store, opened, record, rows

__all__ = ["_quickly", "empty_store"]


@pytest.fixture(params=["plain", "a b%20c?#ü"])
def runs(request: pytest.FixtureRequest, tmp_path: Path, empty_store: Path) -> Path:
    """A runs folder with a store and, in `s`, a sweep's spool: its parent, and a trial with pictures."""
    folder = tmp_path / request.param / "runs"
    (folder / "s").mkdir(parents=True)
    copy_store(empty_store, folder)
    tracker = sweep(folder)
    record(tracker, folder / "s")
    (folder / "s/trials").mkdir()
    (folder / "s/trials/epoch_0001.pt").touch()
    tracker.attach("t00", {}, {CHECKPOINT: str(folder / "s/trials/epoch_0001.pt")}, {})
    tracker.close()
    return folder


def sweep(runs: Path, name: str = "s") -> Relay:
    (runs / name).mkdir(exist_ok=True)
    return opened(runs, sqlite_uri(runs / "mlflow.db"), spool=runs / name / "spool.jsonl")


def more(runs: Path, name: str = "s") -> None:
    """A further epoch with a picture, of a resumed sweep or of a new one."""
    tracker = sweep(runs, name)
    tracker.start(PARENT, params={}, tags={}, text={}, name=name)
    tracker.start("t00", params={}, tags={}, text={"config.yaml": "a: 1"})
    shutil.copy(next(runs.glob("s/*.png")), runs / name / "again.png")
    tracker.log("t00", 7, {"eval/score": 1.0}, {"grid_ref": runs / name / "again.png"})
    tracker.close()
    assert not tracker.waiting


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pictures(runs: Path, name: str) -> list[str]:
    """Those of all runs `name`, as MLflow finds them."""
    client = connect(sqlite_uri(runs / "mlflow.db"))
    ids = [run for (run,) in rows(runs, f"select run_uuid from runs where name = '{name}'")]
    return sorted(
        file.path for run in ids for file in client.list_artifacts(run, "images") if file.path.endswith(".png")
    )


def test_a_copy_goes_on_by_itself(runs: Path, tmp_path: Path) -> None:
    old, copy = tree(runs), tmp_path / "elsewhere/runs 2"
    shutil.copytree(runs, copy)
    assert len(pictures(copy, "t00")) == 1
    more(copy)
    more(copy, "new")
    assert tree(runs) == old
    assert len(pictures(copy, "t00")) == 3
    assert {place.startswith(copy.as_uri()) for place in places(copy)} == {True}
    assert rows(copy, f"select value from tags where key = '{CHECKPOINT}'") == [(f"{copy}/s/trials/epoch_0001.pt",)]
    more(runs)  # and the original in its place
    assert len(list((runs / "artifacts").rglob("grid_ref*.png"))) == 2


def test_a_moved_one_makes_nothing_where_it_was(runs: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    runs.rename(moved)
    assert len(pictures(moved, "t00")) == 1
    more(moved)
    more(moved, "new")
    assert not runs.exists()
    assert len(pictures(moved, "t00")) == 3
    back = tmp_path / "back/runs"
    back.parent.mkdir()
    moved.rename(back)
    more(back, "newer")
    assert not moved.exists()
    assert len(pictures(back, "t00")) == 4


def test_records_that_wait_move_along(runs: Path, tmp_path: Path) -> None:
    """Pictures that the store has not taken are found again, also those that earlier versions wrote down whole."""
    tracker = sweep(runs)
    tracker.store.client = Flaky(tracker.store.client, missing=10**9)
    tracker.start("t00", params={}, tags={}, text={})
    picture = next(runs.glob("s/*.png"))
    tracker.log("t00", 8, {}, {"grid_ref": picture})
    tracker.close()
    spool = runs / "s/spool.jsonl"
    assert str(runs) not in spool.read_text()
    lines = [json.loads(line) for line in spool.read_text().splitlines()]
    last = max(line["n"] for line in lines)
    lines.append({"n": last + 1, "at": 1, "do": "log", "trial": "t00", "epoch": 9, "metrics": {},
                  "images": {"grid_ref": str(picture)}})  # fmt: skip
    spool.write_text("".join(json.dumps(line) + "\n" for line in lines))
    moved = tmp_path / "moved"
    runs.rename(moved)
    sweep(moved).close()
    assert len(pictures(moved, "t00")) == 3
    assert not runs.exists()


def test_what_lies_elsewhere_is_left_alone(tmp_path: Path, empty_store: Path) -> None:
    """A store whose runs keep their files in another folder by intent is none that was moved."""
    here, there = tmp_path / "A", tmp_path / "B"
    for folder in (here, there):
        (folder / "s").mkdir(parents=True)
    copy_store(empty_store, there)
    shutil.move(there / "mlflow.db", here)
    uri = f"sqlite:///{here}/mlflow.db"
    tracker = opened(there, uri, spool=there / "s/spool.jsonl")
    record(tracker, there / "s")
    tracker.close()
    before = places(here)
    assert {place.startswith(there.as_uri()) for place in before} == {True}
    for folder in (there, tmp_path / "unmounted"):
        if folder != there:
            there.rename(folder)
        settle(here / "mlflow.db", here / "artifacts")
        connect(uri)
        assert places(here) == before
    with pytest.raises(RaystarError, match=rf"experiment raystar keeps its files in .*/artifacts, and {there} is not"):
        opened(here, uri, spool=here / "s/spool.jsonl")
    assert not there.exists()
    folder.rename(there)
    sweep(here, "new").close()
    assert places(here) == before


def places(runs: Path) -> list[str]:
    """All that a store names."""
    found = rows(runs, "select artifact_location from experiments where name = 'raystar'")
    return [place for (place,) in [*found, *rows(runs, "select artifact_uri from runs order by run_uuid")]]


def test_the_same_store_by_two_names_is_one(runs: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(runs, target_is_directory=True)
    before = places(runs)
    more(link)
    assert places(runs) == before


def test_what_only_the_old_place_has_is_still_found(runs: Path, tmp_path: Path) -> None:
    """Version 0.1 wrote what a copy recorded into the original's folder."""
    copy = tmp_path / "copy"
    shutil.copytree(runs, copy)
    run = rows(copy, "select run_uuid from runs where name = 't00'")[0][0]
    shutil.rmtree(copy / "artifacts" / run)
    sweep(copy).close()
    assert rows(copy, f"select artifact_uri from runs where run_uuid = '{run}'")[0][0].startswith(runs.as_uri())
    assert len(pictures(copy, "t00")) == 1


def test_several_processes_open_a_moved_store_at_once(runs: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    runs.rename(moved)
    errors: list[BaseException] = []

    def open_it() -> None:
        try:
            settle(moved / "mlflow.db", moved / "artifacts")
        except BaseException as error:
            errors.append(error)

    with sqlite3.connect(moved / "mlflow.db", isolation_level=None) as writer:
        writer.execute("BEGIN IMMEDIATE")  # somebody is just writing
        opening = [threading.Thread(target=open_it) for _ in range(4)]
        for thread in opening:
            thread.start()
        writer.execute("UPDATE tags SET value = value")
        writer.execute("COMMIT")
    for thread in opening:
        thread.join()
    assert not errors
    assert {place.startswith(moved.as_uri()) for place in places(moved)} == {True}


def test_the_checkpoint_of_a_moved_run_is_found_where_nothing_may_be_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved"
    runs.rename(moved)
    run = rows(moved, "select run_uuid from runs where name = 't00'")[0][0]
    taken: list[Path] = []

    def take(path: Path, out: Path, facts: Any) -> None:
        taken.append(path)
        out.mkdir()

    monkeypatch.setattr(export, "_export_checkpoint", take)
    monkeypatch.setattr(export.reader, "connect", lambda uri: __import__("mlflow").MlflowClient(uri))  # as it is
    uri = ["--tracking-uri", sqlite_uri(moved / "mlflow.db")]
    assert export.main(["--run", run, "--runs", str(moved), *uri, "--out", str(tmp_path / "out")]) == 0
    assert taken == [moved / "s/trials/epoch_0001.pt"]
