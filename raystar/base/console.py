"""What raystar prints.

The library logs, below the logger `raystar`, and prints nothing: who imports it sees what their own `logging` shows.
Commands call `show`, which prints those records as lines.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

from raystar.base.errors import RaystarError
from raystar.base.names import shown as as_shown
from raystar.base.secrets import redact

PROGRESS = logging.INFO - 5
"""The level of lines that only tell how far something is. Commands print them on stderr."""
logging.addLevelName(PROGRESS, "PROGRESS")
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_LOGGER = logging.getLogger("raystar")
_LOGGER.addHandler(logging.NullHandler())  # else warnings would come out on stderr by themselves


class _Lines(logging.Handler):
    """Prints each record as a line: on stdout as it is, progress, `note:` and `error:` on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one; a line that finds no room, as when the output goes to a full disk, is lost and costs no work."""
        text = as_shown(record.getMessage())
        if record.levelno >= logging.WARNING:
            text = f"{'error' if record.levelno >= logging.ERROR else 'note'}: {text}"
        with contextlib.suppress(OSError):
            print(text, file=sys.stdout if record.levelno == logging.INFO else sys.stderr, flush=True)


_LINES = _Lines()
_ANY_NAME = "raystar.any-name"


def _as_it_is(error: UnicodeError) -> tuple[str | bytes, int]:
    """The bytes of a file's name as they are; what the terminal's encoding has not, by its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    try:
        return error.object[error.start : error.end].encode("ascii", "surrogateescape"), error.end
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


codecs.register_error(_ANY_NAME, _as_it_is)


class _Kept(logging.Handler):
    """Keeps the notes on this process or machine."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one."""
        if getattr(record, "of_process", False):
            self.notes[record.getMessage()] = None


_KEPT = _Kept()
_LOGGER.addHandler(_KEPT)


def note(logger: logging.Logger, text: str) -> None:
    """Logs a note on this process or machine, once, and keeps it for `noted`.

    A sweep's trials have processes of their own, and who runs the sweep logs again what they noted.
    """
    if text not in _KEPT.notes:
        logger.warning(text, extra={"of_process": True})


def noted() -> list[str]:
    """What `note` has logged in this process, in order, each once."""
    return list(_KEPT.notes)


def show() -> None:
    """Prints from now on what this process's raystar logs; no name of a file is too odd to be printed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ANY_NAME)
    _LOGGER.addHandler(_LINES)
    _LOGGER.setLevel(PROGRESS)
    _LOGGER.propagate = False  # some library of many may have given the root logger a printer of its own


def shows() -> bool:
    """Whether records are printed, and so whether a line may be rewritten in place on a terminal."""
    return _LINES in _LOGGER.handlers


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Within it records are printed."""
    if shows():
        yield
        return
    before = _LOGGER.level, _LOGGER.propagate
    show()
    try:
        yield
    finally:
        _LOGGER.removeHandler(_LINES)
        _LOGGER.level, _LOGGER.propagate = before


def run_cli(main: Callable[[], int]) -> None:
    """Runs a command line's `main` and exits with its status; a `RaystarError` is one line and status 2.

    What the system refuses (no right to it, a mount that may only be read, a full disk) is one line and status 1.
    """
    show()
    try:
        status = main()
    except (RaystarError, KeyboardInterrupt) as error:
        print(last_words(error), file=sys.stderr)
        status = 2 if isinstance(error, RaystarError) else 130
    except BrokenPipeError:
        status = _unread()
    except OSError as error:
        if not _is_refusal(error):
            raise
        print(last_words(error), file=sys.stderr)
        status = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = _unread()
    sys.exit(status)


def _unread() -> int:
    """The status of a command whose reader has gone, as with `| head`; what it still prints goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _is_refusal(error: OSError) -> bool:
    """Whether an error says all there is to know: which file the system refuses, and why."""
    return error.errno in _REFUSALS and error.filename is not None


def last_words(error: BaseException) -> str:
    """What a command prints of what ends it; nothing where it exits by itself."""
    if isinstance(error, RaystarError):
        return f"error: {as_shown(redact(str(error)))}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and _is_refusal(error):
        return f"error: {redact(os.fsdecode(error.filename))}: {error.strerror}"
    return "" if isinstance(error, SystemExit) else "".join(traceback.format_exception(error)).rstrip()


def duration(seconds: float) -> str:
    """`42 s`, `3:07` or `1:02:03`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"
