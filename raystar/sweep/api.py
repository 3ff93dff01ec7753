"""A sweep from Python."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from raystar.base.console import shown
from raystar.config.strict_yaml import dump_yaml
from raystar.record import results
from raystar.record.summary import Summary
from raystar.sweep.plan import make_plan
from raystar.sweep.request import SweepRequest


def run_sweep(
    request: SweepRequest | None = None, *, values: Mapping[str, Any] | None = None, show: bool = True, **asked: Any
) -> Summary:
    """Searches hyper-parameters as `python -m raystar.tune` does, and returns what came of it.

        summary = run_sweep(space="search_spaces/loss.yaml", trials=4, values={"training.epochs": 2})
        print(summary.best.trial, summary.best.score)

    Args:
        request: what is asked for; or its fields one by one, as keywords.
        values: configuration keys and values over those of the configuration file.
        show: print what the command prints. False leaves that to `logging`, below the logger `raystar`.

    Returns:
        The sweep's summary; `summary.finals` names the winner where finalists were trained again. Its folder, below
        `out`, holds the files that the command leaves.

    Raises:
        RaystarError: the request is wrong, or the sweep cannot be started.
        TypeError: a keyword that is no field of `SweepRequest`.
    """
    from raystar.sweep.run import run  # Ray takes seconds to import; a wrong request is answered before that

    if request is None:
        request = SweepRequest(**asked)
    elif asked:
        raise TypeError(f"run_sweep: {', '.join(asked)} beside a request: expected one or the other")
    if values:
        written = [f"{key}={_as_yaml(value)}" for key, value in values.items()]
        request = dataclasses.replace(request, set=[*request.set, *written])
    with shown() if show else contextlib.nullcontext():
        plan = make_plan(request)
        run(plan)
    return results.read(plan.folder).summary


def _as_yaml(value: Any) -> str:
    """A value on one line, as `--set` takes it."""
    return dump_yaml(value, default_flow_style=True, width=10**6, allow_unicode=False).partition("\n")[0]
