"""Resume: N epochs in one go against k epochs, a fresh process, and N - k more; and what a checkpoint costs."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import in_fresh_process, parser, settle, table, take_turns
from raystar.config.load import from_mapping, override
from raystar.config.schema import Config
from raystar.data.bank import open_bank
from raystar.data.listing import DEMO_ROOT
from raystar.demo import DOMAINS
from raystar.model import checkpoint as checkpoints
from raystar.model.networks import NAMES
from raystar.training.step import LOGGED
from raystar.training.trainer import Trainer


def configuration(device: str, precision: str, **changed: Any) -> Config:
    """The demo's latents, R1 in every third step, an incomplete last batch; keyword arguments use `__`."""
    values: dict[str, Any] = {
        "data.data_root": DEMO_ROOT, "data.domains": list(DOMAINS), "training.device": device,
        "training.use_amp": precision != "fp32", "training.progress_style": "off", "training.drop_last": False,
        "training.epoch_size": 100, "training.batch_size": 8, "loss.r1_interval": 3,
        "model.base_dim": 64, "model.n_res_blocks": 2, "model.mapping_hidden_dim": 128,
    }  # fmt: skip
    return override(from_mapping({}, "benchmark"), values | {k.replace("__", "."): v for k, v in changed.items()})


def train(config: Config, folder: Path, start: Path | None, end: Path, threads: int) -> list[dict[str, float]]:
    """Trains to the configuration's last epoch, from `start` if there is one; every epoch's losses and seconds."""
    torch.set_num_threads(threads)
    checkpoint = checkpoints.load(start) if start is not None else None
    trainer = Trainer(config, open_bank(config, folder, verbose=False), checkpoint=checkpoint)
    metrics = []
    for progress in trainer.run():
        metrics.append(progress.metrics)
    checkpoints.save(end, progress.checkpoint)
    return metrics


def compare(config: Config, first: int, folder: Path, threads: int) -> tuple[int, float]:
    """Asserts that a run broken after `first` epochs ends as one in one go.

    Returns:
        How many tensors were compared, and the seconds of an epoch.
    """
    whole = in_fresh_process(train, config, folder, None, folder / "whole.pt", threads)
    short = override(config, {"training.epochs": first})
    parts = in_fresh_process(train, short, folder, None, folder / "half.pt", threads)
    parts += in_fresh_process(train, config, folder, folder / "half.pt", folder / "parts.pt", threads)
    for epoch, (one, other) in enumerate(zip(whole, parts, strict=True), start=1):
        for key in LOGGED:
            key = f"train/{key}"
            assert one[key] == other[key], f"epoch {epoch}: {key} is {one[key]!r} in one go, {other[key]!r} resumed"
    ends = [checkpoints.load(folder / name) for name in ("whole.pt", "parts.pt")]
    tensors = 0
    for part in (*NAMES, "opt_g", "opt_d"):
        one, other = (dict(checkpoints.leaves(part, end[part])) for end in ends)
        assert one.keys() == other.keys(), part
        for name, value in one.items():
            same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            assert same, f"{name} differs"
            tensors += isinstance(value, torch.Tensor)
    return tensors, whole[-1]["perf/train_s"]


def main(argv: list[str] | None = None) -> int:
    """`python -m benchmarks.resume`."""
    p = parser(
        "Trains N epochs in one process, and k in one and N - k in another; asserts that every logged loss, "
        "parameter and optimiser tensor is the same, bit for bit; prints what saving and loading cost."
    )
    p.add_argument("--epochs", type=int, default=4, help="N (4)")
    p.add_argument("--first", type=int, default=2, help="k, the epochs before the break (2)")
    p.add_argument("--base-dim", type=int, default=64, help="model.base_dim (64)")
    p.add_argument("--epoch-size", type=int, default=100, help="contents in an epoch (100)")
    p.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="both by default"
    )
    args = p.parse_args(argv)
    if not 1 <= args.first < args.epochs:
        p.error(f"--first {args.first}: expected at least 1 and less than --epochs {args.epochs}")
    device = settle(args)
    rows = [["precision", "tensors equal", "epoch s", "save s", "load s", "save / epoch", "load / epoch"]]
    for precision in args.precisions:
        config = configuration(
            args.device, precision, training__epochs=args.epochs, model__base_dim=args.base_dim,
            training__epoch_size=args.epoch_size,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="raystar-resume-") as temporary:
            folder = Path(temporary)
            tensors, epoch_s = compare(config, args.first, folder, torch.get_num_threads())
            content = checkpoints.load(folder / "whole.pt")
            seconds = take_turns(
                {
                    "save": lambda _, to=folder / "again.pt", it=content: checkpoints.save(to, it),
                    "load": lambda _, at=folder / "whole.pt": checkpoints.load(at),
                },
                rounds=5,
                device=device,
            )
        rows.append([
            precision, str(tensors), f"{epoch_s:.2f}", f"{seconds['save']:.3f}", f"{seconds['load']:.3f}",
            f"{seconds['save'] / epoch_s:.2%}", f"{seconds['load'] / epoch_s:.2%}",
        ])  # fmt: skip
    print(f"{args.epochs} epochs = {args.first}, a fresh process, {args.epochs - args.first} more: bitwise equal")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
