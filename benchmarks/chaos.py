"""A sweep whose processes are killed every few seconds, and what that costs.

Trials' processes get SIGKILL at random, and one time in ten the driver, which is then followed by `--resume`; more
often, and it would hardly get beyond its start. In the end every trial must be accounted for once, no epoch logged
twice, no run left RUNNING, and every trial's score must be that of the same sweep left in peace, to the last bit.

    python -m benchmarks.chaos --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import measure

_MARK = "RAYSTAR_CHAOS"


def main() -> None:
    """Runs both sweeps and prints what happened."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--trials", type=int, default=24)
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--seconds", type=float, nargs=2, default=[4.0, 10.0], help="least and most between two kills")
    args = p.parse_args()
    print(f"machine: {measure.machine(torch.device('cpu'))}", flush=True)
    with tempfile.TemporaryDirectory(prefix="raystar-chaos-") as folder:
        space = Path(folder) / "space.yaml"
        ranges = {"loss.w_cyc": {"loguniform": [0.5, 5.0]}, "loss.w_sty": {"loguniform": [0.5, 5.0]}}
        wanted = {
            "trials": args.trials,
            "finalists": 0,
            "scheduler": {"type": "none"},
            "keep": args.trials,
            "space": ranges,
        }
        space.write_text(yaml.safe_dump(wanted))
        peace, chaos = (Path(folder) / name for name in ("peace", "chaos"))
        began = time.monotonic()
        status, _ = run(request(space, peace, args.epochs), None, args.seconds)
        quiet_s = time.monotonic() - began
        assert status == 0, "the sweep in peace failed"
        kills: Counter[str] = Counter()
        rng = random.Random(args.seed)
        began = time.monotonic()
        command, sessions = request(space, chaos, args.epochs), 0
        while status != 0 or not sessions or unfinished(chaos / "s"):
            sessions += 1
            status, killed = run(command, rng, args.seconds)
            kills += killed
            assert status in (0, -signal.SIGKILL), f"the sweep ended with status {status}"
            # A driver that dies at once has left nothing to resume.
            command = resume(chaos) if (chaos / "s/sweep.json").exists() else request(space, chaos, args.epochs)
        chaos_s = time.monotonic() - began
        problems = check(chaos / "s", chaos / "mlflow.db", args) + differences(peace / "s", chaos / "s")
    print(f"{sum(kills.values())} kills: {dict(kills)}; {sessions} sessions")
    print(f"all {args.trials} trials: {problems or 'as in peace, bit for bit'}")
    print(f"{chaos_s:.0f} s against {quiet_s:.0f} s in peace: {chaos_s / quiet_s:.2f} times")
    sys.exit(1 if problems else 0)


def request(space: Path, out: Path, epochs: int) -> list[str]:
    """The command that begins the sweep."""
    tune = [sys.executable, "-m", "raystar.tune", "--space", str(space), "--out", str(out), "--name", "s"]
    small = ["model.base_dim=8", "training.epoch_size=64", "visualization.every_epochs=2"]
    small.append("data.domains=[photo,woodcut]")
    return [*tune, "--epochs", str(epochs), *(word for key in small for word in ("--set", key))]


def resume(out: Path) -> list[str]:
    """The command that resumes it."""
    return [sys.executable, "-m", "raystar.tune", "--resume", "s", "--out", str(out)]


def run(command: list[str], rng: random.Random | None, seconds: list[float]) -> tuple[int, Counter[str]]:
    """Runs a command to its end, killing something every so many seconds; returns its status and what was killed."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    kills: Counter[str] = Counter()
    process = subprocess.Popen(
        command, env={**os.environ, _MARK: mark}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    tail: list[str] = []
    while True:
        try:
            out, _ = process.communicate(timeout=None if rng is None else rng.uniform(*seconds))
            tail = out.splitlines()[-8:]
            break
        except subprocess.TimeoutExpired:
            assert rng is not None
            victims = trial_processes(mark)
            if rng.random() < 0.1:
                process.kill()
                kills["driver"] += 1
            elif victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
                kills["trial"] += 1
    if process.returncode not in (0, -signal.SIGKILL):
        print("\n".join(tail))
    return process.returncode, kills


def trial_processes(mark: str) -> list[int]:
    """Processes of Ray's that run trials of the sweep that was started with `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_bytes()
            trains = re.match(rb"ray::(?!IDLE|\w+Agent)", title)
            if trains and f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return sorted(found)


def check(folder: Path, store: Path, args: argparse.Namespace) -> list[str]:
    """What is wrong with the record of a finished sweep; nothing, if all is well."""
    summary = json.loads((folder / "summary.json").read_text())
    problems = [f"{t['trial']}: {t['status']} ({t['reason']})" for t in summary["trials"] if t["status"] != "finished"]
    if len({t["trial"] for t in summary["trials"]}) != args.trials:
        problems.append(f"{len(summary['trials'])} trials are accounted for")
    database = sqlite3.connect(store)
    statuses = Counter(status for (status,) in database.execute("select status from runs"))
    if statuses != Counter({"FINISHED": args.trials + 1}):
        problems.append(f"MLflow's runs: {dict(statuses)}")
    for trial in summary["trials"]:
        query = "select step from metrics where run_uuid = ? and key = 'train/g_loss' order by step"
        steps = [step for (step,) in database.execute(query, [trial["run_id"]])]
        if steps != list(range(1, args.epochs + 1)):
            problems.append(f"{trial['trial']}: epochs {steps} are logged")
    return problems


def differences(peace: Path, chaos: Path) -> list[str]:
    """Trials that came out otherwise than in peace."""
    wanted, found = (
        {t["trial"]: (t["score"], t["score_epoch"], t["params"]) for t in content["trials"]}
        for content in (read(folder / "summary.json") for folder in (peace, chaos))
    )
    return [
        f"{trial}: {found.get(trial)}, in peace {value}" for trial, value in wanted.items() if found.get(trial) != value
    ]


def unfinished(folder: Path) -> bool:
    """Whether a trial's process died so often that the sweep ended without it; it continues when resumed."""
    return any(trial["status"] == "killed" for trial in read(folder / "summary.json")["trials"])


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


if __name__ == "__main__":
    main()
