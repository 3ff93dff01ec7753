"""What compilation costs: a first process, a second one with the same cache, and a second trial in one process.

    python -m benchmarks.compile --threads 1 --base-dim 32 --blocks 2 --batch 8

A trial here is what a sweep runs: networks, compilation, and a first training step, with other loss weights each time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks import measure
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import open_bank
from raystar.model.device import synchronize
from raystar.training.compile import graphs
from raystar.training.trainer import Trainer


def main() -> None:
    """The command line."""
    p = measure.parser(__doc__.splitlines()[0])
    p.add_argument("--base-dim", type=int, default=32)
    p.add_argument("--blocks", type=int, default=2)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--trials", type=int, default=3, help="trials in each process")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        print(json.dumps(trials(args)))
        return
    device = measure.settle(args)
    with tempfile.TemporaryDirectory() as cache:
        first, second = (child(cache, number) for number in ("first", "second"))
    print(f"base_dim {args.base_dim}, {args.blocks} blocks, batch {args.batch}, all four networks, on {device}")
    print(f"{'':44} {'seconds':>9} {'of the first':>13}")
    cold = first[0]["compile_s"]
    print(f"{'first process: compilation':44} {cold:9.2f} {'1':>13}")
    print(f"{'second process, shared cache: compilation':44} {second[0]['compile_s']:9.2f} "
          f"{second[0]['compile_s'] / cold:13.1%}")  # fmt: skip
    for number, trial in enumerate(first[1:], start=2):
        print(f"{f'first process, trial {number}: start to first step':44} {trial['first_step_s']:9.2f} "
              f"{trial['first_step_s'] / cold:13.1%}")  # fmt: skip
    again = sum(trial["graphs"] for trial in first[1:])
    print(f"graphs: {first[0]['graphs']} in the first trial, {again} more in the {len(first) - 1} after it")


def child(cache: str, number: str) -> list[dict[str, float]]:
    """The trials of a fresh process that compiles into `cache`."""
    print(f"{number} process ...", file=sys.stderr, flush=True)
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile", *sys.argv[1:], "--child"],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(found.stdout.splitlines()[-1])


def trials(args: argparse.Namespace) -> list[dict[str, float]]:
    """Runs `--trials` trials one after the other in this process."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config = override(
        Config(),
        {
            "model.base_dim": args.base_dim, "model.n_res_blocks": args.blocks, "training.batch_size": args.batch,
            "training.epochs": 1, "training.epoch_size": args.batch, "training.use_compile": True,
            "training.device": args.device, "training.progress_style": "off", "data.data_root": "raystar:demo",
            "data.domains": ["photo", "pointillism", "woodcut", "watercolour", "stained_glass"],
        },
    )  # fmt: skip
    found = []
    with tempfile.TemporaryDirectory() as folder:
        bank = open_bank(config, folder)
        for number in range(args.trials):
            settings = {
                "loss.w_cyc": 1.0 + number,
                "loss.r1_interval": 8 + number,
                "training.lr_g": 1e-4 / (1 + number),
            }
            before, started = graphs(), time.perf_counter()
            (progress,) = Trainer(override(config, settings), bank).run()
            synchronize(torch.device(args.device))
            if progress.labels["raystar.compiled_modules"] != "G F E D":
                raise SystemExit(f"not all compiled: {progress.labels}")
            found.append(
                {
                    "compile_s": progress.metrics["perf/compile_s"],
                    "first_step_s": time.perf_counter() - started,
                    "graphs": graphs() - before,
                }
            )
    return found


if __name__ == "__main__":
    main()
