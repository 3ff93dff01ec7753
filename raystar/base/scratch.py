"""Folders that must take files, tried before work begins that would find no place for what it makes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from raystar.base.errors import RaystarError

SCRATCH_BYTES = 8 << 20
"""What a run's libraries write into a folder for temporary files at least, about."""


def refuses(folder: Path, size: int = 1 << 12) -> str | None:
    """Why `folder` takes no file of `size` bytes, in the system's words; None where it does. Nothing is left there.

    It is tried: rights, mounts, quotas and full disks look alike until then. A folder that is not there is made by
    whoever writes into it, so the nearest one above it is tried.
    """
    folder = folder.absolute()
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        handle, name = tempfile.mkstemp(prefix=".raystar-", dir=folder)
    except OSError as error:
        return error.strerror or str(error)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    finally:
        os.unlink(name)
    return None


def check_takes(folder: Path, what: str, instead: str) -> None:
    """Refuses a folder that takes no files.

    Args:
        what: begins the error, and says what would lie there.
        instead: what to do, at its end.

    Raises:
        RaystarError: with the reason.
    """
    if (why := refuses(folder)) is not None:
        raise RaystarError(f"{what}: nothing can be written into {folder} ({why}); {instead}")


def check_scratch() -> None:
    """Refuses a machine where libraries, MLflow's among them, find no place for temporary files.

    Raises:
        RaystarError: naming the folder, and the variable that names another one.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:  # it has tried them all
        raise RaystarError(
            "no folder takes temporary files: /tmp and all others that are usual are full or cannot be written; free "
            "some space, or name a folder in TMPDIR"
        ) from None
    if (why := refuses(Path(folder), SCRATCH_BYTES)) is not None:
        raise RaystarError(
            f"{folder}: takes no temporary files ({why}); free some space, or name another folder in TMPDIR"
        )
