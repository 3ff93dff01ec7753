"""What keeps a sweep's processes from starting is found before they do, also by a dry run: one line that names it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raystar import tune
from raystar.train import main as train_main
from tests.kit.mounts import full, needs_mounts, run_within
from tests.kit.support import ROOT
from tests.sweep.test_tune_requests import Files, refusal

STARTED = """
import os, sys
from raystar.backend import ray_start
from raystar.base.errors import RaystarError
folder, beyond = sys.argv[1], int(sys.argv[2])
below = f"/ray/session_2026-11-27_10-52-54_380710_{os.getpid()}/sockets/plasma_store"
os.environ["RAY_TMPDIR"] = folder + "/" + (106 + beyond - len(folder + below)) * "x"
os.environ["RAY_AUTH_TOKEN_PATH"] = f"{folder}/token"
try:
    ray_start.check_machine(None)
    print("passed", flush=True)
except RaystarError as error:
    print(error, flush=True)
try:
    ray_start.start(None, cpus=1, environment={})
    print("started")
except RaystarError as error:
    print(error)
ray_start.stop()
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return Files(tmp_path)


@pytest.mark.parametrize("beyond", [0, 1])
def test_sockets_whose_paths_are_just_short_enough_and_one_byte_too_long(beyond: int) -> None:
    """What is refused is what Ray itself cannot use, to the byte."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", STARTED, folder, str(beyond)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    first, second = done.stdout.splitlines()
    if not beyond:
        assert (first, second) == ("passed", "started"), done.stderr
        return
    assert first.startswith(f"RAY_TMPDIR={folder}/xx")
    assert "paths of 108 bytes, and the system takes 107; set RAY_TMPDIR to a folder with a short path" in first
    assert "AF_UNIX path length cannot exceed 107 bytes" in second


def test_a_long_tmpdir(files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/" + 60 * "j")
    error = refusal(tune.main, files.arguments("--dry-run"), capsys)
    assert f"TMPDIR=/tmp/{60 * 'j'}: Ray's sockets there would have paths of" in error
    assert "set RAY_TMPDIR" in error
    assert not files.out.exists()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert tune.main(files.arguments("--dry-run")) == 0


def test_a_home_that_cannot_be_written(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's token lies there, unless a variable holds it or names another file for it."""
    monkeypatch.setenv("HOME", "/proc/nobody")
    error = refusal(tune.main, files.arguments("--dry-run"), capsys)
    assert "/proc/nobody/.ray/auth_token" in error
    assert "RAY_AUTH_TOKEN_PATH" in error
    assert not files.out.exists()
    for name, value in (("RAY_AUTH_TOKEN_PATH", str(files.folder / "token")), ("RAY_AUTH_TOKEN", 64 * "a")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            assert tune.main(files.arguments("--dry-run")) == 0
    assert not (files.folder / "token").exists()  # a dry run leaves nothing


@needs_mounts
def test_a_full_folder_for_temporary_files(files: Files) -> None:
    command = [sys.executable, "-m", "raystar", "tune", *files.arguments()]
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as scratch:
        done = run_within([full(Path(scratch))], command, ROOT, RAY_TMPDIR=scratch)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: RAY_TMPDIR={scratch}: Ray cannot keep its files there (")
    assert len(done.stderr.splitlines()) == 1


def test_a_single_run_wants_a_place_for_temporary_files_too(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/nobody")
    error = refusal(train_main, ["--config", str(files.config), "--out", str(files.out)], capsys)
    assert error.startswith("error: /proc/nobody: takes no temporary files")
    assert not files.out.exists()
