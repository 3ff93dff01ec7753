"""What a training shows while it runs: where raystar prints, on the terminal; else a record an epoch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from raystar.base.console import PROGRESS, shows
from raystar.config.schema import Config

logger = logging.getLogger(__name__)


class Display:
    """Terminal progress: `bar`, `percent` (one line, rewritten) or `off`."""

    def __init__(self, config: Config, name: str, steps: int) -> None:
        self.style = config.progress
        self.epochs = config.training.epochs
        self.name = f"{name} " if name else ""
        self.steps = steps
        self.bar: tqdm[Any] | None = None

    def step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Shows the losses of one step."""
        losses = " ".join(f"{key}={values[key]:.3f}" for key in ("d_loss", "g_loss", "cyc", "sty", "ds"))
        if not shows():
            return
        if self.style == "percent" and sys.stderr.isatty():
            line = f"{self.name}epoch {epoch}/{self.epochs} {100 * step / self.steps:5.1f}% {losses}"
            print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
        elif self.style == "bar":
            if self.bar is None:
                description = f"{self.name}epoch {epoch}/{self.epochs}"
                self.bar = tqdm(total=self.steps, desc=description, file=sys.stderr, leave=False)
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(losses)

    def epoch_done(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Leaves one line for a finished epoch."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.style == "off":
            return
        score = f"score {metrics['eval/score']:.4f}  " if "eval/score" in metrics else ""
        line = (
            f"{self.name}epoch {epoch}/{self.epochs}  {score}d_loss {metrics['train/d_loss']:.3f}  "
            f"g_loss {metrics['train/g_loss']:.3f}  {metrics['perf/samples_per_s']:.1f} samples/s"
        )
        logger.log(PROGRESS, f"\r{line:<100}" if shows() and sys.stderr.isatty() else line)
