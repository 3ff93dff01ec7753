"""What a sweep is asked for; the command line's flags, and the arguments of `raystar.sweep.api.run_sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CONFIG = "configs/demo.yaml"


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """A sweep as it was asked for; `plan.make_plan` checks it. What each means: `python -m raystar.tune --help`."""

    space: str | Path | None = None
    """The space file; None only with `resume`."""
    config: str | Path = DEFAULT_CONFIG
    overlay: Sequence[str | Path] = ()
    set: Sequence[str] = ()
    """`KEY=VALUE`, each."""
    name: str | None = None
    trials: int | None = None
    epochs: int | None = None
    max_concurrent: int | None = None
    time_budget: str | None = None
    """`90s`, `30m`, `4h` or `2d`."""
    out: Path = Path("runs")
    tracking_uri: str | None = None
    resume: str | None = None
    force: bool = False
    address: str | None = None
    storage: str | None = None
