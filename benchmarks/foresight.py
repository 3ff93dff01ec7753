"""What do young trials say of their end, and how much of a score is luck?

    python -m benchmarks.foresight --space benchmarks/wide.yaml --trials 16 --seeds 4 --out painted.json
    python -m benchmarks.foresight --set data.data_root=latents --set data.domains=[photo,monet] --out real.json

Configurations are drawn from a space file, without its baseline, and all trained to their end on one core, measured on
the way. For each epoch that was measured the rank correlation of some metrics with the final score is printed, as ASHA
would rank: who has not moved is last, at the rung and at the end. With --seeds the best configuration is trained from
other seeds as well, and the deviation of its score printed beside that between configurations. What was trained is
kept in --out, and not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from raystar.base.console import run_cli
from raystar.base.metrics import higher_is_better
from raystar.config.load import override, request_config
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.record.finals import rank_correlation
from raystar.ruler.ruler import UNMOVED, Ruler
from raystar.search.space import load_space
from raystar.training.trainer import Trainer

_SHOWN = ("outlook", "score", "style", "movement")
_LAST = 1e9  # of whoever has not moved

Measured = dict[str, dict[str, float]]
"""The ruler's metrics by epoch, as JSON has it."""


def train(config: Config, bank: Bank, ruler: Ruler, epochs: list[int]) -> Measured:
    """Trains to the end."""
    found: Measured = {}
    for progress in Trainer(config, bank, ruler, measure_at=epochs).run():
        metrics = {k[5:]: v for k, v in progress.metrics.items() if k.startswith("eval/")}
        if metrics:
            found[str(progress.epoch)] = metrics
    return found


def ranked(run: Measured, epoch: str, metric: str) -> float:
    """A run's place among others at an epoch, lower is better."""
    metrics = run[epoch]
    if metrics["movement"] < UNMOVED:
        return _LAST
    return -metrics[metric] if higher_is_better(f"eval/{metric}") else metrics[metric]


def table(runs: list[Measured]) -> str:
    """Rank correlations with the end, by epoch."""
    last = max(runs[0], key=int)
    final = [ranked(run, last, "score") for run in runs]
    lines = [f"{'epoch':>6}" + "".join(f"{name:>10}" for name in _SHOWN) + f"{'moved':>8}"]
    for epoch in sorted(runs[0], key=int):
        then = {name: rank_correlation([ranked(run, epoch, name) for run in runs], final) for name in _SHOWN}
        moved = sum(run[epoch]["movement"] >= UNMOVED for run in runs)
        lines.append(f"{epoch:>6}" + "".join(f"{value:>+10.2f}" for value in then.values()) + f"{moved:>8}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="search_spaces/loss.yaml")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=0, help="further seeds of the best configuration")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    epochs = [f"training.epochs={args.epochs}"] if args.epochs else []
    config = request_config(args.config, [], [*args.set, *epochs, "training.progress_style=off"])
    space = load_space(args.space, config)
    rng = np.random.default_rng(space.seed)
    points = [{key: how.draw(rng) for key, how in space.space.items()} for _ in range(args.trials)]
    known: dict[str, Measured] = json.loads(args.out.read_text()) if args.out.exists() else {}
    n = config.training.epochs
    at = sorted({max(1, round(n * share)) for share in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)})
    with tempfile.TemporaryDirectory() as cache:
        bank = open_bank(config, cache)
        ruler = Ruler.build(bank, config, cache)

        def run(number: int, seed: int) -> Measured:
            values = {**points[number], "training.seed": seed}
            key = json.dumps(values)
            if key not in known:
                began = time.time()
                known[key] = train(override(config, values), bank, ruler, at)
                args.out.write_text(json.dumps(known, indent=1))
                score = known[key][str(n)]["score"]
                print(f"{number:3} seed {seed}: score {score:.4f} in {time.time() - began:.0f} s", flush=True)
            return known[key]

        first = config.training.seed
        runs = [run(number, first) for number in range(args.trials)]
        print(table(runs))
        finals = [r[str(n)]["score"] for r in runs]
        best = min(range(args.trials), key=finals.__getitem__)
        if args.seeds:
            seeds = [run(best, first + k)[str(n)]["score"] for k in range(args.seeds + 1)]
            within, between = statistics.stdev(seeds), statistics.stdev(finals)
            print(f"{len(seeds)} seeds of number {best}: " + "  ".join(f"{score:.4f}" for score in seeds))
            print(f"deviation within {within:.4f}, between configurations {between:.4f}: {within / between:.2f}")
    return 0


if __name__ == "__main__":
    run_cli(main)
