"""Whole sweeps as a user runs them: a process of its own, real latents on disk, a real MLflow store."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from raystar import export
from raystar.config.load import from_mapping, load_config, to_mapping
from raystar.exported import model as model_module
from raystar.exported.picture_translator import PictureTranslator
from raystar.model import checkpoint as checkpoints
from raystar.model import networks
from raystar.model.networks import Nets
from raystar.pictures.codec import open_codec
from raystar.tracking.mlflow.address import sqlite_file
from tests.kit.support import ROOT, tiny_config, write_latents

pytestmark = pytest.mark.slow

SPACE: dict[str, Any] = {
    "description": "a test",
    "trials": 5,
    "finalists": {"top": 3, "seeds": 0},
    "collapse": {"epochs": 0},  # after so few steps, all noises still give nearly the same
    "scheduler": {"type": "asha", "grace_epochs": 1, "reduction_factor": 2},
    "space": {"loss.w_cyc": {"loguniform": [0.1, 10.0]}, "loss.w_id": {"choice": [0.0, 1.0]}},
}


def request(folder: Path, space: dict[str, Any], **changed: Any) -> list[str]:
    """The command of a sweep on a few tiny latents."""
    latents = folder / "latents"
    if not latents.exists():
        write_latents(latents)
    settled = {"visualization__every_epochs": 1, "ruler__every_epochs": 1, "loss__ds_decay_epochs": 1}
    config = tiny_config(latents, **settled | changed)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_mapping(config)))
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    command = [sys.executable, "-m", "raystar.tune", "--space", str(folder / "space.yaml")]
    return [*command, "--config", str(folder / "config.yaml"), "--out", str(folder / "runs"), "--name", "s"]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


class Store:
    """Reads an MLflow SQLite store without MLflow."""

    def __init__(self, runs: Path) -> None:
        self.database = sqlite3.connect(runs / "mlflow.db")
        self.artifacts = runs / "artifacts"

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.database.execute(query, values).fetchall()

    def tags(self, run: str) -> dict[str, str]:
        return dict(self.rows("select key, value from tags where run_uuid = ?", run))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished sweep: its runs folder and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    done = run([*request(folder, SPACE, training__epochs=4), "--trials", "6"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return folder / "runs", done.stdout


def losses(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's `losses.csv`."""
    with (folder / "losses.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def summary_of(runs: Path) -> dict[str, Any]:
    return json.loads((runs / "s/summary.json").read_text())


def test_what_it_prints(sweep: tuple[Path, str]) -> None:
    runs, shown = sweep
    for noise in ("Traceback", "Warning", "WARNING", "INFO", "╭", "ray::", "(pid="):
        assert noise not in shown
    assert shown.startswith("sweep s: 6 trials of up to 4 epochs")
    best = summary_of(runs)["best"]
    assert re.search(rf"best {best['trial']}: score {best['score']:.4f} after epoch {best['score_epoch']}", shown)
    assert "mlflow ui --backend-store-uri sqlite:///" in shown
    assert re.search(r"python -m raystar\.export --sweep s --runs .* --out my_model", shown)


def test_the_printed_commands_run_as_they_stand(tmp_path: Path) -> None:
    """In a folder whose name a shell would take apart and a URI would cut; nothing lies beside it."""
    runs, space = tmp_path / "what? my 50%25 #runs, 'ü'", {**SPACE, "scheduler": {"type": "none"}}
    done = run([*request(tmp_path, space, training__epochs=1), "--trials", "2", "--out", str(runs)])
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert {path.name for path in runs.iterdir()} == {".mlflow.db.lock", "artifacts", "cache", "mlflow.db", "s"}
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "latents", "space.yaml", runs.name}
    assert "model: models:/" in done.stdout
    told = dict(re.findall(r"^(compare|export): +(.*)$", done.stdout, re.MULTILINE))
    words = shlex.split(told["export"])
    done = subprocess.run(
        [sys.executable, *words[1:-1], str(tmp_path / "my_model")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my_model/model.safetensors").read_bytes() == (runs / "s/best/model.safetensors").read_bytes()
    assert sqlite_file(shlex.split(told["compare"])[-1]) == runs / "mlflow.db"
    resumed = [sys.executable, "-m", "raystar.tune", "--resume", "s", "--trials", "3", "--out", str(runs)]
    assert run(resumed).returncode == 0
    assert Store(runs).rows("select count(*) from runs") == [(4,)]


def test_the_record(sweep: tuple[Path, str]) -> None:
    runs, _ = sweep
    summary = summary_of(runs)
    assert summary["status"] == "finished"
    assert [t["trial"] for t in summary["trials"]] == [f"t0{i}" for i in range(6)]
    assert {t["status"] for t in summary["trials"]} <= {"finished", "stopped"}
    baseline = summary["baseline"]
    assert baseline["trial"] == "t00"
    assert baseline["params"] == {"loss.w_cyc": 1.0, "loss.w_id": 1.0}
    assert baseline["status"] == "finished"  # never stopped early
    for trial in summary["trials"]:
        assert trial["score"] >= summary["best"]["score"]
        assert (trial["epochs"] == 4) == (trial["status"] == "finished")
        assert trial["run_id"]
    table = (runs / "s/summary.csv").read_text().splitlines()
    assert len(table) == 9  # with its head, and what a model has to beat
    assert [row.split(",")[:2] for row in table[7:]] == [
        ["doing nothing", "reference"],
        ["channel transfer", "reference"],
    ]
    assert table[1].startswith(summary["best"]["trial"])
    resolved = json.loads((runs / "s/sweep.json").read_text())
    assert resolved["config"]["training"]["epochs"] == 4
    assert resolved["code"]["torch"] == torch.__version__
    assert "raystar.tune" in resolved["command"]
    assert not list(runs.rglob("*.part"))
    for trial in summary["trials"]:
        folder = runs / "s/trials" / trial["trial"]
        assert load_config(folder / "config.yaml").loss.w_cyc == trial["params"]["loss.w_cyc"]
        rows = losses(folder)
        assert [int(row["epoch"]) for row in rows] == list(range(1, trial["epochs"] + 1))
        assert float(rows[-1]["score"]) == trial["score"]
        assert [int(row["global_step"]) for row in rows] == [4 * int(row["epoch"]) for row in rows]


def test_the_report(sweep: tuple[Path, str]) -> None:
    """It is there, says what the summary finally says, and lies with the contact sheet in the sweep's own run."""
    runs, shown = sweep
    assert f"report:  {runs / 's/report.html'}" in shown
    summary, text = summary_of(runs), (runs / "s/report.html").read_text()
    exact = dict(re.findall(r'data-fact="([^"]+)" data-value="([^"]+)"', text))
    assert exact["status"] == "finished"
    assert float(exact["best score"]) == summary["best"]["score"]
    assert float(exact["wall time"]) == summary["wall_s"]
    for trial in summary["trials"]:
        assert f'data-value="{trial["score"]}"' in text
    assert text.count("data:image/webp;base64,") > 6
    for name in ("report.html", "contact_sheet.png"):
        (attached,) = Store(runs).artifacts.rglob(name)
        assert attached.read_bytes() == (runs / "s" / name).read_bytes()


def test_mlflow_has_every_trial_once(sweep: tuple[Path, str]) -> None:
    runs, _ = sweep
    store, summary = Store(runs), summary_of(runs)
    found = dict(store.rows("select run_uuid, status from runs"))
    assert len(found) == 7
    assert set(found.values()) == {"FINISHED"}
    (parent,) = [run for run in found if "mlflow.parentRunId" not in store.tags(run)]
    assert store.tags(parent)["raystar.best_trial"] == summary["best"]["trial"]
    assert store.tags(parent)["mlflow.note.content"] == "a test"
    leading = [t["trial"] for t in sorted(summary["trials"], key=lambda t: t["score"])[:3]]
    ranks = {name: rank for rank, name in enumerate(dict.fromkeys([*leading, "t00"]), start=1)}
    for trial in summary["trials"]:
        run = trial["run_id"]
        tags = store.tags(run)
        assert tags["mlflow.parentRunId"] == parent
        assert tags["raystar.trial"] == tags["mlflow.runName"] == trial["trial"]
        assert tags["raystar.sweep"] == "s"
        assert tags["raystar.status"] == trial["status"]
        assert len(tags["raystar.signature"]) == 12
        params = dict(store.rows("select key, value from params where run_uuid = ?", run))
        assert {k: float(v) for k, v in params.items()} == trial["params"]
        for key in ("eval/score", "train/g_loss", "perf/samples_per_s"):
            steps = store.rows("select step, value from metrics where run_uuid = ? and key = ? order by step", run, key)
            assert [step for step, _ in steps] == list(range(1, trial["epochs"] + 1))
        query = "select value from metrics where run_uuid = ? and key = 'eval/score' and step = ?"
        assert store.rows(query, run, trial["epochs"]) == [(pytest.approx(trial["score"], rel=1e-12),)]
        assert tags["raystar.unmoved"] == str(trial["unmoved"]).lower()
        folder = store.artifacts / run / "artifacts"
        assert load_config(folder / "config.yaml").loss.w_cyc == trial["params"]["loss.w_cyc"]
        images = [p.name for p in (folder / "images").glob("*.png")]
        for key in ("grid_ref", "grid_noise"):
            steps = sorted(int(re.search(r"step[^0-9]*(\d+)", name)[1]) for name in images if name.startswith(key))  # type: ignore[index]
            assert steps == list(range(trial["epochs"] + 1))  # the untrained networks are epoch 0
        best = dict(store.rows("select key, value from latest_metrics where run_uuid = ? and key like 'final/%'", run))
        assert best.pop("final/rank", None) == ranks.get(trial["trial"])
        assert best == {"final/score": pytest.approx(trial["score"]), "final/epoch": trial["score_epoch"]}
    names = {p.name for p in (store.artifacts / parent / "artifacts").rglob("*") if p.is_file()}
    assert {"summary.json", "summary.csv", "config.yaml", "sweep.json", "grid.png"} <= names
    assert len(store.rows("select * from datasets")) == 1


def test_the_best_model_is_what_was_trained(sweep: tuple[Path, str]) -> None:
    runs, _ = sweep
    best = summary_of(runs)["best"]
    saved = checkpoints.load(runs / "s" / best["checkpoint"])
    assert saved["epoch"] == best["score_epoch"]
    config = from_mapping(saved["config"], "saved")
    assert config.loss.w_cyc == best["params"]["loss.w_cyc"]
    nets = Nets.create(config.model, 3, seed=0)
    nets.load_state_dict({name: saved[name] for name in "GFED"}, "saved")
    x = torch.randn(2, 4, 16, 16) * 5
    z = networks.noise(3, config.model.latent_dim)
    scale = config.training.latent_scale
    wanted = nets.translate(x * scale, nets.F(z.expand(2, -1), torch.tensor([1, 1]))) / scale
    assert torch.equal(model_module.load(runs / "s/best", "cpu").translate(x, "b", seed=3), wanted)
    assert {p.name for p in (runs / "s/best").iterdir()} == {
        "model.safetensors", "config.yaml", "metrics.json", "grid.png", "interpolation.png", "README.md",
    }  # fmt: skip


def test_export_by_name(sweep: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, _ = sweep
    assert export.main(["--sweep", "s", "--runs", str(runs), "--out", str(tmp_path / "m")]) == 0
    x = torch.randn(1, 4, 16, 16)
    ours, theirs = model_module.load(tmp_path / "m", "cpu"), model_module.load(runs / "s/best", "cpu")
    assert torch.equal(ours.translate(x, "c"), theirs.translate(x, "c"))


def test_the_finalists_are_models_in_the_store_and_the_best_is_champion(sweep: tuple[Path, str]) -> None:
    runs, shown = sweep
    store, summary = Store(runs), summary_of(runs)
    ranked = sorted(summary["trials"], key=lambda t: t["score"])
    found = dict(store.rows("select source_run_id, name from logged_models where status = 2"))  # ready
    assert found == {t["run_id"]: f"s-{t['trial']}" for t in ranked[:3]}
    assert len(store.rows("select * from logged_models")) == 3
    best = ranked[0]
    assert store.rows("select name, version, run_id from model_versions") == [("raystar-latents", 1, best["run_id"])]
    assert store.rows("select alias, version from registered_model_aliases") == [("champion", 1)]
    assert "model: models:/raystar-latents@champion (version 1)" in shown
    assert not (runs / "s/finalists").exists()  # delivered
    for trial in ranked[:5]:
        assert Path(store.tags(trial["run_id"])["raystar.checkpoint"]) == runs / "s" / trial["checkpoint"]
    assert "raystar.checkpoint" not in store.tags(ranked[5]["run_id"])
    facts = json.loads((runs / "s/best/metrics.json").read_text())
    assert facts["baseline"] == {"trial": "t00", "score": summary["baseline"]["score"]}
    assert facts["data"]["digest"] == store.rows("select digest from datasets")[0][0]


def test_how_busy_the_machine_was(sweep: tuple[Path, str]) -> None:
    runs, _ = sweep
    store = Store(runs)
    for trial in summary_of(runs)["trials"]:
        query = "select key, step, value from metrics where run_uuid = ? and key like 'system/%'"
        found = {(key, step): value for key, step, value in store.rows(query, trial["run_id"])}
        assert {step for _, step in found} == set(range(1, trial["epochs"] + 1))
        for epoch in range(1, trial["epochs"] + 1):
            assert 0 <= found["system/cpu_utilization_percentage", epoch] <= 100
            assert 0 < found["system/process_cpu_percentage", epoch] < 100 * (os.cpu_count() or 1) + 50
            assert 50 < found["system/process_memory_megabytes", epoch] < 20_000


def test_mlflow_predicts_with_the_champion(sweep: tuple[Path, str], tmp_path: Path) -> None:
    runs, _ = sweep
    latent = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(1)) * 5
    asked = {"dataframe_records": [{"latent": latent.tolist(), "domain": "b"}], "params": {"seed": 3, "latents": True}}
    (tmp_path / "in.json").write_text(json.dumps(asked))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "-m", "models:/raystar-latents@champion"]
    command += ["--env-manager", "local", "-i", str(tmp_path / "in.json"), "-o", str(tmp_path / "out.json")]
    settings = {"MLFLOW_TRACKING_URI": f"sqlite:///{runs}/mlflow.db", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (answer,) = json.loads((tmp_path / "out.json").read_text())["predictions"]
    best = model_module.load(runs / "s/best", "cpu")
    wanted = PictureTranslator(best, open_codec(best.config)[0]).restyle(latent[None], "b", None, 3)[0]
    assert torch.allclose(torch.tensor(answer["latent"]), wanted, rtol=1e-5, atol=1e-5)
    assert base64.b64decode(answer["picture"]).startswith(b"\x89PNG")


def test_export_from_the_store_alone(
    sweep: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, _ = sweep
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    summary = summary_of(runs)
    third = sorted(summary["trials"], key=lambda t: t["score"])[2]
    kept = (runs / "s/best/model.safetensors").read_bytes()
    (parent,) = Store(runs).rows("select run_uuid from runs where name = 's'")[0]
    (runs / "s").rename(tmp_path / "gone")
    try:
        for number, source in enumerate((["--sweep", "s"], ["--run", parent], ["--run", summary["best"]["run_id"]])):
            assert export.main([*source, "--runs", str(runs), "--out", str(tmp_path / f"m{number}")]) == 0
            assert (tmp_path / f"m{number}/model.safetensors").read_bytes() == kept
        assert export.main(["--run", third["run_id"], "--runs", str(runs), "--out", str(tmp_path / "third")]) == 0
    finally:
        (tmp_path / "gone").rename(runs / "s")
    assert json.loads((tmp_path / "third/metrics.json").read_text())["trial"] == third["trial"]
    saved = checkpoints.load(runs / "s" / third["checkpoint"])
    model = model_module.load(tmp_path / "third", "cpu")
    assert torch.equal(model.nets.G.state_dict()["decoder.2.bias"], saved["G"]["decoder.2.bias"])
    fourth = sorted(summary["trials"], key=lambda t: t["score"])[3]  # no model there, but a checkpoint
    assert export.main(["--run", fourth["run_id"], "--runs", str(runs), "--out", str(tmp_path / "fourth")]) == 0
    assert json.loads((tmp_path / "fourth/metrics.json").read_text())["trial"] == fourth["trial"]


def test_a_finished_sweep_that_is_resumed_hands_nothing_in_again(sweep: tuple[Path, str]) -> None:
    runs, _ = sweep
    tables = ("logged_models", "model_versions", "registered_model_aliases", "inputs", "metrics")

    def counts() -> list[Any]:
        return [Store(runs).rows(f"select count(*) from {table}") for table in tables]

    before = counts()
    done = run([sys.executable, "-m", "raystar.tune", "--resume", "s", "--out", str(runs)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert counts() == before
    assert not (runs / "s/finalists").exists()


def test_a_new_trial_starts_stepping_soon(sweep: tuple[Path, str]) -> None:
    """The point of reused processes: a fresh one would need several seconds."""
    idle = [t["idle_s"] for t in summary_of(sweep[0])["trials"] if t["idle_s"] is not None]
    assert len(idle) >= 2
    assert float(np.median(idle)) < 3.0


def test_few_latents_are_searched_and_measured_on_what_training_saw(tmp_path: Path) -> None:
    """One number or one for each domain; resumed, the sweep knows which it had; the run and the report say of what."""
    choices = [2, [4, 5, 6], 9]
    space = SPACE | {"trials": 4, "finalists": 0, "space": {"data.max_samples": {"choice": choices}}}
    done = run(request(tmp_path, space, training__epochs=1, data__holdout=0))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("note: data.holdout is 0: the ruler measures on training latents") == 1
    runs = tmp_path / "runs"
    found = {trial["trial"]: trial["params"]["data.max_samples"] for trial in summary_of(runs)["trials"]}
    assert found.pop("t00") is None
    assert sorted(map(str, found.values())) == sorted(map(str, choices))
    assert len(list((runs / "cache").glob("ruler-*.safetensors"))) == len(list((runs / "cache").glob("*.npy"))) == 1
    assert "measured on" in (runs / "s/report.html").read_text()
    store = Store(runs)
    tags = [store.tags(run_id) for (run_id,) in store.rows("select run_uuid from runs")]
    assert len(tags) == 5
    assert {tag["raystar.measured_on"] for tag in tags} == {"training latents"}
    signatures = {tag["raystar.signature"] for tag in tags if "raystar.trial" in tag}
    assert len(signatures) == 4
    (runs / "s/summary.csv").unlink()
    again = run([sys.executable, "-m", "raystar.tune", "--resume", "s", "--out", str(runs), "--trials", "4"])
    assert again.returncode == 0, again.stdout + again.stderr
    trials = {trial["trial"]: trial["params"]["data.max_samples"] for trial in summary_of(runs)["trials"]}
    assert trials == {"t00": None, **found}


def test_diverging_trials_are_told_apart_and_hold_up_nobody(tmp_path: Path) -> None:
    space = SPACE | {
        "search": "grid",
        "space": {"training.lr_g": {"choice": [1e-4, 1e30]}, "training.lr_d": {"choice": [1e-4]}},
    }
    done = run(request(tmp_path, space))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = summary_of(tmp_path / "runs")
    by_rate = {t["params"]["training.lr_g"]: t for t in summary["trials"]}
    assert by_rate[1e30]["status"] == "diverged"
    assert "NaN or infinite" in by_rate[1e30]["reason"]
    assert by_rate[1e-4]["status"] == "finished"
    assert summary["best"]["params"]["training.lr_g"] == 1e-4
    store = Store(tmp_path / "runs")
    assert store.tags(by_rate[1e30]["run_id"])["raystar.reason"] == by_rate[1e30]["reason"]
    assert dict(store.rows("select run_uuid, status from runs"))[by_rate[1e30]["run_id"]] == "FAILED"
    assert "diverged" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def start(command: list[str], until: str) -> subprocess.Popen[str]:
    """Starts a sweep and returns once it has printed a line with `until`."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if until in line:
            return process
    raise AssertionError(process.communicate())


def trial_processes(mark: str | None = None) -> list[int]:
    """Processes that run trials of sweeps that were started with RAYSTAR_TEST_MARK set so, by default to our number."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes().decode(errors="replace")
                environment = (entry / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if (
                re.match(r"ray::(?!IDLE|\w+Agent)", title)
                and f"RAYSTAR_TEST_MARK={mark or os.getpid()}\0" in environment
            ):
                found.append(int(entry.name))
    return found


def test_a_single_run_is_tracked_saved_and_resumed(tmp_path: Path) -> None:
    log = tmp_path / "logs/console.log"
    request(tmp_path, SPACE, training__save_interval=2, training__log_json=True, training__console_log_path=str(log))
    command = [sys.executable, "-m", "raystar.train", "--config", str(tmp_path / "config.yaml")]
    command += ["--out", str(tmp_path / "runs"), "--name", "one"]
    first = run([*command, "--epochs", "3"])
    assert first.returncode == 0, first.stdout + first.stderr
    folder = tmp_path / "runs/one"
    assert sorted(p.name for p in folder.glob("*.pt")) == ["epoch_0002.pt", "epoch_0003.pt", "latest.pt"]
    assert len(list((folder / "vis").glob("grid_*.png"))) == 8
    assert sorted(log.read_text().splitlines()) == sorted((first.stdout + first.stderr).splitlines())
    assert load_config(folder / "config.yaml").training.epochs == 3
    again = run([*command, "--epochs", "3"])
    assert again.returncode == 2
    assert "resume it with --resume" in again.stderr
    more = run([*command, "--epochs", "5", "--resume"])
    assert more.returncode == 0, more.stdout + more.stderr
    assert checkpoints.load(folder / "latest.pt")["epoch"] == 5
    whole = run([*command[:-1], "whole", "--epochs", "5"])
    assert whole.returncode == 0
    resumed, undisturbed = (checkpoints.load(tmp_path / f"runs/{name}/latest.pt") for name in ("one", "whole"))
    for net in "GFED":
        for key, value in undisturbed[net].items():
            assert torch.equal(value, resumed[net][key]), (net, key)
    store = Store(tmp_path / "runs")
    runs = dict(store.rows("select name, run_uuid from runs where status = 'FINISHED'"))
    assert set(runs) == {"one", "whole"}
    assert len(store.rows("select * from runs")) == 2
    assert store.tags(runs["one"])["raystar.checkpoint"] == str(folder.resolve() / "latest.pt")
    for name in runs:  # each epoch once, whether the run was resumed or not
        for key in ("eval/score", "train/g_loss", "perf/samples_per_s"):
            found = store.rows("select step from metrics where run_uuid = ? and key = ? order by step", runs[name], key)
            assert [step for (step,) in found] == [1, 2, 3, 4, 5]
        images = (store.artifacts / runs[name] / "artifacts/images").glob("grid_ref*.png")
        assert sorted(int(image.name.split("+")[2]) for image in images) == [0, 1, 2, 3, 4, 5]
    curve = [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_s")} for row in losses(folder)]
    assert [row["epoch"] for row in curve] == ["1", "2", "3", "4", "5"]
    undisturbed_rows = losses(tmp_path / "runs/whole")
    assert curve == [{key: row[key] for key in curve[0]} for row in undisturbed_rows]
    assert load_config(folder / "config.yaml").training.epochs == 5
    summaries = [line.removeprefix("[Epoch Summary] ") for line in whole.stdout.splitlines() if line.startswith("[")]
    for line, row in zip(map(json.loads, summaries), undisturbed_rows, strict=True):
        assert {key: repr(line[key]) for key in row} == row
    assert log.read_text().count("[Epoch Summary] ") == 3 + 2 + 5
    assert "resume it with --resume" not in log.read_text()  # refused before
    for shown in (first, more, whole):
        assert "Traceback" not in shown.stdout + shown.stderr
        assert "Warning" not in shown.stdout + shown.stderr


def test_a_killed_run_is_recorded_once(tmp_path: Path) -> None:
    """Killed between checkpoints, and before the first one: the epochs are trained again, their record stays."""
    request(tmp_path, SPACE, training__save_interval=3)
    command = [sys.executable, "-m", "raystar.train", "--config", str(tmp_path / "config.yaml")]
    command += ["--out", str(tmp_path / "runs"), "--name", "one", "--epochs", "6"]
    spool = tmp_path / "runs/one/spool.jsonl"
    for done in (1, 4):
        resume = ["--resume"] if spool.exists() else []
        process = subprocess.Popen([*command, *resume], cwd=ROOT, stdout=subprocess.DEVNULL)
        while f'"epoch":{done},' not in (spool.read_text() if spool.exists() else ""):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
    more = run([*command, "--resume"])
    assert more.returncode == 0, more.stdout + more.stderr
    store = Store(tmp_path / "runs")
    assert store.rows("select name, status from runs") == [("one", "FINISHED")]
    steps = store.rows("select step from metrics where key = 'eval/score' order by step")
    assert [step for (step,) in steps] == [1, 2, 3, 4, 5, 6]
    images = store.artifacts.rglob("grid_noise*.png")
    assert sorted(int(image.name.split("+")[2]) for image in images) == [0, 1, 2, 3, 4, 5, 6]
    assert [int(row["epoch"]) for row in losses(tmp_path / "runs/one")] == [1, 2, 3, 4, 5, 6]


def test_a_store_that_cannot_be_opened_is_one_error_and_leaves_the_name_free(tmp_path: Path) -> None:
    store = tmp_path / "mlflow.db"
    with sqlite3.connect(store) as database:  # of a version that this MLflow does not know
        database.execute("create table alembic_version (version_num varchar(32))")
        database.execute("insert into alembic_version values ('from the future')")
        database.execute("create table experiments (experiment_id integer primary key)")
    done = run([*request(tmp_path, SPACE), "--tracking-uri", f"sqlite:///{store}"])
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.fullmatch(r"error: the MLflow store at sqlite:.* cannot be used .*--tracking-uri\n", done.stderr)
    assert not (tmp_path / "runs/s").exists()


def test_a_started_sweep_is_quick_to_refuse(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run([*request(tmp_path, SPACE), "--set", "loss.w_cycl=2"])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert time.monotonic() - began < 15


SABOTAGE = """
import sys
if any("default_worker" in argument for argument in sys.orig_argv):
    import raystar.training.compile
    raystar.training.compile._compile = lambda net, config: lambda *inputs: 1.5 * net(*inputs)
"""


def test_a_speed_sweep_never_prefers_what_is_wrong_and_leaves_an_overlay(tmp_path: Path) -> None:
    """Every compiled network is made wrong in the trials' processes: the gate catches it, and it is never best."""
    space = {
        "purpose": "speed",
        "search": "grid",
        "scheduler": {"type": "none", "max_epochs": 2},
        "resources": {"cpus": "auto"},
        "space": {"training.use_compile": {"choice": [False, True]}},
    }
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = request(tmp_path, space, training__epoch_size=40)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "1 trial at a time" in done.stdout
    folder = tmp_path / "runs/s"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metric"] == "perf/speedup"
    right, wrong = summary["trials"]
    assert right["status"] == "finished"
    assert summary["best"] == right
    assert right["score"] > 0
    assert not any(key.startswith("eval/") for key in right["metrics"])
    assert wrong["status"] == "failed"
    assert wrong["reason"].startswith("wrong results: ")
    assert yaml.safe_load((folder / "fastest.yaml").read_text()) == {"training": {"use_compile": False}}
    assert not (folder / "best").exists()
    assert re.findall(r"^  (t\d+) +[\d.]+ +[\d.]+ +0 s  baseline$", done.stdout, re.MULTILINE) == ["t00"]
    # And the overlay is taken: over the configuration, under --set.
    planned = run([*command[:-1], "o", "--overlay", str(folder / "fastest.yaml"), "--dry-run"])
    assert planned.returncode == 0, planned.stderr
