"""Names of runs, and the folder of caches."""

from __future__ import annotations

import re
from pathlib import Path

from raystar.base.errors import RaystarError, show
from raystar.config.schema import Config

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RESERVED = ("cache", "artifacts", "mlflow.db")


def cache_dir(config: Config, out: Path) -> Path:
    """`data.cache_dir`, by default `cache/` below the output folder."""
    return Path(config.data.cache_dir).expanduser() if config.data.cache_dir else (out / "cache").resolve()


def check_text(path: Path, flag: str) -> None:
    """Raises `RaystarError` for a folder whose name is not UTF-8: no configuration, record or address can hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise RaystarError(
            f"{flag} {path}: its name is not UTF-8, so no file can say where it is; choose another"
        ) from None


def run_name(text: str) -> str:
    """A run's name from `experiment.name`, which may be any text."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:64]


def check_plain(name: str, flag: str) -> None:
    """Raises `RaystarError` for a name that is no plain file name."""
    if not _NAME.fullmatch(name) or set(name) == {"."}:
        raise RaystarError(
            f"{flag} {show(name)}: expected up to 64 letters, digits, dots, dashes and underscores, and no path"
        )


def check_name(name: str, flag: str = "--name") -> None:
    """Raises `RaystarError` for a name that is no plain file name, or one that raystar itself uses."""
    check_plain(name, flag)
    if name in _RESERVED:
        raise RaystarError(f"{flag} {name}: raystar keeps its own files under that name; choose another")
