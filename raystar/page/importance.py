"""How much each swept key moves the score, and how sure that is.

A random forest (Breiman 2001) learns the score from the swept values and the epoch; a key is as important as the
forest's error on trials that it has not seen rises when the key's values are exchanged for those of other trials.

Trials that ASHA stopped have been trained for fewer epochs, so their scores are not those of the others. Comparing
last scores would call important whatever got a trial stopped; comparing at the first rung alone would throw away what
came later. So every trial gives the score of several of its epochs, the epoch is one more input of the forest, and it
is never exchanged: values are compared at equal epochs. A trial counts once, however many epochs it ran, and trials
are held out whole, with all their epochs.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEWEST = 8
"""Trials below which nothing is said: a resample would leave two or three to test on."""
RESAMPLES = 30
_MOST = 300  # trials that are looked at: more make it slower, not surer in any way that matters
_EPOCHS = 5  # of a trial
_TREES = 40
_EXCHANGES = 8  # other trials whose values a held-out trial gets in turn
_SEED = 20_251_121


@dataclass(frozen=True)
class KeyImportance:
    """Of one key, in the score's unit: the rise of the mean absolute error; at 0 or below, it tells nothing."""

    key: str
    rise: float
    """Mean over the resamples."""
    low: float
    """Tenth percentile of the resamples."""
    high: float
    """Ninetieth."""


@dataclass(frozen=True)
class Importance:
    """Of all keys, the most important first."""

    keys: tuple[KeyImportance, ...]
    constant: tuple[str, ...]
    """Keys that had one value in all trials, of which nothing can be said."""
    trials: int
    error: float
    """Mean absolute error on trials that the forest has not seen, in the score's unit."""
    error_exchanged: float
    """The same with all values exchanged for another trial's: what knowing the epoch alone gives."""

    @property
    def skill(self) -> float:
        """Share of the error that knowing the values takes away; at 0 or below the forest has learnt nothing."""
        return 1 - self.error / self.error_exchanged if self.error_exchanged > 0 else 0.0


def importance(
    params: Sequence[Mapping[str, Any]], curves: Sequence[Mapping[int, float]], logarithmic: Collection[str]
) -> Importance | None:
    """The importance of every key; None where there are fewer than `FEWEST` trials with a score, or nothing differs.

    Args:
        params: the swept values of each trial, the same keys in all.
        curves: the finite scores of each trial by epoch.
        logarithmic: keys that are drawn on a logarithmic scale, and learnt on one.
    """
    known = [(p, c) for p, c in zip(params, curves, strict=True) if c]
    if len(known) < FEWEST:
        return None
    rng = np.random.default_rng(_SEED)
    if len(known) > _MOST:
        known = [known[i] for i in np.sort(rng.permutation(len(known))[:_MOST])]
    groups = {key: _columns([p[key] for p, _ in known], key in logarithmic) for key in known[0][0]}
    constant = tuple(key for key, columns in groups.items() if not columns.shape[1])
    groups = {key: columns for key, columns in groups.items() if key not in constant}
    if not groups:
        return None
    values = np.concatenate(list(groups.values()), axis=1)  # [n, d]
    rows = [(trial, epoch, curve[epoch]) for trial, (_, curve) in enumerate(known) for epoch in _spread(curve)]
    of = np.array([trial for trial, _, _ in rows])
    epochs = np.log2([epoch for _, epoch, _ in rows])
    scores = np.array([score for _, _, score in rows])
    errors = _errors(values, list(groups.values()), of, epochs, scores, rng)
    rises = errors[:, 2:] - errors[:, :1]  # [resamples, keys]
    low, high = np.quantile(rises, (0.1, 0.9), axis=0)
    keys = [
        KeyImportance(key, float(mean), float(a), float(b))
        for key, mean, a, b in zip(groups, rises.mean(axis=0), low, high, strict=True)
    ]
    error, error_exchanged = errors[:, :2].mean(axis=0)
    ranked = tuple(sorted(keys, key=lambda k: -k.rise))
    return Importance(ranked, constant, len(known), float(error), float(error_exchanged))


def _errors(
    values: NDArray[np.float64],
    groups: list[NDArray[np.float64]],
    of: NDArray[np.int64],
    epochs: NDArray[np.float64],
    scores: NDArray[np.float64],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Mean absolute errors on held-out trials [resamples, 2 + keys]: as they are, all exchanged, each key exchanged."""
    from sklearn.ensemble import RandomForestRegressor  # seconds to import, which most sweeps' ends need not wait for

    n, ends = len(values), np.cumsum([0, *(group.shape[1] for group in groups)])
    exchanged = [slice(0, 0), slice(0, ends[-1]), *(slice(a, b) for a, b in itertools.pairwise(ends))]
    share = 1 / np.bincount(of, minlength=n)[of]  # a trial counts once, whatever its epochs
    errors: list[list[float]] = []
    while len(errors) < RESAMPLES:
        times = np.bincount(rng.integers(n, size=n), minlength=n)
        inside, outside = times[of] > 0, times[of] == 0
        if len(np.unique(of[outside])) < 2:
            continue
        forest = RandomForestRegressor(_TREES, max_features=0.6, n_jobs=1, random_state=len(errors))
        inputs = np.column_stack([values[of], epochs])
        forest.fit(inputs[inside], scores[inside], sample_weight=(times[of] * share)[inside])
        # All epochs of a held-out trial get the value of the same other trial.
        others = (np.arange(n) + rng.integers(1, n, size=(_EXCHANGES, n))) % n
        tested = []
        for columns in exchanged:
            for other in others:
                changed = inputs[outside]
                changed[:, columns] = values[other[of[outside]], columns]
                tested.append(changed)
        predicted = forest.predict(np.concatenate(tested)).reshape(len(exchanged), _EXCHANGES, -1)
        off = np.abs(predicted - scores[outside]).mean(axis=1)  # [2 + keys, rows]
        errors.append(np.average(off, axis=1, weights=share[outside]).tolist())
    return np.array(errors)


def _columns(values: Sequence[Any], logarithmic: bool) -> NDArray[np.float64]:
    """One key's values as columns [n, c]: a number on its scale, else a column a choice; none where all are alike."""
    kinds = sorted({repr(value) for value in values})
    if len(kinds) == 1:
        return np.zeros((len(values), 0))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        numbers = np.array(values, np.float64)
        return (np.log(numbers) if logarithmic and (numbers > 0).all() else numbers)[:, None]
    return np.array([[float(repr(value) == kind) for kind in kinds] for value in values])


def _spread(curve: Mapping[int, float]) -> list[int]:
    """A few epochs of a curve, first and last among them, closer together where learning is faster."""
    epochs = sorted(curve)
    if len(epochs) <= _EPOCHS:
        return epochs
    places = np.geomspace(1, len(epochs), _EPOCHS).round().astype(int) - 1
    return sorted({epochs[place] for place in places.tolist()})
