"""`python -m raystar.train`: one run of the same training loop that a sweep's trials run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raystar.base.command import command
from raystar.base.console import run_cli
from raystar.base.errors import RaystarError, TrialDiverged, TrialOutOfMemory
from raystar.base.files import write_whole
from raystar.base.metrics import measured_by_0_1
from raystar.base.scratch import check_scratch, check_takes
from raystar.base.transcript import Transcript
from raystar.config.assignment import SET_HELP
from raystar.config.folders import cache_dir, check_name, check_text, run_name
from raystar.config.load import override, request_config, signature, to_yaml
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.data.batches import drawn
from raystar.model import checkpoint as checkpoints
from raystar.model.device import resolve_device
from raystar.model.users import config_of
from raystar.pictures.codec import Codec, check_codec, open_codec
from raystar.record.statuses import DIVERGED, FAILED, FINISHED, INTERRUPTED
from raystar.ruler.ruler import NOTHING, TRANSFER, Ruler
from raystar.ruler.samples import caution, labels, unmeasured
from raystar.ruler.samples import check as check_ruler
from raystar.tracking.mlflow.address import default_uri
from raystar.tracking.relay import Relay
from raystar.tracking.stores import check_uri, open_tracker
from raystar.tracking.tracker import CHECKPOINT, PARENT, SPOOL, Tracker, provenance
from raystar.training.loss_table import LOSSES, LossTable, epoch_row
from raystar.training.losses import outlasting
from raystar.training.resume import initial_state, restore
from raystar.training.trainer import Progress, Trainer

DEFAULT_CONFIG = "configs/stargan_v2_latent.yaml"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m raystar.train",
        description="Trains one configuration, with checkpoints, picture grids, the ruler's score and MLflow.",
    )
    p.add_argument(
        "--config", metavar="FILE", help=f"for example {DEFAULT_CONFIG} or configs/demo.yaml (the one in --resume FILE)"
    )
    p.add_argument(
        "--overlay", metavar="FILE", action="append", default=[],
        help="configuration keys that replace those of --config, for example a speed sweep's fastest.yaml; repeatable",
    )  # fmt: skip
    p.add_argument(
        "--name", metavar="NAME", help="the run's name (experiment.name, else the configuration's with the time)"
    )
    p.add_argument("--epochs", metavar="N", type=int, help="epochs to train, instead of training.epochs")
    p.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=f"{SET_HELP}; repeatable")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("runs"), help="where everything goes (runs)")
    p.add_argument(
        "--resume", metavar="FILE", nargs="?", const="",
        help="resume the run --name from its last checkpoint, or begin one after the checkpoint FILE, raystar's or "
        "latent_cyclegan's",
    )  # fmt: skip
    p.add_argument(
        "--map-domains", action="store_true",
        help="a checkpoint has other domains or another order of them: each takes what is there of its name",
    )  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="check everything and say what would be trained")
    p.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow store ($MLFLOW_TRACKING_URI, else a SQLite file in --out)"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """`python -m raystar.train`."""
    args = parser().parse_args(argv)
    with Transcript() as transcript:
        return _train(args, transcript)


def _train(args: argparse.Namespace, transcript: Transcript) -> int:
    check_scratch()
    check_text(args.out, "--out")
    config = _config(args)
    name, folder, begun = _place(args, config)
    if not args.dry_run:
        transcript.write_to(config.training.console_log_path, "training.console_log_path")
    there = folder.exists()
    check_takes(folder, f"run {name}", "copy it to where it can be continued" if there else "choose another folder")
    uri = args.tracking_uri or default_uri(args.out)
    check_uri(uri, folder / SPOOL)
    check_codec(config)
    device = resolve_device(config)
    cache = cache_dir(config, args.out)
    bank = open_bank(config, cache)
    blind = unmeasured(config)
    if blind is None:
        check_ruler(bank, config)
    else:
        blind = f"no score: {blind}"
    for note in filter(None, (outlasting(config), blind or caution(config))):
        print(f"note: {note}", file=sys.stderr)
    checkpoint, source = checkpoints.load_latest(begun) if begun else (None, folder)
    state, first_epoch = initial_state(config, device), 1
    if checkpoint is not None:  # before anything is written: it may not fit
        first_epoch = restore(state, checkpoint, str(source)) + 1
    if args.dry_run:
        _codec(config, device)
        _ruler(config, bank, cache)
        return _dry_run(Trainer(config, bank, state=state, first_epoch=first_epoch), name, folder, str(source))
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"run {name}: {config.training.epochs} epochs on {device}, {len(bank.domains)} domains, "
        f"{sum(map(len, drawn(bank, config)))} latents; opening the codec, the ruler and MLflow",
        flush=True,
    )
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    tracker = _tracker(uri, args.out, bank, name, folder)
    late = tracker.waiting
    tracker.begin()
    try:
        codec, ruler = _codec(config, device), _ruler(config, bank, cache)
        tracker.wait_until_connected()
        trainer = Trainer(config, bank, ruler, codec, state, first_epoch=first_epoch)
    except BaseException:
        tracker.close()
        raise
    if trainer.first_epoch > config.training.epochs:
        tracker.close()
        if late and not tracker.waiting:
            print(f"MLflow has the {late} records that waited for it; nothing is left to train")
            return 0
        raise RaystarError(
            f"{folder}: trained for {trainer.first_epoch - 1} epochs already; ask for more with --epochs"
        )
    recorded = tracker.last_epoch(PARENT)
    if trainer.first_epoch <= recorded:
        print(f"epochs {trainer.first_epoch} to {recorded} are trained again, from the checkpoint; their record stays")
    _open_run(tracker, config, name, checkpoint, trainer.first_epoch)
    return _run(trainer, tracker, config, folder)


def _config(args: argparse.Namespace) -> Config:
    base = None
    if args.config is None:
        if not args.resume:
            raise RaystarError(f"--config: expected a file, for example {DEFAULT_CONFIG}, or --resume and a checkpoint")
        base = config_of(checkpoints.load(args.resume), args.resume)
    config = request_config(args.config, args.overlay, args.set, base=base)
    if args.epochs is not None:
        config = override(config, {"training.epochs": args.epochs}, "--epochs")
    return override(config, {"checkpoint.map_domains": True}) if args.map_domains else config


def _place(args: argparse.Namespace, config: Config) -> tuple[str, Path, list[Path]]:
    """The run's name, its folder, and the checkpoints from which it is resumed, newest first.

    Raises:
        RaystarError: there is a run already, or none, and the opposite was asked for.
    """
    named = args.name or (run_name(config.experiment.name) if config.experiment.name else None)
    if args.resume == "" and named is None:
        raise RaystarError("--resume: name the run to resume with --name, or the checkpoint to begin after")
    name = named or f"{Path(args.config or args.resume).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_name(name)
    folder = _folder(args, config, name)
    saved, latest = sorted(folder.glob("epoch_*.pt"), reverse=True), folder / "latest.pt"
    begun = [latest, *saved] if saved or latest.exists() else []
    file = args.resume or None
    if config.checkpoint.resume_path is not None and (args.resume is None or (args.resume == "" and not begun)):
        path = Path(config.checkpoint.resume_path).expanduser()
        if path.exists():
            print(f"resuming after {path}, as checkpoint.resume_path says")
            file = str(path)
        else:
            print(f"note: checkpoint.resume_path: {path} is not there; the run begins from its start", file=sys.stderr)
    if file is not None:
        return name, folder, _begun_by(Path(file).expanduser(), folder, begun)
    # Stopped before its first checkpoint, a run begins anew, but in the same record.
    if begun or (folder / SPOOL).exists():
        if args.resume is None:
            held = "checkpoints" if begun else "the record of a run"
            raise RaystarError(f"{folder} holds {held} already; resume it with --resume, or choose another name")
    elif args.resume is not None:
        raise RaystarError(f"--resume: {folder} holds no checkpoint (latest.pt)")
    return name, folder, begun


def _folder(args: argparse.Namespace, config: Config, name: str) -> Path:
    """Where the run's files go: as the configuration says, unless `--name` names another run."""
    if config.checkpoint.save_dir is not None:
        return Path(config.checkpoint.save_dir).expanduser()
    if config.experiment.name is not None and args.name is None:
        return Path(config.experiment.outputs_dir or f"outputs/{config.experiment.name}").expanduser()
    return Path(args.out) / name


def _begun_by(file: Path, folder: Path, begun: list[Path]) -> list[Path]:
    """The checkpoints of a run that begins after `file`, newest first.

    Raises:
        RaystarError: the run's folder holds others, which would be overwritten.
    """
    if not begun:
        return [file]
    newest = {path.resolve() for path in begun[:2]}  # latest.pt and the last of an epoch
    if file.resolve() not in newest:
        raise RaystarError(
            f"--resume {file}: {folder} holds checkpoints already, which would be overwritten; continue them with "
            "--resume and no file, or choose another --name (and checkpoint.save_dir, where the configuration has one)"
        )
    return [file, *(path for path in begun if path.resolve() != file.resolve())]


def _dry_run(trainer: Trainer, name: str, folder: Path, source: str) -> int:
    config, bank = trainer.config, trainer.data.bank
    begin = f"after epoch {trainer.first_epoch - 1} of {source}" if trainer.first_epoch > 1 else "from its start"
    train, held = (sum(map(len, rows)) for rows in (bank.train, bank.held))
    print(
        f"run {name}: {config.training.epochs} epochs of {trainer.data.steps} steps on {trainer.device}, {begin}; "
        f"{len(bank.domains)} domains, {train} latents to train on, {held} held out; checkpoints in {folder}"
    )
    print("dry run: nothing was written")
    return 0


def _codec(config: Config, device: Any) -> Codec | None:
    codec, note = open_codec(config, device)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    return codec


def _ruler(config: Config, bank: Bank, cache: Path) -> Ruler | None:
    if unmeasured(config) is not None:  # which has been said
        return None
    ruler = Ruler.build(bank, config, cache)
    if config.progress != "off":
        nothing, transfer = (ruler.references[name]["eval/score"] for name in (NOTHING, TRANSFER))
        print(f"score: doing nothing {nothing:.4f}, channel transfer {transfer:.4f}, perfect 0.1", file=sys.stderr)
    return ruler


def _tracker(uri: str, out: Path, bank: Bank, name: str, folder: Path) -> Relay:
    return open_tracker(
        uri,
        folder / SPOOL,
        artifacts=out / "artifacts",
        dataset={"name": Path(bank.root).name or "latents", "digest": bank.digest, "source": bank.root},
        tags={**provenance(), "raystar.run": name},
        metric="eval/score",
    )


def _open_run(
    tracker: Tracker, config: Config, name: str, checkpoint: Mapping[str, Any] | None, first_epoch: int
) -> None:
    """Begins the record, or continues it. Of 0.1's scores and today's MLflow draws one curve."""
    tracker.start(
        PARENT,
        params={},
        tags={
            "raystar.signature": signature(config),
            "raystar.seed": str(config.training.seed),
            **labels(config),
        },
        text={"config.yaml": to_yaml(config)},
        name=name,
    )
    metrics = checkpoint.get("metrics") if checkpoint is not None else None
    if isinstance(metrics, dict) and measured_by_0_1(metrics):
        remark = f"scores up to epoch {first_epoch - 1} are of raystar 0.1's ruler, not to be compared with later ones"
        print(f"note: {remark}", file=sys.stderr)
        tracker.attach(PARENT, {}, {"mlflow.note.content": remark}, {})


def _run(trainer: Trainer, tracker: Tracker, config: Config, folder: Path) -> int:
    vis = Path(config.visualization.save_dir) if config.visualization.save_dir else folder / "vis"
    measured: tuple[float, int] | None = None
    status, reason = FAILED, None
    try:
        _leave_config(config, folder)
        losses = _losses(folder, trainer.first_epoch - 1)
        for progress in trainer.run():
            images = {}
            for key, image in progress.images.items():
                vis.mkdir(parents=True, exist_ok=True)
                images[key] = vis / f"{key}_{progress.epoch:04d}.png"
                image.save(images[key])
            first = {key: vis / f"{key}_0000.png" for key in progress.first_images}
            for key, path in first.items():
                progress.first_images[key].save(path)
            if first:
                tracker.log(PARENT, 0, {}, first)
            # Before the checkpoint: an epoch that is trained again is recorded once, one that is not must be there.
            tracker.log(PARENT, progress.epoch, progress.metrics, images)
            losses.add(epoch_row(progress.epoch, progress.step, progress.metrics))
            write_whole(folder / LOSSES, losses.text())
            _save(progress, config, folder, tracker)
            score = progress.metrics.get("eval/score")
            if score is not None:
                measured = (score, progress.epoch)
        status = FINISHED
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (TrialDiverged, TrialOutOfMemory) as error:
        status = DIVERGED if isinstance(error, TrialDiverged) else FAILED
        reason = str(error)
        print(f"error: {reason}", file=sys.stderr)
    finally:
        if (folder / "latest.pt").is_file():
            tracker.attach(PARENT, {}, {CHECKPOINT: str((folder / "latest.pt").resolve())}, {})
        tracker.end(PARENT, status, reason)
        tracker.close()
    if measured is not None or status == FINISHED:
        result = f"score {measured[0]:.4f} after epoch {measured[1]}" if measured is not None else "no score"
        left = "checkpoints and grids" if trainer.codec is not None else "checkpoints"
        print(f"{status}; {result}; {left} in {folder}")
    if (folder / "latest.pt").is_file():
        print(f"export: {command('export', ('--checkpoint', folder / 'latest.pt'), ('--out', 'my_model'))}")
    if status == INTERRUPTED:
        return 130
    return 0 if status == FINISHED else 1


def _losses(folder: Path, until: int) -> LossTable:
    """The rows of `losses.csv` up to the epoch after which a run is resumed."""
    table = LossTable()
    if (folder / LOSSES).is_file():
        table.read((folder / LOSSES).read_text(encoding="utf-8", errors="replace"), until)
    return table


def _leave_config(config: Config, folder: Path) -> None:
    """Writes the resolved configuration into the run's folder; a file there that raystar has not written stays."""
    mark = "# The resolved configuration of a run, written by raystar\n"
    for path in (folder / "config.yaml", folder / "config.resolved.yaml"):
        if not path.exists() or path.read_text(encoding="utf-8", errors="replace").startswith(mark):
            write_whole(path, mark + to_yaml(config))
            return


def _save(progress: Progress, config: Config, folder: Path, tracker: Tracker) -> None:
    """`epoch_xxxx.pt` and `latest.pt` every `save_interval` epochs and at the end."""
    if progress.epoch % config.training.save_interval and progress.epoch != config.training.epochs:
        return
    tracker.sync()
    checkpoints.save(folder / f"epoch_{progress.epoch:04d}.pt", progress.checkpoint)
    checkpoints.save(folder / "latest.pt", progress.checkpoint)


if __name__ == "__main__":
    run_cli(main)
