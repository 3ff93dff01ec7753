"""Runs folders that are moved or copied, and commands in other working folders: a sweep finds what is its own."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raystar import report, tune
from raystar.base.errors import RaystarError
from raystar.base.journal import Journal
from raystar.config.load import to_mapping
from raystar.record.places import keep
from raystar.record.summary import Summary
from raystar.record.sweep_file import write_record
from raystar.sweep.plan import Plan, make_plan
from raystar.tracking.mlflow.address import sqlite_file
from raystar.tracking.tracker import PARENT
from tests.kit.support import ROOT, tiny_config, write_latents
from tests.sweep.test_tune_requests import SPACE

RUN = "0" * 32


class Project:
    """A working folder with latents and files of a request, and sweeps that were planned there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        folder.mkdir()
        write_latents(folder / "latents")
        self.write(data__data_root="latents")

    def write(self, **changed: Any) -> None:
        values = to_mapping(tiny_config("latents", visualization__vae_model_name_or_path=None, **changed))
        (self.folder / "c.yaml").write_text(yaml.safe_dump(values))
        (self.folder / "s.yaml").write_text(yaml.safe_dump(SPACE))

    def plan(self, folder: Path, *arguments: str) -> Plan:
        """What a command in `folder` plans."""
        self.monkeypatch.chdir(folder)
        return make_plan(tune.request_of(tune.parser().parse_args(list(arguments))))

    def sweep(self, *more: str, out: str = "runs") -> Plan:
        """A sweep `one` as it lies there once it has begun, without its trials."""
        plan = self.plan(self.folder, "--space", "s.yaml", "--config", "c.yaml", "--name", "one", "--out", out, *more)
        plan.folder.mkdir()
        write_record(plan.folder, plan.record)
        Journal(plan.folder / "spool.done.jsonl").append({"n": 1, "runs": {PARENT: RUN}})
        with sqlite3.connect(str(sqlite_file(plan.tracking_uri))) as database:
            database.execute("create table if not exists runs (run_uuid text, lifecycle_stage text)")
            database.execute("insert into runs values (?, 'active')", (RUN,))
        return plan


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Project(tmp_path / "p", monkeypatch)


def text(folder: Path) -> str:
    return (folder / "one/sweep.json").read_text()


@pytest.mark.parametrize("how", ["copied", "moved"])
@pytest.mark.parametrize("uri", [None, "sqlite:///runs/mlflow.db", "sqlite:///{p}/runs/mlflow.db"])
def test_a_runs_folder_is_resumed_where_it_lies(
    project: Project, tmp_path: Path, how: str, uri: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    given = [] if uri is None else ["--tracking-uri", uri.format(p=project.folder)]
    began = project.sweep(*given)
    assert began.tracking_uri == f"sqlite:///{project.folder}/runs/mlflow.db"
    assert json.loads(text(project.folder / "runs"))["tracking_uri"] == "sqlite:///{runs}/mlflow.db"
    (project.folder / "runs/one/sweep.json").touch()
    new = tmp_path / "else where/my runs"
    new.parent.mkdir()
    (shutil.copytree if how == "copied" else shutil.move)(project.folder / "runs", new)
    for folder in (project.folder, tmp_path, new):
        for again in ([], ["--tracking-uri", f"sqlite:///{new}/mlflow.db"]):
            plan = project.plan(folder, "--resume", "one", "--out", str(new), "--trials", "3", *again)
            assert plan.tracking_uri == f"sqlite:///{new}/mlflow.db"
            assert plan.storage.uri == f"{new}/one"
            assert plan.bank.digest == began.bank.digest
            assert plan.trials == 3
    assert not caplog.records or "not there any more" not in caplog.text  # space and configuration are found, too
    write_record(plan.folder, plan.record)
    shutil.move(new, tmp_path / "again")
    plan = project.plan(tmp_path, "--resume", "one", "--out", "again")
    assert plan.tracking_uri == f"sqlite:///{tmp_path}/again/mlflow.db"
    fresh = project.plan(project.folder, "--space", "s.yaml", "--config", "c.yaml", "--out", str(tmp_path / "again"))
    assert fresh.tracking_uri == f"sqlite:///{tmp_path}/again/mlflow.db"
    assert (project.folder / "runs").exists() == (how == "copied")


def test_a_project_is_moved_or_copied_as_a_whole(project: Project, tmp_path: Path) -> None:
    began = project.sweep("--storage", "runs/files")
    assert json.loads(text(project.folder / "runs"))["storage"] == "{runs}/files"
    copy = tmp_path / "q"
    shutil.copytree(project.folder, copy)
    np.save(project.folder / "latents/a/more.npy", np.zeros((4, 16, 16), np.float16))  # the original has gone on
    for folder in (copy, tmp_path):
        plan = project.plan(folder, "--resume", "one", "--out", str(copy / "runs"))
        assert plan.bank.digest == began.bank.digest
        assert plan.storage.uri == f"{copy}/runs/files/one"
    Summary("one", "eval/score", "min", 2, None).write(copy / "runs/one")
    assert report.storage_of(copy / "runs/one", copy / "runs").uri == f"{copy}/runs/files/one"


def test_latents_in_the_runs_folder_move_along(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.folder / "latents", project.folder / "runs/latents")
    for root in ("runs/latents", f"{project.folder}/runs/latents"):
        project.sweep("--set", f"data.data_root={root}")
        shutil.move(project.folder / "runs", tmp_path / "moved")
        plan = project.plan(tmp_path, "--resume", "one", "--out", "moved")
        assert plan.config.data.data_root == f"{tmp_path}/moved/latents"
        shutil.rmtree(tmp_path / "moved/one")
        shutil.move(tmp_path / "moved", project.folder / "runs")


def test_a_sweep_in_its_place_packs_nothing_again(project: Project) -> None:
    began = project.sweep()
    assert project.plan(project.folder, "--resume", "one").bank.key == began.bank.key


def test_what_lies_elsewhere_is_named_and_asked_for(project: Project, tmp_path: Path) -> None:
    far = tmp_path / "far"
    far.mkdir()
    project.sweep("--storage", str(far / "files"), "--tracking-uri", f"sqlite:///{far}/store.db")
    record = json.loads(text(project.folder / "runs"))
    assert (record["storage"], record["tracking_uri"]) == (f"{far}/files", f"sqlite:///{far}/store.db")
    (far / "files/one/trials/t00").mkdir(parents=True)
    resume = ["--resume", "one", "--out", str(project.folder / "runs")]
    assert project.plan(tmp_path, *resume).storage.uri == f"{far}/files/one"

    shutil.move(far, tmp_path / "farther")
    shutil.move(project.folder / "latents", tmp_path / "farther/latents")
    given: list[str] = []
    for said, flag, place in (
        (rf"data.data_root: latents is not there \(looked for {project.folder}/latents, {tmp_path}/latents\)", "--set",
         "data.data_root=farther/latents"),
        (rf"runs are in sqlite:///{far}/store.db, which is not there; say where it lies now with --tracking-uri",
         "--tracking-uri", "sqlite:///farther/store.db"),
        (rf"files are in {far}/files, which is not there; say where they lie now with --storage", "--storage",
         "farther/files"),
    ):  # fmt: skip
        with pytest.raises(RaystarError, match=said):
            project.plan(tmp_path, *resume, *given)
        given += [flag, place]
    plan = project.plan(tmp_path, *resume, *given)
    assert plan.tracking_uri == f"sqlite:///{tmp_path}/farther/store.db"
    assert plan.storage.uri == f"{tmp_path}/farther/files/one"
    assert not far.exists()
    write_record(plan.folder, plan.record)
    assert project.plan(project.folder, *resume).config.data.data_root == f"{tmp_path}/farther/latents"

    (tmp_path / "empty").mkdir()
    with sqlite3.connect(tmp_path / "empty/store.db") as database:
        database.execute("create table runs (run_uuid text, lifecycle_stage text)")
    with pytest.raises(
        RaystarError, match=r"--tracking-uri: this sweep's runs are in .*farther/store.db, not in .*empty"
    ):
        project.plan(tmp_path, *resume, "--tracking-uri", "sqlite:///empty/store.db")
    with pytest.raises(RaystarError, match=r"--storage: the files of this sweep's trials are in .*, not in .*empty"):
        project.plan(tmp_path, *resume, "--storage", "empty")
    with pytest.raises(RaystarError, match=r"leave out --set \(but for places: data.data_root"):
        project.plan(tmp_path, *resume, "--set", "loss.w_cyc=2")


def test_other_latents_in_the_new_place_are_no_moved_ones(project: Project, tmp_path: Path) -> None:
    project.sweep()
    write_latents(tmp_path / "others", seed=4)
    with pytest.raises(RaystarError, match=r"another ruler|data: digest"):
        project.plan(project.folder, "--resume", "one", "--set", f"data.data_root={tmp_path}/others")


@pytest.mark.parametrize("how", ["there", "copied", "moved"])
def test_records_of_earlier_versions_are_resumed(project: Project, tmp_path: Path, how: str) -> None:
    """They name places whole, and no working folder."""
    began = project.sweep()
    record = json.loads(text(project.folder / "runs"))
    del record["began_in"]
    record["tracking_uri"] = began.tracking_uri
    (project.folder / "runs/one/sweep.json").write_text(json.dumps(record))
    place = project.folder / "runs"
    if how != "there":
        place = tmp_path / "new"
        (shutil.copytree if how == "copied" else shutil.move)(project.folder / "runs", place)
    plan = project.plan(project.folder, "--resume", "one", "--out", str(place))
    assert plan.tracking_uri == f"sqlite:///{place}/mlflow.db"
    assert plan.record["tracking_uri"] == "sqlite:///{runs}/mlflow.db"


def test_pictures_in_a_journal_are_found_wherever_it_lies(project: Project, tmp_path: Path) -> None:
    plan = project.sweep()
    place = plan.storage.at("pictures/t00/grid_ref_0001.png")
    assert plan.storage.names({"grid_ref": place}) == {"grid_ref": "pictures/t00/grid_ref_0001.png"}
    Path(place).parent.mkdir(parents=True)
    Path(place).touch()
    shutil.move(project.folder / "runs", tmp_path / "moved")
    moved = project.plan(project.folder, "--resume", "one", "--out", str(tmp_path / "moved"))
    for name in ("pictures/t00/grid_ref_0001.png", place):
        found = moved.storage.places({"grid_ref": name, "far": "s3://b/x.png"})
        assert found == {"grid_ref": f"{tmp_path}/moved/one/pictures/t00/grid_ref_0001.png", "far": "s3://b/x.png"}


def test_places_are_kept_as_they_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    for place, kept in {
        "runs/a": "{runs}/a",
        f"{tmp_path}/runs": "{runs}/.",
        "link/a": "{runs}/a",
        "runs2/a": f"{tmp_path}/runs2/a",
        "s3://bucket/a": "s3://bucket/a",
        "http://h:5000": "http://h:5000",
        "sqlite:///runs/a b.db": "sqlite:///{runs}/a b.db",
    }.items():
        assert keep(place, Path("runs")) == kept


def run(folder: Path, *arguments: str) -> None:
    """A sweep, started in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAYSTAR_LAST_RECORDS_TIMEOUT_S": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "raystar.tune", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_sweep_goes_on_in_its_new_place(project: Project, tmp_path: Path) -> None:
    """Copied, made longer, moved, and another one beside it; the original stays as it is."""

    def tree(folder: Path) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    old, copy, new = project.folder / "runs", tmp_path / "copy", tmp_path / "new"
    run(project.folder, "--space", "s.yaml", "--config", "c.yaml", "--name", "one")
    before = tree(old)
    shutil.copytree(old, copy)
    run(tmp_path, "--resume", "one", "--trials", "3", "--out", "copy")
    copy.rename(new)
    files = ["--space", f"{project.folder}/s.yaml", "--config", f"{project.folder}/c.yaml"]
    run(tmp_path, *files, "--set", f"data.data_root={project.folder}/latents", "--name", "two", "--out", "new")
    assert tree(old) == before
    assert not copy.exists()
    with sqlite3.connect(new / "mlflow.db") as database:
        runs = database.execute("select name, run_uuid from runs where name glob 't0[0-9]' order by name").fetchall()
        foreign = f"select count(*) from runs where artifact_uri not like '{new.as_uri()}/%'"
        assert database.execute(foreign).fetchone() == (0,)
    assert [name for name, _ in runs] == ["t00", "t00", "t01", "t01", "t02"]
    for _, run_id in runs:
        assert list((new / "artifacts" / run_id).rglob("grid_ref*.png"))
