"""The finals of a sweep: its best configurations are trained again from other seeds, and compared by their means.

A score of one seed is partly luck, and the best of many trials partly the luckiest. So the best configurations and the
baseline are trained again, all from the same seeds. Seeds are taken to spread every configuration's scores alike: a
pooled standard deviation is better founded than that of one's two or three scores, and Student's t allows for what it
still does not know. Of the ruler's score it is never taken for less than other sweeps have shown. Only a configuration
whose runs all stayed the identity is no measure of that. Every function is a pure one of what the trials did.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from raystar.record.statuses import BROKEN, FINISHED, STOPPED
from raystar.record.summary import Finalist, Finals, Summary, TrialRecord

INTERVAL = 0.9
"""Probability that an interval stands for."""
_SCORE = "eval/score"
SEEDS_DIFFER = 0.03
"""The deviation of the ruler's score between seeds of one configuration, from 18 pairs in other sweeps
(benchmarks/RESULTS.md). Two pairs alone now and then agree to a thousandth by chance, and would claim to know the mean
to that."""
_FEATURED = 3  # trials beside the baseline, where there were no finals


def choose(records: Iterable[TrialRecord], mode: str, top: int, baseline: str | None) -> list[str]:
    """The trials of the search whose configurations are trained again: the `top` best, and the baseline.

    Those that ran to the end come first; where there are too few, the best that were stopped early follow. Who has not
    begun to move is none of them, unless nobody has.
    """
    candidates = [r for r in records if r.parent is None and r.score is not None and r.status in (FINISHED, STOPPED)]
    sign = 1 if mode == "min" else -1
    able = [r for r in candidates if not r.unmoved] or candidates
    best = sorted(able, key=lambda r: (r.status != FINISHED, sign * (r.score or 0.0), r.trial))
    names = [r.trial for r in best[:top]]
    if names and baseline not in names:
        names += [r.trial for r in candidates if r.trial == baseline]
    return names


def repeats(finalists: Sequence[str], seeds: Sequence[int]) -> dict[str, tuple[str, int]]:
    """The trials of the finals by name, each with its finalist and its seed: `t07-s1`, `t07-s2`, ..."""
    return {
        f"{finalist}-s{number}": (finalist, seed)
        for finalist in finalists
        for number, seed in enumerate(seeds, start=1)
    }


def decide(summary: Summary) -> Finals | None:
    """What the finals say; None before all of their trials have ended.

    A trial that went wrong is left out of its finalist's mean, and a finalist all of whose repeats did out of the
    ranking: its first score was chosen for being good.
    """
    planned = repeats(summary.finalists, summary.seeds)
    if not planned or any(summary.trials[name].status not in (FINISHED, *BROKEN) for name in planned):
        return None
    sign = 1 if summary.mode == "min" else -1
    scored = []
    for finalist in summary.finalists:
        runs = [finalist, *(name for name, (parent, _) in planned.items() if parent == finalist)]
        counted = [summary.trials[name] for name in runs if summary.trials[name].status == FINISHED]
        scores = {r.trial: r.score for r in counted if r.score is not None}
        if scores.keys() - {finalist}:
            scored.append((finalist, scores))
    if not scored:
        return None
    # Runs that all stayed what they began as differ by nothing: they say nothing of those that move.
    moved = [(f, scores) for f, scores in scored if not all(summary.trials[name].unmoved for name in scores)]
    freedom = sum(len(scores) - 1 for _, scores in moved or scored)
    means = {finalist: math.fsum(scores.values()) / len(scores) for finalist, scores in scored}
    squares = math.fsum((v - means[finalist]) ** 2 for finalist, scores in moved or scored for v in scores.values())
    spread = math.sqrt(squares / freedom) if freedom else None
    if spread is not None and summary.metric == _SCORE:
        spread = max(spread, SEEDS_DIFFER)
    wide = _quantile((1 + INTERVAL) / 2, freedom) if freedom else math.nan
    ranked = sorted(
        (
            Finalist(
                finalist,
                list(scores),
                list(scores.values()),
                means[finalist],
                None if spread is None else wide * spread / math.sqrt(len(scores)),
            )
            for finalist, scores in scored
        ),
        key=lambda f: (sign * f.mean, f.trial),
    )
    winner = ranked[0]
    baseline = next((f for f in ranked if f.trial == summary.baseline_trial), None)
    gain = gain_error = chance = None
    if baseline is winner:
        gain = 0.0
    elif baseline is not None:
        scale = max(abs(baseline.mean), 1e-12)
        gain = sign * (baseline.mean - winner.mean) / scale
        chance = _chance(sign * (baseline.mean - winner.mean), winner, baseline, spread, freedom)
        if spread is not None:  # of a quotient, by its derivatives
            error = math.sqrt(1 / len(winner.runs) + (winner.mean / scale) ** 2 / len(baseline.runs))
            gain_error = wide * spread * error / scale
    over_next = None
    if len(ranked) > 1:
        over_next = _chance(sign * (ranked[1].mean - winner.mean), winner, ranked[1], spread, freedom)
    return Finals(INTERVAL, spread, ranked, winner.trial, gain, gain_error, chance, over_next)


def _chance(ahead: float, winner: Finalist, other: Finalist, spread: float | None, freedom: int) -> float | None:
    """The one-sided probability that the winner's true mean is better; None where nothing tells how seeds differ."""
    if spread is None:
        return None
    error = spread * math.sqrt(1 / len(winner.runs) + 1 / len(other.runs))
    if error == 0:
        return 1.0 if ahead else 0.5
    from scipy.special import stdtr  # a sweep begins without it

    return float(stdtr(freedom, ahead / error))


def _quantile(probability: float, freedom: int) -> float:
    """Of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def line(summary: Summary, finals: Finals) -> str:
    """Who won, by how much and how sure that is."""
    winner, name = finals.ranked[0], summary.short_metric
    of = f"mean of {len(winner.runs)} seeds" if len(winner.runs) > 1 else "one seed"
    sureness = f", {finals.interval:.0%}" if winner.error is not None else ""
    text = f"winner {winner.trial}: {name} {around(winner)} ({of}{sureness}); "
    baseline = finals.of(summary.baseline_trial or "")
    sure = []
    if baseline is winner:
        text += "it is the baseline: no other finalist beats it"
    elif baseline is not None and finals.gain is not None:
        off = "" if finals.gain_error is None else f" +- {finals.gain_error:.1%}"
        text += f"baseline {around(baseline)}, {finals.gain:.1%}{off} better"
        if finals.chance is not None:
            sure.append(f"chance that the order is real {finals.chance:.0%}")
    else:
        text += "there is no baseline's mean to compare with"
    if finals.over_next is not None:
        following = finals.ranked[1]
        if following is not baseline:
            sure.append(f"against the runner-up {following.trial} {finals.over_next:.0%}")
        elif baseline is not None and not sure:
            sure.append(f"chance that the order is real {finals.over_next:.0%}")
    return "; ".join([text, ", ".join(sure)]) if sure else text


def around(finalist: Finalist) -> str:
    """A finalist's mean and what it may be off by: `0.7120 +- 0.030`."""
    return f"{finalist.mean:.4f}" + ("" if finalist.error is None else f" +- {finalist.error:.2g}")


def featured(summary: Summary) -> list[TrialRecord]:
    """Whose pictures are shown first: of each finalist its best run, or the best trials; and the baseline."""
    if summary.finals is not None:
        return [summary.best_run(finalist) for finalist in summary.finals.ranked]
    best = summary.ranked()[:_FEATURED]
    baseline = summary.baseline
    if baseline is None or baseline.score is None or baseline in best:
        return best
    return [*best, baseline]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; NaN where one of both is the same throughout. Equal values share their mean rank."""
    a, b = _ranks(first), _ranks(second)
    middle = (len(a) + 1) / 2
    across = math.fsum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    along = math.sqrt(math.fsum((x - middle) ** 2 for x in a) * math.fsum((y - middle) ** 2 for y in b))
    return across / along if along else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + 1 + bisect_right(ordered, value)) / 2 for value in values]
