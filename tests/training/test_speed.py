"""Speed trials: two steps in turn, whatever the machine does meanwhile; wrong settings never get a number."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from raystar.base.errors import RaystarError, WrongResults
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.search.purpose import SPEED
from raystar.training import speed
from raystar.training.speed import measure
from raystar.training.state import TrainState
from tests.kit.support import tiny_config, write_latents


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture
def config(root: Path) -> Config:
    return tiny_config(root, training__epoch_size=60, training__epochs=3)


@pytest.fixture
def bank(config: Config, root: Path) -> Bank:
    return open_bank(config, root.parent / "cache")


def test_a_slower_step_is_found_though_the_machine_drifts(
    config: Config, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidate's step takes twice the eager one's, and all takes thrice as long in odd epochs."""

    def step(state: TrainState, batch: Any, *, epoch: int, step: int) -> None:
        time.sleep((0.016 if state.config.training.channels_last else 0.008) * (3 if epoch % 2 else 1))

    monkeypatch.setattr(speed, "train_step", step)
    slower = override(config, {"training.channels_last": True})
    found = [metrics for metrics, _ in measure(slower, config, bank)]
    assert [set(metrics) for metrics in found] == [set(SPEED.metrics)] * 3
    for metrics in found:
        assert metrics["perf/speedup"] == pytest.approx(0.5, abs=0.1)
    fast, slow = found[1], found[0]
    assert fast["perf/steady_samples_per_s"] > 2 * slow["perf/steady_samples_per_s"]


def test_the_same_settings_are_as_fast(config: Config, bank: Bank) -> None:
    config = override(config, {"training.epochs": 1, "training.epoch_size": 240})
    ((metrics, labels),) = measure(config, config, bank)
    assert metrics["perf/speedup"] == pytest.approx(1.0, abs=0.3)
    assert metrics["perf/steady_samples_per_s"] > 0
    assert labels == {}


def test_wrong_settings_get_no_number(config: Config, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_wrongly(state: TrainState, size: tuple[int, int]) -> Any:
        net = state.nets.G
        state.calls["G"] = lambda x, s: 1.5 * net(x, s)
        return speed_compile(state, size)

    speed_compile = speed.compile_networks
    monkeypatch.setattr(speed, "compile_networks", compile_wrongly)
    with pytest.raises(WrongResults, match="wrong results: "):
        next(measure(config, config, bank))


def test_an_incomplete_last_batch_is_never_timed(config: Config, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = set()

    def step(state: TrainState, batch: Any, *, epoch: int, step: int) -> None:
        sizes.add(len(batch.content))

    monkeypatch.setattr(speed, "train_step", step)
    odd = override(config, {"training.epoch_size": 58, "training.drop_last": False})  # 14 whole batches and one of 2
    assert len(list(measure(odd, odd, bank))) == 3
    assert sizes == {4}


def test_too_few_steps(config: Config, bank: Bank) -> None:
    config = override(config, {"training.epoch_size": 36})
    with pytest.raises(RaystarError, match=r"36 samples are 9 steps, too few to time; at least 40"):
        next(measure(config, config, bank))


def test_measuring_leaves_torchs_random_state_alone(config: Config, bank: Bank) -> None:
    before = torch.get_rng_state()
    next(measure(config, config, bank))
    assert torch.equal(torch.get_rng_state(), before)
