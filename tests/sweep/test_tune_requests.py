"""Bad requests: each is one clear line and exit status 2, before Ray is even imported."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from raystar import train, tune
from raystar.base import console
from raystar.base.console import run_cli
from raystar.base.errors import RaystarError
from raystar.config.load import to_mapping
from raystar.export import main as export_main
from raystar.sweep import plan, resources
from raystar.train import main as train_main
from tests.kit.support import ROOT, tiny_config, write_latents

SPACE: dict[str, Any] = {"trials": 2, "space": {"loss.w_cyc": {"uniform": [0.5, 2.0]}}}


class Files:
    """A good request on disk, for a test to spoil."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.latents = write_latents(folder / "latents")
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(to_mapping(tiny_config(self.latents))))
        self.space = folder / "space.yaml"
        self.space.write_text(yaml.safe_dump(SPACE))
        self.out = folder / "runs"

    def arguments(self, *more: str) -> list[str]:
        return ["--space", str(self.space), "--config", str(self.config), "--out", str(self.out), *more]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def refusal(main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one error of a request that must be refused."""
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: main(arguments))
    shown = capsys.readouterr()
    assert stopped.value.code == 2, shown
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err + shown.out
    return shown.err


def test_a_good_request_is_listed(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(files.arguments("--dry-run", "--trials", "5", "--epochs", "3", "--name", "n")) == 0
    shown = capsys.readouterr().out
    assert "sweep n: 5 trials of up to 3 epochs" in shown
    assert "t00 (baseline): loss.w_cyc=1.0" in shown
    assert "t04: loss.w_cyc=" in shown
    assert "then the best 3 and the baseline again at full length, from seeds 1, 2: up to 8 trials more" in shown
    assert not (files.out / "n").exists()


@pytest.mark.parametrize(
    ("space", "setting", "words"),
    [
        (SPACE["space"], "20", "ds_decay_epochs 20 outlasts training.epochs 8: .* from 1 to 0.65, .*\\(5 of 5 trials"),
        (SPACE["space"], "0.5", None),
        ({"loss.ds_decay_epochs": {"uniform": [0.2, 0.8]}}, "20", r"ds_decay_epochs 20 .*\(1 of 5 trials\)"),
        ({"loss.ds_decay_epochs": {"choice": [0.5, 30]}}, "20", r"ds_decay_epochs 20 .*\(2 of 3 trials\)"),
    ],
    ids=str,
)
def test_a_schedule_that_outlasts_the_trials_is_told_once(
    files: Files, capsys: pytest.CaptureFixture[str], space: dict[str, Any], setting: str, words: str | None
) -> None:
    files.space.write_text(yaml.safe_dump(SPACE | {"trials": 5, "space": space}))
    arguments = files.arguments("--dry-run", "--epochs", "8", "--set", f"loss.ds_decay_epochs={setting}")
    assert tune.main(arguments) == 0
    shown = [line for line in capsys.readouterr().err.splitlines() if "outlasts" in line]
    assert len(shown) == (words is not None)
    if words is not None:
        assert re.search(words, shown[0]), shown


@pytest.mark.parametrize(("setting", "told"), [("20", True), ("0.5", False)])
def test_a_run_is_told_of_a_schedule_that_outlasts_it(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, setting: str, told: bool
) -> None:
    def stop(config: Any, device: Any) -> None:
        raise RaystarError("far enough")

    monkeypatch.setattr(train, "initial_state", stop)
    arguments = ["--config", str(files.config), "--out", str(files.out), "--name", "x", "--epochs", "8"]
    with pytest.raises(RaystarError, match="far enough"):
        train_main([*arguments, "--set", f"loss.ds_decay_epochs={setting}"])
    assert capsys.readouterr().err.count("note: loss.ds_decay_epochs 20 outlasts training.epochs 8") == told


def test_a_search_that_draws_as_it_goes_is_told_what_it_may_draw(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    for choices, told in (([0.5, 30, 20], True), ([0.5, 4, 20], True), ([0.5, 4], False)):
        space = {"loss.ds_decay_epochs": {"choice": choices}}
        files.space.write_text(yaml.safe_dump(SPACE | {"search": "tpe", "baseline": False, "space": space}))
        assert tune.main(files.arguments("--dry-run", "--epochs", "8")) == 0
        assert ("outlasts training.epochs 8" in capsys.readouterr().err) == told, choices


def test_workers_are_listed_and_counted(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "usable_cpus", lambda: 13)
    monkeypatch.setattr(resources, "usable_cpus", lambda: 13)
    files.space.write_text(yaml.safe_dump(SPACE | {"trials": 9, "resources": {"workers": 3, "cpus": 2}}))
    assert tune.main(files.arguments("--dry-run")) == 0
    assert "a trial takes 2 cpu and 0 gpu for each of 3 workers" in capsys.readouterr().out
    assert plan.make_plan(tune.request_of(tune.parser().parse_args(files.arguments()))).at_a_time == 2


NOTED = "note: data.holdout is 0: the ruler measures on training latents"


@pytest.mark.parametrize(("setting", "told"), [("0", True), ("0.25", False)])
def test_a_holdout_of_nothing_is_told_once(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, setting: str, told: bool
) -> None:
    def stop(config: Any, device: Any) -> None:
        raise RaystarError("far enough")

    console.show()
    assert tune.main(files.arguments("--dry-run", "--set", f"data.holdout={setting}")) == 0
    shown = capsys.readouterr()
    assert shown.err.count(NOTED) == told
    assert f"a: {20 if told else 15} latents to train on, {0 if told else 5} held out" in shown.out
    monkeypatch.setattr(train, "initial_state", stop)
    with pytest.raises(RaystarError, match="far enough"):
        train_main(["--config", str(files.config), "--out", str(files.out), "--set", f"data.holdout={setting}"])
    assert capsys.readouterr().err.count(NOTED) == told


def test_few_latents_are_listed_and_epochs_without_a_step_refused(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    console.show()
    space = {"data.max_samples": {"choice": [2, [4, 5, 6]]}}
    files.space.write_text(yaml.safe_dump(SPACE | {"trials": 3, "space": space}))
    assert tune.main(files.arguments("--dry-run", "--set", "data.max_samples=[7,8,9]")) == 0
    shown = capsys.readouterr()
    assert "a: 7 latents to train on, 5 held out\n  b: 8 latents to train on" in shown.out
    assert "t00 (baseline): data.max_samples=[7, 8, 9]" in shown.out
    assert "data.max_samples=[4, 5, 6]" in shown.out
    assert "epoch_size" not in shown.err
    assert tune.main(files.arguments("--dry-run", "--set", "training.epoch_size=null")) == 0
    assert "data.max_samples: without training.epoch_size an epoch of fewer" in capsys.readouterr().err
    arguments = files.arguments("--dry-run", "--set", "training.epoch_size=null", "--set", "training.batch_size=8")
    assert "training.batch_size 8 is more than an epoch's 6 samples" in refusal(tune.main, arguments, capsys)


CASES: list[tuple[list[str], list[str]]] = [
    (["--set", "loss.w_cycl=2"], ["--set", "loss.w_cycl", "did you mean 'loss.w_cyc'"]),
    (["--set", "loss.w_cyc"], ["expected key=value"]),
    (["--set", "loss.w_cyc=[1"], ["cannot be read as YAML"]),
    (["--set", "training.batch_size=-3"], ["training.batch_size", "at least 1", "-3"]),
    (["--set", "data.domains=[a,b,d]"], ["no folder for domain 'd'", "a, b, c"]),
    (["--set", "data.data_root=nowhere"], ["nowhere", "found nothing"]),
    (["--set", "visualization.vae_model_name_or_path=./nowhere"], ["nowhere", "hub name"]),
    (["--set", "data.holdout=0.01"], ["held-out", "data.holdout=0 to measure on training's"]),
    (["--set", "data.max_samples=[1,2]"], ["data.max_samples", "each of the 3 domains", "found 2"]),
    (["--set", "training.device=cuda"], ["cuda"]),
    (["--name", "../escape"], ["--name '../escape'", "no path"]),
    (["--name", "a/b"], ["no path"]),
    (["--name", ".."], ["no path"]),
    (["--name", "x" * 65], ["64"]),
    (["--name", ""], ["--name ''"]),
    (["--name", "cache"], ["its own files"]),
    (["--trials", "0"], ["--trials", "at least 1"]),
    (["--epochs", "0"], ["--epochs", "at least 1"]),
    (["--max-concurrent", "-1"], ["--max-concurrent"]),
    (["--time-budget", "soon"], ["--time-budget", "30m"]),
    (["--tracking-uri", "./mlruns"], ["--tracking-uri", "sqlite"]),
    (["--tracking-uri", "http://127.0.0.1:9"], ["nothing answers", "mlflow server"]),
]


@pytest.mark.parametrize(("arguments", "words"), CASES, ids=[" ".join(c[0])[:40] for c in CASES])
def test_bad_arguments(
    files: Files, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    error = refusal(tune.main, files.arguments(*arguments), capsys)
    for word in words:
        assert word in error
    assert not (files.out / "mlflow.db").exists()
    assert not list(files.out.glob("space-*"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"resources": {"gpus": 1}}, ["resources.gpus", "this machine has 0", "auto"]),
        ({"resources": {"cpus": 4000}}, ["resources.cpus", "4000"]),
        ({"resources": {"cpus": 2, "workers": 2000}}, ["resources.cpus", "2000 workers want 4000"]),
        ({"resources": {"workers": 2, "gpus": 1}}, ["resources.gpus", "2 workers want 2", "this machine has 0"]),
        (
            {"resources": {"workers": 2}, "space": {"training.batch_size": {"choice": [8, 1]}}},
            ["resources.workers", "2 workers share every batch", "can be 1"],
        ),
        ({"space": {"loss.w_cyc": {"uniform": [2.0, 0.5]}}}, ["loss.w_cyc", "low < high"]),
        ({"space": {"loss.w_cycl": {"uniform": [0.5, 2.0]}}}, ["'loss.w_cyc'"]),
        ({"scheduler": {"grace_epochs": 50}}, ["grace_epochs 50", "2 epochs"]),
    ],
)
def test_bad_spaces(
    files: Files,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    words: list[str],
) -> None:
    monkeypatch.setattr(plan, "usable_cpus", lambda: 8)
    files.space.write_text(yaml.safe_dump(SPACE | changed))
    error = refusal(tune.main, files.arguments(), capsys)
    for word in [str(files.space), *words]:
        assert word in error


@pytest.mark.parametrize("main", [tune.main, train_main], ids=["tune", "train"])
def test_a_vae_of_other_latents(files: Files, capsys: pytest.CaptureFixture[str], main: Any) -> None:
    """Before anything is packed; a hub that is away is left alone."""
    folder = files.folder / "vae"
    folder.mkdir()
    config = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8], "scaling_factor": 0.13025}
    (folder / "config.json").write_text(json.dumps(config))
    space = ["--space", str(files.space)] if main is tune.main else []
    arguments = [*space, "--config", str(files.config), "--out", str(files.out), "--set"]
    error = refusal(main, [*arguments, f"visualization.vae_model_name_or_path={folder}"], capsys)
    assert f"visualization.vae_model_name_or_path: {folder}/config.json: expected an autoencoder of Stable" in error
    assert "found scaling_factor 0.13025" in error
    assert not list(files.out.glob("cache/latents-*"))


def test_latents_that_the_ruler_cannot_look_at(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep ranks by its score; a single run goes without it, and without pictures where nothing decodes them."""
    latents = files.folder / "sixteen"
    for domain in "abc":
        (latents / domain).mkdir(parents=True)
        for number in range(6):
            latent = np.random.default_rng(number).standard_normal((16, 8, 8))
            np.save(latents / domain / f"{number}x.npy", latent.astype(np.float16))
    config = yaml.safe_load(files.config.read_text())
    config["data"]["data_root"], config["model"]["latent_channels"] = str(latents), 16
    config["training"]["epochs"], config["visualization"]["every_epochs"] = 1, 1
    files.config.write_text(yaml.safe_dump(config))
    error = refusal(tune.main, files.arguments(), capsys)
    assert "model.latent_channels is 16: the ruler looks at pictures" in error
    assert "a sweep ranks trials by it: train single runs" in error
    assert not list(files.out.glob("cache/latents-*"))
    assert train_main(["--config", str(files.config), "--out", str(files.out), "--name", "one"]) == 0
    shown = capsys.readouterr()
    assert "note: no score: model.latent_channels is 16: the ruler looks at pictures" in shown.err
    assert "note: no pictures: model.latent_channels is 16, and the built-in decoder takes 4" in shown.err
    assert f"finished; no score; checkpoints in {files.out / 'one'}\n" in shown.out
    assert not (files.out / "one/vis").exists()
    assert torch.load(files.out / "one/latest.pt", weights_only=True)["epoch"] == 1


def test_missing_files(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(tune.main, ["--space", str(files.folder / "spase.yaml"), "--out", str(files.out)], capsys)
    assert "did you mean 'space.yaml'" in error
    error = refusal(tune.main, files.arguments("--config", str(files.folder)), capsys)
    assert "found a folder" in error
    files.config.write_text("model: {base_dmi: 8}")
    assert "did you mean 'model.base_dim'" in refusal(tune.main, files.arguments(), capsys)


def test_an_empty_domain(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (files.latents / "b").iterdir():
        file.unlink()
    assert "expected latents (*.pt or *.npy), found none" in refusal(tune.main, files.arguments(), capsys)


class Bomb:
    """A pickle that leaves a mark if it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_bad_latents_are_listed_together(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    mark = files.folder / "executed"
    good = np.zeros((4, 16, 16), np.float16)
    np.save(files.latents / "a/shape.npy", good[:3])
    nan = good.copy()
    nan[0, 0, 0] = np.nan
    np.save(files.latents / "b/nan.npy", nan)
    np.save(files.latents / "b/cut.npy", good)
    cut = files.latents / "b/cut.npy"
    cut.write_bytes(cut.read_bytes()[:200])
    (files.latents / "c/bomb.pt").write_bytes(pickle.dumps(Bomb(mark)))
    error = refusal(tune.main, files.arguments(), capsys)
    assert "4 of 64 latents cannot be used" in error
    for word in [
        "a/shape.npy: expected shape [4,H,W], found [3, 16, 16]",
        "b/nan.npy: holds NaN",
        "b/cut.npy",
        "bomb.pt",
    ]:
        assert word in error
    assert not mark.exists()


def test_a_used_name(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    (files.out / "mine").mkdir(parents=True)
    assert "is there already" in refusal(tune.main, files.arguments("--name", "mine"), capsys)


def test_train_and_export_refuse_too(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(files.config), "--out", str(files.out)]
    assert "no path" in refusal(train_main, [*config, "--name", "a/b"], capsys)
    assert "--name" in refusal(train_main, [*config, "--resume"], capsys)
    assert "holds no checkpoint" in refusal(train_main, [*config, "--name", "none", "--resume"], capsys)
    out = ["--out", str(files.folder / "model")]
    assert "no such sweep" in refusal(export_main, ["--sweep", "none", "--runs", str(files.out), *out], capsys)
    missing = ["--checkpoint", str(files.folder / "none.pt"), *out]
    assert "expected a checkpoint, found nothing" in refusal(export_main, missing, capsys)


def test_ray_and_mlflow_are_not_even_imported(files: Files) -> None:
    code = (
        "import sys\nfrom raystar import tune\nfrom raystar.base.errors import RaystarError\n"
        "try:\n    tune.main(sys.argv[1:])\nexcept RaystarError as error:\n    print(error)\n"
        "print([m for m in ('ray', 'mlflow', 'diffusers') if m in sys.modules])"
    )
    arguments = files.arguments("--set", "loss.w_cycl=1")
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.splitlines()[-1] == "[]", found.stdout + found.stderr
    assert found.stderr == ""
