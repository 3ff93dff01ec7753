"""The ways into raystar: verbs, modules, imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raystar import SweepRequest, __version__, run_sweep
from raystar import __main__ as entry
from raystar.base.errors import RaystarError
from raystar.config.load import to_yaml
from tests.kit.support import ROOT, tiny_config, write_latents


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("verb", entry.VERBS)
def test_a_verb_is_its_module(verb: str) -> None:
    by_verb, by_module = run("-m", "raystar", verb, "--help"), run("-m", f"raystar.{verb}", "--help")
    assert by_verb.returncode == by_module.returncode == 0
    assert by_verb.stdout == by_module.stdout != ""
    assert by_verb.stderr == by_module.stderr == ""


def test_help_lists_every_verb_at_once() -> None:
    done = run("-X", "importtime", "-m", "raystar", "--help")
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


FROM_PYTHON = """
import json, sys
from pathlib import Path
from raystar import SweepRequest, run_sweep
folder = Path(sys.argv[1])
request = SweepRequest(
    space=folder / "space.yaml", config=folder / "config.yaml", out=folder / "runs", name="p", trials=2, epochs=2
)
summary = run_sweep(request, values={"loss.w_sty": 0.5, "data.domains": ["a", "b"], "training.progress_style": "off"})
print("silent from here")
again = run_sweep(resume="p", out=folder / "runs", show=False)
assert again.best.trial == summary.best.trial
print(json.dumps([summary.status, summary.best.trial, [r.trial for r in summary.trials.values()]]))
"""


@pytest.mark.slow
def test_a_sweep_from_python(tmp_path: Path) -> None:
    """The same as the command's: its folder, its store, and what was asked for in its record."""
    config = tiny_config(write_latents(tmp_path / "latents", ("a", "b")), ("a", "b"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "space.yaml").write_text("finalists: 1\nspace:\n  loss.w_cyc: {loguniform: [0.1, 10.0]}\n")
    done = run("-c", FROM_PYTHON, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    *printed, silent, last = done.stdout.splitlines()
    assert printed[0].startswith("sweep p: 2 trials of up to 2 epochs")
    assert silent == "silent from here"
    status, best, trials = json.loads(last)
    assert (status, trials) == ("finished", ["t00", "t01"])
    assert best in trials
    record = json.loads((tmp_path / "runs/p/sweep.json").read_text())
    assert record["config"]["loss"]["w_sty"] == 0.5
    assert record["request"]["set"] == ["loss.w_sty=0.5", "data.domains=[a, b]", "training.progress_style='off'"]
    assert (tmp_path / "runs/p/best/model.safetensors").is_file()


def test_a_wrong_request_from_python() -> None:
    with pytest.raises(RaystarError, match="--space: expected a space file"):
        run_sweep()
    with pytest.raises(RaystarError, match=r"did you mean 'loss\.w_cyc'"):
        run_sweep(space="search_spaces/loss.yaml", values={"loss.w_cycl": 2})
    with pytest.raises(TypeError, match="trials beside a request"):
        run_sweep(SweepRequest(space="search_spaces/loss.yaml"), trials=2)
    with pytest.raises(TypeError, match="trial"):
        run_sweep(space="search_spaces/loss.yaml", trial=2)
