"""Ten trials in one reused process: does memory stay, and is a trial after a failed one as in a fresh process?

The trials run through `raystar.backend.loop.train_loop`, each in a thread of its own as under Ray Tune; only Tune's
side of the conversation is replaced, by an object that keeps what is reported.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.measure import in_fresh_process, parser, resident_bytes, settle, table
from raystar.backend import loop, reporting
from raystar.config.load import from_mapping, override, to_mapping
from raystar.data.bank import open_bank
from raystar.data.listing import DEMO_ROOT
from raystar.demo import DOMAINS
from raystar.record.statuses import RUNNING
from raystar.search.purpose import QUALITY
from raystar.training import trainer
from raystar.training.step import LOGGED

FAILS, STARVES = "fails", "out of memory"
METRIC = "eval/score"


def configuration(device: str) -> dict[str, Any]:
    """What all trials share: the demo's latents, with the ruler and pictures in every epoch."""
    return {
        "data.data_root": DEMO_ROOT, "data.domains": list(DOMAINS), "training.device": device,
        "training.progress_style": "off", "visualization.every_epochs": 1, "model.n_res_blocks": 2,
        "model.mapping_hidden_dim": 128, "loss.r1_interval": 4,
    }  # fmt: skip


def trials(count: int) -> list[dict[str, Any]]:
    """So many configurations that all differ; the fourth fails, the seventh finds no memory."""
    made = []
    for number in range(count):
        params = {
            "loss.w_cyc": 0.5 + 0.25 * number,
            "loss.w_id": 0.0 if number % 3 == 2 else 1.0,
            "loss.w_sty": 2.0 - 0.15 * number,
            "training.batch_size": (8, 16, 4)[number % 3],
            "training.lr_g": 1e-4 * (1 + number),
        }
        made.append({"params": params, "fate": {3: FAILS, 6: STARVES}.get(number, "")})
    return made


class Conversation:
    """Stands for `ray.tune` in a trial's process, and keeps the trial's reports."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def report(self, message: dict[str, Any]) -> None:
        """Keeps a report."""
        self.reports.append({**json.loads(message["report"]), METRIC: message[METRIC]})


def run_trials(
    requests: list[dict[str, Any]], settings: dict[str, Any], folder: Path, threads: int
) -> list[dict[str, Any]]:
    """Runs trials one after the other in this process: status, losses and memory after each."""
    config = override(from_mapping({}, "benchmark"), settings)
    request = reporting.Request(
        config=to_mapping(config),
        metric=METRIC,
        mode="min",
        cache_dir=str(folder),
        bank_key=open_bank(config, folder).key,
        starts={},
        placed=None,
        storage=tempfile.mkdtemp(dir=folder),
        scratch=str(folder),
        known={},
        gpu_share=0.0,
        cpus=threads,
        workers=1,
        measure_at=(),
        purpose=QUALITY,
    )
    conversation = Conversation()
    reporting.tune = conversation  # type: ignore[assignment]
    real_step = trainer.train_step
    done = []
    for number, each in enumerate(requests):
        trainer.train_step = _doomed(real_step, each["fate"])
        conversation.reports.clear()
        given = {"params": each["params"], "request": request, "trial": f"t{number:02d}"}
        # Tune runs every trial of a reused process in a new thread.
        thread = threading.Thread(target=loop.train_loop, args=(given,))
        thread.start()
        thread.join()
        last = conversation.reports[-1]
        epochs = [report["metrics"] for report in conversation.reports if "metrics" in report]
        losses = [[epoch[f"train/{key}"] for key in LOGGED] for epoch in epochs]
        done.append(
            {
                "status": "finished" if last["status"] == RUNNING else last["status"],
                "reason": last.get("reason", ""),
                "epochs": len(losses),
                "losses": losses,
                "score": last[METRIC],
                "resident": resident_bytes(),
                "anonymous": resident_bytes("RssAnon"),
                "device": torch.cuda.memory_reserved() if torch.cuda.is_available() else 0,
            }
        )
    return done


def run_trials_apart(*args: Any) -> list[dict[str, Any]]:
    """`run_trials` in a fresh process whose allocator has one arena.

    Which of several arenas a trial's thread gets is chance, and so is which free pages they keep between them: 20 to
    50 MB that come and go, and that hide what adds up.
    """
    with mock.patch.dict(os.environ, MALLOC_ARENA_MAX="1"):
        return in_fresh_process(run_trials, *args)


def _doomed(real_step: Callable[..., Any], fate: str) -> Callable[..., Any]:
    """`train_step` that goes wrong in a trial's last epoch, with the step's activations alive."""

    def step(state: Any, batch: Any, *, epoch: int, step: int) -> Any:
        if fate and epoch == state.config.training.epochs:
            held = state.nets.G(batch.content, state.nets.E(batch.x_ref, batch.y_trg))
            if fate == STARVES:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate beside {held.nbytes} bytes")
            raise ValueError("this trial was told to fail")
        return real_step(state, batch, epoch=epoch, step=step)

    return step


def main(argv: list[str] | None = None) -> int:
    """`python -m benchmarks.memory`."""
    p = parser(
        "Runs trials that differ in loss weights and batch size one after the other in one process, as a reused "
        "trial process does, one of them failing and one out of memory; prints the resident memory after each and "
        "its growth after the second, and checks that the trials after the failed ones give the losses that a "
        "fresh process gives, bit for bit. Exits with 1 if they do not, or if memory grew by 5 %% or more."
    )
    p.add_argument("--trials", type=int, default=10, help="trials, at least 8 (10)")
    p.add_argument("--epochs", type=int, default=2, help="epochs of each (2)")
    p.add_argument("--epoch-size", type=int, default=96, help="contents in an epoch (96)")
    p.add_argument("--base-dim", type=int, default=64, help="model.base_dim (64)")
    args = p.parse_args(argv)
    if args.trials < 8:
        p.error(f"--trials {args.trials}: expected at least 8, so that some follow the failed ones")
    device = settle(args)
    settings = configuration(args.device) | {
        "training.epochs": args.epochs, "training.epoch_size": args.epoch_size, "model.base_dim": args.base_dim,
    }  # fmt: skip
    requests = trials(args.trials)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="raystar-memory-") as temporary:
        folder = Path(temporary)
        reused = run_trials_apart(requests, settings, folder, threads)
        after = [number + 1 for number, each in enumerate(requests) if each["fate"] and number + 1 < len(requests)]
        fresh = {n: run_trials_apart([requests[n]], settings, folder, threads)[0] for n in after}
    rows = [["trial", "batch", "status", "epochs", "resident MB", "anonymous MB", "GPU MB", "as in a fresh process"]]
    same = True
    for number, (each, found) in enumerate(zip(requests, reused, strict=True)):
        equal = ""
        if number in fresh:
            alike = found["losses"] and all(found[key] == fresh[number][key] for key in ("losses", "score"))
            same = same and bool(alike)
            equal = "losses and score equal" if alike else "DIFFERS"
        number_and_size = [str(number + 1), str(each["params"]["training.batch_size"])]
        memory = [f"{found[key] / 1e6:.0f}" for key in ("resident", "anonymous", "device")]
        status = f"{found['status']} {found['reason']}"[:48].strip()
        rows.append([*number_and_size, status, str(found["epochs"]), *memory, equal])
    print(table(rows))
    kinds = ("resident", "device") if device.type == "cuda" else ("resident",)
    growth = {}
    for kind in kinds:
        second, *later = (max(found[kind], 1) for found in reused[1:])
        growth[kind] = statistics.median(later[-3:]) / second - 1
        print(
            f"{kind} memory after the last trials: {growth[kind]:+.1%} over that after the second "
            f"(the largest in between {max(later) / second - 1:+.1%})"
        )
    return 0 if same and max(growth.values()) < 0.05 else 1


if __name__ == "__main__":
    sys.exit(main())
