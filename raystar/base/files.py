"""Files and folders: asked for, written whole, and waited for while the disk is full."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from raystar.base.errors import RaystarError

logger = logging.getLogger(__name__)


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


def looked_for(path: Path) -> str:
    """For the end of a message about something that is not there: what a relative path means; nothing of another."""
    if path.is_absolute():
        return ""
    return f"; looked for {os.path.abspath(path)}, since relative paths start at the folder of the command"


def found_in(place: str, folder: Path) -> str:
    """Where a file lies that was named by its whole path when `folder`, which holds it, may have lain elsewhere."""
    parts = Path(place).parts
    for at in range(len(parts) - 1, 0, -1):
        if parts[at] == folder.name and (here := folder.joinpath(*parts[at + 1 :])).exists():
            return str(here)
    return place


def cache_dir() -> Path:
    """Folder of compiled kernels: `RAYSTAR_CACHE_DIR`, else `raystar` in `XDG_CACHE_HOME` or `~/.cache`."""
    if folder := os.environ.get("RAYSTAR_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "raystar"


def home() -> Path:
    """The user's folder.

    Raises:
        RaystarError: nobody knows it, as for a container's user of a number alone.
    """
    try:
        return Path.home()
    except RuntimeError:
        raise RaystarError(
            "HOME: is not set, and the system knows no folder of this user; set it to a folder that can be written"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_S = 1.0  # between two attempts on a full disk

_waited_for: set[str] = set()  # folders on full disks


def sync_folder(folder: Path) -> None:
    """Makes names that were created or replaced in `folder` survive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def wait_for_space(path: Path | str, operation: Callable[[], T]) -> T:
    """Runs `operation` until the disk that holds `path` has space for it.

    Logs once when it begins to wait and once when it continues, however many threads wait for the same folder.
    """
    tells, folder = False, str(path).rpartition("/")[0]
    try:
        while True:
            try:
                done = operation()
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if folder not in _waited_for:
                    tells = True
                    _waited_for.add(folder)
                    logger.warning(f"the disk that holds {path} is full; waiting: free some space and it continues")
                time.sleep(_FULL_S)
            else:
                if tells:
                    logger.warning(f"the disk that holds {path} has space again; continuing")
                return done
    finally:
        if tells:
            _waited_for.discard(folder)
