"""Metrics: names, units, directions and meanings."""

from __future__ import annotations

from raystar.ruler.ruler import HIGHER

EXPLAINED = {
    "eval/score": "style and content together, plus what diversity lacks or has too much; 0.1 is perfect",
    "eval/style": "distance of translations from real pictures of the domain, as a share of the sources' distance: "
    "0 as real pictures, 1 as if nothing had been done",
    "eval/content": "how much of the source's layout is lost: 0 none, about 0.95 another picture",
    "eval/diversity": "how different the translations of one picture are under several noises: 1 as different as "
    "real pictures of the domain, 0 all alike",
    "eval/worst_pair": "(0.1 + style)(1 + content) of the pair of domains that fares worst",
    "eval/movement": "how far translations are from their own sources, as a share of how far pictures of a domain are "
    "from each other: 0 nothing has changed",
    "eval/outlook": "how much of the way to the target's latents is still to go: 1 all of it, 0 none; it ranks trials "
    "at rungs, before the score can",
    "eval/accuracy": "share of translations that a classifier takes for the target domain",
    "perf/speedup": "samples a second over those of the eager step, both timed in turn",
    "perf/steady_samples_per_s": "samples a second once everything is compiled",
    "perf/eager_samples_per_s": "samples a second of the eager step beside it",
    "perf/compile_s": "seconds that compiling took before the first step",
    "perf/compiled_modules": "networks that run compiled",
    "perf/recompilations": "compilations after the first step",
}
HIGHER_IS_BETTER = (
    *(f"eval/{name}" for name in HIGHER),
    "perf/speedup",
    "perf/steady_samples_per_s",
    "perf/eager_samples_per_s",
)

# The ruler's metrics in a reader's words; what is best, and what doing nothing has.
MODEL_CARD = {
    "eval/score": "all of the below in one number; 0.1 is perfect, doing nothing scores 1.1",
    "eval/style": "distance to held-out pictures of the target domain: 0 like real ones, 1 like untranslated ones",
    "eval/content": "how much of the layout is lost: 0 none, about 0.95 for another picture",
    "eval/diversity": "how much noises differ in effect: 1 as much as real pictures do, 0 not at all",
    "eval/worst_pair": "score of the worst pair of domains, without diversity",
    "eval/accuracy": "share of translations that a simple classifier takes for the target domain",
    "eval/movement": "how far translations are from their sources: 0 untouched, 1 as two pictures of a domain",
}


def arrow(mode: str) -> str:
    """Which way is better, in words."""
    return "lower is better" if mode == "min" else "higher is better"


def unit(metric: str) -> str:
    """A metric's name with its unit: `samples per second`, `compiling, s`, `style (no unit)`."""
    units = {
        "perf/speedup": "speed, times eager",
        "perf/steady_samples_per_s": "speed, samples/s",
        "perf/eager_samples_per_s": "eager speed, samples/s",
        "perf/compile_s": "compiling, s",
        "perf/samples_per_s": "speed, samples/s",
        "perf/train_s": "training an epoch, s",
        "perf/eval_s": "measuring an epoch, s",
        "perf/peak_memory_gib": "peak memory, GiB",
    }
    return units.get(metric, f"{metric.rpartition('/')[2]} (no unit)")
