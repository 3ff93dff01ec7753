"""ASHA's memory: which values were reported at which epoch, and which trial they stop.

A pure function of the reports in their order, so a sweep that goes on puts it back by telling it again. Asynchronous
successive halving after Li et al., arXiv:1810.05934, with the decisions of Ray Tune's `ASHAScheduler` (one bracket).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Rungs:
    """Stops a trial at an epoch `grace * factor**k` if it is worse than the best 1/`factor` of those there before it.

    Args:
        mode: `min` or `max`, of the reported values.
        grace: the first epoch at which a trial may be stopped.
        factor: reduction factor, above 1.
        epochs: of a trial that is not stopped.
        exempt: a trial that is never stopped; its values count for the others.
    """

    mode: str
    grace: int
    factor: float
    epochs: int
    exempt: str | None = None
    levels: list[tuple[float, dict[str, float]]] = field(init=False)
    """Epoch of each rung, the last first, and what trials had there, higher is better."""

    def __post_init__(self) -> None:
        count = int(math.log(self.epochs / self.grace) / math.log(self.factor) + 1)
        self.levels = [(self.grace * self.factor**k, {}) for k in reversed(range(count))]

    def take(self, trial: str, epoch: int, value: float) -> bool:
        """Takes in a trial's value; returns whether the trial may go on. A value that is not finite is the worst."""
        value = value if self.mode == "max" else -value
        for at, there in self.levels:
            if epoch < at or trial in there:
                continue
            stopped = bool(there) and not value >= self._cutoff(there)
            there[trial] = value if math.isfinite(value) else -math.inf
            return not stopped or trial == self.exempt
        return True

    def _cutoff(self, there: dict[str, float]) -> float:
        finite = [value for value in there.values() if math.isfinite(value)]
        return float(np.percentile(finite, (1 - 1 / self.factor) * 100)) if finite else -math.inf
