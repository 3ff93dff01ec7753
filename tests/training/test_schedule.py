"""Learning rates by step: the formula, what a run makes of it, what is logged, and that a resumed run is the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.model import checkpoint as checkpoints
from raystar.training import trainer as trainer_module
from raystar.training.schedule import rate_factor
from raystar.training.state import TrainState
from raystar.training.trainer import Trainer
from tests.kit.support import tiny_config, write_latents

COSINE = {"training.lr_schedule": "cosine", "training.warmup_steps": 5, "training.min_lr_ratio": 0.1}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    changed = {"training__lr_g": 0.004, "training__lr_d": 0.002, "training__lr_mapping": 0.001}
    return tiny_config(write_latents(tmp_path / "latents"), training__epochs=3, **changed)


@pytest.fixture
def bank(config: Config, tmp_path: Path) -> Bank:
    return open_bank(config, tmp_path / "cache")


def schedule(kind: str, warmup: int = 0, least: float = 0.0) -> Any:
    values = {"training.lr_schedule": kind, "training.warmup_steps": warmup, "training.min_lr_ratio": least}
    return override(Config(), values).training


@pytest.mark.parametrize("warmup", [0, 1, 7, 40, 100])
@pytest.mark.parametrize("least", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("total", [1, 40, 1000])
def test_the_formula(warmup: int, least: float, total: int) -> None:
    """Written out anew: a cosine by its half-angle, a line by its ends."""
    for step in range(total + 3):
        if step < warmup:
            cosine = linear = (step + 1) / warmup
        else:
            share = 1.0 if total <= warmup else min(1.0, (step - warmup) / (total - warmup))
            if total <= warmup:
                share = min(1.0, float(step - warmup))
            cosine = least + (1 - least) * math.cos(math.pi * share / 2) ** 2
            linear = 1 + share * (least - 1)
        assert rate_factor(schedule("cosine", warmup, least), step, total) == pytest.approx(cosine, abs=1e-12)
        assert rate_factor(schedule("linear", warmup, least), step, total) == pytest.approx(linear, abs=1e-12)
        assert rate_factor(schedule("none", warmup, least), step, total) == 1.0


def test_torchs_own_cosine() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.2)
    for step in range(50):
        assert rate_factor(schedule("cosine", 0, 0.2), step, 50) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def rates(state: TrainState) -> list[float]:
    return [group["lr"] for optimizer in (state.opt_g, state.opt_d) for group in optimizer.param_groups]


def test_every_step_has_its_rate(config: Config, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of G, E, F and D; the log says what stands when an epoch has ended."""
    config = override(config, COSINE)
    seen: list[list[float]] = []
    step = trainer_module.train_step

    def watched(state: TrainState, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        seen.append(rates(state))
        return step(state, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "train_step", watched)
    trainer = Trainer(config, bank)
    epochs = list(trainer.run())
    total = 3 * trainer.data.steps
    assert len(seen) == total == 12
    for number, found in enumerate(seen):
        factor = rate_factor(config.training, number, total)
        assert found == pytest.approx([0.004 * factor, 0.004 * factor, 0.001 * factor, 0.002 * factor], abs=1e-15)
    assert seen[0][0] == pytest.approx(0.004 / 5)
    for progress in epochs:
        factor = rate_factor(config.training, progress.epoch * trainer.data.steps, total)
        logged = [progress.metrics[f"train/{name}"] for name in ("lr_g", "lr_mapping", "lr_d")]
        assert logged == pytest.approx([0.004 * factor, 0.001 * factor, 0.002 * factor], abs=1e-15)
    assert epochs[-1].metrics["train/lr_g"] == pytest.approx(0.0004)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_resumed_run_is_bitwise_the_same(
    config: Config, bank: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    config = override(config, COSINE | {"training.lr_schedule": kind})
    *_, whole = Trainer(config, bank).run()
    for progress in Trainer(config, bank).run():
        if progress.epoch == 1:
            checkpoints.save(tmp_path / "first.pt", progress.checkpoint)
            break
    saved = checkpoints.load(tmp_path / "first.pt")
    *_, resumed = Trainer(config, bank, checkpoint=saved).run()
    assert capsys.readouterr().err == ""  # the rate of the step that the file ended with is no difference
    for part in ("G", "F", "E", "D", "opt_g", "opt_d"):
        for (key, a), (_, b) in zip(
            checkpoints.leaves(part, whole.checkpoint[part]), checkpoints.leaves(part, resumed.checkpoint[part]),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, key
    plain = override(config, {"training.lr_schedule": "none"})
    *_, other = Trainer(plain, bank).run()
    assert not torch.equal(next(iter(other.checkpoint["G"].values())), next(iter(whole.checkpoint["G"].values())))


def test_a_changed_rate_is_noted(
    config: Config, bank: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = override(config, COSINE)
    progress = next(iter(Trainer(config, bank).run()))
    checkpoints.save(tmp_path / "first.pt", progress.checkpoint)
    changed = override(config, {"training.lr_g": 0.003})
    Trainer(changed, bank, checkpoint=checkpoints.load(tmp_path / "first.pt"))
    assert "lr 0.004 there, 0.003 now; the configuration counts" in capsys.readouterr().err
