"""The ways into raystar: verbs, modules, imports."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from raystar import __main__ as entry
from raystar import __version__
from raystar.base.errors import RaystarError
from tests.support import ROOT


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("verb", entry.VERBS)
def test_a_verb_is_its_module(verb: str) -> None:
    by_verb, by_module = run("-m", "raystar", verb, "--help"), run("-m", f"raystar.{verb}", "--help")
    assert by_verb.returncode == by_module.returncode == 0
    assert by_verb.stdout == by_module.stdout != ""
    assert by_verb.stderr == by_module.stderr == ""


def test_help_lists_every_verb_at_once() -> None:
    began = time.monotonic()
    done = run("-X", "importtime", "-m", "raystar", "--help")
    assert time.monotonic() - began < 3  # 0.1 s where nothing else runs
    assert done.returncode == 0
    assert all(f"  {verb} " in done.stdout for verb in entry.VERBS)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "ray", "mlflow", "numpy", "yaml"}


def test_importing_raystar_imports_nothing_large() -> None:
    done = run("-c", "import sys, raystar; print([m for m in ('torch', 'ray', 'mlflow', 'numpy') if m in sys.modules])")
    assert done.stdout.strip() == "[]"


def test_no_verb_and_a_wrong_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([]) == 2
    assert "usage: raystar COMMAND" in capsys.readouterr().out
    with pytest.raises(RaystarError, match=r"unknown command 'tunes' \(did you mean 'tune'\?\); known: tune, train"):
        entry.main(["tunes"])
    done = run("-m", "raystar", "tunes")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"raystar {__version__}\n"


def test_arguments_go_to_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RaystarError, match="--space: expected a space file"):
        entry.main(["tune", "--epochs", "2"])
