"""Saved views of MLflow's UI: a sweep's runs as a table, and their pictures side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

VIEW = "raystar"  # key of the saved view of all runs; with a sweep's name, of its featured runs
SHOWN, RANK = "raystar.shown", "final/rank"  # tag and metric of the featured runs
PICTURED_RUNS = 10  # MLflow's charts draw no more
_GRIDS = {"columns": 2, "cardHeight": 640}  # pixels


def pictured(step: int) -> dict[str, Any]:
    """The part of a view that begins its charts with the grids of an epoch."""
    section = {"uuid": "raystar-grids", "name": "Grids", "display": True, "isReordered": True}
    return {
        "compareRunSections": [{**section, "deleted": False, "isGenerated": False, **_GRIDS}],
        "compareRunCharts": [
            {
                "type": "IMAGE", "uuid": f"raystar-{key}", "metricSectionId": section["uuid"], "deleted": False,
                "isGenerated": True, "imageKeys": [key], "step": step, "showRunParams": False,
                "runsCountToCompare": PICTURED_RUNS,
            }
            for key in ("grid_ref", "grid_noise")
        ],
        "isAccordionReordered": True,  # else sections are sorted by name
    }  # fmt: skip


def saved_view(name: str, state: Mapping[str, Any]) -> str:
    """A view of MLflow's UI, as its experiment tags hold it."""
    now = int(time.time() * 1000)
    return json.dumps({"name": name, "createdAt": now, "updatedAt": now, "state": json.dumps(state)})


def table_state(primary: tuple[str, bool], columns: Sequence[str], epoch: int) -> dict[str, Any]:
    """Every run in one table, best first, with the columns that matter.

    Its charts begin with the grids, large and all at one epoch, the last to which every trial came, instead of ending
    with them: at the last of all, trials that were stopped early would show nothing. The form is what MLflow 3.17
    writes itself; another version ignores what it does not know.

    Args:
        primary: the metric that runs are sorted by, and whether lower is better.
        epoch: whose pictures are shown.
    """
    metric, lower = primary
    final = f"metrics.`final/{metric.partition('/')[2]}`"
    selected = [final, f"metrics.`{metric}`", "tags.`raystar.status`", "tags.`raystar.sweep`"]
    state = {
        "orderByKey": final,
        "orderByAsc": lower,
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": [*selected, *(f"params.`{column}`" for column in columns)],
    }
    if not metric.startswith("perf/"):  # who measures speed draws nothing
        state |= pictured(epoch)
    return state


def grids_state(primary: tuple[str, bool], columns: Sequence[str], name: str, epoch: int) -> dict[str, Any]:
    """Nothing but the featured runs, at one epoch.

    MLflow 3.17 draws the first ten runs of its table, from the last to the first: so these are sorted backwards, and
    stand in the charts with the best at the left. Pinned and hidden runs would be simpler, but a view that is opened by
    its address leaves those out.

    Args:
        name: the view's, which the runs bear as the tag `SHOWN`.
    """
    selected = [f"metrics.`{RANK}`", f"metrics.`final/{primary[0].partition('/')[2]}`", "tags.`raystar.status`"]
    return {
        "searchFilter": f"tags.`{SHOWN}` = '{name}'",
        "orderByKey": selected[0],
        "orderByAsc": False,
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": [*selected, *(f"params.`{column}`" for column in columns)],
        **pictured(epoch),
    }
