"""Trials that start from a checkpoint's networks: what fits, what is kept of it, what a trial makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raystar.base.errors import RaystarError
from raystar.config.load import load_config, override
from raystar.config.schema import Config
from raystar.data.bank import open_bank
from raystar.model import checkpoint as checkpoints
from raystar.record.sweep_file import write_record
from raystar.training.resume import initial_state, snapshot
from raystar.training.state import TrainState
from raystar.training.trainer import Trainer
from tests.kit.support import tiny_config
from tests.sweep.test_experiments import files, plan_of, resumed
from tests.sweep.test_sweep import request, run, summary_of
from tests.sweep.test_tune_requests import Files

__all__ = ["files"]
KEY = "checkpoint.init_from"


def save(config: Config, path: Path, seed: int = 5) -> Path:
    """A checkpoint of networks that no seed of the sweep's gives."""
    state = TrainState.create(override(config, {"training.seed": seed}), "cpu")
    checkpoints.save(path, snapshot(state, 3, {}))
    return path


def test_the_file_is_kept_for_the_sweep(files: Files, tmp_path: Path) -> None:
    config = plan_of(files).config
    saved = save(config, tmp_path / "mine.pt")
    plan = plan_of(files, None, "--set", f"{KEY}={saved}")
    (name,) = plan.starts.values()
    assert (plan.cache_dir / name).read_bytes() == saved.read_bytes()
    assert plan.record["starts"] == {str(saved): name}
    plan.folder.mkdir(parents=True)
    write_record(plan.folder, plan.record)
    assert resumed(files).starts == plan.starts
    save(config, saved, seed=6)
    with pytest.raises(RaystarError, match=rf"not what the sweep began with:\n  {KEY}: {saved}: {name} then, start-"):
        resumed(files)
    saved.unlink()
    assert resumed(files).starts == plan.starts  # its copy is there
    (plan.cache_dir / name).unlink()
    with pytest.raises(RaystarError, match=rf"{KEY}: {saved}: expected a checkpoint, found nothing \(looked for /"):
        resumed(files)


def test_what_does_not_fit_a_trial_is_refused_before_any_begins(files: Files, tmp_path: Path) -> None:
    saved = save(plan_of(files).config, tmp_path / "mine.pt")
    content = {"experiments": {"same": {"loss.w_cyc": 2}, "wide": {"model.base_dim": 16}}}
    with pytest.raises(RaystarError, match=rf"{KEY}: wide: .*mine\.pt: network G does not fit the configuration"):
        plan_of(files, content, "--set", f"{KEY}={saved}")
    content = {"experiments": {"fresh": {"model.base_dim": 16}, "from": {KEY: str(saved)}}}
    assert list(plan_of(files, content).starts) == [str(saved)]
    content = {"trials": 6, "space": {KEY: {"choice": [str(saved), str(tmp_path / "other.pt")]}}}
    with pytest.raises(RaystarError, match=r"other\.pt: expected a checkpoint, found nothing"):
        plan_of(files, content)


def test_a_trial_starts_from_the_files_networks(tmp_path: Path) -> None:
    """Bitwise as a run of the same configuration does; the trial beside it starts fresh."""
    small = {"training__epochs": 1, "training__epoch_size": 8, "visualization__every_epochs": 0}
    config = tiny_config(tmp_path / "latents", **small)
    saved = save(config, tmp_path / "mine.pt")
    space = {"experiments": {"fresh": {"loss.w_cyc": 2}, "mine": {KEY: str(saved), "loss.w_cyc": 2}}}
    done = run(request(tmp_path, space, **small))
    assert done.returncode == 0, done.stdout + done.stderr
    config = override(load_config(tmp_path / "config.yaml"), {"training.progress_style": "off"})
    bank = open_bank(config, tmp_path / "cache")
    trials = {trial["trial"]: trial for trial in summary_of(tmp_path / "runs")["trials"]}
    assert trials["fresh"]["params"][KEY] is None
    for name in ("fresh", "mine"):
        own = override(config, trials[name]["params"])
        (progress,) = Trainer(own, bank, state=initial_state(own, "cpu")).run()
        found = checkpoints.load(tmp_path / f"runs/s/trials/{name}/epoch_0001.pt")
        for key, value in progress.checkpoint["G"].items():
            assert torch.equal(found["G"][key], value), (name, key)
