"""Runs that may only be read: what looks at them works, what would change them says that it cannot, in one line."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from raystar.base.console import run_cli
from raystar.config.load import to_mapping
from raystar.train import main as train_main
from tests.kit.autoencoder import save_block_averages
from tests.kit.mounts import needs_mounts, read_only, run_within
from tests.kit.support import ROOT, tiny_config, write_latents
from tests.kit.sweeps import draw_pictures, make_sweep
from tests.pictures.test_encode import fill

RUN_ALL = """
import contextlib, io, json, sys
from raystar.__main__ import main
from raystar.base.console import run_cli

for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_cli(lambda: main(arguments))
        except SystemExit as ended:
            status = ended.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""
"""Commands one after the other in one process, whose imports take seconds."""


def outcomes(runs: Path, commands: list[list[str]], cwd: Path) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each, with `runs` on a file system that may only be read."""
    (cwd / "commands.json").write_text(json.dumps(commands))
    script = f"{shlex.join([sys.executable, '-c', RUN_ALL])} < commands.json"
    done = run_within([read_only(runs)], ["sh", "-c", script], cwd, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A sweep with pictures, and a run whose record is in the MLflow store."""
    latents = write_latents(tmp_path / "latents")
    values = to_mapping(tiny_config(latents, training__epochs=1))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"trials": 2, "space": {"loss.w_cyc": {"uniform": [0.5, 2]}}}))
    runs = tmp_path / "runs"
    draw_pictures(make_sweep(runs, 3))
    assert train_main(["--config", str(tmp_path / "config.yaml"), "--out", str(runs), "--name", "one"]) == 0
    return runs


def run_id(runs: Path) -> str:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return str(run.info.run_id)


@needs_mounts
def test_runs_on_a_file_system_that_may_only_be_read(runs: Path, tmp_path: Path) -> None:
    checkpoint, config = str(runs / "one/latest.pt"), ["--config", str(tmp_path / "config.yaml")]
    space = ["--space", str(tmp_path / "space.yaml"), *config]
    work: dict[str, list[str]] = {
        "page.html": ["report", "--sweep", "s", "--out", "page.html"],
        "by_run": ["export", "--run", run_id(runs), "--out", "by_run"],
        "by_file": ["export", "--checkpoint", checkpoint, "--out", "by_file"],
        "scored": ["score", "--checkpoint", checkpoint, "--out", "scored"],
    }
    others = ["--set", "data.domains=[b,a,c]", "--map-domains"]
    refused: list[tuple[list[str], str]] = [
        (["report", "--sweep", "s"], "name a file elsewhere with --out"),
        (["report", "--sweep", "s", "--out", "runs/page.html"], "choose another folder"),
        (["export", "--checkpoint", checkpoint, "--out", "runs/model"], "choose another folder"),
        (["export", "--checkpoint", checkpoint, "--legacy-pt", "runs/model.pt"], "choose another folder"),
        (["score", "--checkpoint", checkpoint, "--out", "runs/scored"], "choose another folder"),
        (["score", "--checkpoint", checkpoint, *others], "name another folder in data.cache_dir"),
        (["tune", "--resume", "s"], "copy the runs to where they can be written, and resume there"),
        (["tune", *space, "--name", "new"], "choose another folder"),
        (["tune", *space, "--name", "new", "--dry-run"], "choose another folder"),
        (["train", *config, "--name", "new"], "choose another folder"),
        (["train", *config, "--name", "one", "--resume", "--epochs", "2"], "copy it to where it can be continued"),
        (["encode", "--images", "pics", "--vae", "vae", "--out", "runs/latents"], "choose another folder"),
    ]
    save_block_averages(tmp_path / "vae")
    fill(tmp_path / "pics", "a/one.png")
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    found = outcomes(runs, [*work.values(), *(arguments for arguments, _ in refused)], tmp_path)
    for name, (status, out, err) in zip(work, found, strict=False):
        assert status == 0, (name, out, err)
        assert (tmp_path / name).exists()
    for (arguments, words), (status, out, err) in zip(refused, found[len(work) :], strict=True):
        assert (status, out) == (2, ""), (arguments, out, err)
        assert err.startswith("error: "), arguments
        assert "Read-only file system" in err, arguments
        assert err.endswith(f"{words}\n"), (arguments, err)
        assert len(err.splitlines()) == 1, (arguments, err)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


@pytest.mark.parametrize(("number", "one_line"), [(errno.EROFS, True), (errno.EACCES, True), (errno.EBADF, False)])
def test_what_the_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str], number: int, one_line: bool) -> None:
    """Whatever meets it; an error that does not speak for itself keeps its trace."""

    def main() -> int:
        raise OSError(number, os.strerror(number), "runs/s/it")

    with pytest.raises(SystemExit if one_line else OSError) as ended:
        run_cli(main)
    if one_line:
        assert ended.value.code == 1  # type: ignore[union-attr]
        assert capsys.readouterr().err == f"error: runs/s/it: {os.strerror(number)}\n"
