"""Every metric that a run reports: what it is called, measured in and means, and which direction is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    better: Literal["lower", "higher"] | None = None
    """None where neither is."""
    label: str = ""
    """Name and unit on an axis; by default the name's last part, without a unit."""
    meaning: str = ""
    """For the report; what is not explained is not shown there."""
    card: str = ""
    """For a model's card, which stands alone: what is best, and what doing nothing has."""
    quality: bool = True
    """Whether a training reports it."""
    speed: bool = False
    """Whether a speed sweep's trials report it."""


def _loss(name: str) -> Metric:
    return Metric(f"train/{name}")


METRICS = {
    metric.name: metric
    for metric in (
        *map(_loss, ("d_loss", "g_loss", "g_adv", "sty", "ds", "cyc", "id", "r1")),
        *map(_loss, ("lambda_ds", "lr_g", "lr_d", "lr_mapping")),
        Metric(
            "eval/score",
            "lower",
            meaning="style and content together, plus what diversity lacks or has too much; 0.1 is perfect",
            card="all of the below in one number; 0.1 is perfect, doing nothing scores 1.1",
        ),
        Metric(
            "eval/style",
            "lower",
            meaning="distance of translations from real pictures of the domain, as a share of the sources' distance: "
            "0 as real pictures, 1 as if nothing had been done",
            card="distance to held-out pictures of the target domain: 0 like real ones, 1 like untranslated ones",
        ),
        Metric(
            "eval/content",
            "lower",
            meaning="how much of the source's layout is lost: 0 none, about 0.95 another picture",
            card="how much of the layout is lost: 0 none, about 0.95 for another picture",
        ),
        Metric(
            "eval/diversity",
            "higher",
            meaning="how different the translations of one picture are under several noises: 1 as different as "
            "real pictures of the domain, 0 all alike",
            card="how much noises differ in effect: 1 as much as real pictures do, 0 not at all",
        ),
        Metric(
            "eval/worst_pair",
            "lower",
            meaning="(0.1 + style)(1 + content) of the pair of domains that fares worst",
            card="score of the worst pair of domains, without diversity",
        ),
        Metric(
            "eval/accuracy",
            "higher",
            meaning="share of translations that a classifier takes for the target domain",
            card="share of translations that a simple classifier takes for the target domain",
        ),
        Metric(
            "eval/movement",
            "higher",
            meaning="how far translations are from their own sources, as a share of how far pictures of a domain are "
            "from each other: 0 nothing has changed",
            card="how far translations are from their sources: 0 untouched, 1 as two pictures of a domain",
        ),
        Metric(
            "eval/outlook",
            "lower",
            meaning="how much of the way to the target's latents is still to go: 1 all of it, 0 none; it ranks trials "
            "at rungs, before the score can",
        ),
        Metric("perf/samples_per_s", label="speed, samples/s"),
        Metric("perf/train_s", label="training an epoch, s"),
        Metric("perf/eval_s", label="measuring an epoch, s"),
        Metric("perf/peak_memory_gib", label="peak memory, GiB"),
        Metric("perf/skipped_batches"),
        Metric(
            "perf/speedup",
            "higher",
            "speed, times eager",
            "samples a second over those of the eager step, both timed in turn",
            quality=False,
            speed=True,
        ),
        Metric(
            "perf/steady_samples_per_s",
            "higher",
            "speed, samples/s",
            "samples a second once everything is compiled",
            quality=False,
            speed=True,
        ),
        Metric(
            "perf/eager_samples_per_s",
            "higher",
            "eager speed, samples/s",
            "samples a second of the eager step beside it",
            quality=False,
            speed=True,
        ),
        Metric(
            "perf/compile_s",
            "lower",
            "compiling, s",
            "seconds that compiling took before the first step",
            speed=True,
        ),
        Metric("perf/compiled_modules", meaning="networks that run compiled", speed=True),
        Metric("perf/recompilations", "lower", meaning="compilations after the first step", speed=True),
    )
}
"""Every metric by its name, in the order in which they are shown; how busy the machine was (`system/`) is not there."""

RULER = tuple(name.partition("/")[2] for name in METRICS if name.startswith("eval/"))
"""The ruler's, by their short names."""

OF_0_1 = {
    "eval/score": "style and content together, plus what diversity lacks of 0.25; 1 is perfect, doing nothing scores "
    "2.25",
    "eval/style": "distance of translations from held-out latents of the domain, as a share of the sources' distance: "
    "0 as real ones, 1 as if nothing had been done",
    "eval/content": "how much of the source's layout is lost: 0 none, about 0.92 another picture",
    "eval/worst_pair": "(1 + style)(1 + content) of the pair of domains that fares worst",
}
"""What the ruler of version 0.1, which looked at latents, meant by the same names."""


def measured_by_0_1(metrics: Mapping[str, float]) -> bool:
    """Whether they are from the ruler of version 0.1, which knew no movement."""
    return "eval/score" in metrics and "eval/movement" not in metrics


def higher_is_better(name: str) -> bool:
    """Whether more of a metric is better."""
    return name in METRICS and METRICS[name].better == "higher"


def arrow(mode: str) -> str:
    """Which way is better, in words."""
    return "lower is better" if mode == "min" else "higher is better"


def label(name: str) -> str:
    """A metric's name with its unit: `speed, samples/s`, `style (no unit)`."""
    return (METRICS[name].label if name in METRICS else "") or f"{name.rpartition('/')[2]} (no unit)"
