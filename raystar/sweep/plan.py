"""A request for a sweep, checked in full before Ray starts."""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raystar import __version__
from raystar.backend.ray_start import check_machine
from raystar.base.errors import RaystarError
from raystar.base.files import is_folder
from raystar.base.limits import check_limits
from raystar.base.machine import usable_cpus
from raystar.base.scratch import check_takes
from raystar.base.secrets import redact
from raystar.base.storage import Storage
from raystar.config.folders import cache_dir, check_name, check_text
from raystar.config.load import from_mapping as config_from_mapping
from raystar.config.load import get_value, override, request_config, signature, to_mapping
from raystar.config.schema import Config
from raystar.config.strict_yaml import find_shipped, read_mapping
from raystar.data.bank import Bank, open_bank
from raystar.model.device import resolve_device
from raystar.record.places import KEYS, Origins, began_in, find_config, keep, keep_config, moved
from raystar.record.sweep_file import (
    RECORD,
    as_meant,
    begun_by,
    code,
    code_differences,
    differences,
    of_0_1,
    read_record,
)
from raystar.ruler.samples import check as check_ruler
from raystar.ruler.samples import measured_by
from raystar.search.purpose import Purpose
from raystar.search.searchers import SEARCHERS
from raystar.search.space import Space
from raystar.search.space import from_mapping as space_from_mapping
from raystar.sweep.checks import check_latents, check_pictures, check_room, note_idle
from raystar.sweep.naming import check_kept, name_trials
from raystar.sweep.request import DEFAULT_CONFIG, SweepRequest
from raystar.sweep.resources import fitted_share, trial_resources
from raystar.sweep.starts import keep_starts
from raystar.sweep.whereabouts import shared_storage, tracking_uri
from raystar.tracking.stores import check_uri
from raystar.tracking.tracker import SPOOL, provenance
from raystar.training.speed import check_steps

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request that has passed every check that can be made before Ray starts."""

    name: str
    out: Path
    config: Config
    space: Space
    known: Mapping[str, Mapping[str, Any]]
    """The swept values of trials, by their names in order: of all of them, unless the search chooses as it goes."""
    baseline: str | None
    """The trial that runs the configuration as it stands."""
    names: list[str]
    """Of all trials: an experiment's own, `t00`, `t01`, ... of the others; a longer sweep keeps those it has."""
    gpu_share: float
    """GPUs of each of a trial's workers."""
    cpus: int
    """Processors of each."""
    max_concurrent: int | None
    time_budget_s: float | None
    tracking_uri: str
    bank: Bank
    record: Mapping[str, Any]
    """What `sweep.json` says."""
    resumed: bool = False
    address: str | None = None
    """Of a running Ray cluster."""
    starts: Mapping[str, str] = dataclasses.field(default_factory=dict, kw_only=True)
    """The checkpoints that trials start from: their files in the cache, by `checkpoint.init_from`."""
    storage: Storage = dataclasses.field(kw_only=True)
    """The sweep's folder for what trials save."""

    @property
    def trials(self) -> int:
        """How many trials the search has."""
        return len(self.names)

    @property
    def points(self) -> list[Mapping[str, Any]] | None:
        """The swept values of every trial; None where the search chooses as it goes."""
        return None if self.space.learns else list(self.known.values())

    @property
    def folder(self) -> Path:
        """The sweep's folder on this machine."""
        return self.out / self.name

    @property
    def purpose(self) -> Purpose:
        """Of the sweep."""
        return self.space.purpose

    @property
    def at_a_time(self) -> int:
        """Trials that run side by side: as many as fit on this machine, and no more than asked for."""
        workers = self.space.resources.workers
        fit = usable_cpus() // (self.cpus * workers)
        if self.gpu_share:
            fit = min(fit, int(torch.cuda.device_count() / (self.gpu_share * workers)))
        elif self.purpose.alone:
            fit = 1  # two trials on one device would measure each other
        return max(1, min(fit, self.max_concurrent or fit, self.trials + self.repeats))

    @property
    def seeds(self) -> list[int]:
        """From which the finalists are trained again; none where they are not."""
        first, finalists = self.config.training.seed + 1, self.space.finalists
        return list(range(first, first + finalists.seeds)) if finalists.top else []

    @property
    def repeats(self) -> int:
        """How many trials the finals will have, at most."""
        return len(self.seeds) * min(self.space.finalists.top + (1 if self.baseline else 0), self.trials)

    @property
    def cache_dir(self) -> Path:
        """Packed latents, the ruler and compiled code, shared by all sweeps below `out`."""
        return cache_dir(self.config, self.out)


def make_plan(request: SweepRequest) -> Plan:
    """Checks the whole request.

    Raises:
        RaystarError: the first thing that is wrong.
    """
    for flag, value in (
        ("--trials", request.trials),
        ("--epochs", request.epochs),
        ("--max-concurrent", request.max_concurrent),
    ):
        if value is not None and value < 1:
            raise RaystarError(f"{flag}: expected at least 1, found {value}")
    check_limits()
    check_machine(request.address)
    check_text(request.out, "--out")
    budget = _time_budget(request.time_budget) if request.time_budget else None
    if request.resume is not None:
        return _resumed(request, request.resume, budget)
    if request.space is None:
        raise RaystarError("--space: expected a space file, for example search_spaces/loss.yaml, or --resume NAME")
    name = request.name if request.name is not None else f"{Path(request.space).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_name(name)
    check_takes(request.out, f"--out {request.out}", "choose another folder")
    folder = request.out / name
    if folder.exists():
        resume = f"resume it with --resume {name}, " if (folder / RECORD).exists() else ""
        raise RaystarError(f"--name {name}: {folder} is there already; {resume}choose another name or remove it")
    asked = {
        "space": str(request.space),
        "config": str(request.config),
        "overlay": list(map(str, request.overlay)),
        "set": list(request.set),
        "epochs": request.epochs,
        "trials": request.trials,
    }
    config, content = _read(asked)
    config, space = _settle(asked, config, content)
    return _check(request, budget, name, asked, config, content, space)


def _read(asked: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The configuration and the content of the space file that a command names."""
    config = request_config(asked["config"], asked["overlay"], asked["set"])
    return config, dict(read_mapping(find_shipped(asked["space"])))


def _settle(asked: Mapping[str, Any], config: Config, content: Mapping[str, Any]) -> tuple[Config, Space]:
    """What the command's flags make of a configuration and a space."""
    space = space_from_mapping(content, config, str(asked["space"]))
    if asked["trials"] is not None:
        if not space.space:
            raise RaystarError(
                f"--trials: {space.source} holds experiments alone, and every one of them is a trial; add experiments, "
                "or a space to draw from"
            )
        if SEARCHERS[space.search].exhaustive:
            raise RaystarError("--trials: a grid search runs every combination; use search: random to choose a number")
        space = dataclasses.replace(space, trials=asked["trials"])
    epochs = asked["epochs"] or space.scheduler.max_epochs
    if epochs is not None:
        config = override(config, {"training.epochs": epochs}, "--epochs")
    if space.scheduler.type == "asha" and (space.scheduler.grace_epochs or 0) > config.training.epochs:
        raise RaystarError(
            f"{space.source}: scheduler.grace_epochs {space.scheduler.grace_epochs} is more than the "
            f"{config.training.epochs} epochs of a trial"
        )
    # In a sweep the terminal belongs to the table.
    return override(config, {"training.progress_style": "off", "training.log_json": False}, "sweep"), space


def _check(
    request: SweepRequest,
    budget: float | None,
    name: str,
    asked: Mapping[str, Any],
    written: Config,
    content: Mapping[str, Any],
    space: Space,
    *,
    before: Mapping[str, Any] | None = None,
) -> Plan:
    """Everything that must hold before Ray starts. `before`: the record of the sweep that is resumed."""
    config = written if before is None else Origins(before, request.out).config(written)
    gpu_share, cpus = trial_resources(config, space, request.address)
    device = resolve_device(config) if request.address is None else torch.device("cpu")
    known, baseline, names = name_trials(space, config, device, content, before)
    if before is None:
        note_idle(space, content, known)
    uri = tracking_uri(request, name, before)
    check_uri(uri, request.out / name / SPOOL)
    shared = shared_storage(request, name, before)
    storage = (Storage(str(request.out)) if shared is None else shared).child(name)
    if space.purpose.models:
        check_pictures(config)
    bank = open_bank(config, cache_dir(config, request.out))
    check_latents(config, space, known.values(), bank, resumed=before is not None)
    if request.address is None:
        gpu_share = fitted_share(gpu_share, config, space, known.values(), bank.shape)
    starts = keep_starts(space, config, known, cache_dir(config, request.out), before) if space.purpose.models else {}
    if not space.purpose.models:
        check_steps(config, bank)
    else:
        check_ruler(bank, config)
        check_room(config, space, storage, cpus, len(names))
    record: dict[str, Any] = {
        "name": name,
        "request": dict(asked),
        "config": keep_config(written, config, request.out),
        "space": dict(content),
        "trials": len(names),
        "points": None if space.learns else list(known.values()),
        "names": names,
        "baseline": baseline,
        "keys": space.keys,
        "signature": signature(written),
        "data": {"root": written.data.data_root, "digest": bank.digest, "latents": len(bank.names)},
        "starts": starts,
        **(_rulers(measured_by(bank, config), before) if space.purpose.models else {}),
        "storage": None if shared is None else keep(shared.uri, request.out),
        "tracking_uri": redact(keep(uri, request.out)),
        "began_in": began_in(request.out, before),
        "begun_by": __version__ if before is None else begun_by(before),
        "code": code(),
        "command": (before or {}).get("command") or redact(shlex.join(["python", *sys.orig_argv[1:]])),
        "git_commit": (before or {}).get("git_commit") or provenance().get("mlflow.source.git.commit"),
    }
    return Plan(
        name, request.out, config, space, known, baseline, names, gpu_share, cpus, request.max_concurrent, budget, uri,
        bank, record, before is not None, request.address, starts=starts, storage=storage,
    )  # fmt: skip


def _rulers(ruler: str, before: Mapping[str, Any] | None) -> dict[str, str | None]:
    """The key under which scores are comparable, and that of the sweep's first ones; 0.1 knew none."""
    first = ruler if before is None else before.get("first_ruler", before.get("ruler"))
    return {"ruler": ruler, "first_ruler": first}


def _resumed(request: SweepRequest, name: str, budget: float | None) -> Plan:
    """The plan of a resumed sweep: its record's, unless what it was made from has changed and `--force` is given.

    Raises:
        RaystarError: what has changed; or anything that `make_plan` refuses.
    """
    check_name(name, "--resume")
    _check_flags(request, name)
    if is_folder(folder := request.out / name):
        check_takes(folder, f"--resume {name}", "copy the runs to where they can be written, and resume there")
    before = read_record(request.out, name)
    asked = {**before["request"], **({"trials": request.trials} if request.trials is not None else {})}
    elsewhere = moved(request.set)
    config = config_from_mapping(find_config(before["config"], request.out), RECORD)
    config = request_config(None, [], elsewhere, base=config)
    asked["set"] = [*asked["set"], *elsewhere]
    content = as_meant(before["space"], before)
    changed = code_differences(before["code"], code())
    files = Origins(before, request.out).files(asked)
    gone = [file for file in (files["space"], files["config"], *files["overlay"]) if not find_shipped(file).is_file()]
    if gone:
        logger.warning(f"{' and '.join(gone)} not there any more; the sweep's record counts")
    elif (version := begun_by(before)) != __version__:  # its files may be others now, and keys have other defaults
        logger.info(f"sweep {name} was begun by raystar {version}: configuration and space are those of its record")
    else:
        config_now, content_now = _read(files)
        config_now, _ = _settle(files, config_now, content_now)
        changed += differences(_without_places(config), _without_places(config_now), "configuration")
        changed += differences(content, content_now, "space")
        if request.force:
            config, content = config_now, content_now
    config, space = _settle(asked, config, content)
    named = check_kept(space, before, name)
    plan = _check(request, budget, name, asked, config, content, space, before=before)
    changed += differences({**before["data"], "root": None}, {**plan.record["data"], "root": None}, "data")
    changed += differences(before.get("starts", {}), plan.record["starts"], "checkpoint.init_from")
    wanted = request.trials + len(space.experiments) if request.trials is not None else plan.trials
    if min(plan.trials, wanted) < before["trials"]:
        beside = f" beside its {len(named)} experiments" if named else ""
        raise RaystarError(
            f"--trials: sweep {name} has {before['trials'] - len(named)} trials{beside}; expected at least as many"
        )
    listed = "".join(f"\n  {line}" for line in changed)
    if plan.record.get("ruler") != before.get("ruler") and not request.force:
        raise RaystarError(
            f"--resume {name}: its scores are those of another ruler, {before.get('ruler', 'of an earlier version')}, "
            f"and cannot be compared with those of {plan.record.get('ruler', 'none')} now; {_instead(before)}; or set "
            f"them aside with --force, and go by what is measured from now on{':' if listed else ''}{listed}"
        )
    if changed and not request.force:
        raise RaystarError(
            f"--resume {name}: not what the sweep began with:{listed}\n"
            "put it back, or continue with what is there now with --force"
        )
    if changed:
        many = f"{len(changed)} thing{'s have' if len(changed) > 1 else ' has'} changed"
        logger.warning(f"{many} since sweep {name} began; continuing, because of --force:{listed}")
    return plan


def _check_flags(request: SweepRequest, name: str) -> None:
    """Refuses what a resumed sweep cannot be given; where something lies now it can."""
    for flag, value in (
        ("--name", request.name), ("--space", request.space), ("--overlay", request.overlay),
        ("--set", [text for text in request.set if text.partition("=")[0].strip() not in KEYS]),
        ("--epochs", request.epochs), ("--config", str(request.config) != DEFAULT_CONFIG),
    ):  # fmt: skip
        if value:
            but = f" (but for places: {', '.join(KEYS)})" if flag == "--set" else ""
            raise RaystarError(f"--resume {name} continues the sweep as it was asked for; leave out {flag}{but}")


def _without_places(config: Config) -> dict[str, Any]:
    """A configuration's values without the places whose content says what they are."""
    return to_mapping(override(config, {key: get_value(Config(), key) for key in KEYS}))


def _instead(before: Mapping[str, Any]) -> str:
    """What else can be done with a sweep that another ruler measured."""
    if of_0_1(before):
        at = f", commit {before['git_commit']}" if before.get("git_commit") else ""
        return f"start a new sweep, or continue with the raystar that began it (0.1{at})"
    return "start a new sweep, or put back what has changed"


def _time_budget(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not match or float(match[1]) <= 0:
        raise RaystarError(f"--time-budget {text}: expected a number and a unit, for example 90s, 30m, 4h or 2d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
