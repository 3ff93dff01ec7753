"""Folders of sweeps that never ran: the journal, the summary and the pictures that a real one leaves."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raystar.base.journal import Journal
from raystar.base.storage import Storage
from raystar.config.load import override, to_mapping
from raystar.config.schema import Config
from raystar.record import finals
from raystar.record.events import ENDED, EPOCH, FINALS, NOTE, REFERENCES, SESSION, STARTED
from raystar.record.state import Ledger
from raystar.record.statuses import FINISHED
from raystar.record.summary import Summary
from raystar.record.sweep_file import JOURNAL, RECORD
from raystar.search.asha import Rungs
from raystar.search.space import Collapse

SPACE: dict[str, Any] = {
    "loss.w_adv": {"loguniform": [0.1, 10.0]},
    "loss.w_cyc": {"loguniform": [0.1, 10.0]},
    "loss.w_id": {"choice": [0.0, 0.3, 1.0]},
}
EPOCHS = 8


def make_sweep(
    runs: Path,
    trials: int,
    *,
    broken: Mapping[int, tuple[str, str]] | None = None,
    status: str = FINISHED,
    purpose: str = "quality",
    baseline: bool = True,
    space: Mapping[str, Any] = SPACE,
    values: Mapping[str, Any] | None = None,
    description: str = "",
    note: str | None = None,
    references: Mapping[str, Mapping[str, float]] | None = None,
    seeds: int = 0,
) -> Path:
    """A sweep `s` below `runs` whose score is best at `loss.w_cyc` 1, stopped by a real ASHA; returns its folder.

    Args:
        broken: status and reason of trials that went wrong after two epochs, by number.
        values: swept values of every trial, for those that are not to be drawn.
        references: what the ruler says of doing nothing and of the channel transfer.
        seeds: from how many the best three and the baseline are trained again.
    """
    folder = runs / "s"
    folder.mkdir(parents=True)
    speed = purpose == "speed"
    metric, mode = ("perf/speedup", "max") if speed else ("eval/score", "min")
    first = "t00" if baseline else None
    clock: Iterator[float] = itertools.count(1_700_000_000.25, 1.5)
    summary = Summary("s", metric, mode, trials, first, started=next(clock))
    rungs = None if speed else Rungs(mode, 1, 2, EPOCHS, first)
    ledger = Ledger(summary, rungs, EPOCHS, Collapse(), None if speed else "eval/outlook")
    journal, rng = Journal(folder / JOURNAL), np.random.default_rng(0)

    def happened(event: str, **facts: Any) -> Any:
        record = {"event": event, "at": next(clock), **facts}
        journal.append(record)
        return ledger.apply(record)

    happened(SESSION)
    if references is not None:
        happened(REFERENCES, values=references)
    for number in range(trials):
        name = f"t{number:02d}"
        params = {key: _drawn(how, rng) for key, how in space.items()} | dict(values or {})
        happened(STARTED, trial=name, params=params)
        how, reason = (broken or {}).get(number, (FINISHED, None))
        for epoch in range(1, EPOCHS + 1):
            if how != FINISHED and epoch > 2:
                break
            metrics = _speed(rng) if speed else _quality(params, epoch, rng)
            verdict = happened(EPOCH, trial=name, epoch=epoch, idle_s=None, metrics=metrics)
            if verdict.ends is not None and how == FINISHED:
                how, reason = verdict.ends, verdict.reason
                break
        if note is not None:
            happened(NOTE, trial=name, note=note)
        if status != "running" or number < trials - 1:
            happened(ENDED, trial=name, status=how, reason=reason)
        summary.trials[name].run_id = f"{number:032x}"
    if seeds:
        chosen = finals.choose(summary.trials.values(), mode, 3, first)
        happened(FINALS, finalists=chosen, seeds=list(range(1, seeds + 1)))
        for name in summary.repeats:
            params = summary.trials[name].params
            happened(STARTED, trial=name, params=params)
            for epoch in range(1, EPOCHS + 1):
                happened(EPOCH, trial=name, epoch=epoch, idle_s=None, metrics=_quality(params, epoch, rng))
            happened(ENDED, trial=name, status=FINISHED, reason=None)
            summary.trials[name].run_id = f"{name:0>32}"
    journal.close()
    summary.status, summary.over = status, next(clock)
    summary.write(folder)
    config = override(Config(), {"training.epochs": EPOCHS}, "test")
    scheduler = {"type": "none"} if speed else {"type": "asha", "grace_epochs": 1, "reduction_factor": 2}
    record = {
        "name": "s",
        "request": {"space": "space.yaml", "config": "config.yaml", "overlay": [], "set": []},
        "config": to_mapping(config),
        "space": {
            **({"description": description} if description else {}),
            **({"purpose": purpose} if speed else {}),
            "scheduler": scheduler,
            "space": {key: dict(how) for key, how in space.items()},
        },
        "trials": trials,
        "signature": "0123456789ab",
        "data": {"root": "latents", "digest": "feedc0de", "latents": 410},
        "storage": None,
        "code": {"python": "3.11.9", "torch": "2.9.1", "raystar/model/networks.py": "abc"},
        "command": "python -m raystar.tune --space space.yaml --name s",
        "git_commit": "0" * 40,
    }
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def draw_pictures(folder: Path, pixels: int = 96, kinds: int = 2) -> None:
    """Grids of every epoch of every trial: noise, which no format makes small; `kinds` files under many names."""
    rng = np.random.default_rng(1)
    storage = Storage(str(folder))
    originals = []
    for number in range(kinds):
        coarse = rng.integers(0, 256, (pixels // 3, pixels // 3, 3), dtype=np.uint8)
        originals.append(folder / f"picture{number}.png")
        Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC).save(originals[-1], compress_level=1)
    for number, trial in enumerate(json.loads((folder / "summary.json").read_text())["trials"]):
        for key in ("grid_ref", "grid_noise"):
            for epoch in range(trial["epochs"] + 1):
                path = Path(storage.at(f"pictures/{trial['trial']}/{key}_{epoch:04d}.png"))
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(originals[(number + epoch) % kinds], path)


def _drawn(how: Mapping[str, Any], rng: np.random.Generator) -> Any:
    ((kind, values),) = how.items()
    if kind == "choice":
        return values[int(rng.integers(len(values)))]
    return float(np.exp(rng.uniform(math.log(values[0]), math.log(values[1]))))


def _quality(params: Mapping[str, Any], epoch: int, rng: np.random.Generator) -> dict[str, float]:
    far = abs(math.log10(params.get("loss.w_cyc", 1.0)))
    style, content = 0.3 + 0.4 * far + 0.5 / epoch + 0.01 * rng.normal(), 0.1 + 0.1 * far
    diversity = float(rng.uniform(0.3, 1))
    score = (0.1 + style) * (1 + content)
    return {
        "train/d_loss": 1.0,
        "eval/score": score,
        "eval/outlook": score,
        "eval/movement": 0.9,
        "eval/style": style,
        "eval/content": content,
        "eval/diversity": diversity,
        "eval/worst_pair": 1.1 * score,
        "eval/accuracy": 0.5,
    }


def _speed(rng: np.random.Generator) -> dict[str, float]:
    own, eager = rng.uniform(100, 200, 2).tolist()
    return {
        "perf/speedup": own / eager,
        "perf/steady_samples_per_s": own,
        "perf/eager_samples_per_s": eager,
        "perf/compile_s": float(rng.uniform(0, 60)),
        "perf/compiled_modules": 2.0,
        "perf/recompilations": 0.0,
    }
