"""How long raystar waits for what is not in its hands. An environment variable sets each to other seconds."""

from __future__ import annotations

import math
import os

from raystar.base.errors import RaystarError, show

NODE, PLACING, JOIN, MLFLOW, LAST_RECORDS = (
    f"RAYSTAR_{name}_TIMEOUT_S" for name in ("NODE", "PLACING", "JOIN", "MLFLOW", "LAST_RECORDS")
)
LIMITS = {
    NODE: 300.0,  # a node of the cluster says whether it can use the storage
    PLACING: 3600.0,  # a node fetches the latents from the storage
    JOIN: 120.0,  # a Ray cluster lets us in
    MLFLOW: 15.0,  # an MLflow server says what it is
    LAST_RECORDS: 40.0,  # MLflow takes what is left, at a sweep's end; what it does not take waits in a file
}
"""Seconds, by the variable that sets them."""


def limit(name: str) -> float:
    """Seconds to wait, as the variable `name` says or by default.

    Raises:
        RaystarError: the variable holds no number above 0.
    """
    text = os.environ.get(name)
    if not text:
        return LIMITS[name]
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RaystarError(f"{name}: expected seconds, a number above 0, found {show(text)}; correct or unset it")
    return seconds


def check_limits() -> None:
    """Raises `RaystarError` if one of the variables holds no number above 0."""
    for name in LIMITS:
        limit(name)
