"""Why a sweep ends before its trials do: interrupts, a time budget, too many broken trials."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable
from types import FrameType

from raystar.base.console import PROGRESS

logger = logging.getLogger(__name__)


class Ending:
    """What speaks against continuing, and how Ctrl-C and SIGTERM are answered.

    Args:
        time_budget_s: seconds from now; None for no limit.
        hurry: has what is written at the end wait for nobody.
    """

    def __init__(self, time_budget_s: float | None, hurry: Callable[[], None]) -> None:
        self.interrupts = 0
        self.given_up: str | None = None
        """Why the sweep ends before its trials do, where nobody asked for that."""
        self.fitting = False
        """Whether trials are running."""
        self.finishing = False
        """Whether all that is left is to write what is known."""
        self._deadline = time.time() + time_budget_s if time_budget_s is not None else math.inf
        self._hurry = hurry

    @property
    def late(self) -> bool:
        """Whether the time budget is used up."""
        return time.time() > self._deadline

    @property
    def near(self) -> bool:
        """Whether no trial is to be begun, and those that run are to end with their next report."""
        return bool(self.interrupts) or self.given_up is not None or self.late

    @property
    def why(self) -> str:
        """The reason that interrupted trials are given."""
        if self.interrupts:
            return "interrupted"
        return f"the sweep gave up: {self.given_up}" if self.given_up is not None else "the time budget was used up"

    def catch_signals(self) -> Callable[[], None]:
        """The first Ctrl-C or SIGTERM stops after saving, a third at once.

        Returns:
            What puts the handlers back that were there before.
        """
        old = {number: signal.signal(number, self._interrupted) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in old.items():
                signal.signal(number, handler)

        return restore

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += 1
        if self.finishing:  # what is known is being written, which takes a moment and leaves no run open
            if self.interrupts >= 3:
                self._hurry()
            if self.interrupts >= 4:
                raise KeyboardInterrupt
            return
        if not self.fitting or self.interrupts >= 3:
            raise KeyboardInterrupt
        if self.interrupts == 1:
            logger.log(
                PROGRESS,
                "\nstopping when each running trial has saved its epoch; press Ctrl-C twice more to stop at once",
            )
