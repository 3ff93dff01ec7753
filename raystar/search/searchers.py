"""Who proposes a sweep's trials, by name. What decides as it goes has its other half in `backend.tuner.ADAPTIVE`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raystar.search.distributions import Distribution

_DRAWS = 200  # for each trial, before a space is taken to hold no further combination

Draw = Callable[[Mapping[str, Distribution], int, int], Iterator[tuple[Any, ...]]]
"""Combinations of the keys' values, of a space, a seed and a number of trials."""


@dataclass(frozen=True)
class Searcher:
    """A way to search."""

    name: str
    draw: Draw | None
    """What draws all trials before the first begins; None for one that learns from those before."""
    exhaustive: bool = False
    """Whether it takes every combination, so that their number is not chosen."""
    package: str | None = None
    """What it needs beyond raystar's own dependencies."""


def _random(space: Mapping[str, Distribution], seed: int, trials: int) -> Iterator[tuple[Any, ...]]:
    rng = np.random.default_rng(seed)
    return (tuple(d.draw(rng) for d in space.values()) for _ in range(_DRAWS * trials))


def _grid(space: Mapping[str, Distribution], seed: int, trials: int) -> Iterator[tuple[Any, ...]]:
    return itertools.product(*(d.values for d in space.values()))


SEARCHERS: Mapping[str, Searcher] = {
    searcher.name: searcher
    for searcher in (
        Searcher("random", _random),
        Searcher("grid", _grid, exhaustive=True),
        Searcher("tpe", None, package="optuna"),
    )
}
"""Every way to search, by its name in space files."""
