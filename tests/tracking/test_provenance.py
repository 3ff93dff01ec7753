"""Which commit is recorded: that of raystar's own clone, and of no repository around it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import raystar
from raystar.tracking.tracker import commit_of, provenance
from tests.kit.support import ROOT

COMMIT = "mlflow.source.git.commit"


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder: Path) -> str:
    """A repository with one commit of all that is there; returns the commit."""
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "begun")
    return git(folder, "rev-parse", "HEAD")


def clone(folder: Path) -> Path:
    """What of a clone's files matters; returns its package."""
    (folder / "raystar").mkdir(parents=True)
    (folder / "raystar/__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder / "raystar"


def test_a_clone_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = clone(tmp_path / "raystar")
    assert commit_of(package) is None
    commit = repository(package.parent)
    assert commit_of(package) == commit
    other = tmp_path / "other"
    other.mkdir()
    repository(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))  # as in a hook of that repository
    assert commit_of(package) == commit


def test_below_another_repository_there_is_none(tmp_path: Path) -> None:
    project = tmp_path / "project"
    installed = project / ".venv/lib/python3.11/site-packages/raystar"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    unpacked = clone(project / "raystar-0.2")
    repository(project)  # whatever of it is committed there
    assert commit_of(installed) is None
    assert commit_of(unpacked) is None
    copied = tmp_path / "mine"
    shutil.copytree(unpacked, copied / "raystar")
    repository(copied)
    assert commit_of(copied / "raystar") is None  # the commit is one of that project
    fresh = clone(tmp_path / "fresh")
    (fresh.parent / ".gitignore").write_text("raystar\n")
    repository(fresh.parent)
    assert commit_of(fresh) is None


def test_what_ran_is_said_of_a_raystar_in_a_users_repository(tmp_path: Path) -> None:
    package = Path(raystar.__file__).parent
    shutil.copytree(package, tmp_path / "site/raystar", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    repository(tmp_path)
    code = "from raystar.tracking.tracker import provenance; print(provenance())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert "'raystar.version'" in done.stdout
    assert COMMIT not in done.stdout
    if (ROOT / ".git").exists():
        assert provenance()[COMMIT] == git(ROOT, "rev-parse", "HEAD")
