"""What commands print: notes, announcements, durations, errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from raystar.base.errors import RaystarError
from raystar.base.secrets import redact


def run_cli(main: Callable[[], int]) -> None:
    """Runs a command line's `main` and exits with its status; a `RaystarError` is one line and status 2."""
    try:
        status = main()
    except RaystarError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.stdout.flush()
    sys.exit(status)


def say(note: str | None) -> None:
    """Prints `open_codec`'s line, if there is one."""
    if note is not None:
        print(f"note: {note}", file=sys.stderr)


def duration(seconds: float) -> str:
    """`42 s`, `3:07` or `1:02:03`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


def announce(text: str) -> None:
    """One line of what is going on, at once."""
    print(text, flush=True)
