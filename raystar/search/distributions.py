"""What a value is drawn from: one class a kind. A new kind is a class here, and nothing elsewhere."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from raystar.base.errors import RaystarError, misspelt, show
from raystar.config.load import check_value
from raystar.config.schema import MAX_WHOLE
from raystar.search.comparable import why_alike
from raystar.search.fields import whole

_SIGNIFICANT = 4  # digits of a drawn number: enough to search with, short enough to read


@dataclass(frozen=True)
class Distribution(ABC):
    """How the values of one key are drawn."""

    kind: ClassVar[str]
    """Its name in space files."""
    logarithmic: ClassVar[bool] = False
    """Whether values are compared, shown and learnt from by their logarithms."""
    whole: ClassVar[bool] = False
    """Whether values are whole numbers."""
    listed: ClassVar[bool] = False
    """Whether the values are those of a list, and no range."""
    values: tuple[Any, ...]
    """As a space file gives them, checked."""

    @classmethod
    @abstractmethod
    def read(cls, key: str, values: Sequence[Any], source: str) -> Distribution:
        """From a space file's list for a key.

        Raises:
            RaystarError: what is wrong with it, where.
        """

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Any:
        """One value."""

    @abstractmethod
    def holds(self, value: Any) -> bool:
        """Whether `value` could be drawn."""

    @property
    @abstractmethod
    def size(self) -> float:
        """How many values there are to draw; infinitely many in a range of numbers."""

    @classmethod
    @abstractmethod
    def describe(cls, values: Sequence[Any]) -> str:
        """What is drawn, in words: `0.5 to 4, log`. `values` as a sweep's record has them."""


class Choice(Distribution):
    """One of some values, each as likely as the others."""

    kind = "choice"
    listed = True

    @classmethod
    def read(cls, key: str, values: Sequence[Any], source: str) -> Choice:
        """See `Distribution`."""
        return cls(tuple(check_value(key, v, f"{source}: space") for v in values))

    def draw(self, rng: np.random.Generator) -> Any:
        """See `Distribution`."""
        return self.values[int(rng.integers(len(self.values)))]

    def holds(self, value: Any) -> bool:
        """See `Distribution`."""
        return (tuple(value) if isinstance(value, list) else value) in self.values

    @property
    def size(self) -> float:
        """See `Distribution`."""
        return len(set(self.values))

    @classmethod
    def describe(cls, values: Sequence[Any]) -> str:
        """See `Distribution`."""
        return ", ".join(dict.fromkeys(map(_text, values)))


class _Range(Distribution):
    """Between two ends."""

    def holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.values
        return bool(low <= value < high if self.whole else low <= value <= high)

    @property
    def size(self) -> float:
        return math.inf

    @classmethod
    def describe(cls, values: Sequence[Any]) -> str:
        low, high = values
        return f"{_text(low)} to {_text(high - 1 if cls.whole else high)}" + (", log" if cls.logarithmic else "")


class RandInt(_Range):
    """A whole number; the upper end is excluded, as in Python and Ray."""

    kind = "randint"
    whole = True

    @classmethod
    def read(cls, key: str, values: Sequence[Any], source: str) -> RandInt:
        """See `Distribution`."""
        where = f"{source}: space: {key}"
        low, high = (whole(v, f"{where}: randint", -MAX_WHOLE) for v in _ends(cls.kind, values, where))
        for value_drawn in (low, high - 1):
            check_value(key, value_drawn, f"{source}: space")
        return cls(_ordered(cls.kind, low, high, where))

    def draw(self, rng: np.random.Generator) -> Any:
        """See `Distribution`."""
        return int(rng.integers(*self.values))

    @property
    def size(self) -> float:
        """See `Distribution`."""
        return float(self.values[1] - self.values[0])


class Uniform(_Range):
    """A number, every one as likely."""

    kind = "uniform"

    @classmethod
    def read(cls, key: str, values: Sequence[Any], source: str) -> Uniform:
        """See `Distribution`."""
        where = f"{source}: space: {key}"
        low, high = (check_value(key, v, f"{source}: space") for v in _ends(cls.kind, values, where))
        if key == "loss.ds_decay_epochs" and not isinstance(high, float):
            raise RaystarError(
                f"{where}: {cls.kind}: takes shares of the run, both ends below 1, found [{low:g}, {high:g}]; "
                "use randint or choice for epochs"
            )
        if not isinstance(low, float) or not isinstance(high, float):
            raise RaystarError(f"{where}: takes whole numbers or names; use randint or choice instead of {cls.kind}")
        return cls(_ordered(cls.kind, low, high, where))

    def draw(self, rng: np.random.Generator) -> Any:
        """See `Distribution`."""
        low, high = self.values
        return _rounded(float(rng.uniform(low, high)), low, high)


class LogUniform(Uniform):
    """A number above 0, every order of magnitude as likely."""

    kind = "loguniform"
    logarithmic = True

    @classmethod
    def read(cls, key: str, values: Sequence[Any], source: str) -> LogUniform:
        """See `Distribution`."""
        low, high = super().read(key, values, source).values
        if low <= 0:
            raise RaystarError(f"{source}: space: {key}: loguniform: expected low above 0, found [{low:g}, {high:g}]")
        return cls((low, high))

    def draw(self, rng: np.random.Generator) -> Any:
        """See `Distribution`."""
        low, high = self.values
        return _rounded(math.exp(rng.uniform(math.log(low), math.log(high))), low, high)


KINDS: Mapping[str, type[Distribution]] = {cls.kind: cls for cls in (Uniform, LogUniform, RandInt, Choice)}
"""Every kind, by its name in space files."""


def read_distribution(key: str, value: Any, source: str) -> Distribution:
    """How a key of a space file is drawn, checked against the key.

    Raises:
        RaystarError: it cannot be searched, or its kind or values are wrong.
    """
    where = f"{source}: space: {key}"
    if (reason := why_alike(key, f"{source}: space")) is not None:
        raise RaystarError(f"{where}: cannot be searched: {reason}")
    if not isinstance(value, Mapping) or len(value) != 1:
        raise RaystarError(
            f"{where}: expected one of {', '.join(KINDS)}, as in {{uniform: [0.5, 2.0]}}; found {show(value)}"
        )
    ((kind, values),) = value.items()
    if kind not in KINDS:
        raise RaystarError(f"{where}: unknown distribution {misspelt(kind, KINDS)}; known: {', '.join(KINDS)}")
    if not isinstance(values, list | tuple) or not values:
        raise RaystarError(f"{where}: {kind}: expected a list, found {show(values)}")
    return KINDS[kind].read(key, values, source)


def _ends(kind: str, values: Sequence[Any], where: str) -> Sequence[Any]:
    if len(values) != 2:
        raise RaystarError(f"{where}: {kind}: expected [low, high], found {show(list(values))}")
    return values


def _ordered(kind: str, low: Any, high: Any, where: str) -> tuple[Any, Any]:
    if not low < high:
        raise RaystarError(f"{where}: {kind}: expected low < high, found [{low:g}, {high:g}]")
    return low, high


def _rounded(value: float, low: float, high: float) -> float:
    return min(max(float(f"{value:.{_SIGNIFICANT}g}"), low), high)


def _text(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)
