"""Sweeps of named experiments: their names, their order, and what a resumed one takes from a changed file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from raystar import tune
from raystar.base.errors import RaystarError
from raystar.base.journal import Journal
from raystar.record.events import ENDED, EPOCH, SESSION, STARTED
from raystar.record.statuses import FINISHED
from raystar.record.summary import Summary
from raystar.record.sweep_file import JOURNAL, write_record
from raystar.search.searchers import SEARCHERS
from raystar.sweep import run as sweep_run
from raystar.sweep.plan import Plan, make_plan
from tests.sweep.test_sweep import Store, request, run, summary_of
from tests.sweep.test_tune_requests import Files, refusal

NAMES = ["z10", "a.b", "cyc-2"]
EXPERIMENTS: list[dict[str, Any]] = [
    {"name": "z10", "overrides": {"loss.w_cyc": 10, "training.seed": 3}},
    {"name": "a.b", "overrides": {"loss": {"w_cyc": 0.5}}},
    {"name": "cyc-2", "overrides": {"training.batch_size": 2}},
]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def plan_of(files: Files, content: dict[str, Any] | None = None, *flags: str) -> Plan:
    if content is not None:
        files.space.write_text(yaml.safe_dump(content, sort_keys=False))
    return make_plan(tune.request_of(tune.parser().parse_args(files.arguments("--name", "s", *flags))))


def resumed(files: Files, content: dict[str, Any] | None = None, *flags: str) -> Plan:
    if content is not None:
        files.space.write_text(yaml.safe_dump(content, sort_keys=False))
    arguments = ["--resume", "s", "--out", str(files.out), *flags]
    return make_plan(tune.request_of(tune.parser().parse_args(arguments)))


def begin(plan: Plan, trials: int) -> None:
    """What a sweep leaves whose first trials have ended."""
    plan.folder.mkdir(parents=True)
    write_record(plan.folder, plan.record)
    journal = Journal(plan.folder / JOURNAL)
    journal.append({"event": SESSION, "at": time.time()})
    for name, values in list(plan.known.items())[:trials]:
        for event, facts in (
            (STARTED, {"params": values}),
            (EPOCH, {"epoch": plan.config.training.epochs, "metrics": {"eval/score": 1.0}, "idle_s": None}),
            (ENDED, {"status": FINISHED, "reason": None}),
        ):
            journal.append({"event": event, "at": time.time(), "trial": name, **facts})
    journal.close()


def resuming(runs: Path) -> list[str]:
    """The command that resumes the sweep."""
    return [sys.executable, "-m", "raystar.tune", "--resume", "s", "--out", str(runs)]


def summary_at(plan: Plan) -> Summary:
    return sweep_run._ledger(plan).summary


# -- what is planned -------------------------------------------------------------------------------


def test_a_dry_run_lists_them(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.space.write_text(yaml.safe_dump({"trials": 3, "experiments": EXPERIMENTS}))
    assert tune.main(files.arguments("--dry-run", "--name", "s")) == 0
    shown = capsys.readouterr()
    assert "sweep s: 3 trials of up to 2 epochs" in shown.out
    lines = [line.strip() for line in shown.out.splitlines()[-3:]]
    assert lines == [
        "z10: loss.w_cyc=10.0  training.seed=3  training.batch_size=4",
        "a.b: loss.w_cyc=0.5  training.seed=0  training.batch_size=4",
        "cyc-2: loss.w_cyc=1.0  training.seed=0  training.batch_size=2",
    ]
    assert "trials has no effect: the file draws no trials" in shown.err
    assert "--trials: " in refusal(tune.main, files.arguments("--trials", "2"), capsys)


def test_beside_a_space_drawn_trials_are_numbered_by_themselves(files: Files) -> None:
    content = {"trials": 3, "experiments": EXPERIMENTS, "space": {"loss.w_id": {"uniform": [0.1, 2.0]}}}
    plan = plan_of(files, content)
    assert plan.names == ["t00", *NAMES, "t01", "t02"]
    assert (plan.baseline, plan.trials, list(plan.known)) == ("t00", 6, plan.names)
    assert plan_of(files, None, "--trials", "1").names == ["t00", *NAMES]
    assert plan_of(files, content | {"baseline": False}).names == [*NAMES, "t00", "t01", "t02"]
    named = plan_of(files, content | {"experiments": [*EXPERIMENTS, {"name": "stays"}]})
    assert (named.baseline, named.names) == ("stays", [*NAMES, "stays", "t00", "t01", "t02"])


def test_what_has_no_effect_and_what_runs_twice_is_said(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    plan_of(files, {"experiments": {"a": {"loss.w_cyc": 2}, "b": {"loss": {"w_cyc": 2.0}}}})
    assert "experiments a, b are the same; each of them runs" in capsys.readouterr().err


def test_workers_share_the_smallest_batch_of_an_experiment(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("plan", "resources"):
        monkeypatch.setattr(f"raystar.sweep.{module}.usable_cpus", lambda: 8)
    content = {"resources": {"workers": 3}, "experiments": EXPERIMENTS}
    with pytest.raises(RaystarError, match=r"3 workers share every batch, and training\.batch_size can be 2"):
        plan_of(files, content)


# -- resumed ---------------------------------------------------------------------------------------


def test_resumed_they_keep_their_names_and_a_longer_sweep_draws_more(files: Files) -> None:
    content = {"trials": 3, "experiments": EXPERIMENTS, "space": {"loss.w_id": {"uniform": [0.1, 2.0]}}}
    plan = plan_of(files, content)
    begin(plan, 2)
    again = resumed(files)
    assert (again.names, again.known, again.baseline) == (plan.names, plan.known, "t00")
    assert [record.status for record in summary_at(again).trials.values()] == ["finished"] * 2 + ["pending"] * 4
    longer = resumed(files, None, "--trials", "5")
    assert longer.names == [*plan.names, "t03", "t04"]
    assert list(longer.known.items())[:6] == list(plan.known.items())
    with pytest.raises(RaystarError, match="sweep s has 3 trials beside its 3 experiments; expected at least as many"):
        resumed(files, None, "--trials", "2")


def test_experiments_may_be_added_to_a_sweep(files: Files) -> None:
    """With keys that nobody has set before: those that ran had the configuration's."""
    begin(plan_of(files, {"experiments": EXPERIMENTS}), 3)
    added = {"experiments": [EXPERIMENTS[0], {"name": "new", "overrides": {"loss.w_id": 0}}, *EXPERIMENTS[1:]]}
    with pytest.raises(RaystarError, match="not what the sweep began with"):
        resumed(files, added)
    plan = resumed(files, None, "--force")
    assert plan.names == ["z10", "new", "a.b", "cyc-2"]
    trials = summary_at(plan).trials
    assert {name: record.status for name, record in trials.items()} == {
        "z10": "finished", "new": "pending", "a.b": "finished", "cyc-2": "finished",
    }  # fmt: skip
    assert trials["z10"].params == {
        "loss.w_cyc": 10.0, "training.seed": 3, "training.batch_size": 4, "loss.w_id": 1.0,
    }  # fmt: skip
    assert trials["new"].params["loss.w_id"] == 0.0


def test_experiments_that_are_there_stay_as_they_are(files: Files) -> None:
    begin(plan_of(files, {"experiments": EXPERIMENTS}), 2)
    with pytest.raises(
        RaystarError, match=r"experiments: a\.b: the sweep has this already, and the file has it no more"
    ):
        resumed(files, {"experiments": [EXPERIMENTS[0], EXPERIMENTS[2]]}, "--force")
    changed = json.loads(json.dumps(EXPERIMENTS))
    changed[2]["overrides"] = {"training.batch_size": 8}  # has not begun
    found = summary_at(resumed(files, {"experiments": changed}, "--force"))
    assert found.trials["cyc-2"].params["training.batch_size"] == 8
    changed[1]["overrides"] = {"loss.w_cyc": 0.7}
    plan = resumed(files, {"experiments": changed}, "--force")
    with pytest.raises(RaystarError, match=r"a\.b: loss\.w_cyc: it has begun with 0\.5, found 0\.7; put that back"):
        summary_at(plan)


# -- run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished sweep of three experiments: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("experiments")
    command = request(folder, {"experiments": EXPERIMENTS}, training__epochs=1, training__epoch_size=8)
    done = run([*command, "--max-concurrent", "1"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return folder, done.stdout


def test_three_named_trials_run_in_order_under_their_names(ran: tuple[Path, str]) -> None:
    folder, shown = ran
    runs = folder / "runs"
    summary, store = summary_of(runs), Store(runs)
    assert [trial["trial"] for trial in summary["trials"]] == NAMES
    assert {trial["status"] for trial in summary["trials"]} == {"finished"}
    assert [trial["params"] for trial in summary["trials"]] == [
        {"loss.w_cyc": 10.0, "training.seed": 3, "training.batch_size": 4},
        {"loss.w_cyc": 0.5, "training.seed": 0, "training.batch_size": 4},
        {"loss.w_cyc": 1.0, "training.seed": 0, "training.batch_size": 2},
    ]
    started = [line["trial"] for line in Journal(runs / "s" / JOURNAL) if line["event"] == STARTED]
    assert started == NAMES
    found = store.rows("select run_uuid, name from runs order by start_time")
    assert [name for _, name in found] == ["s", *NAMES]
    assert [t["run_id"] for t in summary["trials"]] == [run_id for run_id, _ in found[1:]]
    for run_id, name in found[1:]:
        assert store.tags(run_id)["mlflow.runName"] == store.tags(run_id)["raystar.trial"] == name
        assert store.tags(run_id)["mlflow.parentRunId"] == found[0][0]
    assert sorted(path.name for path in (runs / "s/trials").iterdir()) == sorted(NAMES)
    assert f"best {summary['best']['trial']}: score" in shown
    table = (runs / "s/summary.csv").read_text().splitlines()
    assert table[0].endswith("loss.w_cyc,training.batch_size,training.seed")
    page = (runs / "s/report.html").read_text()
    for word in (*NAMES, "w_cyc", "batch_size", "10, 0.5, 1"):  # the last: what experiments have tried
        assert word in page, word


@pytest.mark.slow
def test_one_more_is_added_and_the_sweep_goes_on(ran: tuple[Path, str]) -> None:
    folder, _ = ran
    runs = folder / "runs"
    before = summary_of(runs)["trials"]
    path = folder / "space.yaml"
    more = {"name": "no-id", "overrides": {"loss.w_id": 0}}
    path.write_text(yaml.safe_dump({"experiments": [more, *EXPERIMENTS]}))
    done = run([*resuming(runs), "--force"])
    assert done.returncode == 0, done.stdout + done.stderr
    trials = {trial["trial"]: trial for trial in summary_of(runs)["trials"]}
    assert list(trials) == ["no-id", *NAMES]
    for trial in before:
        assert trials[trial["trial"]]["params"] == trial["params"] | {"loss.w_id": 1.0}
        assert trials[trial["trial"]]["score"] == trial["score"]
    assert trials["no-id"]["status"] == "finished"
    assert [name for (name,) in Store(runs).rows("select name from runs order by start_time")] == ["s", *NAMES, "no-id"]


@pytest.mark.slow
def test_the_finals_take_experiments_and_a_search_that_learns_stands_beside_them(tmp_path: Path) -> None:
    """One experiment lies in the space, one outside of it; the baseline is a third. A broken-off sweep is resumed."""
    pytest.importorskip(SEARCHERS["tpe"].package or "raystar")
    space = {
        "search": "tpe",
        "trials": 3,
        "finalists": {"top": 1, "seeds": 1},
        "collapse": {"epochs": 0},
        "experiments": {"inside": {"loss.w_cyc": 0.5}, "outside": {"model.style_dim": 4}},
        "space": {"loss.w_cyc": {"loguniform": [0.25, 4.0]}},
    }
    command = request(tmp_path, space, training__epochs=2, training__epoch_size=8)
    done = run([*command, "--time-budget", "1s"])
    assert done.returncode in (0, 1), done.stdout + done.stderr
    done = run(resuming(tmp_path / "runs"))
    assert done.returncode == 0, done.stdout + done.stderr
    trials = {trial["trial"]: trial for trial in summary_of(tmp_path / "runs")["trials"]}
    searched = [name for name, trial in trials.items() if trial["parent"] is None]
    assert searched[:3] == ["t00", "inside", "outside"]
    assert sorted(searched[3:]) == ["t01", "t02"]
    for name in searched:
        assert trials[name]["params"].keys() == {"loss.w_cyc", "model.style_dim"}, name
        assert (trials[name]["params"]["model.style_dim"] == 4) == (name == "outside")
    repeats = [name for name, trial in trials.items() if trial["parent"] is not None]
    assert "t00-s1" in repeats
    assert {trials[name]["status"] for name in repeats} == {"finished"}
    assert summary_of(tmp_path / "runs")["finals"]["ranked"]
