"""What a long sweep costs its driver: thousands of trials whose epochs take a millisecond and train nothing.

Everything but the training is real: Ray Tune with reused processes, the journal, ASHA, the summary's files, MLflow on
SQLite. Prints, for each tenth of the results, the main thread's processor time for a result, the results a second, and
the driver's memory; constant and bounded is what a sweep of days needs.

    python -m benchmarks.driver --trials 5000
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import measure
from raystar.backend import ray_start, reporting

EPOCH_S = 0.001


def simulated(params: dict[str, Any], request: Any) -> None:
    """A Tune function in place of a trial: reports like one, and learns nothing."""
    from ray import tune

    rng = random.Random(repr(params))
    score = 2 + rng.random()
    told = {"status": "running", "images": {}, "first_images": {}, "labels": {}, "note": None, "first_step_at": None}
    for epoch in range(1, request.config["training"]["epochs"] + 1):
        time.sleep(EPOCH_S)
        score *= 0.9 + 0.1 * rng.random()
        metrics = {f"train/{name}": rng.random() for name in "abcdefghijklmnopqrst"}
        metrics |= {request.metric: score, "eval/outlook": score, "eval/movement": 0.5}
        tune.report(
            reporting.message({**told, "epoch": epoch, "metrics": metrics}, request.metric, score) | {"saved": True}
        )


class Watch:
    """Notes what the driver has used whenever another share of the results is in."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.results = 0
        self.rows: list[dict[str, float]] = []
        self._last = (time.perf_counter(), time.thread_time())

    def result(self) -> None:
        """One more result is dealt with."""
        self.results += 1
        if self.results % self.every:
            return
        now = (time.perf_counter(), time.thread_time())
        wall, cpu = (b - a for a, b in zip(self._last, now, strict=True))
        self._last = now
        memory = measure.resident_bytes() / 2**20
        row = {"results": self.results, "ms": 1e3 * cpu / self.every, "a_second": self.every / wall, "mib": memory}
        self.rows.append(row)
        print("{results:8d} results  {ms:6.2f} ms of the main thread a result  {a_second:6.1f} a second  "
              "{mib:7.1f} MiB".format(**row), flush=True)  # fmt: skip


def main() -> None:
    """Runs the sweep and prints what it cost."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--trials", type=int, default=5000)
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--mlflow-away", action="store_true", help="records wait in the spool, as without a server")
    args = p.parse_args()

    ray_start.settle_token(create=True)  # before the trial's module imports Ray
    from raystar import tune
    from raystar.backend import tuner
    from raystar.sweep import live_table as table
    from raystar.sweep import plan, session
    from raystar.sweep import run as sweep
    from raystar.tracking import relay

    with tempfile.TemporaryDirectory(prefix="raystar-driver-") as out:
        space = {
            "trials": args.trials,
            "abort_after": 0,
            "finalists": 0,
            "scheduler": {"type": "asha", "grace_epochs": 1, "reduction_factor": 2},
            "space": {"loss.w_cyc": {"loguniform": [0.1, 10.0]}, "loss.w_sty": {"loguniform": [0.1, 10.0]}},
        }
        (Path(out) / "space.yaml").write_text(yaml.safe_dump(space))
        request = ["--space", f"{out}/space.yaml", "--out", out, "--name", "long", "--epochs", str(args.epochs)]
        wanted = plan.make_plan(tune.request_of(tune.parser().parse_args(request)))
        watch = Watch(max(1, args.trials // 5))
        reported = session.Session.trial_reported

        def counted(self: Any, name: str, told: dict[str, Any]) -> bool:
            continues = reported(self, name, told)
            watch.result()
            return continues

        session.Session.trial_reported = counted  # type: ignore[method-assign]
        tuner.run_trial = simulated
        table.Board.changed = lambda *_: None  # type: ignore[method-assign,assignment]
        if args.mlflow_away:
            away = relay.Relay
            away.begin = away.wait_until_connected = away.close = lambda self: None  # type: ignore[method-assign]
        began = time.perf_counter()
        status = sweep.run(wanted)
        summary = json.loads((Path(out) / "long/summary.json").read_text())
        ended = sum(trial["status"] in ("finished", "stopped") for trial in summary["trials"])
        print(f"{ended} of {args.trials} trials ended in {time.perf_counter() - began:.0f} s, exit status {status}")
        first, last = watch.rows[len(watch.rows) // 10], watch.rows[-1]
        print(f"main thread a result, last share over an early one: {last['ms'] / first['ms']:.2f}")
        print(f"memory, last over an early one: {last['mib'] / first['mib']:.2f}")
        sys.exit(0 if ended == args.trials else 1)


if __name__ == "__main__":
    main()
