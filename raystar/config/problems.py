"""Values checked against their keys; what is wrong with one, as a line."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from raystar.config.schema import MAX_WHOLE

_UTF8 = " in UTF-8 (a file or folder whose name holds other bytes must be renamed)"


def convert(hint: Any, value: Any) -> Any:
    """A value as a key's type has it.

    Raises:
        ValueError: what was expected, without what was found.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if inner == [int, float]:  # whole numbers stay what they are where nothing else was possible
            number = _number(value)
            return convert(int if number is not None and number.is_integer() else float, value)
        if isinstance(value, list | tuple):  # as a list, where that is possible
            inner = list(filter(_is_list, inner)) or inner
        return None if value is None else convert(inner[0], value)
    if origin is Literal:
        choices = typing.get_args(hint)
        # YAML 1.1 reads an unquoted `off` as false, and progress_style has a choice of that name.
        if value is False and "off" in choices:
            value = "off"
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return value
    if _is_list(hint):
        names = typing.get_args(hint)[0] is str
        if not isinstance(value, list | tuple) or (names and not all(_is_text(v) for v in value)):
            bytes_ = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
            raise ValueError(f"expected a list of {'names' if names else 'numbers'}{_UTF8 if names and bytes_ else ''}")
        return tuple(value) if names else tuple(convert(typing.get_args(hint)[0], v) for v in value)
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value
    if hint is str:
        if not _is_text(value) or not value or "\0" in value:
            raise ValueError(
                "expected text" if _is_text(value) or not isinstance(value, str) else f"expected text{_UTF8}"
            )
        return value
    number = _number(value)
    if hint is int:
        if number is None or not number.is_integer():
            raise ValueError("expected a whole number")
        if abs(number) > MAX_WHOLE:
            raise ValueError(f"expected a whole number up to {MAX_WHOLE}")
        return int(number)
    if number is None:
        raise ValueError("expected a number")
    return number


def _is_list(hint: Any) -> bool:
    origin: Any = typing.get_origin(hint)
    return origin is tuple


def _is_text(value: Any) -> bool:
    """Half of an escaped pair such as \\ud83d is text to Python, but no file can be named or written with it."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _number(value: Any) -> float | None:
    """A finite float, or None. Text is tried too: YAML 1.1 reads a `1e-4` without a dot as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number + 0.0 if math.isfinite(number) else None  # -0.0 equals 0.0, so it must not sign differently


def check_limits(value: Any, limits: Mapping[str, float | None]) -> None:
    """Raises ValueError, saying what was expected, for a number beyond a key's limits, or a list with such a number."""
    if isinstance(value, tuple):
        for item in value:
            check_limits(item, limits)
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return
    if limits["at_least"] is not None and value < limits["at_least"]:
        raise ValueError(f"expected at least {limits['at_least']:g}")
    if limits["above"] is not None and value <= limits["above"]:
        raise ValueError(f"expected more than {limits['above']:g}")
    if limits["at_most"] is not None and value > limits["at_most"]:
        raise ValueError(f"expected at most {limits['at_most']:g}")
