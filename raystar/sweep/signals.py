"""Ctrl-C and SIGTERM while a sweep runs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from raystar.tracking.tracker import Tracker


class Interruptible(Protocol):
    """What an interrupt acts on."""

    interrupts: int
    fitting: bool
    finishing: bool
    tracker: Tracker


def catch(session: Interruptible) -> Callable[[], None]:
    """The first Ctrl-C or SIGTERM stops after saving, a third at once.

    Returns:
        What puts the handlers back that were there before.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        session.interrupts += 1
        if session.finishing:  # what is known is being written, which takes a moment and leaves no run open
            if session.interrupts >= 3:
                session.tracker.hurry()
            if session.interrupts >= 4:
                raise KeyboardInterrupt
            return
        if not session.fitting or session.interrupts >= 3:
            raise KeyboardInterrupt
        if session.interrupts == 1:
            print(
                "\nstopping when each running trial has saved its epoch; press Ctrl-C twice more to stop at once",
                file=sys.stderr,
                flush=True,
            )

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    return restore
