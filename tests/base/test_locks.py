"""One process at a time, with locks and, where the file system has none, with marks."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raystar.base import locks
from raystar.base.errors import RaystarError
from raystar.base.locks import Held, hold, running
from raystar.pictures import encoding
from tests.kit.support import ROOT

NO_LOCKS = """
import errno, fcntl, os
def flock(file, how):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = flock
"""
HOLDER = """
import sys, time
from pathlib import Path
from raystar.base.locks import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["locks", "no locks"])
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Program text that does to another process what was done to this one."""
    monkeypatch.setattr(locks, "_told", set())
    if request.param == "locks":
        return ""

    def flock(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    return NO_LOCKS


def holder(path: Path, before: str) -> subprocess.Popen[str]:
    """Another process, once it holds `path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", before + HOLDER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_holds_and_a_killed_one_holds_nothing(without: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    if kind == "folder":
        path.mkdir()
    process = holder(path, without)
    with pytest.raises(Held) as held, hold(path, wait=False):
        pass
    if kind == "file" or without:
        assert f"process {process.pid} on {socket.gethostname()}" in str(held.value)
    waited: list[float] = []

    def wait() -> None:
        with hold(path):
            waited.append(time.monotonic())

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    assert not waited
    process.send_signal(signal.SIGKILL)
    process.wait()
    waiting.join(timeout=20)
    assert waited
    with hold(path, wait=False):
        pass
    assert not [*tmp_path.rglob("*held*")]


def test_of_many_one_at_a_time(without: str, tmp_path: Path) -> None:
    """Each adds to a number that two at once would spoil."""
    (tmp_path / "number").write_text("0")
    code = (
        without
        + """
import sys, time
from pathlib import Path
from raystar.base import locks
locks._LOOK_S = 0.01
folder = Path(sys.argv[1])
for _ in range(20):
    with locks.hold(folder / "lock"):
        number = int((folder / "number").read_text())
        time.sleep(0.001)
        (folder / "number").write_text(str(number + 1))
"""
    )
    adding = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) for _ in range(4)]
    assert [process.wait(60) for process in adding] == [0] * 4
    assert (tmp_path / "number").read_text() == "80"


def test_what_has_no_locks_is_told_once_with_a_way_around(
    without: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        with hold(tmp_path / name):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (1 if without else 0)
    if without:
        assert re.search(r"lies on a file system without locks \(No locks available\); files \*.held mark", lines[0])


def test_only_a_sweep_that_runs_is_said_to_run(without: str, tmp_path: Path) -> None:
    with running(tmp_path):
        process = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(RaystarError, match=f"this sweep is running already, in {process}"), running(tmp_path):
            pass
    with running(tmp_path):  # and not a moment longer
        pass


def test_a_mark_of_another_machine_is_believed_and_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    mark = tmp_path / f"{locks.LOCK}.held"
    mark.write_text("1 2 on another-machine\n")
    with pytest.raises(RaystarError, match=rf"running already, in process 1 on another-machine, says {mark}; if that"):
        running(tmp_path).__enter__()
    mark.write_text(f"{os.getpid()} 12 on {socket.gethostname()}\n")  # an earlier process of this one's number
    with running(tmp_path):
        pass


def test_a_lock_that_fails_otherwise_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, how: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RaystarError, match=r"lock: cannot be locked: Input/output error"):
        running(tmp_path).__enter__()
    with pytest.raises(RaystarError, match=r"out: cannot be locked: Input/output error"):
        encoding._alone(tmp_path / "out").__enter__()


def test_whoever_locks_does_so_here() -> None:
    """Nothing else knows what to do where there are no locks."""
    users = [path.name for path in (ROOT / "raystar").rglob("*.py") if "fcntl" in path.read_text()]
    assert users == ["locks.py"]
