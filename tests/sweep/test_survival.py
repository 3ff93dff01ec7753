"""Sweeps that die in every way, as a user sees them: processes killed, disks filled, files damaged; then `--resume`.

Whatever happens, every trial is accounted for once, no epoch is logged twice, no run is left RUNNING, the best can be
exported, and trials end bit for bit as in a sweep that nothing happened to. `tests/faults` makes trials go wrong.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raystar import tune
from raystar.base.errors import RaystarError
from raystar.base.locks import running
from raystar.base.machine import usable_cpus
from raystar.exported import model
from raystar.model import checkpoint as checkpoints
from raystar.sweep import run as sweep
from raystar.sweep.plan import make_plan
from tests.kit.cluster import cluster
from tests.kit.support import ROOT, write_latents
from tests.sweep.test_sweep import Store, request, run, start, summary_of, trial_processes
from tests.tracking.test_tracking import Server

pytestmark = pytest.mark.slow

WEIGHTS = [1.0, 2.0, 3.0]  # of the cycle; the baseline's is the first
EPOCHS = 4
EPOCH_SIZE = 60


def space(weights: list[float] = WEIGHTS, **changed: Any) -> dict[str, Any]:
    """One trial for each weight, none stopped early, all checkpoints kept."""
    return {
        "search": "grid",
        "scheduler": {"type": "none"},
        "keep": 20,
        "finalists": 3,
        "collapse": {"epochs": 0},
        "space": {"loss.w_cyc": {"choice": weights}},
        **changed,
    }


def command(folder: Path, wanted: dict[str, Any], **changed: Any) -> list[str]:
    return request(folder, wanted, **{"training__epochs": EPOCHS, "training__epoch_size": EPOCH_SIZE, **changed})


def resumed(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "raystar.tune", "--resume", "s", "--out", str(folder / "runs"), *flags]


class Faults:
    """What goes wrong in the trials of the sweeps that a test starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.plan([])

    def plan(self, faults: list[dict[str, Any]]) -> None:
        for done in self.folder.glob("done-*"):
            done.unlink()
        (self.folder / "faults.json").write_text(json.dumps(faults))

    def kills(self, driver: int) -> None:
        (self.folder / "driver").write_text(str(driver))


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    folder = tmp_path / "faults"
    monkeypatch.setenv("RAYSTAR_TEST_MARK", str(os.getpid()))
    monkeypatch.setenv("RAYSTAR_TEST_FAULTS", str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests/faults"), str(ROOT)]))
    return Faults(folder)


def ended(process: subprocess.Popen[str], status: int) -> str:
    """What a sweep printed from here on, once it has ended with `status`, without a stack trace."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, out + err
    assert "Traceback" not in out + err
    return out + err


def finished(done: subprocess.CompletedProcess[str], status: int = 0) -> str:
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def weights_of(runs: Path, storage: Path | None = None) -> dict[float, dict[str, Any]]:
    """Every trial's best checkpoint, by the trial's weight."""
    found = {}
    for trial in summary_of(runs)["trials"]:
        if trial["checkpoint"] is not None:
            saved = (storage or runs) / "s" / trial["checkpoint"]
            found[trial["params"]["loss.w_cyc"]] = checkpoints.load(saved)
    return found


def check(runs: Path, trials: int, artifacts: Path | None = None) -> dict[str, Any]:
    """What must hold of every record, whatever happened; returns the summary.

    Args:
        artifacts: of MLflow, where they are not below `runs`.
    """
    summary = summary_of(runs)
    names = [trial["trial"] for trial in summary["trials"]]
    assert names == [f"t{number:02d}" for number in range(trials)]
    store = Store(runs)
    statuses = dict(store.rows("select run_uuid, status from runs"))
    assert "RUNNING" not in statuses.values()
    begun = [trial for trial in summary["trials"] if trial["run_id"] is not None]
    assert sorted(statuses) == sorted([trial["run_id"] for trial in begun] + [parent(store)])
    for trial in begun:
        assert store.tags(trial["run_id"])["raystar.status"] == trial["status"]
        assert store.tags(trial["run_id"]).get("raystar.reason") == trial["reason"], trial
        for key in ("train/g_loss", "eval/score"):
            query = "select step from metrics where run_uuid = ? and key = ? order by step"
            steps = [step for (step,) in store.rows(query, trial["run_id"], key)]
            assert steps == list(range(1, trial["epochs"] + 1)), (trial["trial"], key)
        pictures = (artifacts or store.artifacts) / trial["run_id"] / "artifacts/images"
        images = [p.name for p in pictures.glob("grid_ref*.png")]
        drawn = sorted(int(re.search(r"step[^0-9]*(\d+)", name)[1]) for name in images)  # type: ignore[index]
        assert drawn == ([*range(trial["epochs"] + 1)] if trial["epochs"] else []), trial["trial"]
        if trial["status"] in ("finished", "stopped") and (runs / "s/trials").exists():
            _, *rows = (runs / f"s/trials/{trial['trial']}/losses.csv").read_text().splitlines()
            assert [int(row.split(",")[0]) for row in rows] == list(range(1, trial["epochs"] + 1)), trial["trial"]
    if summary["best"] is not None:
        assert model.load(runs / "s/best", "cpu").domains == ("a", "b", "c")
    return summary


def parent(store: Store) -> str:
    (found,) = [run for (run,) in store.rows("select run_uuid from runs") if "raystar.trial" not in store.tags(run)]
    return str(found)


def same_as(undisturbed: Path, runs: Path, weights: list[float] = WEIGHTS, storage: Path | None = None) -> None:
    """Trials ended bit for bit as they do when nothing happens."""
    wanted, found = weights_of(undisturbed), weights_of(runs, storage)
    for weight in weights:
        for net in "GFED":
            for key, value in wanted[weight][net].items():
                assert torch.equal(value, found[weight][net][key]), (weight, net, key)
    scores = [{t["params"]["loss.w_cyc"]: t["score"] for t in summary_of(r)["trials"]} for r in (undisturbed, runs)]
    assert all(scores[0][weight] == scores[1][weight] for weight in weights)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a sweep that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finished(run(command(folder, space())))
    check(folder / "runs", 3)
    return folder / "runs"


def test_the_driver_is_killed_in_an_epoch_and_in_a_checkpoint(
    undisturbed: Path, faults: Faults, tmp_path: Path
) -> None:
    """Twice, and then its newest checkpoint is cut short as well."""
    faults.plan([{"w_cyc": 2.0, "epoch": 3, "do": "half"}])
    process = start(command(tmp_path, space()), "epoch 1/4")
    time.sleep(0.3)
    process.kill()
    process.communicate()

    process = start(resumed(tmp_path), "resumed")
    faults.kills(process.pid)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL

    journal = tmp_path / "runs/s/journal.jsonl"
    with journal.open("a") as file:
        file.write('{"event":"epoch","trial":"t0')  # killed in mid-write
    wait_for(lambda: not trial_processes())  # they notice that their driver is gone, and may save an epoch before
    folder = tmp_path / "runs/s/trials/t01"  # in its third epoch; t00 may have come to its end
    newest = max(folder.glob("epoch_*.pt"))
    os.truncate(newest, newest.stat().st_size - 100)

    shown = finished(run(resumed(tmp_path)))
    assert re.search(r"t01: epoch_000\d\.pt cannot be read; resumed after epoch \d", shown)
    summary = check(tmp_path / "runs", 3)
    assert {trial["status"] for trial in summary["trials"]} == {"finished"}
    assert summary["status"] == "finished"
    same_as(undisturbed, tmp_path / "runs")
    assert not list((tmp_path / "runs/s").rglob("*.part.pt"))


def test_ctrl_c_once_and_thrice(undisturbed: Path, tmp_path: Path) -> None:
    drawn = space() | {"search": "random", "trials": 3, "space": {"loss.w_cyc": {"uniform": [2.0, 4.0]}}}
    process = start(command(tmp_path, drawn), "epoch 1/4")
    process.send_signal(signal.SIGINT)
    shown = ended(process, 130)
    assert "stopping when each running trial has saved its epoch" in shown
    assert "--resume s" in shown
    first = check(tmp_path / "runs", 3)
    assert first["status"] == "interrupted"
    running = [trial for trial in first["trials"] if trial["status"] == "interrupted"]
    assert running
    for trial in running:
        there = sorted(p.name for p in (tmp_path / f"runs/s/trials/{trial['trial']}").glob("*.pt"))
        assert there[-1] == f"epoch_{trial['epochs']:04d}.pt"  # nothing that was trained is lost

    process = start(resumed(tmp_path), "epoch 3/4")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    began = time.monotonic()
    ended(process, 130)
    assert time.monotonic() - began < 30
    assert check(tmp_path / "runs", 3)["status"] == "interrupted"

    # What is left, and one more than was asked for at first.
    before = {t["trial"]: t for t in check(tmp_path / "runs", 3)["trials"] if t["status"] == "finished"}
    finished(run(resumed(tmp_path, "--trials", "4")))
    after = check(tmp_path / "runs", 4)
    assert after["status"] == "finished"
    assert all(t == before.get(t["trial"], t) for t in after["trials"])
    same_as(undisturbed, tmp_path / "runs", [1.0])
    shown = finished(run(resumed(tmp_path)))
    assert "0 to go" in shown
    assert (check(tmp_path / "runs", 4))["trials"] == after["trials"]


def test_everything_that_can_go_wrong_with_trials(undisturbed: Path, faults: Faults, tmp_path: Path) -> None:
    """Each has its own status and reason, none holds up the others."""
    always = {"times": 99}
    faults.plan(
        [
            {"w_cyc": 2.0, "epoch": 3, "step": 2, "do": "kill", "times": 2},
            {"w_cyc": 3.0, "epoch": 2, "do": "oom", "times": 2},
            {"w_cyc": 4.0, "epoch": 2, "step": 3, "do": "nan"},
            {"w_cyc": 5.0, "epoch": 2, "do": "oom", **always},
            {"w_cyc": 6.0, "epoch": 2, "step": 1, "do": "raise"},
            {"w_cyc": 7.0, "epoch": 2, "step": 1, "do": "kill", **always},
            {"w_cyc": 8.0, "do": "alike", **always},
        ]
    )
    wanted = space([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], abort_after=0, collapse={"diversity": 1e-9, "epochs": 2})
    shown = finished(run(command(tmp_path, wanted)))
    summary = check(tmp_path / "runs", 8)
    found = {t["params"]["loss.w_cyc"]: (t["status"], t["epochs"], t["reason"]) for t in summary["trials"]}
    assert [found[w][:2] for w in (1.0, 2.0, 3.0)] == [("finished", 4)] * 3
    reasons = {
        4.0: ("diverged", 1, r"became NaN or infinite in epoch 2, by step \d+"),
        5.0: ("out_of_memory", 1, r"out of memory in 2 of 15 batches of epoch 2 \(peak \d+\.\d GiB\)"),
        6.0: ("failed", 1, r"ValueError: broken on purpose"),
        7.0: ("killed", 1, r"its process died 4 times"),
        8.0: ("collapsed", 2, r"diversity below 1e-09 in 2 measured epochs in a row, the last epoch 2"),
    }
    for weight, (status, epochs, reason) in reasons.items():
        assert found[weight][:2] == (status, epochs)
        assert re.search(reason, found[weight][2]), found[weight]
        assert re.search(rf"{status}: .*{reason}", shown)
    assert summary["best"]["params"]["loss.w_cyc"] in (1.0, 2.0, 3.0)
    assert len(re.findall("tried again by itself", shown)) == 2
    error = next(t["trial"] for t in summary["trials"] if t["params"]["loss.w_cyc"] == 6.0)
    assert "broken on purpose" in (tmp_path / f"runs/s/trials/{error}/error.txt").read_text()
    same_as(undisturbed, tmp_path / "runs")


def test_the_driver_is_killed_in_the_finals(tmp_path: Path) -> None:
    """The same finalists continue, nothing is trained twice, and a longer sweep keeps what was trained."""
    drawn = space(finalists={"top": 1, "seeds": 2}) | {
        "search": "random", "trials": 2, "space": {"loss.w_cyc": {"uniform": [2.0, 4.0]}},
    }  # fmt: skip
    process = start(command(tmp_path, drawn), "-s1  finished")
    process.kill()
    process.communicate()
    wait_for(lambda: not trial_processes())
    journal = tmp_path / "runs/s/journal.jsonl"

    def told(event: str) -> list[dict[str, Any]]:
        return [found for line in journal.read_text().splitlines() if (found := json.loads(line))["event"] == event]

    (chosen,) = told("finals")
    shown = finished(run(resumed(tmp_path)))
    assert re.search(r"winner t0\d: score .* \(mean of 3 seeds, 90%\)", shown)
    assert told("finals") == [chosen]
    first = summary_of(tmp_path / "runs")
    assert first["status"] == "finished"
    repeats = [f"{name}-s{number}" for name in chosen["finalists"] for number in (1, 2)]
    assert [t["trial"] for t in first["trials"]] == ["t00", "t01", *repeats]
    assert {t["status"] for t in first["trials"]} == {"finished"}
    epochs = [(found["trial"], found["epoch"]) for found in told("epoch")]
    assert sorted(epochs) == [
        (t["trial"], e) for t in sorted(first["trials"], key=lambda t: t["trial"]) for e in range(1, 5)
    ]
    for trial in first["trials"]:
        config = yaml.safe_load(
            (Store(tmp_path / "runs").artifacts / trial["run_id"] / "artifacts/config.yaml").read_text()
        )
        assert config["training"]["seed"] == (int(trial["trial"][-1]) if trial["parent"] else 0)
    found = first["finals"]
    scores = {t["trial"]: t["score"] for t in first["trials"]}
    for finalist in found["ranked"]:
        assert finalist["scores"] == [scores[name] for name in finalist["runs"]]
        assert finalist["mean"] == pytest.approx(sum(finalist["scores"]) / 3)
    best = first["best"]
    winner = found["ranked"][0]
    assert best["score"] == min(winner["scores"])
    assert json.loads((tmp_path / "runs/s/best/metrics.json").read_text())["trial"] == best["trial"]
    store = Store(tmp_path / "runs")
    assert store.rows("select run_id from model_versions") == [(best["run_id"],)]
    assert store.tags(best["run_id"]).get("raystar.parent") == best["parent"]

    begun = len(told("started"))
    shown = finished(run(resumed(tmp_path)))  # there is nothing to do
    assert len(told("started")) == begun
    finished(run(resumed(tmp_path, "--trials", "3")))
    longer = summary_of(tmp_path / "runs")
    again = [found["trial"] for found in told("started")[begun:]]
    assert again[0] == "t02"
    assert not set(again) & {t["trial"] for t in first["trials"]}
    assert longer["finals"] is not None
    assert {t["trial"]: t["score"] for t in longer["trials"]}.items() >= scores.items()


@pytest.mark.skipif(usable_cpus() < 2, reason="needs two processors, one for each worker")
def test_a_worker_of_a_group_is_killed(faults: Faults, tmp_path: Path) -> None:
    """Its trial resumes from the last epoch that was saved, with new workers."""
    faults.plan([{"w_cyc": 1.0, "epoch": 2, "step": 2, "do": "kill"}])
    wanted = space([1.0], resources={"workers": 2})
    shown = finished(run(command(tmp_path, wanted, training__epochs=3)))
    (trial,) = check(tmp_path / "runs", 1)["trials"]
    assert (trial["status"], trial["epochs"]) == ("finished", 3)
    assert (faults.folder / "done-0-0").exists()
    assert shown.count("epoch 2/3") == 1


def test_every_trial_fails(faults: Faults, tmp_path: Path) -> None:
    """The sweep gives up with the first cause, and resumes once that is mended."""
    weights = [1.0, 2.0, 3.0, 4.0]
    faults.plan([{"w_cyc": w, "do": "raise", "times": 99} for w in weights])
    wanted = space(weights, abort_after=2)
    shown = finished(run(command(tmp_path, wanted, training__epochs=2)), status=1)
    assert re.search(r"error: 2 trials in a row went wrong, the first, t0[01]: ValueError: broken on purpose", shown)
    summary = check(tmp_path / "runs", 4)
    assert summary["status"] == "failed"
    assert summary["best"] is None
    assert [t["status"] for t in summary["trials"]].count("pending") >= 1
    faults.plan([])
    finished(run(resumed(tmp_path)))
    assert {t["status"] for t in check(tmp_path / "runs", 4)["trials"]} == {"finished"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A folder on a disk of its own, what fills it, and what frees it; skipped where the machine lets nobody mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine mounts no tmpfs for us; ENOSPC is tested at the system call")
    filler = folder / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                return

    try:
        yield folder, fill, filler.unlink
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_disk_is_full(
    undisturbed: Path, tmp_path: Path, small_disk: tuple[Path, Callable[[], None], Callable[[], None]]
) -> None:
    """Trials wait, one line says so, and they continue: nothing is lost and nothing ends."""
    folder, fill, free = small_disk
    process = start([*command(tmp_path, space()), "--storage", str(folder)], "epoch 1/4")
    fill()
    time.sleep(6)
    before = summary_of(tmp_path / "runs")
    time.sleep(3)
    assert summary_of(tmp_path / "runs")["trials"] == before["trials"]  # nobody trains on what is not saved
    free()
    shown = ended(process, 0)
    assert shown.count("is full") == 1
    assert shown.count("has space again") == 1
    summary = check(tmp_path / "runs", 3)
    assert {t["status"] for t in summary["trials"]} == {"finished"}
    same_as(undisturbed, tmp_path / "runs", storage=folder)


@pytest.mark.skipif(os.getuid() == 0, reason="root mounts a small disk instead")
def test_no_space_at_the_system_call(faults: Faults, tmp_path: Path) -> None:
    process = start(command(tmp_path, space([1.0, 2.0]), training__epochs=2), "running   epoch 0/2")
    (faults.folder / "full").touch()
    wait_for((faults.folder / "was_full").exists)
    time.sleep(1)
    (faults.folder / "full").unlink()
    ended(process, 0)
    assert {t["status"] for t in check(tmp_path / "runs", 2)["trials"]} == {"finished"}


def test_too_small_a_disk_is_refused(
    tmp_path: Path, small_disk: tuple[Path, Callable[[], None], Callable[[], None]]
) -> None:
    folder, fill, _ = small_disk
    fill()
    shown = finished(run([*command(tmp_path, space()), "--storage", str(folder)]), status=2)
    assert re.fullmatch(r"error: .*disk/s: \d\.\d MB are free, and this sweep's checkpoints take about .*\n", shown)
    assert not (tmp_path / "runs/s").exists()


class TestResumeRefuses:
    """What `--resume` does not do, on the record of a sweep that ended."""

    @pytest.fixture
    def runs(self, undisturbed: Path, tmp_path: Path) -> Path:
        """A copy of the record, and of what it was made from."""
        there = undisturbed.parent
        text = (undisturbed / "s/sweep.json").read_text().replace(str(there), str(tmp_path))
        (tmp_path / "runs/s").mkdir(parents=True)
        (tmp_path / "runs/s/sweep.json").write_text(text)
        for name in ("config.yaml", "space.yaml"):
            (tmp_path / name).write_text((there / name).read_text().replace(str(there), str(tmp_path)))
        os.symlink(there / "latents", tmp_path / "latents")
        return tmp_path / "runs"

    def refused(self, runs: Path, *flags: str) -> str:
        with pytest.raises(RaystarError) as caught:
            make_plan(tune.request_of(tune.parser().parse_args(["--resume", "s", "--out", str(runs), *flags])))
        return str(caught.value)

    def test_a_changed_space_configuration_and_code(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        record = runs / "s/sweep.json"
        content = json.loads(record.read_text())
        content["code"]["raystar/training/losses.py"] = "000000000000"
        record.write_text(json.dumps(content))
        for name, change in (
            ("space.yaml", lambda found: found["space"]["loss.w_cyc"]["choice"].append(9.0)),
            ("config.yaml", lambda found: found["loss"].update(w_id=0.25)),
        ):
            found = yaml.safe_load((runs.parent / name).read_text())
            change(found)
            (runs.parent / name).write_text(yaml.safe_dump(found))
        shown = self.refused(runs)
        assert "code: raystar/training/losses.py: 000000000000 then, " in shown
        assert "configuration: loss.w_id: 1.0 then, 0.25 now" in shown
        assert "space: space.loss.w_cyc.choice: [1.0, 2.0, 3.0] then, [1.0, 2.0, 3.0, 9.0] now" in shown
        assert "--force" in shown
        plan = make_plan(tune.request_of(tune.parser().parse_args(["--resume", "s", "--out", str(runs), "--force"])))
        assert plan.trials == 4
        assert plan.config.loss.w_id == 0.25
        assert "3 things have changed" in capsys.readouterr().err

    def test_changed_data(self, runs: Path, undisturbed: Path) -> None:
        (runs.parent / "latents").unlink()
        write_latents(runs.parent / "latents", seed=5)
        shown = self.refused(runs)
        assert re.search(r"another ruler.*data: digest: \w+ then, \w+ now", shown, re.DOTALL)

    @pytest.mark.parametrize("ruler", [None, "0123456789abcdef"])
    def test_another_ruler(self, runs: Path, ruler: str | None) -> None:
        """Scores of two rulers are never ranked together."""
        record = runs / "s/sweep.json"
        content = json.loads(record.read_text())
        for key in ("ruler", "first_ruler"):  # as versions before it was kept wrote records
            content.pop(key)
        record.write_text(json.dumps(content | ({"ruler": ruler} if ruler else {})))
        shown = self.refused(runs)
        assert f"its scores are those of another ruler, {ruler or 'of an earlier version'}" in shown
        assert "start a new sweep" in shown
        assert "or set them aside with --force" in shown
        plan = make_plan(tune.request_of(tune.parser().parse_args(["--resume", "s", "--out", str(runs), "--force"])))
        assert plan.record["first_ruler"] == ruler
        assert plan.record["ruler"] not in (ruler, None)

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--resume", "ss"], "is not there (did you mean 's'?)"),
            (["--resume", "../s"], "--resume '../s': expected up to 64 letters"),
            (["--resume", "s", "--space", "x.yaml"], "leave out --space"),
            (["--resume", "s", "--trials", "2"], "sweep s has 3 trials; expected at least as many"),
            (["--resume", "s", "--tracking-uri", "http://127.0.0.1:1"], "127.0.0.1:1: nothing answers there"),
            (["--name", "s", "--space", "space.yaml"], "is there already; resume it with --resume s"),
        ],
    )
    def test_names_and_flags(self, runs: Path, flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(runs.parent)
        text = (runs / "s/sweep.json").read_text().replace('"search": "grid"', '"search": "random"')
        (runs / "s/sweep.json").write_text(text)
        (runs.parent / "space.yaml").write_text(
            (runs.parent / "space.yaml").read_text().replace("search: grid", "search: random")
        )
        with pytest.raises(RaystarError, match=re.escape(said)):
            make_plan(tune.request_of(tune.parser().parse_args([*flags, "--out", str(runs)])))

    def test_what_it_was_made_from_is_gone(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (runs.parent / "space.yaml").unlink()
        plan = make_plan(tune.request_of(tune.parser().parse_args(["--resume", "s", "--out", str(runs)])))
        assert plan.points == [{"loss.w_cyc": weight} for weight in WEIGHTS]
        assert "not there any more; the sweep's record counts" in capsys.readouterr().err

    @pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to another user")
    def test_somebody_elses_sweep(self, runs: Path) -> None:
        os.chown(runs / "s/sweep.json", 12345, 12345)
        assert "belongs to user 12345, not to you" in self.refused(runs)

    def test_a_sweep_that_is_running(self, runs: Path) -> None:
        plan = make_plan(tune.request_of(tune.parser().parse_args(["--resume", "s", "--out", str(runs)])))
        with (
            running(runs / "s"),
            pytest.raises(RaystarError, match=rf"s: this sweep is running already, in process {os.getpid()}"),
        ):
            sweep.run(plan)

    def test_damaged_records(self, runs: Path) -> None:
        record = runs / "s/sweep.json"
        record.write_text(record.read_text()[:100])
        assert "sweep.json cannot be read" in self.refused(runs)
        record.write_text("[]")
        assert "expected the record of a sweep" in self.refused(runs)


def test_a_node_dies_another_joins_and_mlflow_is_away(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster with a token: one of two nodes is killed, MLflow's server for twenty seconds, and a node joins."""
    runs, token, storage = tmp_path / "runs", tmp_path / "token", tmp_path / "storage"
    runs.mkdir()
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    server = Server(runs)
    server.start()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with cluster(1, 1, token=token, HOME=str(tmp_path)) as nodes:
        joined = [*command(tmp_path, space()), "--address", nodes.address, "--storage", str(storage)]
        assert "start a server, `mlflow server" in finished(run(joined), 2)
        assert not (runs / "s").exists()
        server.wait()
        process = start([*joined, "--tracking-uri", server.uri], "epoch 1/4")
        nodes.kill(nodes.nodes[1])
        server.stop(signal.SIGKILL)
        away = time.monotonic()
        nodes.add(1, {"RAYSTAR_TEST_MARK": "late"})
        wait_for(lambda: bool(trial_processes("late")), 120)  # it takes over the lost trial, or the one that waits
        time.sleep(max(0.0, 20 - (time.monotonic() - away)))
        server.start()
        shown = ended(process, 0)
    server.stop(signal.SIGKILL)
    assert "raylet" not in shown
    summary = check(runs, 3, artifacts=runs / "artifacts/1")
    assert {trial["status"] for trial in summary["trials"]} == {"finished"}
    same_as(undisturbed, runs, storage=storage)
