"""A trained model as plain files, and back: `python -m raystar.export` and `raystar.export.load`.

An export is a folder with `model.safetensors`, `config.yaml`, `metrics.json`, `grid.png` and `README.md`, and with
`--onnx` the files of `exported.onnx.FILES`; using one needs neither Ray nor MLflow.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raystar.base.console import run_cli
from raystar.base.errors import RaystarError, nearest
from raystar.base.scratch import check_takes
from raystar.base.storage import Storage
from raystar.exported import onnx as graphs
from raystar.exported.model import WEIGHTS, Translator, add_onnx, load, write
from raystar.exported.model_card import versions
from raystar.model import checkpoint as checkpoints
from raystar.model.networks import Nets
from raystar.model.users import as_theirs, config_of
from raystar.tracking.mlflow import address, reader

__all__ = ["Translator", "load", "main"]


def main(argv: list[str] | None = None) -> int:
    """`python -m raystar.export`."""
    parser = argparse.ArgumentParser(
        prog="python -m raystar.export",
        description="Writes a sweep's best model, any trial's model or a checkpoint as plain files.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sweep", metavar="NAME", help="a sweep below --runs, or in the MLflow store: its best trial")
    source.add_argument("--run", metavar="RUN_ID", help="an MLflow run: a trial's, or a sweep's (its best trial)")
    source.add_argument("--checkpoint", metavar="FILE", type=Path, help="a .pt checkpoint, raystar's or an older one")
    parser.add_argument("--runs", metavar="DIR", type=Path, default=Path("runs"), help="folder of sweeps (runs)")
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow store (MLFLOW_TRACKING_URI, else mlflow.db below --runs)"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", metavar="DIR", type=Path, help="a folder that does not exist yet")
    target.add_argument(
        "--legacy-pt", metavar="FILE", type=Path,
        help="instead of --out, with --checkpoint: a .pt file (not there yet) for latent_cyclegan to go on from",
    )  # fmt: skip
    parser.add_argument("--onnx", action="store_true", help="also as ONNX graphs, which need neither torch nor raystar")
    args = parser.parse_args(argv)
    if args.legacy_pt is not None:
        return _export_legacy(args)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise RaystarError(f"--out {args.out}: already there; choose a folder that does not exist")
    if args.onnx:
        graphs.check_packages()
    uri = args.tracking_uri or address.default_uri(args.runs)
    check_takes(args.out.parent, f"--out {args.out}", "choose another folder")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".raystar-export-") as scratch:
        folder = Path(scratch) / "model"
        if args.sweep is not None:
            _export_sweep(args.runs, uri, args.sweep, folder)
        elif args.run is not None:
            _export_run(uri, args.run, folder)
        else:
            _export_checkpoint(args.checkpoint, folder, {})
        difference = add_onnx(folder) if args.onnx else None
        os.replace(folder, args.out)
    print(f"exported to {args.out}: {', '.join(sorted(p.name for p in args.out.iterdir()))}")
    if difference is not None:
        print(f"the ONNX graphs agree with PyTorch to {difference:.1e} of the largest value")
    return 0


def _export_sweep(runs: Path, uri: str, name: str, out: Path) -> None:
    best = runs / name / "best"
    if (best / WEIGHTS).is_file():
        load(best, "cpu")  # a damaged export is not passed on
        shutil.copytree(best, out)
        return
    run_id = reader.best_run(uri, name)
    if run_id is not None:
        _export_run(uri, run_id, out)
        return
    if not (runs / name).is_dir():
        present = [p.parent.name for p in runs.glob("*/sweep.json")]
        raise RaystarError(f"--sweep {name}: no such sweep in {runs}{nearest(name, present)}")
    raise RaystarError(f"--sweep {name}: no trial of it has a model yet ({best} is not there)")


def _export_run(uri: str, run_id: str, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        stored = reader.stored_model(uri, run_id, Path(scratch))
        if stored.export is not None:
            load(stored.export, "cpu")
            shutil.copytree(stored.export, out)
            return
    folder, _, name = str(stored.checkpoint).rpartition("/")
    try:
        with Storage(folder).fetched(name) as path:
            _export_checkpoint(path, out, stored.facts)
    except (RaystarError, OSError) as error:
        raise RaystarError(
            f"--run {run_id}: it has no model in the store, and its checkpoint {stored.checkpoint} cannot be used "
            f"({error}); {reader.with_models(uri, run_id)}"
        ) from None


def _export_checkpoint(path: Path, out: Path, known: Mapping[str, Any]) -> None:
    checkpoint = checkpoints.load(path)
    nets_config = config_of(checkpoint, str(path))
    Nets.of(nets_config.model, nets_config.num_domains, checkpoints.shown_weights(checkpoint), str(path))
    # Other trainers' files hold here what they like; what is no plain number is left out.
    recorded = checkpoint.get("metrics")
    metrics = {str(k): v for k, v in recorded.items() if _is_number(v)} if isinstance(recorded, dict) else {}
    epoch = checkpoint.get("epoch")
    facts = {"trial": path.stem, "epoch": epoch if _is_number(epoch) else None, "metrics": metrics, "params": {}}
    if "eval/score" in metrics:
        facts |= {"metric": "eval/score", "score": metrics["eval/score"]}
    write(out, checkpoint, {**facts, "versions": versions(), **known}, {})


def _export_legacy(args: argparse.Namespace) -> int:
    if args.checkpoint is None or args.onnx:
        raise RaystarError("--legacy-pt: goes with --checkpoint alone")
    if args.legacy_pt.exists():
        raise RaystarError(f"--legacy-pt {args.legacy_pt}: already there; choose another name")
    check_takes(args.legacy_pt.parent, f"--legacy-pt {args.legacy_pt}", "choose another folder")
    checkpoint = checkpoints.load(args.checkpoint)
    theirs = as_theirs(checkpoint, str(args.checkpoint))
    checkpoints.save(args.legacy_pt, theirs, with_digest=False)
    if "ema" in checkpoint:
        print("note: training goes on from the weights themselves; their averages are left out", file=sys.stderr)
    print(f"written to {args.legacy_pt}: epoch {theirs['epoch']}, for latent_cyclegan to go on from")
    return 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


if __name__ == "__main__":
    run_cli(main)
