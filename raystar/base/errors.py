"""The one exception a user's mistake becomes: what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class RaystarError(Exception):
    """A request that cannot be carried out. The command lines print it as one line and exit with 2."""


class TrialDiverged(RaystarError):  # noqa: N818  (says what happened)
    """A loss became NaN or infinite, and the optimisers did not move on it; or it exploded."""


class TrialOutOfMemory(RaystarError):  # noqa: N818
    """More than a tenth of an epoch's batches did not fit into memory."""


class WrongResults(RaystarError):  # noqa: N818
    """Settings that were to change speed alone change what a training step computes."""


class WorkerLost(RaystarError):  # noqa: N818
    """Another worker of the same model is gone, so this one cannot continue."""


_TRACE = "Traceback (most recent call last):"


def in_short(error: BaseException) -> str:
    """An error in a line: a RaystarError's own first one, before another's its kind.

    Ray's errors quote the trace of what they are about: of these it is the line that the last trace ends with.
    """
    lines = str(error).strip().splitlines()
    traces = [number for number, line in enumerate(lines) if line.strip().endswith(_TRACE)]
    if traces:
        ends = [line for line in lines[traces[-1] + 1 :] if line.strip() and not line[0].isspace()]
        if ends:
            return ends[0][:500]
    reason = lines[0] if lines else ""
    kind = "" if isinstance(error, RaystarError) else f"{type(error).__name__}{': ' if reason else ''}"
    return f"{kind}{reason}"[:500]


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


class _Short(reprlib.Repr):
    """Looks at a few items of a few levels only: aliases can make a small file's `repr` endless."""

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write down a number of more than 4300 digits."""
        return repr(x) if abs(x) < 10**40 else f"a number of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 8
_SHORT.maxstring = _SHORT.maxother = 60


def show(value: Any) -> str:
    """What was found, as an error quotes it: at most 60 characters of any value."""
    text = "null" if value is None else _SHORT.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def key_text(key: Any) -> str:
    """A key as an error names it: text as it stands, up to a length, and anything else as `show` does."""
    return (key if len(key) <= 200 else key[:197] + "...") if isinstance(key, str) else show(key)


def misspelt(key: Any, known: Iterable[str]) -> str:
    """`"'w_cycl' (did you mean 'w_cyc'?)"`: a key that is not known, and the nearest that is."""
    return f"'{key_text(key)}'{nearest(key_text(key), known)}"
