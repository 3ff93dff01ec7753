"""What holds for every test: which cases are collected, and that what the library logs is printed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from raystar.base import console
from raystar.base.console import shown
from raystar.model.device import bf16_as_asked
from tests.kit.autoencoder import save_block_averages
from tests.kit.support import SHARED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `shared` with a name that is not in ../shared.

    What raystar does is tested on data that ships with the tests; the further cases prove the same on real pictures,
    models and codecs, which cannot ship. Where they are not at hand nothing is missing that a skip should speak of.
    """
    absent = []
    for item in items:
        names = [name for mark in item.iter_markers("shared") for name in mark.args]
        if not all((SHARED / name).exists() for name in names):
            absent.append(item)
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in set(absent)]


@pytest.fixture(autouse=True)
def _leaves_no_store() -> Iterator[None]:
    """A store that one test has named would take the records of those after it; `mlflow.set_tracking_uri` names one."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    assert os.environ.get("MLFLOW_TRACKING_URI") == before


@pytest.fixture(autouse=True)
def _printed(_leaves_no_store: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests see what commands print, the library itself only logs; and each what is said once in a process."""
    monkeypatch.setattr(console._KEPT, "notes", {})
    with shown():
        yield


@pytest.fixture
def bf16() -> Iterator[None]:
    """bf16 also on a processor that is slow at it: for tests of what its rounding does."""
    with bf16_as_asked():
        yield


TAESD = pytest.param("taesd", marks=pytest.mark.shared("data/taesd"))


@pytest.fixture(scope="session", params=["block averages", TAESD])
def faithful_vae(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an autoencoder that gives back what it was given; also a trained one where it is at hand."""
    if request.param == "taesd":
        return SHARED / "data/taesd"
    return save_block_averages(tmp_path_factory.mktemp("block averages") / "vae")
