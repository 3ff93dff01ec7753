"""One process at a time: locks that are gone with the process that holds them, also where files cannot be locked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raystar.base.errors import RaystarError

logger = logging.getLogger(__name__)

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF}
"""What a file system answers that cannot lock: without a lock service, not at all, or no folders."""
_LOOK_S, _TELL_S = 0.2, 5.0  # between two looks at a mark; until it is said that somebody is waited for

_told: set[int] = set()  # devices of file systems without locks


class Held(Exception):  # noqa: N818
    """Another process holds a lock; the text says which, as far as that is known."""


@contextmanager
def hold(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds a lock for this process, however it ends.

    Where the file system has no locks, a mark is held instead: a file `NAME.held` that names the process and its
    machine. A mark that a killed process left on this machine counts for nothing.

    Args:
        path: a folder that is there, or a file, which is made.
        wait: until nobody else holds it.

    Raises:
        Held: another process does, and `wait` is false.
        OSError: the file cannot be opened.
        RaystarError: it cannot be locked.
    """
    folder = path.is_dir()
    file = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _locked(file, path, wait):
            if not folder:  # for whoever is refused
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()} on {socket.gethostname()}\n".encode())
            yield
        else:
            mark = path / ".held" if folder else path.with_name(f"{path.name}.held")
            _set(mark, wait)
            try:
                yield
            finally:
                mark.unlink(missing_ok=True)
    finally:
        os.close(file)


def _locked(file: int, path: Path, wait: bool) -> bool:
    """Locks an open file; False where that cannot be done with any file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        holder = "" if path.is_dir() else os.pread(file, 200, 0).decode(errors="replace").strip()
        raise Held(f"process {holder}" if holder else "another process") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise RaystarError(f"{path}: cannot be locked: {error.strerror}") from None
        device = os.fstat(file).st_dev
        if device not in _told:
            _told.add(device)
            logger.warning(
                f"{path.parent} lies on a file system without locks ({error.strerror}); files *.held mark what is in "
                "use instead. If a machine breaks down, remove those that name it"
            )
        return False
    return True


def _set(mark: Path, wait: bool) -> None:
    """Makes a mark, once nobody else's is there."""
    began, told = time.monotonic(), False
    while True:
        try:
            file = os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            holder = _holder(mark)
            if holder is None:
                continue
            if not wait:
                raise Held(f"{holder}, says {mark}; if that is over, remove the file") from None
            if not told and time.monotonic() - began > _TELL_S:
                told = True
                logger.info(f"waiting for {holder}, says {mark}; if that is over, remove the file")
            time.sleep(_LOOK_S)
            continue
        except OSError as error:
            raise RaystarError(f"{mark}: cannot be made: {error.strerror}") from None
        with os.fdopen(file, "w", encoding="utf-8") as opened:
            opened.write(f"{os.getpid()} {_born(os.getpid())} on {socket.gethostname()}\n")
        return


def _holder(mark: Path) -> str | None:
    """Who made a mark, in words; None where that is over, and the mark gone."""
    try:
        text = mark.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    process, _, machine = text.strip().partition(" on ")
    number, _, born = process.partition(" ")
    if not number.isdecimal():
        return "another process"  # which is just writing it
    if machine == socket.gethostname() and _born(int(number)) != born:
        _take_away(mark, text)
        return None
    return f"process {number} on {machine}"


def _take_away(mark: Path, text: str) -> None:
    """Removes a mark that says `text`. Another that came in between, since somebody else was faster, stays."""
    left = mark.with_name(f"{mark.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.replace(mark, left)
        if left.read_text(encoding="utf-8", errors="replace") != text:
            with contextlib.suppress(FileExistsError):
                os.link(left, mark)
        left.unlink()


def _born(process: int) -> str:
    """When a process of this machine began, in the kernel's ticks, which tells it from a later one of its number.

    `-` where nobody says so of a process that runs; empty where there is none, or it has ended.
    """
    try:
        state, *numbers = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if state == "Z" else numbers[18]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:  # another user's
        pass
    return "-"


LOCK = "lock"
"""A file that the process which runs a sweep holds."""


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Holds a sweep's folder for this process, however it ends.

    Raises:
        RaystarError: another process runs the sweep, or the folder cannot be locked.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(folder / LOCK, wait=False))
        except Held as held:
            raise RaystarError(f"{folder}: this sweep is running already, in {held}") from None
        except OSError as error:
            raise RaystarError(f"{folder / LOCK}: cannot be opened: {error.strerror}") from None
        yield
