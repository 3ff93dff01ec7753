"""ASHA's memory: which values were reported at which epoch, and which trial they stop.

A pure function of the reports in their order, so a resumed sweep restores it by repeating them. Asynchronous
successive halving after Li et al., arXiv:1810.05934, with the decisions of Ray Tune's `ASHAScheduler` (one bracket).
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass, field


@dataclass
class Rung:
    """What trials had when they came to an epoch, higher is better."""

    epoch: float
    trials: set[str] = field(default_factory=set)
    values: list[float] = field(default_factory=list)
    """In rising order: the finite ones, below them -inf for each trial that has not begun to move."""

    def quantile(self, q: float) -> float:
        """Between the two nearest values, rounded as `numpy.percentile` does; the worst where there is no value."""
        if not self.values:
            return -math.inf
        at = q * (len(self.values) - 1)
        below = math.floor(at)
        a, b = self.values[below], self.values[min(below + 1, len(self.values) - 1)]
        part = at - below
        if a == -math.inf:  # and whatever lies between it and another value
            return a
        return a + (b - a) * part if part < 0.5 else b - (b - a) * (1 - part)


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
    rungs: list[Rung] = field(init=False)
    """The last epoch's first."""

    def __post_init__(self) -> None:
        count = int(math.log(self.epochs / self.grace) / math.log(self.factor) + 1)
        self.rungs = [Rung(self.grace * self.factor**k) for k in reversed(range(count))]

    def clear(self) -> None:
        """Forgets all values."""
        self.__post_init__()

    @property
    def places(self) -> list[int]:
        """The epochs at which trials come to a rung, in order; the last of a trial that is not stopped is none."""
        return sorted({math.ceil(rung.epoch) for rung in self.rungs if rung.epoch < self.epochs})

    def take(self, trial: str, epoch: int, value: float, unmoved: bool = False) -> bool:
        """Takes in a trial's value; returns whether the trial may continue. A value that is not finite is the worst.

        Args:
            unmoved: the trial's translations cannot be distinguished from their sources. Whatever its value, it
                is last: it is stopped where any trial has moved, and it counts for those that come after it.
        """
        value = value if self.mode == "max" else -value
        for rung in self.rungs:
            if epoch < rung.epoch or trial in rung.trials:
                continue
            if unmoved:
                value = -math.inf
                stopped = bool(rung.values) and rung.values[-1] > value
            else:
                stopped = bool(rung.trials) and not value >= rung.quantile(1 - 1 / self.factor)
            rung.trials.add(trial)
            if unmoved or math.isfinite(value):
                insort(rung.values, value)
            return not stopped or trial == self.exempt
        return True
