"""A space file: what is searched, how, for how long and on what; checked whole before Ray starts."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raystar.base.errors import RaystarError, key_text, misspelt, show
from raystar.base.metrics import RULER, higher_is_better
from raystar.config.load import get_value, override
from raystar.config.schema import MAX_WHOLE, Config
from raystar.config.strict_yaml import read_mapping
from raystar.search.distributions import Distribution, read_distribution
from raystar.search.fields import boolean, number, one_of, section, whole
from raystar.search.purpose import PURPOSES, QUALITY, Purpose
from raystar.search.searchers import SEARCHERS
from raystar.training.compile import canonical

SEED = "training.seed"
"""The key that differs between the runs of a finalist."""
_KNOWN = (
    "description", "purpose", "metric", "mode", "trials", "baseline", "search", "seed", "scheduler", "resources",
    "space", "collapse", "keep", "finalists", "abort_after",
)  # fmt: skip
_SCORE, _OUTLOOK = "eval/score", "eval/outlook"
_MOST = 10_000  # trials, or combinations of a grid: more would never be run, and hardly be listed


@dataclass(frozen=True)
class Scheduler:
    """When trials are stopped: ASHA on epochs, or never (`none`)."""

    type: str = "asha"
    max_epochs: int | None = None
    """Epochs of a trial that is never stopped; by default `training.epochs`."""
    grace_epochs: int | None = None
    """The first rung; see `grace`."""
    reduction_factor: float = 2
    metric: str | None = None
    """What ranks trials at rungs, in full; None where the file leaves that open (`ranking`)."""

    def grace(self, epochs: int) -> int:
        """Epochs before a trial may be stopped: by default a fifth of its run.

        By then the outlook's rank correlation with the final score is above 0.8 (benchmarks/RESULTS.md).
        """
        return self.grace_epochs if self.grace_epochs is not None else -(-epochs // 5)


@dataclass(frozen=True)
class Resources:
    """What one trial occupies: `workers` processes that share its batches, each on a device of its own."""

    gpus: float | str = "auto"
    """Of a worker: a number, a fraction to share one, or `auto`: half a GPU (with several workers a whole one) where
    there is one, else none."""
    cpus: int | str = 1
    """Of a worker: a number, or `auto`: all of the machine's for a speed sweep without a GPU, else 1."""
    workers: int = 1


@dataclass(frozen=True)
class Finalists:
    """The best configurations, and how often they are trained again."""

    top: int = 3
    """Configurations that are compared by means over seeds, and whose models go into the MLflow store; 0 for none."""
    seeds: int = 2
    """Further seeds that each of them and the baseline are trained from; 0 compares trials by their own scores."""


@dataclass(frozen=True)
class Collapse:
    """When a model is taken to have collapsed: it translates every noise alike for several measurements in a row."""

    diversity: float = 0.01
    """Of `eval/diversity`, 0 for the same picture and 1 for real diversity."""
    epochs: int = 3
    """Measured epochs in a row, of a model that has begun to move; 0 never."""


@dataclass(frozen=True)
class Space:
    """A checked space file."""

    source: str
    metric: str
    """One of the purpose's."""
    mode: str
    trials: int
    space: Mapping[str, Distribution]
    description: str = ""
    purpose: Purpose = QUALITY
    baseline: bool = True
    search: str = "random"
    seed: int = 0
    scheduler: Scheduler = field(default_factory=Scheduler)
    resources: Resources = field(default_factory=Resources)
    collapse: Collapse = field(default_factory=Collapse)
    keep: int = 5
    """Trials whose best checkpoints stay when all have ended."""
    finalists: Finalists = field(default_factory=Finalists)
    abort_after: int = 5
    """Trials that go wrong one after the other before the sweep gives up; 0 never."""

    @property
    def ranking(self) -> tuple[str, str]:
        """What ranks trials at rungs, and its mode."""
        return ranking(self.scheduler, self.metric, self.mode, self.source)

    def points(self, config: Config, device: torch.device) -> list[dict[str, Any]] | None:
        """The swept keys' values of every trial, the baseline first; None where the search decides as it goes.

        No combination comes twice; where only the step is timed, neither do two that run the same code on `device`.

        Raises:
            RaystarError: a drawn combination that no configuration may have.
        """
        base = [{key: get_value(config, key) for key in self.space}] if self.baseline else []
        searcher = SEARCHERS[self.search]
        if searcher.draw is None:
            for key, value in base[0].items() if base else ():
                if self.space[key].listed and value not in self.space[key].values:
                    raise RaystarError(
                        f"{self.source}: space: {key}: search {self.search} begins with the baseline, whose value "
                        f"{value} is not among the choices; add it, or set baseline: false"
                    )
                if not self.space[key].listed and value is None:
                    raise RaystarError(
                        f"{self.source}: space: {key}: search {self.search} begins with the baseline, whose value "
                        "null is not a number; set it, or baseline: false"
                    )
            return None
        combinations = searcher.draw(self.space, self.seed, self.trials)
        points: dict[tuple[Any, ...], dict[str, Any]] = {}
        for values in (tuple(point.values()) for point in base):
            self._add(points, values, config, device)
        seen: set[tuple[Any, ...]] = set()
        there_are = math.prod(d.size for d in self.space.values())
        for values in combinations:
            if not searcher.exhaustive and (len(points) == self.trials or len(seen) == there_are):
                break
            if values not in seen:
                seen.add(values)
                self._add(points, values, config, device)
        return list(points.values())

    def _add(
        self, points: dict[tuple[Any, ...], Any], values: tuple[Any, ...], config: Config, device: torch.device
    ) -> None:
        drawn = override(config, dict(zip(self.space, values, strict=True)), self.source)
        if not self.purpose.models:
            drawn = canonical(drawn, device)
        point = {key: get_value(drawn, key) for key in self.space}
        points.setdefault(tuple(point.values()), point)


def load_space(path: str | Path, config: Config) -> Space:
    """Reads and checks a space file against `config`.

    Raises:
        RaystarError: what is wrong, where, and what was expected.
    """
    return from_mapping(read_mapping(path), config, str(path))


def from_mapping(content: Mapping[str, Any], config: Config, source: str) -> Space:
    """A `Space` from a mapping read from `source`."""
    for key in content:
        if key not in _KNOWN:
            raise RaystarError(f"{source}: unknown key {misspelt(key, _KNOWN)}; known: {', '.join(_KNOWN)}")
    ranges = content.get("space")
    if not isinstance(ranges, Mapping) or not ranges:
        raise RaystarError(
            f"{source}: space: expected the keys to search, for example loss.w_cyc: {{uniform: [0.5, 2]}}"
        )
    space = {key_text(key): read_distribution(key_text(key), value, source) for key, value in ranges.items()}
    search = one_of(content.get("search", "random"), tuple(SEARCHERS), f"{source}: search")
    if SEARCHERS[search].exhaustive and (ranged := [key for key, d in space.items() if not d.listed]):
        raise RaystarError(f"{source}: search {search} needs choices, but {', '.join(ranged)} has a range")
    package = SEARCHERS[search].package
    if package is not None and importlib.util.find_spec(package) is None:
        raise RaystarError(f"{source}: search {search} needs the package {package}; pip install {package}")
    purpose = PURPOSES[one_of(content.get("purpose", QUALITY.name), tuple(PURPOSES), f"{source}: purpose")]
    resources = _resources(content.get("resources", {}), source)
    _check_purpose(purpose, space, search, resources, source)
    description = content.get("description", "")
    baseline = boolean(content.get("baseline", True), f"{source}: baseline")
    trials = whole(content.get("trials", 12), f"{source}: trials", 1, _MOST)
    if SEARCHERS[search].exhaustive:
        combinations = math.prod(len(d.values) for d in space.values())
        if combinations > _MOST:
            raise RaystarError(
                f"{source}: search {search}: expected at most {_MOST} combinations, found {combinations}; "
                "leave out choices, or use search: random"
            )
        trials = combinations + (1 if baseline else 0)
    space_file = Space(
        source=source,
        metric=_metric(content.get("metric", purpose.metric), purpose.metrics, f"{source}: metric"),
        mode=one_of(content.get("mode", purpose.mode), ("min", "max"), f"{source}: mode"),
        trials=trials,
        space=space,
        description=description if isinstance(description, str) else show(description),
        purpose=purpose,
        baseline=baseline,
        search=search,
        seed=whole(content.get("seed", 0), f"{source}: seed", 0, MAX_WHOLE),
        scheduler=read_scheduler(content.get("scheduler", {}), purpose.metrics, source),
        resources=resources,
        collapse=_collapse(content.get("collapse", {}), source),
        keep=whole(content.get("keep", Space.keep), f"{source}: keep", 1, _MOST),
        finalists=_finalists(content.get("finalists"), purpose, space, source),
        abort_after=whole(content.get("abort_after", Space.abort_after), f"{source}: abort_after", 0, _MOST),
    )
    _ = space_file.ranking  # refuses what has no known direction
    return space_file


def _check_purpose(
    purpose: Purpose, space: Mapping[str, Distribution], search: str, resources: Resources, source: str
) -> None:
    """The fastest settings are taken over into other runs, so they may change nothing but how fast these are."""
    for key in space:
        if purpose.keys is not None and key not in purpose.keys:
            raise RaystarError(
                f"{source}: space: {key}: purpose {purpose.name} searches only what leaves the results as they are: "
                f"{', '.join(purpose.keys)}"
            )
    if not purpose.alone:
        return
    if SEARCHERS[search].draw is None:
        raise RaystarError(f"{source}: search: expected random or grid for purpose {purpose.name}, found {search}")
    if resources.workers != 1:
        raise RaystarError(
            f"{source}: resources.workers: purpose {purpose.name} measures one worker on one device, "
            f"found {resources.workers}"
        )


def ranking(scheduler: Scheduler, metric: str, mode: str, source: str) -> tuple[str, str]:
    """What ranks trials at rungs, and which way, in a sweep for `metric`.

    The score is for the end: whatever begins to move looks worse before it gets better, and the ruler's outlook allows
    for that.

    Raises:
        RaystarError: a metric of which nobody knows which way is better.
    """
    rung_metric = scheduler.metric or (_OUTLOOK if metric == _SCORE else metric)
    if rung_metric == metric:
        return rung_metric, mode
    group, _, name = rung_metric.partition("/")
    if group != "eval":
        raise RaystarError(
            f"{source}: scheduler.metric: {rung_metric}: whether more of it is better is not known; expected a metric "
            f"of the ruler's ({', '.join(RULER)}) or the sweep's own, {metric}"
        )
    return rung_metric, "max" if higher_is_better(f"eval/{name}") else "min"


def read_scheduler(content: Any, metrics: Sequence[str], source: str) -> Scheduler:
    """The scheduler of a space file, whose sweep can report `metrics`."""
    where = f"{source}: scheduler"
    section(content, ("type", "max_epochs", "grace_epochs", "reduction_factor", "metric"), where)
    most, grace, metric = (content.get(key) for key in ("max_epochs", "grace_epochs", "metric"))
    scheduler = Scheduler(
        type=one_of(content.get("type", "asha"), ("asha", "none"), f"{where}.type"),
        max_epochs=None if most is None else whole(most, f"{where}.max_epochs", 1),
        grace_epochs=None if grace is None else whole(grace, f"{where}.grace_epochs", 1),
        reduction_factor=number(content.get("reduction_factor", 2), f"{where}.reduction_factor"),
        metric=None if metric is None else _metric(metric, metrics, f"{where}.metric"),
    )
    if scheduler.reduction_factor <= 1:
        raise RaystarError(f"{where}.reduction_factor: expected more than 1, found {scheduler.reduction_factor:g}")
    if scheduler.max_epochs is not None and (scheduler.grace_epochs or 0) > scheduler.max_epochs:
        raise RaystarError(
            f"{where}.grace_epochs: expected at most max_epochs {scheduler.max_epochs}, found {scheduler.grace_epochs}"
        )
    return scheduler


def _finalists(content: Any, purpose: Purpose, space: Mapping[str, Distribution], source: str) -> Finalists:
    where = f"{source}: finalists"
    if not purpose.models:
        if content is not None:
            raise RaystarError(
                f"{where}: purpose {purpose.name} has none, since speed does not depend on a seed; leave it out"
            )
        return Finalists(0, 0)
    if content is None:  # where seeds are searched, there is no other seed to train from
        return Finalists(seeds=0) if SEED in space else Finalists()
    if not isinstance(content, Mapping):
        return Finalists(whole(content, where, 0, _MOST), 0)
    section(content, ("top", "seeds"), where)
    finalists = Finalists(
        whole(content.get("top", Finalists.top), f"{where}.top", 0, _MOST),
        whole(content.get("seeds", Finalists.seeds), f"{where}.seeds", 0, _MOST),
    )
    if finalists.seeds and SEED in space:
        raise RaystarError(
            f"{where}.seeds: the best are trained again from other seeds, but the space searches {SEED} itself; "
            "leave that out, or set seeds: 0"
        )
    return finalists


def _collapse(content: Any, source: str) -> Collapse:
    where = f"{source}: collapse"
    section(content, ("diversity", "epochs"), where)
    diversity = number(content.get("diversity", Collapse.diversity), f"{where}.diversity")
    if not 0 <= diversity <= 1:
        raise RaystarError(f"{where}.diversity: expected between 0 and 1, found {diversity:g}")
    return Collapse(diversity, whole(content.get("epochs", Collapse.epochs), f"{where}.epochs", 0))


def _resources(content: Any, source: str) -> Resources:
    where = f"{source}: resources"
    section(content, ("gpus", "cpus", "workers"), where)
    gpus = content.get("gpus", "auto")
    if gpus != "auto":
        gpus = number(gpus, f"{where}.gpus")
        if not 0 <= gpus <= 1:
            raise RaystarError(
                f"{where}.gpus: expected auto, 0, 1 or a fraction: a worker trains on one device; found {gpus:g} "
                f"(for a trial on several, set resources.workers)"
            )
    workers = whole(content.get("workers", 1), f"{where}.workers", 1)
    if workers > 1 and gpus not in ("auto", 0, 1):
        raise RaystarError(f"{where}.gpus: {workers} workers take a whole GPU each, auto, 0 or 1; found {gpus:g}")
    cpus = content.get("cpus", 1)
    cpus = cpus if cpus == "auto" else whole(cpus, f"{where}.cpus", 1)
    return Resources(gpus=gpus, cpus=cpus, workers=workers)


def _metric(name: Any, metrics: Sequence[str], where: str) -> str:
    """The full name of a metric given in full or by its last part."""
    for metric in metrics:
        if name in (metric, metric.partition("/")[2]):
            return metric
    tails = [metric.partition("/")[2] for metric in metrics]
    raise RaystarError(f"{where}: unknown {misspelt(name, tails)}; known: {', '.join(tails)}")
