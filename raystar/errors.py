"""The one exception a user's mistake becomes: what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class RaystarError(Exception):
    """A request that cannot be carried out. The command lines print it as one line and exit with 2."""


class TrialDiverged(RaystarError):  # noqa: N818  (says what happened)
    """A loss became NaN or infinite; the optimisers did not move on it."""


class TrialOutOfMemory(RaystarError):  # noqa: N818
    """More than a tenth of an epoch's batches did not fit into memory."""


class WrongResults(RaystarError):  # noqa: N818
    """Settings that were to change speed alone change what a training step computes."""


class WorkerLost(RaystarError):  # noqa: N818
    """Another worker of the same model is gone, so this one cannot go on."""


def redact(text: str) -> str:
    return text


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'w_cyc'?)"` for the known name closest to `name`, or an empty string."""
    known = list(known)
    # A misspelt dotted key is looked for whole first, then by its last part in any section.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        tails = {k.rsplit(".", 1)[-1]: k for k in known}
        tail = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.6)
        close = [tails[t] for t in tail]
    return f" (did you mean '{close[0]}'?)" if close else ""


def run_cli(main: Callable[[], int]) -> None:
    """Runs a command line's `main` and exits with its status; a `RaystarError` is one line and status 2."""
    try:
        status = main()
    except RaystarError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.stdout.flush()
    sys.exit(status)
