"""What an epoch spends on anything but training: the ruler, the grids, the display and the record in MLflow.

    python -m benchmarks.overhead --data ../shared/data/latents --domains photo hayao monet vangogh

The epoch's training time is its number of steps times the median of some of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from benchmarks import measure
from benchmarks.step import RaystarStep
from raystar.base.metrics import QUALITY
from raystar.config.load import override, parse_assignment
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.pictures import grid
from raystar.pictures.codec import need_codec
from raystar.ruler.ruler import Ruler
from raystar.tracking.mlflow.writer import MlflowStore
from raystar.tracking.relay import Relay
from raystar.tracking.tracker import PARENT
from raystar.training.display import Display
from raystar.training.step import LOGGED


def main() -> None:
    """The command line."""
    p = measure.parser(__doc__.splitlines()[0])
    p.add_argument("--data", default="raystar:demo", help="data.data_root (the demo's)")
    p.add_argument("--domains", nargs="+", default=["photo", "pointillism", "woodcut", "watercolour", "stained_glass"])
    p.add_argument("--rounds", type=int, default=5, help="training steps that are measured")
    p.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="over the full-size defaults")
    args = p.parse_args()
    measure.settle(args)
    config = override(
        Config(), {"data.data_root": args.data, "data.domains": args.domains, "training.device": args.device}
    )
    config = override(config, dict(parse_assignment(text) for text in args.set), "--set")
    with tempfile.TemporaryDirectory() as folder:
        report(args, config, open_bank(config, folder), Path(folder))


def report(args: argparse.Namespace, config: Config, bank: Bank, folder: Path) -> None:
    """Measures and prints."""
    step = RaystarStep(config, bank, torch.device(args.device))
    nets, steps = step.state.nets, step.data.steps
    median = measure.take_turns({"step": step}, args.rounds, step.state.device, warmup=1)["step"]
    ruler = Ruler.build(bank, config, folder).to(step.state.device)
    codec, _ = need_codec(config, step.state.device)
    chosen = grid.choose(bank, config, codec)
    pictures: dict[str, Image.Image] = {}
    store = MlflowStore(
        f"sqlite:///{folder}/mlflow.db", folder / "artifacts", {"name": "b", "digest": "b", "source": "b"}, {},
        "eval/score", lower_is_better=True,
    )  # fmt: skip
    tracker = Relay(store, folder / "spool.jsonl")
    tracker.begin()
    tracker.wait_until_connected()
    tracker.start(PARENT, params={}, tags={}, text={}, name="overhead")

    def draw() -> None:
        pictures.update(grid.draw(nets, config, chosen, codec))

    def show() -> None:
        display = Display(config, "", steps)
        with contextlib.redirect_stderr(io.StringIO()):
            for number in range(0, steps, config.training.display_interval):
                display.step(1, number, dict.fromkeys(LOGGED, 0.0))

    def record() -> None:
        paths = {}
        for key, image in pictures.items():
            paths[key] = folder / f"{key}.png"
            image.save(paths[key])
        tracker.log(PARENT, 1, dict.fromkeys(QUALITY, 1.0), paths)

    spent = {
        "ruler": seconds(lambda: ruler.measure(nets, config)),
        "grids, every epoch": seconds(draw),
        "display": seconds(show),
        "handing over to the record": seconds(record),
        "writing it to MLflow, beside training": seconds(tracker.close),
    }
    epoch = steps * median
    print(f"base_dim {config.model.base_dim}, {config.model.n_res_blocks} blocks, batch {config.training.batch_size}")
    print(f"epoch: {steps} steps of {median * 1e3:.0f} ms, {epoch:.0f} s; {len(bank.names)} latents")
    for name, value in spent.items():
        print(f"{name:40} {value:8.2f} s {value / epoch:8.2%}")
    total = sum(spent.values())
    print(f"{'together':40} {total:8.2f} s {total / epoch:8.2%}")


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
