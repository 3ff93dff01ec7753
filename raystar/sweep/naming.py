"""Names of a sweep's trials, and their values as far as these are known: of a resumed sweep, what it began with."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch

from raystar.base.errors import RaystarError
from raystar.config.schema import Config
from raystar.record.sweep_file import as_meant
from raystar.search.space import Space

_NUMBERED = re.compile(r"t\d+")  # no experiment


def name_trials(
    space: Space,
    config: Config,
    device: torch.device,
    content: Mapping[str, Any],
    before: Mapping[str, Any] | None,
) -> tuple[dict[str, Mapping[str, Any]], str | None, list[str]]:
    """The values of trials that are known by name, the baseline's name, and the names of all trials.

    What a sweep began with, on another machine maybe, stays while its space file is the same.

    Args:
        content: the space file's.
        before: the record of the sweep that is resumed.

    Raises:
        RaystarError: a combination that no configuration may have, or a baseline that the search cannot begin with.
    """
    first = space.known(config, device)
    points = space.points(config, device)
    names: list[str | None] = [trial.name for trial in first]
    base = next((place for place, trial in enumerate(first) if trial.baseline), None)
    values: list[Mapping[str, Any]] = [trial.values for trial in first]
    trials = space.trials + len(space.experiments)
    if points is not None:
        values, trials = list(points), len(points)
    digits = None
    if before is not None:
        began = _names(before)
        digits = next((len(name) - 1 for name in began if _NUMBERED.fullmatch(name)), None)
        if content == as_meant(before["space"], before) and points is not None:
            further = [point for point in points if point not in before["points"]]
            more = max(0, space.trials + len(space.experiments) - len(began))
            values = [*before["points"], *further[:more]]
            names, trials = [None if _NUMBERED.fullmatch(name) else name for name in began], len(values)
            held = before.get("baseline", began[0] if space.baseline else None)
            base = began.index(held) if held is not None else None
    names += [None] * (trials - len(names))
    numbers = itertools.count()
    digits = digits or max(2, len(str(names.count(None) - 1)))
    named = [f"t{next(numbers):0{digits}d}" if name is None else name for name in names]
    return dict(zip(named, values, strict=False)), None if base is None else named[base], named


def _names(record: Mapping[str, Any]) -> list[str]:
    """The names of a sweep's trials, which records hold since there are experiments."""
    trials = int(record["trials"])
    digits = max(2, len(str(trials - 1)))
    return list(record.get("names") or (f"t{number:0{digits}d}" for number in range(trials)))


def check_kept(space: Space, before: Mapping[str, Any], sweep: str) -> list[str]:
    """The experiments that a sweep has already.

    Raises:
        RaystarError: the space file has one of them no more.
    """
    named = [trial for trial in _names(before) if not _NUMBERED.fullmatch(trial)]
    if left_out := [trial for trial in named if trial not in {e.name for e in space.experiments}]:
        raise RaystarError(
            f"--resume {sweep}: {space.source}: experiments: {', '.join(left_out)}: the sweep has this already, and "
            "the file has it no more; put it back, or start a new sweep"
        )
    return named
