"""Sweeps whose search decides as it goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from raystar.backend.tuner import ADAPTIVE
from raystar.search.searchers import SEARCHERS
from tests.sweep.test_sweep import request, run, summary_of

pytestmark = pytest.mark.slow
LEARNING = sorted(name for name, searcher in SEARCHERS.items() if searcher.draw is None)


def params_of(runs: Path) -> list[dict[str, Any]]:
    """Of every trial, in the order of their names: which of two begins first is chance."""
    trials = summary_of(runs)["trials"]
    return [trial["params"] for trial in sorted(trials, key=lambda trial: str(trial["trial"]))]


def test_every_one_has_its_half_in_the_backend() -> None:
    assert sorted(ADAPTIVE) == LEARNING


@pytest.mark.parametrize("search", LEARNING)
def test_it_proposes_within_the_space_and_resumes(search: str, tmp_path: Path) -> None:
    """The baseline first, then values of every kind of distribution; made longer, the sweep proposes others."""
    pytest.importorskip(SEARCHERS[search].package or "raystar")
    space = {
        "search": search,
        "trials": 3,
        "finalists": 0,
        "scheduler": {"type": "none"},
        "space": {
            "loss.w_cyc": {"loguniform": [0.5, 2.0]},
            "loss.w_ds": {"uniform": [0.5, 1.5]},
            "model.mapping_hidden_dim": {"randint": [8, 16]},
            "loss.w_id": {"choice": [0, 1.0]},
            "data.max_samples": {"choice": [9, [3, 4, 5]]},
        },
    }
    done = run(request(tmp_path, space, training__epochs=1, data__max_samples=9))
    assert done.returncode == 0, done.stdout + done.stderr
    first = params_of(tmp_path / "runs")
    done = run(
        [sys.executable, "-m", "raystar.tune", "--resume", "s", "--out", str(tmp_path / "runs"), "--trials", "5"]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    params = params_of(tmp_path / "runs")
    assert params[:3] == first
    assert len(set(map(json.dumps, params))) == 5
    baseline = {"loss.w_cyc": 1.0, "loss.w_ds": 1.0, "model.mapping_hidden_dim": 12, "loss.w_id": 1.0}
    assert params[0] == baseline | {"data.max_samples": 9}
    for values in params:
        assert 0.5 <= values["loss.w_cyc"] <= 2
        assert 0.5 <= values["loss.w_ds"] <= 1.5
        assert values["model.mapping_hidden_dim"] in range(8, 16)
        assert values["loss.w_id"] in (0, 1)
        assert values["data.max_samples"] in (9, [3, 4, 5])
