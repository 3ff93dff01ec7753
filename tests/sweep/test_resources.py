"""How much of a GPU a trial gets, where `auto` decides; the GPU is made up, nvidia-smi's answer with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raystar.base.machine import gpu_memory
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.search.space import from_mapping
from raystar.sweep.resources import fitted_share
from raystar.training.memory import CONTEXT, step_bytes

SHAPE = (4, 16, 16)
CONFIG = override(Config(), {"model.base_dim": 32, "model.n_res_blocks": 2, "training.batch_size": 8})
NEEDED = step_bytes(CONFIG, SHAPE) + CONTEXT


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what nvidia-smi says, in MiB."""

    def say(*mib: int, status: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        lines = "".join(f"echo {each}\n" for each in mib)
        program.write_text(f"#!/bin/sh\n{lines}exit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return say


def share(gpus: Any = "auto", points: list[dict[str, Any]] | None = None, before: float = 0.5) -> float:
    space = from_mapping({"resources": {"gpus": gpus}, "space": {"loss.w_cyc": {"uniform": [1, 2]}}}, CONFIG, "s.yaml")
    return fitted_share(before, CONFIG, space, points or [], SHAPE)


def test_what_nvidia_smi_says(card: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card(8188, 81559)
    assert gpu_memory() == [8188 * 2**20, 81559 * 2**20]
    card(status=9)
    assert gpu_memory() == []
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpu_memory() == []


def test_two_trials_share_a_gpu_only_where_both_fit(card: Any, capsys: pytest.CaptureFixture[str]) -> None:
    mib = NEEDED // 2**20
    card(2 * mib + 10)
    assert share() == 0.5
    assert capsys.readouterr().out == ""
    card(2 * mib - 10)
    assert share() == 1.0
    assert "one trial at a time on a GPU: the largest takes about" in capsys.readouterr().out
    card(100_000, 2 * mib - 10)  # the smallest of several cards counts
    assert share() == 1.0


def test_the_largest_trial_counts(card: Any) -> None:
    card(2 * (NEEDED // 2**20) + 10)
    assert share(points=[{"training.batch_size": 2}]) == 0.5
    assert share(points=[{"training.batch_size": 64}]) == 1.0


def test_what_cannot_fit_is_said_with_what_would(card: Any, capsys: pytest.CaptureFixture[str]) -> None:
    card((NEEDED - 10 * 2**20) // 2**20)
    assert share() == 1.0
    shown = capsys.readouterr().err
    assert "the largest trial may not fit a GPU: a step takes about " in shown
    assert "training.batch_size=4 takes about " in shown


@pytest.mark.parametrize(("gpus", "before"), [(0.25, 0.25), (1, 1.0), ("auto", 0.0)])
def test_what_was_asked_for_stays(card: Any, gpus: Any, before: float) -> None:
    card(1)
    assert share(gpus, before=before) == before
