"""What version 0.1 wrote is read, exported, served and resumed by the code of today (of_0_1/README.md)."""

from __future__ import annotations

import html
import json
import os
import re
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from raystar import export, report, tune
from raystar.base.errors import RaystarError
from raystar.config.load import load_config, override
from raystar.exported.model import add_onnx
from raystar.model import checkpoint as checkpoints
from raystar.record import results
from raystar.sweep.plan import Plan, make_plan
from raystar.train import initial_state
from tests.kit.support import ROOT

ARCHIVE = Path(__file__).parent / "of_0_1/runs.tar.xz"
PLACE = "/tmp/raystar-0.1"  # where 0.1 ran
COMMIT = "43ee4df0a72c865ce8f677a35fafef57cda4c1f0"


def unpack(folder: Path) -> Path:
    """The folder in which 0.1 was run, as if it had been run there."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    there = folder / "raystar-0.1"
    for path in there.rglob("*.json*"):
        text = path.read_text()
        if PLACE in text:
            path.write_text(text.replace(PLACE, str(there)))
    with sqlite3.connect(there / "runs/mlflow.db") as store:
        tables = [name for (name,) in store.execute("select name from sqlite_master where type = 'table'")]
        for table in tables:
            for _, column, kind, *_ in store.execute(f"pragma table_info({table})").fetchall():
                if "CHAR" in kind or "TEXT" in kind:
                    places = f'replace("{column}", ?, ?) where instr("{column}", ?)'
                    store.execute(f'update {table} set "{column}" = {places}', (PLACE, str(there), PLACE))
    store.close()
    return there


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = unpack(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def plan_of(*flags: str) -> Plan:
    return make_plan(tune.request_of(tune.parser().parse_args(flags)))


def run(module: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command as a user gives it, in the folder of 0.1."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", module, *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def page_of(sweep: str) -> str:
    """The text of a sweep's report."""
    assert report.main(["--sweep", sweep]) == 0
    page = (Path("runs") / sweep / "report.html").read_text()
    page = re.sub(r"<(script|style)[ >].*?</\1>", "", page, flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", " ", page)
    return re.sub(r"\s+", " ", html.unescape(text))


@pytest.mark.parametrize("sweep", ["done", "cut"])
def test_report(there: Path, sweep: str) -> None:
    """It has 0.1's numbers, and says by which ruler they are."""
    text = page_of(sweep)
    summary = json.loads((there / "runs" / sweep / "summary.json").read_text())
    assert f"score {summary['best']['score']:.4f} after epoch {summary['best']['score_epoch']}" in text
    for trial in summary["trials"]:
        assert trial["trial"] in text
        assert trial["score"] is None or f"{trial['score']:.4f}" in text
    assert "A sweep of raystar 0.1, whose ruler looked at latents: 1 is perfect, doing nothing scores 2.25." in text
    assert "the mean of (1 + style)(1 + content)" in text
    for of_today in ("(0.1 + style)", "scores 1.1", "0.1 is perfect", "measured last", "outlook", "None", "nan"):
        assert of_today not in text


def test_report_of_speed(there: Path) -> None:
    text = page_of("speed")
    assert "A sweep of raystar 0.1: a trial's value is the best of its epochs" in text
    assert "doing nothing" not in text
    assert "None" not in text


def test_rungs_are_where_they_were(there: Path) -> None:
    """A space file of 0.1 that leaves the first rung open had it at epoch 1, and ranked by what the sweep was for."""
    assert results.read(there / "runs/cut").rungs[0] == 1
    assert results.read(there / "runs/cut").ranking == ("eval/score", "min")
    assert results.read(there / "runs/speed").ranking == ("perf/speedup", "max")
    assert results.read(there / "runs/done").curve("t02").keys() == {1}  # which is where it was stopped


def test_exported_models_translate_as_they_did(there: Path) -> None:
    expected = np.load("expected.npz")
    latents = torch.from_numpy(expected["latents"])
    for source in ([], ["--sweep", "done"], ["--sweep", "done", "--runs", "elsewhere"]):
        # The last knows the MLflow store alone.
        uri = ["--tracking-uri", f"sqlite:///{there}/runs/mlflow.db"]
        made = Path("exported") if not source else there / f"made{len(source)}"
        assert not source or export.main([*source, *uri, "--out", str(made)]) == 0
        model = export.load(made, "cpu")
        found = {"noise": model.translate(latents, "b", seed=3)}
        found["reference"] = model.translate(latents, "a", reference=latents)
        for name, value in found.items():
            np.testing.assert_allclose(value.numpy(), expected[name], rtol=0, atol=1e-5)


def test_cards_say_whose_ruler_measured(there: Path) -> None:
    """Also those that are written today: of a checkpoint, and of an export to which graphs are added."""
    assert export.main(["--checkpoint", "runs/done/trials/t01/epoch_0001.pt", "--out", "made"]) == 0
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    add_onnx("exported")
    for card in (Path("made/README.md").read_text(), Path("exported/README.md").read_text()):
        assert "by the ruler of raystar 0.1, whose scores cannot be compared" in card
        assert "doing nothing scores 2.25" in card
        assert "scores 1.1" not in card


def test_champion_is_served_as_it_was(there: Path) -> None:
    import mlflow
    import pandas as pd

    expected = np.load("expected.npz")
    mlflow.set_tracking_uri(f"sqlite:///{there}/runs/mlflow.db")  # which sets MLFLOW_TRACKING_URI
    try:
        model = mlflow.pyfunc.load_model("models:/raystar-latents@champion")
    finally:
        mlflow.set_tracking_uri(None)
    row = {"latent": expected["latents"][0].astype(float).tolist(), "domain": "b"}
    found = model.predict(pd.DataFrame([row]), params={"seed": 3, "latents": True})
    np.testing.assert_allclose(np.asarray(found["latent"][0]), expected["served"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("flags", [[], ["--trials", "5"]])
@pytest.mark.parametrize("sweep", ["done", "cut"])
def test_sweeps_for_the_score_are_not_resumed_unasked(there: Path, sweep: str, flags: list[str]) -> None:
    """Scores of two rulers have no common ranking; what can be done is said."""
    with pytest.raises(RaystarError) as refused:
        plan_of("--resume", sweep, *flags)
    line, *listed = str(refused.value).splitlines()
    assert line.startswith(f"--resume {sweep}: its scores are those of another ruler, of an earlier version")
    assert f"start a new sweep, or continue with the raystar that began it (0.1, commit {COMMIT})" in line
    assert "or set them aside with --force, and go by what is measured from now on:" in line
    assert re.fullmatch(r"  code: \d+ of raystar's files are others, as in another version", listed[-1])


def test_by_force_they_have_what_they_began_with(there: Path) -> None:
    """The configuration and the space of the record: files that shipped with 0.1 are others now."""
    for name in ("config.yaml", "space.yaml"):
        (there / name).write_text("{}")
    plan = plan_of("--resume", "cut", "--force")
    before = json.loads((there / "runs/cut/sweep.json").read_text())
    assert plan.points == before["points"]
    assert plan.config.training.epochs == before["config"]["training"]["epochs"]
    assert (plan.space.scheduler.grace_epochs, plan.space.ranking) == (1, ("eval/score", "min"))
    assert (plan.space.finalists.top, plan.seeds) == (3, [])
    assert (plan.record["first_ruler"], plan.record["ruler"] is None) == (None, False)


@pytest.mark.slow
def test_a_sweep_that_was_cut_off_is_resumed(there: Path) -> None:
    """What 0.1 measured is set aside; trials continue from their checkpoints, and are ranked by today's ruler."""
    record = there / "runs/cut/sweep.json"
    content = json.loads(record.read_text())
    content["config"]["training"]["epochs"] = 6
    record.write_text(json.dumps(content))
    then = json.loads((there / "runs/cut/summary.json").read_text())["trials"]
    done = run("raystar.tune", "--resume", "cut", "--force", cwd=there)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note: scores of 2 trials are another ruler's and are set aside: only what is measured now" in done.stderr
    assert f"another ruler measured it up to epoch {then[0]['epochs']}, score " in done.stdout
    assert not re.search(r"t00 .* epoch [1-4]/6  score", done.stdout)
    summary = json.loads((there / "runs/cut/summary.json").read_text())
    assert summary["status"] == "finished"
    old = {trial["score"] for trial in then}
    for trial in summary["trials"]:
        assert trial["status"] in ("finished", "stopped")
        assert trial["score"] not in old
        assert 5 <= trial["score_epoch"] <= 6 or trial["trial"] == "t02"
        assert "eval/movement" in trial["metrics"]
    curves = results.read(there / "runs/cut").curves["t00"]
    assert ["eval/score" in curves[epoch] for epoch in sorted(curves)][:4] == [False] * 4
    assert "eval/score" in curves[6]
    again = run("raystar.tune", "--resume", "cut", cwd=there)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "set aside" not in again.stderr


@pytest.mark.slow
def test_a_finished_sweep_gets_longer(there: Path) -> None:
    """Its trials of 0.1 keep their checkpoints and are not ranked; there must be something to measure."""
    journal = (there / "runs/done/journal.jsonl").read_bytes()
    record = (there / "runs/done/sweep.json").read_bytes()
    done = run("raystar.tune", "--resume", "done", "--force", cwd=there)
    assert done.returncode == 2
    assert "nothing is left to train; ask for more with --trials, or start a new sweep" in done.stderr
    assert (there / "runs/done/journal.jsonl").read_bytes() == journal
    assert (there / "runs/done/sweep.json").read_bytes() == record
    checkpoint = there / "runs/done/trials/t01/epoch_0001.pt"
    assert checkpoint.exists()
    done = run("raystar.tune", "--resume", "done", "--force", "--trials", "4", cwd=there)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = {trial["trial"]: trial for trial in json.loads((there / "runs/done/summary.json").read_text())["trials"]}
    assert [trials[name]["score"] for name in ("t00", "t01", "t02")] == [None] * 3
    assert trials["t03"]["score"] is not None
    assert json.loads((there / "runs/done/summary.json").read_text())["best"]["trial"] == "t03"
    assert checkpoint.exists()
    assert page_of("done")


def test_sweeps_for_speed_are_resumed_by_force(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RaystarError) as refused:
        plan_of("--resume", "speed")
    lines = str(refused.value).splitlines()
    assert lines[0] == "--resume speed: not what the sweep began with:"
    assert re.fullmatch(r"  code: \d+ of raystar's files are others, as in another version", lines[-2])
    assert not [line for line in lines if "configuration:" in line or "space:" in line]
    plan = plan_of("--resume", "speed", "--force")
    assert "of raystar's files are others" in capsys.readouterr().err
    assert plan.space.scheduler.grace(plan.config.training.epochs) == 1
    before = json.loads((there / "runs/speed/sweep.json").read_text())
    assert plan.points == before["points"]


def test_checkpoints_start_new_runs(there: Path) -> None:
    place = "runs/cut/trials/t00/epoch_0004.pt"
    config = override(load_config("config.yaml"), {"checkpoint.init_from": place})
    state = initial_state(config, torch.device("cpu"))
    weights = checkpoints.load(place)
    for name, net in state.nets.items():
        for key, value in net.state_dict().items():
            assert torch.equal(value, weights[name][key])


@pytest.mark.slow
def test_a_run_is_resumed(there: Path) -> None:
    """In its own MLflow run, which says that its scores are of two rulers."""
    flags = ["--config", "config.yaml", "--set", "visualization.every_epochs=0", "--name", "single", "--resume"]
    done = run("raystar.train", *flags, "--epochs", "3", cwd=there)
    assert done.returncode == 0, done.stderr
    said = "scores up to epoch 2 are of raystar 0.1's ruler, not to be compared with later ones"
    assert f"note: {said}" in done.stderr
    assert checkpoints.load(there / "runs/single/latest.pt")["epoch"] == 3
    with sqlite3.connect(there / "runs/mlflow.db") as store:
        (run_id,) = store.execute("select run_uuid from runs where name = 'single'").fetchone()
        steps = store.execute("select distinct step from metrics where run_uuid = ? and key = 'eval/score'", [run_id])
        assert sorted(step for (step,) in steps) == [1, 2, 3]
        query = "select value from tags where run_uuid = ? and key = 'mlflow.note.content'"
        assert store.execute(query, [run_id]).fetchone() == (said,)
    store.close()


@pytest.mark.slow
def test_a_speed_sweep_is_resumed_and_gets_longer(there: Path) -> None:
    """Trials of both versions have the value by which MLflow's table sorts."""
    done = run("raystar.tune", "--resume", "speed", "--force", "--trials", "4", cwd=there)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((there / "runs/speed/summary.json").read_text())
    assert summary["status"] == "finished"
    assert [trial["trial"] for trial in summary["trials"]] == ["t00", "t01", "t02", "t03"]
    with sqlite3.connect(there / "runs/mlflow.db") as store:
        query = "select value from latest_metrics where run_uuid = ? and key = 'final/speedup'"
        for trial in summary["trials"]:
            assert store.execute(query, [trial["run_id"]]).fetchone() == (pytest.approx(trial["score"]),)
    store.close()
    assert "--resume" not in done.stdout  # nothing is left to do


@pytest.mark.slow
def test_a_new_sweep_shares_the_store(there: Path) -> None:
    """Its champion is not compared with 0.1's, whose score is of another ruler; 0.1's model stays, and loads."""
    space = Path("loss-space.yaml").read_text() + "collapse: {epochs: 0}\n"
    Path("new.yaml").write_text(space)
    flags = ["--space", "new.yaml", "--config", "config.yaml", "--name", "new", "--trials", "2"]
    done = run("raystar.tune", *flags, cwd=there)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "version 1 was, on other data or by another measure" in done.stdout
    with sqlite3.connect(there / "runs/mlflow.db") as store:
        assert store.execute("select count(*) from experiments where name = 'raystar'").fetchone() == (1,)
        assert store.execute("select alias, version from registered_model_aliases").fetchall() == [("champion", 2)]
        # No run has values of both: 0.1's are `best/score`, those of today `final/score`.
        both = "select count(*) from latest_metrics a join latest_metrics b using (run_uuid) "
        assert store.execute(f"{both} where a.key = 'best/score' and b.key = 'final/score'").fetchone() == (0,)
    store.close()
    assert run("raystar.export", "--sweep", "done", "--out", "old", cwd=there).returncode == 0
    assert run("raystar.export", "--sweep", "new", "--out", "young", cwd=there).returncode == 0
