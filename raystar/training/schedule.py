"""Learning rates by step: a warm-up, then a constant, a cosine or a line down to a share (docs/networks.md)."""

from __future__ import annotations

import math

from raystar.config.schema import TrainingConfig
from raystar.training.state import TrainState


def rate_factor(training: TrainingConfig, step: int, total: int) -> float:
    """What all learning rates are multiplied by.

    Args:
        step: of the whole run, from 0.
        total: steps of the whole run.
    """
    if training.lr_schedule == "none":
        return 1.0
    warmup, least = training.warmup_steps, training.min_lr_ratio
    if step < warmup:
        return (step + 1) / warmup
    progress = min(max((step - warmup) / max(1, total - warmup), 0.0), 1.0)
    falling = 1 - progress if training.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return least + (1 - least) * falling


def set_rates(state: TrainState, factor: float) -> None:
    """Sets every learning rate of both optimisers to `factor` times the configuration's."""
    for optimizer in (state.opt_g, state.opt_d):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
