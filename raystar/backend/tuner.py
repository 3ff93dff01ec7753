"""Trials handed to Ray Tune: in which order, with which values, and what proposes new ones."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import tune

from raystar.backend.reporting import Request, for_tune
from raystar.backend.trial import run_trial
from raystar.backend.tune_hooks import Heard, Listener, Recorder, Release, Silent, Stop, TrialNames, Warden
from raystar.base.errors import RaystarError
from raystar.search.distributions import Distribution
from raystar.search.space import SEED, Space

_LEARNING = 8  # trials at a time on a cluster, for a search that learns


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Trials that Tune runs in one go."""

    known: Mapping[str, Mapping[str, Any]]
    """Trials whose values are known, in their order."""
    fresh: Sequence[str]
    """Trials whose values the searcher proposes."""
    scores: Sequence[tuple[Mapping[str, Any], float]] = ()
    """Values and scores of earlier trials, which it learns from."""
    at_a_time: int
    """Trials that run beside each other; 0: as many as there is room for."""


def fit(listener: Listener, request: Request, space: Space, assignment: Assignment) -> None:
    """Has Tune run the trials, and returns when all have ended.

    Args:
        request: what all trials share; its folder `scratch` is set here.

    Raises:
        Exception: what the listener raises, or what Tune itself does.
    """
    heard = Heard(listener)
    grouped = request.workers > 1
    # A group of workers asks for its own; the function that steers it must ask for something, or Tune refuses it.
    resources: dict[str, float] = {"cpu": 0.01 if grouped else request.cpus}
    if request.gpu_share and not grouped:
        resources["gpu"] = request.gpu_share
    names = [*assignment.known, *assignment.fresh]
    with tempfile.TemporaryDirectory(prefix="raystar-ray-", ignore_cleanup_errors=True) as scratch:
        request = replace(request, scratch=scratch)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, request=request), resources),
            param_space=_param_space(space, assignment),
            tune_config=tune.TuneConfig(
                search_alg=_searcher(space, assignment),
                scheduler=Warden(heard),
                num_samples=len(names),
                # The function of a stopped trial still waits for its group of workers: it ends with its process.
                # And what one setting compiled would be in the next one's way, and in its memory.
                reuse_actors=not grouped and not request.purpose.alone,
                trial_name_creator=TrialNames(names),
                trial_dirname_creator=str,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                stop=Stop(heard),
                callbacks=[Silent(), Release(), Recorder(heard)],
                # A process that dies starts again from its trial's last checkpoint, as often as `Recorder` says;
                # what a trial raises never comes here.
                failure_config=tune.FailureConfig(max_failures=-1),
            ),
        )
        try:
            tuner.fit()
        except Exception:
            if heard.error is None:
                raise
        if heard.error is not None:
            raise heard.error


def _param_space(space: Space, assignment: Assignment) -> dict[str, Any]:
    if assignment.fresh:  # the searcher has the space, and Tune wants it in one place
        return {}
    known = list(map(for_tune, assignment.known.values()))
    # What was chosen before need not lie in a range: a baseline's null cannot even be compared with one.
    values = {key: tune.choice([params[key] for params in known]) for key in space.keys}
    if SEED not in values and (seeds := sorted({params[SEED] for params in known if SEED in params})):
        values[SEED] = tune.choice(seeds)
    return values


def _domain(distribution: Distribution) -> Any:
    """A distribution as Ray Tune's."""
    if distribution.listed:
        return tune.choice([for_tune({"": value})[""] for value in distribution.values])
    low, high = distribution.values
    if distribution.whole:
        return tune.lograndint(low, high) if distribution.logarithmic else tune.randint(low, high)
    return tune.loguniform(low, high) if distribution.logarithmic else tune.uniform(low, high)


def _searcher(space: Space, assignment: Assignment) -> Any:
    points = list(map(for_tune, assignment.known.values()))
    if not assignment.fresh:
        from ray.tune.search.basic_variant import BasicVariantGenerator

        # Drawn and checked by `Space.points`, or chosen before: Tune only hands them out.
        return BasicVariantGenerator(points_to_evaluate=points, max_concurrent=assignment.at_a_time)
    if space.search not in ADAPTIVE:
        raise RaystarError(f"search {space.search}: nothing here proposes trials for it; known: {', '.join(ADAPTIVE)}")
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.search_generator import SearchGenerator

    searcher = ADAPTIVE[space.search](space, assignment, points)
    # A search that learns learns little if all its trials begin at once.
    return SearchGenerator(ConcurrencyLimiter(searcher, max_concurrent=assignment.at_a_time or _LEARNING))


def _optuna(space: Space, assignment: Assignment, points: list[dict[str, Any]]) -> Any:
    """Tree-structured Parzen estimators (Bergstra et al. 2011), as Optuna has them."""
    from ray.tune.search.optuna import OptunaSearch

    # It tells of every study it opens, and warns of a baseline that lies outside the searched ranges.
    logging.getLogger("optuna").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")
    search = OptunaSearch(
        space={key: _domain(d) for key, d in space.space.items()},
        metric=space.metric,
        mode=space.mode,
        points_to_evaluate=points or None,
        # Begun anew with the same seed, it would first propose what it proposed before.
        seed=space.seed + len(assignment.scores) + len(assignment.known),
    )
    for params, score in assignment.scores:
        search.add_evaluated_point(for_tune(params), score)
    return search


ADAPTIVE: Mapping[str, Callable[[Space, Assignment, list[dict[str, Any]]], Any]] = {"tpe": _optuna}
"""The searchers that decide as they go (`search.searchers`), as Ray Tune's, by their names; each is made of a space, of
what is to be run, and of the points to begin with."""
