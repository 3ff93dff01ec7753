"""Saved views of MLflow's UI: a sweep's runs as a table, and their pictures side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
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
