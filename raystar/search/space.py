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
from raystar.config.load import get_value, override, plain
from raystar.config.schema import MAX_WHOLE, Config
from raystar.config.strict_yaml import read_mapping
from raystar.config.users import our_name
from raystar.search.distributions import Distribution, read_distribution
from raystar.search.experiments import Experiment, read_experiments
from raystar.search.fields import boolean, number, one_of, section, whole
from raystar.search.purpose import PURPOSES, QUALITY, Purpose
from raystar.search.scheduling import Scheduler, alone, full_name, ranking, read_scheduler
from raystar.search.searchers import SEARCHERS
from raystar.training.compile import canonical

SEED = "training.seed"
"""The key that differs between the runs of a finalist."""
_KNOWN = (
    "description", "purpose", "metric", "mode", "trials", "baseline", "search", "seed", "scheduler", "resources",
    "space", "experiments", "collapse", "keep", "finalists", "abort_after",
)  # fmt: skip
_MOST = 10_000  # trials, or combinations of a grid: more would never be run, and hardly be listed


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
class Known:
    """A trial whose values are known before the search begins."""

    name: str | None
    """Of an experiment."""
    values: dict[str, Any]
    """Of every swept key."""
    baseline: bool = False
    """Whether it is the configuration as it stands, with which the others are compared."""


@dataclass(frozen=True)
class Space:
    """A checked space file."""

    source: str
    metric: str
    """One of the purpose's."""
    mode: str
    trials: int
    """Those that are drawn and the baseline, apart from experiments."""
    space: Mapping[str, Distribution]
    """How keys are drawn; empty where the file holds experiments alone."""
    experiments: tuple[Experiment, ...] = ()
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

    @property
    def keys(self) -> list[str]:
        """Every swept key: those that are drawn, then those that experiments set."""
        return list(dict.fromkeys([*self.space, *(key for e in self.experiments for key in e.overrides)]))

    @property
    def learns(self) -> bool:
        """Whether the search decides as it goes."""
        return bool(self.space) and SEARCHERS[self.search].draw is None

    @property
    def searched_by(self) -> str:
        """The search in a word."""
        return self.search if self.space else "experiments"

    def known(self, config: Config, device: torch.device) -> list[Known]:
        """The trials that are known before the search: the baseline, then the experiments in their order.

        An experiment that changes nothing is the baseline itself. `device` is as in `points`.

        Raises:
            RaystarError: a baseline that the search cannot begin with.
        """
        base = self._point({}, config, device)
        named = [(e.name, self._point(e.overrides, config, device)) for e in self.experiments]
        stands = next((name for name, values in named if values == base), None)
        known = [Known(name, values, name == stands) for name, values in named]
        if self.baseline and stands is None:
            if self.learns and not named:
                self._check_beginning(base)
            known.insert(0, Known(None, base, True))
        return known

    def points(self, config: Config, device: torch.device) -> list[dict[str, Any]] | None:
        """The swept keys' values of every trial, those that are known first; None where the search decides as it goes.

        No combination is drawn twice, and none that is known; where only the step is timed, neither are two that run
        the same code on `device`.

        Raises:
            RaystarError: a drawn combination that no configuration may have.
        """
        known = [trial.values for trial in self.known(config, device)]
        if self.learns:
            return None
        if not self.space:
            return known
        searcher, points = SEARCHERS[self.search], known
        taken = set(map(hashable, known))
        seen: set[tuple[Any, ...]] = set()
        there_are = math.prod(d.size for d in self.space.values())
        for values in searcher.draw(self.space, self.seed, self.trials) if searcher.draw is not None else ():
            if not searcher.exhaustive and (
                len(points) == self.trials + len(self.experiments) or len(seen) == there_are
            ):
                break
            if values in seen:
                continue
            seen.add(values)
            point = self._point(dict(zip(self.space, values, strict=True)), config, device)
            if hashable(point) not in taken:
                taken.add(hashable(point))
                points.append(point)
        return points

    def holds(self, values: Mapping[str, Any], config: Config) -> bool:
        """Whether the search could have drawn `values`, of every swept key."""
        return all(
            self.space[key].holds(value) if key in self.space else value == plain(get_value(config, key))
            for key, value in values.items()
        )

    def _point(self, values: Mapping[str, Any], config: Config, device: torch.device) -> dict[str, Any]:
        """Every swept key's value; of those that run the same code, the same."""
        config = override(config, values, self.source)
        if not self.purpose.models:
            config = canonical(config, device)
        return {key: plain(get_value(config, key)) for key in self.keys}

    def _check_beginning(self, base: Mapping[str, Any]) -> None:
        """A search that learns takes the baseline's values for its own first ones."""
        for key, value in base.items():
            if self.space[key].listed and not self.space[key].holds(value):
                raise RaystarError(
                    f"{self.source}: space: {key}: search {self.search} begins with the baseline, whose value "
                    f"{value} is not among the choices; add it, or set baseline: false"
                )
            if not self.space[key].listed and value is None:
                raise RaystarError(
                    f"{self.source}: space: {key}: search {self.search} begins with the baseline, whose value "
                    "null is not a number; set it, or baseline: false"
                )


def hashable(point: Mapping[str, Any]) -> tuple[Any, ...]:
    """A point's values as something that sets hold."""
    return tuple(tuple(value) if isinstance(value, list) else value for value in point.values())


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
    ranges, only_named = content.get("space"), alone(content)
    if not only_named and (not isinstance(ranges, Mapping) or not ranges):
        raise RaystarError(
            f"{source}: space: expected the keys to search, for example loss.w_cyc: {{uniform: [0.5, 2]}}, or "
            "experiments"
        )
    names = {our_name(key_text(key), f"{source}: space"): value for key, value in (ranges or {}).items()}
    if len(names) < len(ranges or {}):
        raise RaystarError(f"{source}: space: a key is there twice, once in another spelling; leave one of them out")
    space = {key: read_distribution(key, value, source) for key, value in names.items()}
    experiments = read_experiments(content["experiments"], config, source) if "experiments" in content else ()
    search = one_of(content.get("search", "random"), tuple(SEARCHERS), f"{source}: search")
    if SEARCHERS[search].exhaustive and (ranged := [key for key, d in space.items() if not d.listed]):
        raise RaystarError(f"{source}: search {search} needs choices, but {', '.join(ranged)} has a range")
    package = SEARCHERS[search].package
    if package is not None and importlib.util.find_spec(package) is None:
        raise RaystarError(f"{source}: search {search} needs the package {package}; pip install {package}")
    purpose = PURPOSES[one_of(content.get("purpose", QUALITY.name), tuple(PURPOSES), f"{source}: purpose")]
    resources = _resources(content.get("resources", {}), source)
    _check_purpose(purpose, space, search, resources, source)
    _check_named(purpose, experiments, source)
    description = content.get("description", "")
    baseline = boolean(content.get("baseline", not only_named), f"{source}: baseline")
    trials = whole(content.get("trials", 12), f"{source}: trials", 1, _MOST)
    if only_named:
        trials = 1 if baseline else 0
    elif SEARCHERS[search].exhaustive:
        combinations = math.prod(len(d.values) for d in space.values())
        if combinations > _MOST:
            raise RaystarError(
                f"{source}: search {search}: expected at most {_MOST} combinations, found {combinations}; "
                "leave out choices, or use search: random"
            )
        trials = combinations + (1 if baseline else 0)
    space_file = Space(
        source=source,
        metric=full_name(content.get("metric", purpose.metric), purpose.metrics, f"{source}: metric"),
        mode=one_of(content.get("mode", purpose.mode), ("min", "max"), f"{source}: mode"),
        trials=trials,
        space=space,
        experiments=experiments,
        description=description if isinstance(description, str) else show(description),
        purpose=purpose,
        baseline=baseline,
        search=search,
        seed=whole(content.get("seed", 0), f"{source}: seed", 0, MAX_WHOLE),
        scheduler=read_scheduler(content, purpose.metrics, source),
        resources=resources,
        collapse=_collapse(content.get("collapse", {}), source),
        keep=whole(content.get("keep", Space.keep), f"{source}: keep", 1, _MOST),
        finalists=_finalists(content.get("finalists"), purpose, space, experiments, source),
        abort_after=whole(content.get("abort_after", Space.abort_after), f"{source}: abort_after", 0, _MOST),
    )
    _ = space_file.ranking  # refuses what has no known direction
    return space_file


def _check_named(purpose: Purpose, experiments: Sequence[Experiment], source: str) -> None:
    for experiment in experiments:
        for key in experiment.overrides:
            if purpose.keys is not None and key not in purpose.keys:
                raise RaystarError(
                    f"{source}: experiments: {experiment.name}: {key}: purpose {purpose.name} compares only what "
                    f"leaves the results as they are: {', '.join(purpose.keys)}"
                )


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


def _finalists(
    content: Any,
    purpose: Purpose,
    space: Mapping[str, Distribution],
    experiments: Sequence[Experiment],
    source: str,
) -> Finalists:
    where = f"{source}: finalists"
    seeded = SEED in space or any(SEED in experiment.overrides for experiment in experiments)
    if not purpose.models:
        if content is not None:
            raise RaystarError(
                f"{where}: purpose {purpose.name} has none, since speed does not depend on a seed; leave it out"
            )
        return Finalists(0, 0)
    if content is None:  # where seeds are searched, there is no other seed to train from
        return Finalists(seeds=0) if seeded or not space else Finalists()
    if not isinstance(content, Mapping):
        return Finalists(whole(content, where, 0, _MOST), 0)
    section(content, ("top", "seeds"), where)
    finalists = Finalists(
        whole(content.get("top", Finalists.top), f"{where}.top", 0, _MOST),
        whole(content.get("seeds", Finalists.seeds), f"{where}.seeds", 0, _MOST),
    )
    if finalists.seeds and seeded:
        who = "the space searches" if SEED in space else "an experiment sets"
        raise RaystarError(
            f"{where}.seeds: the best are trained again from other seeds, but {who} {SEED} itself; leave that out, or "
            "set seeds: 0"
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
