"""What a value is drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raystar.base.errors import RaystarError, misspelt, show
from raystar.config.load import check_value
from raystar.config.schema import MAX_WHOLE, key_field
from raystar.search.fields import whole

KINDS = ("uniform", "loguniform", "randint", "choice")
_SIGNIFICANT = 4  # digits of a drawn number: enough to search with, short enough to read

# What must stay as it is for trials to be compared, or to be trials at all.
_FIXED_SECTIONS = ("ruler", "data", "visualization", "checkpoint")
_FIXED_KEYS = ("training.epochs", "training.device", "model.num_domains", "model.latent_channels")


@dataclass(frozen=True)
class Distribution:
    """How the values of one key are drawn."""

    kind: str
    values: tuple[Any, ...]
    """(low, high) of a range, high excluded for `randint`; or the choices."""

    def draw(self, rng: np.random.Generator) -> Any:
        """One value."""
        if self.kind == "choice":
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(rng.integers(low, high))
        if self.kind == "uniform":
            return _rounded(float(rng.uniform(low, high)), low, high)
        return _rounded(math.exp(rng.uniform(math.log(low), math.log(high))), low, high)

    @property
    def size(self) -> float:
        """How many values there are to draw; infinitely many in a range of numbers."""
        if self.kind == "choice":
            return len(set(self.values))
        return self.values[1] - self.values[0] if self.kind == "randint" else math.inf


def read_distribution(key: str, value: Any, source: str) -> Distribution:
    """How a key of a space file is drawn, checked against the key.

    Raises:
        RaystarError: it cannot be searched, or its kind or values are wrong.
    """
    where = f"{source}: space: {key}"
    spec = key_field(key, f"{source}: space")
    if key.partition(".")[0] in _FIXED_SECTIONS or key in _FIXED_KEYS or not spec.metadata["result"]:
        raise RaystarError(f"{where}: cannot be searched: trials could not be compared, or would not differ")
    if not isinstance(value, Mapping) or len(value) != 1:
        raise RaystarError(
            f"{where}: expected one of {', '.join(KINDS)}, as in {{uniform: [0.5, 2.0]}}; found {show(value)}"
        )
    ((kind, values),) = value.items()
    if kind not in KINDS:
        raise RaystarError(f"{where}: unknown distribution {misspelt(kind, KINDS)}; known: {', '.join(KINDS)}")
    if not isinstance(values, list | tuple) or not values:
        raise RaystarError(f"{where}: {kind}: expected a list, found {show(values)}")
    if kind == "choice":
        return Distribution(kind, tuple(check_value(key, v, f"{source}: space") for v in values))
    if len(values) != 2:
        raise RaystarError(f"{where}: {kind}: expected [low, high], found {show(list(values))}")
    if kind == "randint":
        low, high = (whole(v, f"{where}: randint", -MAX_WHOLE) for v in values)
        # The upper end is excluded, as in Python and Ray, so high - 1 is the largest value drawn.
        for value_drawn in (low, high - 1):
            check_value(key, value_drawn, f"{source}: space")
    else:
        low, high = (check_value(key, v, f"{source}: space") for v in values)
        if key == "loss.ds_decay_epochs" and not isinstance(high, float):
            raise RaystarError(
                f"{where}: {kind}: takes shares of the run, both ends below 1, found [{low:g}, {high:g}]; "
                "use randint or choice for epochs"
            )
        if not isinstance(low, float) or not isinstance(high, float):
            raise RaystarError(f"{where}: takes whole numbers or names; use randint or choice instead of {kind}")
    if not low < high:
        raise RaystarError(f"{where}: {kind}: expected low < high, found [{low:g}, {high:g}]")
    if kind == "loguniform" and low <= 0:
        raise RaystarError(f"{where}: loguniform: expected low above 0, found [{low:g}, {high:g}]")
    return Distribution(kind, (low, high))


def _rounded(value: float, low: float, high: float) -> float:
    return min(max(float(f"{value:.{_SIGNIFICANT}g}"), low), high)
