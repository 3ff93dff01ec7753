"""Values of a space file, each checked, and each fault said with the place where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raystar.base.errors import RaystarError, misspelt, show
from raystar.config.schema import MAX_WHOLE


def section(content: Any, known: tuple[str, ...], where: str) -> None:
    """Refuses what is no mapping, or has a key that is not known."""
    if not isinstance(content, Mapping):
        raise RaystarError(f"{where}: expected keys {', '.join(known)}, found {show(content)}")
    for key in content:
        if key not in known:
            raise RaystarError(f"{where}: unknown key {misspelt(key, known)}; known: {', '.join(known)}")


def one_of(value: Any, choices: tuple[str, ...], where: str) -> str:
    """A text that is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise RaystarError(f"{where}: expected one of {', '.join(choices)}, found {show(value)}")
    return value


def boolean(value: Any, where: str) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise RaystarError(f"{where}: expected true or false, found {show(value)}")
    return value


def whole(value: Any, where: str, at_least: int, at_most: int = MAX_WHOLE) -> int:
    """A whole number within limits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RaystarError(f"{where}: expected a whole number, found {show(value)}")
    if value < at_least:
        raise RaystarError(f"{where}: expected at least {at_least}, found {show(value)}")
    if value > at_most:
        raise RaystarError(f"{where}: expected at most {at_most}, found {show(value)}")
    return value


def number(value: Any, where: str) -> float:
    """A number."""
    # A whole number that is no float is beyond every limit here, and beyond isfinite.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise RaystarError(f"{where}: expected a number, found {show(value)}")
    return float(value)
