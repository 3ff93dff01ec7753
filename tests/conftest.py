"""Tests see what commands print: the library itself only logs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raystar.base.console import shown


@pytest.fixture(autouse=True)
def _printed() -> Iterator[None]:
    with shown():
        yield
