"""Compiling network by network: the same losses, and a labelled way out where it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import open_bank
from raystar.training import compile as compile_module
from raystar.training.compile import compile_networks, graphs
from raystar.training.state import TrainState
from raystar.training.step import train_step
from raystar.training.trainer import Trainer
from tests.kit.support import tiny_config, write_latents


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(
        write_latents(tmp_path / "latents"), training__use_compile=True, training__compile_generator=False,
        training__compile_style_encoder=False, training__compile_discriminator=False, training__epochs=1,
    )  # fmt: skip


def test_nothing_is_compiled_unless_asked_for(tmp_path: Path) -> None:
    state = TrainState.create(tiny_config(tmp_path), "cpu")
    assert compile_networks(state, (16, 16)).modules == ()
    assert state.calls == {}


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_losses(config: Config, tmp_path: Path) -> None:
    bank = open_bank(config, tmp_path / "cache")
    compiled, eager = TrainState.create(config, "cpu"), TrainState.create(config, "cpu")
    done = compile_networks(compiled, (16, 16))
    assert done.modules == ("F",)
    assert done.notes == ()
    assert done.seconds > 0
    batch = Trainer(config, bank).data.batch(1)
    for step in (1, 2):
        found = train_step(compiled, batch, epoch=1, step=step)
        wanted = train_step(eager, batch, epoch=1, step=step)
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    # What is saved are the originals: no wrapper's name in any key.
    assert not any("_orig_mod" in key for state in compiled.nets.state_dict().values() for key in state)


def test_a_network_that_does_not_compile_runs_eager_and_says_so(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(net: Any, config: Config) -> Any:
        def call(*args: Any) -> Any:
            raise AssertionError("no kernel for this\nand more lines")

        return call

    monkeypatch.setattr(compile_module, "_compile", broken)
    (progress,) = Trainer(config, open_bank(config, tmp_path / "cache")).run()
    assert progress.metrics["perf/compiled_modules"] == 0
    assert progress.labels["raystar.compiled_modules"] == "none"
    assert progress.labels["raystar.compile_note"].startswith("F runs eager, its compilation failed: AssertionError")
    shown = capsys.readouterr().err
    assert shown.count("note: F runs eager, its compilation failed: AssertionError: no kernel for this") == 1
    assert "and more lines" not in shown


@pytest.mark.slow
def test_swept_numbers_are_no_constants_of_the_graphs(config: Config, tmp_path: Path) -> None:
    """A second trial in the process compiles nothing; a batch of another size does once, and is counted."""
    bank = open_bank(config, tmp_path / "cache")
    (first,) = Trainer(config, bank).run()
    assert first.metrics["perf/recompilations"] == 0
    assert first.labels == {"raystar.compiled_modules": "F"}
    compiled = graphs()
    swept = {
        "loss.w_adv": 3.0, "loss.w_ds": 0.1, "loss.r1_interval": 2, "loss.ds_margin": 0.5, "training.lr_g": 1e-3,
        "training.seed": 9, "training.latent_scale": 0.2,
    }  # fmt: skip
    (second,) = Trainer(override(config, swept), bank).run()
    assert second.metrics["train/g_loss"] != first.metrics["train/g_loss"]
    assert graphs() == compiled
    odd = {"training.drop_last": False, "training.epoch_size": 18, "training.epochs": 2}
    recompiled = [p.metrics["perf/recompilations"] for p in Trainer(override(config, odd), bank).run()]
    assert recompiled[0] >= 1
    assert recompiled[1] == 0
