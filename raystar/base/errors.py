"""The one exception a user's mistake becomes: what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
import re
import reprlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Up to the last @ before the path; or, after a user's name, up to the next @, since some passwords hold a slash.
_IN_URI = re.compile(r"""((?<![\w+.-])[\w+.-]+://)(?:[^\s/?#"'<>]*|[^\s/?#:@"'<>]*:(?!\d+/)[^\s@"'<>]*)@""")
_NAMES_SECRET = (
    r"(?<![\w.-])[\w.-]*(?:token|passw(?:or)?d|passphrase|pwd|secret|credentials?|(?:api|access|account|private)[_-]?key)"
    r"(?:[_-](?:key|id|value))*"
)
_VALUE = r"""("(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^\s&;,"')\]}]+)"""
_NAMED = re.compile(rf"""(?i)({_NAMES_SECRET}["']?[ \t]*[:=][ \t]*){_VALUE}""")
_SIGNATURE = re.compile(rf"(?i)((?<![\w.-])[\w.-]*(?:signature|sig)=){_VALUE}")
_AUTHORIZATION = re.compile(r"(?i)(authorization[\"']?[ \t]*[:=][ \t]*[\"']?(?:basic|bearer)?[ \t]*)[^\s,\"']+")
_SECRET = re.compile(_NAMES_SECRET, re.IGNORECASE)
_HIDDEN = "***"


class RaystarError(Exception):
    """A request that cannot be carried out. The command lines print it as one line and exit with 2."""


class TrialDiverged(RaystarError):  # noqa: N818  (says what happened)
    """A loss became NaN or infinite, and the optimisers did not move on it; or it exploded."""


class TrialOutOfMemory(RaystarError):  # noqa: N818
    """More than a tenth of an epoch's batches did not fit into memory."""


class WrongResults(RaystarError):  # noqa: N818
    """Settings that were to change speed alone change what a training step computes."""


class WorkerLost(RaystarError):  # noqa: N818
    """Another worker of the same model is gone, so this one cannot go on."""


def redact(text: str) -> str:
    """`text` without credentials: those of a URI, and values that are named token, password, api_key and the like."""
    text = _IN_URI.sub(rf"\1{_HIDDEN}@", text)
    text = _AUTHORIZATION.sub(rf"\1{_HIDDEN}", text)
    return _SIGNATURE.sub(_hide, _NAMED.sub(_hide, text))


def redact_value(name: str, value: str) -> str:
    """The value of a parameter or tag called `name`, without credentials."""
    return _HIDDEN if value and _SECRET.fullmatch(name) else redact(value)


def _hide(found: re.Match[str]) -> str:
    name, value = found.groups()
    # YAML takes a bare *** for a mistake.
    quote = value[0] if value[0] in "\"'" else '"' if ":" in name else ""
    return f"{name}{quote}{_HIDDEN}{quote}"


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


def is_file(path: Path) -> bool:
    """`Path.is_file`, False also for a name that no file system takes or a place that may not be looked into."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """`Path.is_dir`, False also for a name that no file system takes or a place that may not be looked into."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


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
