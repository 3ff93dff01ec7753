"""`python -m raystar.score`: a checkpoint's score, its losses on held-out latents, its pictures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from raystar.base.console import run_cli
from raystar.base.errors import RaystarError
from raystar.base.metrics import METRICS
from raystar.base.scratch import check_takes
from raystar.config.assignment import SET_HELP
from raystar.config.folders import cache_dir
from raystar.config.load import override, request_config
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.data.batches import LatentDataset
from raystar.model import checkpoint as checkpoints
from raystar.model.device import resolve_device
from raystar.model.users import config_of
from raystar.pictures import grid
from raystar.pictures.codec import check_codec, need_codec
from raystar.ruler.ruler import NOTHING, TRANSFER, Ruler
from raystar.ruler.samples import caution, measured, measured_by
from raystar.ruler.samples import check as check_ruler
from raystar.training.resume import state_of
from raystar.training.state import TrainState
from raystar.training.step import LOGGED, losses_of


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m raystar.score",
        description="Measures a checkpoint without training: the ruler's score, the losses on held-out latents, and "
        "picture grids. Takes raystar's and latent_cyclegan's files.",
    )
    p.add_argument("--checkpoint", metavar="FILE", type=Path, required=True, help="a .pt checkpoint")
    p.add_argument("--config", metavar="FILE", help="a configuration, instead of the one inside of the checkpoint")
    p.add_argument("--overlay", metavar="FILE", action="append", default=[], help="as for train; repeatable")
    p.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=f"{SET_HELP}; repeatable")
    p.add_argument("--map-domains", action="store_true", help="as for train: domains take what is there of their names")
    p.add_argument("--out", metavar="DIR", type=Path, help="a folder (not there yet) for score.json and the grids")
    p.add_argument("--runs", metavar="DIR", type=Path, default=Path("runs"), help="whose cache/ is used (runs)")
    return p


def main(argv: list[str] | None = None) -> int:
    """`python -m raystar.score`."""
    args = parser().parse_args(argv)
    if args.out is not None and args.out.exists():
        raise RaystarError(f"--out {args.out}: already there; choose a folder that does not exist")
    if args.out is not None:
        check_takes(args.out.parent, f"--out {args.out}", "choose another folder")
    checkpoint, source = checkpoints.load(args.checkpoint), str(args.checkpoint)
    base = config_of(checkpoint, source) if args.config is None else None
    config = request_config(args.config, args.overlay, args.set, base=base)
    if args.map_domains:
        config = override(config, {"checkpoint.map_domains": True})
    check_codec(config)
    device = resolve_device(config)
    cache = cache_dir(config, args.runs)
    bank = open_bank(config, cache)
    check_ruler(bank, config)
    if note := caution(config):
        print(f"note: {note}", file=sys.stderr)
    state = state_of(config, device, checkpoint, source)
    epoch = checkpoint.get("epoch")
    epoch = epoch if isinstance(epoch, int) and epoch > 0 else 1
    ruler = Ruler.build(bank, config, cache).to(device)
    scores = {f"eval/{name}": value for name, value in ruler.measure(state.shown, config).items()}
    losses, latents = _losses(state, config, bank, epoch)
    _print(scores, ruler, losses, latents, epoch, held_out=config.data.holds_out)
    if args.out is not None:
        facts = {
            "checkpoint": source, "epoch": epoch, "ruler": measured_by(bank, config), "metrics": scores,
            "references": ruler.references, "losses": losses, "data": {"root": bank.root, "digest": bank.digest},
        }  # fmt: skip
        _write(args.out, facts, state, config, bank)
        print(f"{', '.join(sorted(path.name for path in args.out.iterdir()))} in {args.out}")
    return 0


def _losses(state: TrainState, config: Config, bank: Bank, epoch: int) -> tuple[dict[str, float], int]:
    """Mean losses over the latents that the ruler looks at, each a source once on average, and how many these are."""
    held = measured(bank, config)
    count = sum(map(len, held))
    size = max(count, 2)
    config = override(
        config,
        {
            "training.epoch_size": size, "training.batch_size": min(config.training.batch_size, size),
            "training.drop_last": False, "training.seed": 0, "data.max_samples": None,
        },
    )  # fmt: skip
    data = LatentDataset(dataclasses.replace(bank, train=held), config, state.device)
    sums = torch.zeros(len(LOGGED), dtype=torch.float64)
    for step, batch in enumerate(data.batches(), start=1):
        values = losses_of(state, batch, epoch=epoch)
        sums += data.rows(step) * torch.stack([values[name].double() for name in LOGGED]).cpu()
    return dict(zip(LOGGED, (sums / size).tolist(), strict=True)), count


def _print(
    scores: dict[str, float], ruler: Ruler, losses: dict[str, float], latents: int, epoch: int, *, held_out: bool
) -> None:
    nothing, transfer = (ruler.references[name] for name in (NOTHING, TRANSFER))
    print(f"{'epoch ' + str(epoch):14} {'here':>8}  nothing  transfer")
    for name, value in scores.items():
        others = "  ".join(f"{given[name]:8.4f}" if name in given else " " * 8 for given in (nothing, transfer))
        better = METRICS[name].better
        print(f"{name.partition('/')[2]:14} {value:8.4f} {others}  {better + ' is better' if better else ''}".rstrip())
    kind, each = "held-out" if held_out else "training", (f"{name} {value:.4f}" for name, value in losses.items())
    print(f"losses on {latents} {kind} latents: {', '.join(each)}")


def _write(out: Path, facts: dict[str, Any], state: TrainState, config: Config, bank: Bank) -> None:
    """Grids and numbers; the folder appears whole or not at all."""
    codec, note = need_codec(config, state.device)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        for name, image in grid.draw(state.shown, config, grid.choose(bank, config, codec), codec).items():
            image.save(folder / f"{name}.png")
        (folder / "score.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        folder.chmod(0o755)
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder)
        raise


if __name__ == "__main__":
    run_cli(main)
