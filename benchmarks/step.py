"""raystar's training step beside a textbook step: the same networks, data and losses, in turn.

    python -m benchmarks.step --threads 1 --base-dim 64 --blocks 2 --batch 8

The textbook step is written from the specification: every network call alone, fakes computed once for D and
again for G, `.item()` on every loss, and a `DataLoader` that collates single items. Both compute the same losses.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from raystar.config.load import load_config, override, parse_assignment
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.data.batches import Batch, LatentDataset
from raystar.model.device import autocast, set_backends
from raystar.training.compile import compile_networks
from raystar.training.state import TrainState
from raystar.training.step import train_step
from tests.kit import textbook


class TextbookStep:
    """One update of D and one of G, E and F, as the specification's formulas stand."""

    def __init__(self, config: Config, bank: Bank, device: torch.device) -> None:
        self.config, self.device = config, device
        self.state = TrainState.create(config, device)
        self.nets = self.state.nets
        training = config.training
        shared = {"betas": (0.0, 0.99), "weight_decay": training.weight_decay}
        self.opt_d = torch.optim.AdamW(self.nets.D.parameters(), lr=training.lr_d, **shared)
        self.opt_g = torch.optim.AdamW(
            [
                {"params": [*self.nets.G.parameters(), *self.nets.E.parameters()], "lr": training.lr_g},
                {"params": list(self.nets.F.parameters()), "lr": training.lr_mapping},
            ],
            **shared,
        )
        if training.use_compile:
            # D under R1 needs second derivatives, which compiled code does not have.
            for name in ("G", "F", "E"):
                setattr(self.nets, name, torch.compile(getattr(self.nets, name)))
        data = LatentDataset(bank, config, torch.device("cpu"))
        self.loader = DataLoader(data, training.batch_size, drop_last=True)
        self.batches = self._endless()

    def _endless(self) -> Iterator[Batch]:
        while True:
            for item in self.loader:
                n = len(item["content"])
                noise = [torch.randn(n, self.config.model.latent_dim) for _ in range(3)]
                yield Batch(
                    item["content"], item["target_style"], item["source_style_id"], item["target_style_id"], *noise
                ).to(self.device)

    def __call__(self, number: int) -> dict[str, float]:
        batch, logs = next(self.batches), {}
        for terms, optimizer, loss in (
            (lambda: textbook.d_terms(self.nets, batch, self.config, number), self.opt_d, "d_loss"),
            (lambda: textbook.g_terms(self.nets, batch, self.config, epoch=1), self.opt_g, "g_loss"),
        ):
            with autocast(self.config, self.device):
                found = terms()
            optimizer.zero_grad()
            found[loss].backward()
            optimizer.step()
            logs |= {name: value.item() for name, value in found.items()}
        return logs


class RaystarStep:
    """`train_step` on batches gathered by index, and the averages where they are on."""

    def __init__(self, config: Config, bank: Bank, device: torch.device) -> None:
        self.data = LatentDataset(bank, config, device)
        self.state = TrainState.create(config, device)
        if config.training.use_compile:
            found = compile_networks(self.state, bank.shape[1:])
            print(f"compiled {' '.join(found.modules)} in {found.seconds:.0f} s", *found.notes, sep="\n", flush=True)
        self.sums: dict[str, torch.Tensor] = {}

    def __call__(self, number: int) -> None:
        batch = self.data.batch(1 + number % self.data.steps).to(self.state.device)
        logs = train_step(self.state, batch, epoch=1, step=number)
        self.state.average(self.data.steps)
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in logs.items()}


def flops(subject: Callable[[int], object]) -> int:
    """Floating-point operations of one step without R1, from the shapes that pass through it."""
    with FlopCounterMode(display=False) as counter:
        subject(1)
    return counter.get_total_flops()


def main() -> None:
    """The command line."""
    p = measure.parser(__doc__.splitlines()[0])
    p.add_argument("--base-dim", type=int, default=64)
    p.add_argument("--blocks", type=int, default=2)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--rounds", type=int, default=15, help="steps of each that count")
    p.add_argument("--compile", action="store_true", help="also both steps with torch.compile")
    p.add_argument("--average", action="store_true", help="also raystar's step with averaged weights")
    p.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="of raystar's steps; repeatable")
    p.add_argument(
        "--overlay", metavar="FILE", action="append", default=[],
        help="raystar's step once more with these settings, such as a speed sweep's fastest.yaml; repeatable",
    )  # fmt: skip
    args = p.parse_args()
    device = measure.settle(args)
    base = override(
        Config(),
        {
            "model.base_dim": args.base_dim,
            "model.n_res_blocks": args.blocks,
            "training.batch_size": args.batch,
            "training.device": args.device,
            "data.data_root": "raystar:demo",
            "data.domains": ["photo", "pointillism", "woodcut", "watercolour", "stained_glass"],
        },
    )
    with tempfile.TemporaryDirectory() as cache:
        report(args, base, open_bank(base, cache), device)


def report(args: argparse.Namespace, base: Config, bank: Bank, device: torch.device) -> None:
    """Measures and prints."""
    set_backends(base, device)
    float32 = override(base, {"training.use_amp": False})
    ours = override(base, dict(parse_assignment(text) for text in args.set), "--set")
    subjects: dict[str, Any] = {
        "textbook float32": TextbookStep(float32, bank, device),
        "textbook autocast": TextbookStep(base, bank, device),
        "raystar": RaystarStep(ours, bank, device),
    }
    if args.compile:
        compiled = {"training.use_compile": True}
        subjects["textbook autocast, compiled"] = TextbookStep(override(base, compiled), bank, device)
        subjects["raystar, compiled"] = RaystarStep(override(ours, compiled), bank, device)
    if args.average:
        subjects["raystar, averaging"] = RaystarStep(override(ours, {"training.ema_epochs": 1}), bank, device)
    for overlay in args.overlay:
        subjects[f"raystar, {Path(overlay).stem}"] = RaystarStep(load_config(overlay, ours), bank, device)
    # Counted in float32, where every product is one that the counter knows: the same function in every precision.
    counts = {
        "textbook": flops(TextbookStep(float32, bank, device)),
        "raystar": flops(RaystarStep(float32, bank, device)),
    }
    seconds = measure.take_turns(subjects, args.rounds, device)
    ceiling = {name: measure.matmul_ceiling(device, dtype) for name, dtype in
               (("float32", torch.float32), ("bf16", torch.bfloat16))}  # fmt: skip
    print(f"base_dim {args.base_dim}, {args.blocks} blocks, batch {args.batch}, {args.rounds} rounds")
    print(f"matmul ceiling: float32 {ceiling['float32'] / 1e9:.0f}, bf16 {ceiling['bf16'] / 1e9:.0f} GFLOP/s")
    print(f"{'':30} {'ms a step':>10} {'x textbook float32':>20} {'GFLOP a step':>13} {'of the ceiling':>15}")
    for name, value in seconds.items():
        count = counts[name.split(",")[0].split()[0]]
        kind = "float32" if "float32" in name or (name.startswith("raystar") and not ours.training.use_amp) else "bf16"
        share = count / value / ceiling[kind]
        ratio = seconds["textbook float32"] / value
        print(f"{name:30} {value * 1e3:10.1f} {ratio:20.2f} {count / 1e9:13.1f} {share:14.0%}")


if __name__ == "__main__":
    main()
