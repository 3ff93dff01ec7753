"""Storage on a file system and behind a URI, what trials leave in it, and what is removed again."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from PIL import Image

from raystar.base.errors import RaystarError
from raystar.base.storage import Storage
from raystar.config.schema import Config
from raystar.model import checkpoint as checkpoints
from raystar.model.networks import Nets
from raystar.record.retention import Janitor
from raystar.record.summary import TrialRecord
from raystar.record.trial_files import TrialFiles, checkpoint_name, saved_epochs
from raystar.sweep.disk import check_space, checkpoint_bytes, needed_bytes
from raystar.training import resume
from raystar.training.state import TrainState
from tests.kit.support import tiny_config


@pytest.fixture(params=["path", "uri"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "path":
        return Storage(str(tmp_path / "there")).child("s")
    # In memory, so nothing that works on paths alone gets by.
    return Storage(f"memory://{tmp_path.name}").child("s")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path)


@pytest.fixture
def checkpoint(config: Config) -> dict[str, Any]:
    return resume.snapshot(TrainState.create(config, "cpu"), 3, {"eval/score": 1.5})


def test_files_come_back(storage: Storage) -> None:
    assert storage.list("a") == []
    storage.write("a/b/one", b"1")
    storage.write("a/b/one", b"one")
    storage.write("a/b/two", b"2")
    assert storage.list("a/b") == ["one", "two"]
    assert storage.read("a/b/one") == b"one"
    with storage.fetched("a/b/two") as path:
        assert path.read_bytes() == b"2"
    with fsspec.open(storage.at("a/b/one"), "rb") as file:  # what is handed to others opens elsewhere
        assert file.read() == b"one"
    storage.delete("a/b/one")
    storage.delete("a/b/one")
    assert storage.list("a/b") == ["two"]
    with pytest.raises(FileNotFoundError):
        storage.read("a/b/one")


def test_a_write_that_fails_leaves_what_was_there(storage: Storage) -> None:
    storage.write("x/file", b"whole")

    def half(path: Path) -> None:
        path.write_bytes(b"ha")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        storage.fill("x/file", half)
    assert storage.read("x/file") == b"whole"
    assert storage.list("x") == ["file"]
    if storage.path is not None:
        assert os.listdir(storage.path / "x") == ["file"]


def test_what_storage_there_is() -> None:
    with pytest.raises(RaystarError, match=r"--storage nosuch://x: expected a path or an fsspec URI"):
        Storage("nosuch://x")
    relative = Storage("runs")
    assert relative.path == Path("runs").absolute()
    assert relative.free_bytes() is not None
    assert Storage("memory://x").free_bytes() is None


def test_a_trial_resumes_from_the_newest_that_can_be_read(storage: Storage, checkpoint: dict[str, Any]) -> None:
    files = TrialFiles(storage, "t00")
    assert files.restore().checkpoint is None
    for epoch in (1, 2, 3):
        files.save(epoch, {"epoch": epoch, "metrics": {"eval/score": 2.0 - epoch}}, checkpoint | {"epoch": epoch})
    assert saved_epochs(storage, "t00") == [1, 2, 3]
    restored = files.restore()
    assert (restored.epoch, restored.note) == (3, None)
    assert restored.checkpoint is not None
    assert checkpoints.digest(restored.checkpoint) == checkpoints.digest(checkpoint | {"epoch": 3})

    whole = storage.read(checkpoint_name("t00", 3))
    storage.write(checkpoint_name("t00", 3), whole[:-50])
    storage.write(checkpoint_name("t00", 2), b"")
    restored = files.restore()
    assert restored.epoch == 1
    assert restored.note == "epoch_0003.pt and epoch_0002.pt cannot be read; resumed after epoch 1"
    assert [report["epoch"] for report in files.reports(after=0, until=2)] == [1, 2]
    storage.write(checkpoint_name("t00", 1), whole.replace(b"PK", b"KP"))
    restored = files.restore()
    assert (restored.checkpoint, restored.epoch) == (None, 0)
    assert restored.note is not None


def test_a_report_is_there_before_its_checkpoint(storage: Storage, checkpoint: dict[str, Any]) -> None:
    """However a process ends in between, no checkpoint is without its report and its row."""
    order: list[str] = []
    fill = storage.fill
    storage.fill = lambda name, write: (order.append(name), fill(name, write))  # type: ignore[method-assign,func-returns-value]
    TrialFiles(storage, "t1").save(4, {"epoch": 4}, checkpoint)
    assert order == ["trials/t1/epoch_0004.json", "trials/t1/losses.csv", "trials/t1/epoch_0004.pt"]


def test_the_table_of_losses_has_every_epoch_once(storage: Storage, checkpoint: dict[str, Any]) -> None:
    """Over a kill before a checkpoint, a damaged checkpoint, a lost table, and reports of a version that had none."""

    def save(files: TrialFiles, epoch: int, loss: float, **report: Any) -> None:
        report |= {"epoch": epoch, "metrics": {"train/d_loss": loss, "perf/train_s": 2.0}}
        files.save(epoch, report, checkpoint | {"epoch": epoch})

    def losses() -> list[tuple[str, str, str]]:
        rows = csv.DictReader(io.StringIO(storage.read("trials/t00/losses.csv").decode()))
        return [(row["epoch"], row["global_step"], row["d_loss"]) for row in rows]

    first = TrialFiles(storage, "t00")
    first.restore()
    for epoch in (1, 2, 3):
        save(first, epoch, epoch / 4, step=10 * epoch)
    assert losses() == [("1", "10", "0.25"), ("2", "20", "0.5"), ("3", "30", "0.75")]
    storage.delete(checkpoint_name("t00", 3))  # killed before it was there

    second = TrialFiles(storage, "t00")
    assert second.restore().epoch == 2
    save(second, 3, 9.0, step=30)
    assert losses() == [("1", "10", "0.25"), ("2", "20", "0.5"), ("3", "30", "9.0")]

    storage.write("trials/t00/losses.csv", b"\xff\x00 no table")
    third = TrialFiles(storage, "t00")
    assert third.restore().epoch == 3
    save(third, 4, 1.0, step=40)
    assert losses() == [("1", "10", "0.25"), ("2", "20", "0.5"), ("3", "30", "9.0"), ("4", "40", "1.0")]

    storage.delete("trials/t00/losses.csv")
    storage.write("trials/t00/epoch_0001.json", b'{"epoch": 1, "metrics": {"train/d_loss": 0.25}}')
    storage.delete("trials/t00/epoch_0002.json")
    fourth = TrialFiles(storage, "t00")
    fourth.restore()
    save(fourth, 5, 1.0, step=50)
    assert losses() == [("1", "", "0.25"), ("3", "30", "9.0"), ("4", "40", "1.0"), ("5", "50", "1.0")]

    for epoch in range(1, 6):
        storage.delete(checkpoint_name("t00", epoch))
    anew = TrialFiles(storage, "t00")
    anew.restore()
    save(anew, 1, 7.0, step=10)
    assert losses() == [("1", "10", "7.0")]


def test_pictures(storage: Storage) -> None:
    image = Image.new("RGB", (8, 4), (200, 10, 30))
    place = TrialFiles(storage, "t07").save_picture("grid_ref", image, 12)
    assert place == storage.at("pictures/t07/grid_ref_0012.png")
    with storage.fetched("pictures/t07/grid_ref_0012.png") as path, Image.open(path) as found:
        assert found.tobytes() == image.tobytes()


def record(trial: str, status: str, score: float, epoch: int) -> TrialRecord:
    return TrialRecord(trial, {}, status=status, epochs=4, score=score, score_epoch=epoch)


def test_what_is_kept(storage: Storage) -> None:
    """While a trial can continue its last two and its best; afterwards the best of the best trials."""

    def saves(name: str, epoch: int) -> None:
        storage.write(checkpoint_name(name, epoch), b"x")

    janitor = Janitor(storage, keep=2, mode="min")
    running = record("t00", "running", 1.0, 1)
    for epoch in range(1, 6):
        saves("t00", epoch)
        janitor.epoch(running, epoch)
    ends = [("t01", "finished", 3.0), ("t02", "stopped", 2.0), ("t03", "finished", 1.5), ("t04", "diverged", 0.1)]
    for name, status, score in [*ends, ("t05", "killed", 0.2)]:
        for epoch in (2, 3, 4):
            saves(name, epoch)
            janitor.epoch(record(name, "running", score, 2), epoch)
        janitor.ended(record(name, status, score, 2))
    janitor.close()
    left = {name: saved_epochs(storage, name) for name in ("t00", "t01", "t02", "t03", "t04", "t05")}
    assert left == {"t00": [1, 4, 5], "t01": [], "t02": [2], "t03": [2], "t04": [], "t05": [2, 3, 4]}
    assert janitor.checkpoint(record("t03", "finished", 1.5, 2)) == "trials/t03/epoch_0002.pt"
    assert janitor.checkpoint(record("t01", "finished", 3.0, 2)) is None

    again = Janitor(storage, keep=1, mode="min")  # a resumed sweep, and is to keep less
    for name, status, score in ends:
        again.known(record(name, status, score, 2))
    again.known(record("t00", "interrupted", 1.0, 1))
    again.close()
    assert {name: saved_epochs(storage, name) for name in left} == left | {"t02": []}


def test_higher_may_be_better(storage: Storage) -> None:
    janitor = Janitor(storage, keep=1, mode="max")
    for name, score in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        storage.write(checkpoint_name(name, 1), b"x")
        janitor.epoch(record(name, "running", score, 1), 1)
        janitor.ended(record(name, "finished", score, 1))
    janitor.close()
    assert [name for name in "abc" if saved_epochs(storage, name)] == ["b"]


def test_the_size_of_a_checkpoint(config: Config, checkpoint: dict[str, Any], tmp_path: Path) -> None:
    state = TrainState.create(config, "cpu")
    for optimizer in (state.opt_g, state.opt_d):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    checkpoints.save(tmp_path / "x.pt", resume.snapshot(state, 1, {}))
    told, found = checkpoint_bytes(config), (tmp_path / "x.pt").stat().st_size
    assert told < found < told + 400_000  # names and headers
    assert sum(p.numel() for _, net in Nets(config.model, 3).items() for p in net.parameters()) * 12 == told


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "not/yet/there"))
    check_space(storage, 1)
    with pytest.raises(RaystarError, match=r"not/yet/there: .* are free, and this sweep's checkpoints take about"):
        check_space(storage, 10**18)
    check_space(Storage("memory://x"), 10**18)  # nobody knows
    assert needed_bytes(1000, at_a_time=2, keep=5, trials=3) == 1000 * (2 * 4 + 3) + 3 * 2**20


def test_reports_are_plain_json(storage: Storage, checkpoint: dict[str, Any]) -> None:
    report = {"epoch": 1, "status": "running", "metrics": {"eval/score": 1.0}, "labels": {"a": "b"}}
    TrialFiles(storage, "t00").save(1, report, checkpoint)
    assert json.loads(storage.read("trials/t00/epoch_0001.json")) == report
