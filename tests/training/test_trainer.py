"""The loop: epoch means, bitwise resume, divergence, memory, grids and the three displays."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raystar.base.errors import RaystarError, TrialDiverged, TrialOutOfMemory
from raystar.base.metrics import RULER
from raystar.config.load import override, to_mapping
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.model import checkpoint as checkpoints
from raystar.pictures.codec import PreviewCodec, open_codec
from raystar.ruler.ruler import Ruler
from raystar.search.purpose import QUALITY
from raystar.training import trainer as trainer_module
from raystar.training.state import TrainState
from raystar.training.step import LOGGED, train_step
from raystar.training.trainer import Progress, Trainer
from tests.kit.support import ROOT, tiny_config, write_latents


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture
def config(root: Path) -> Config:
    return tiny_config(root)


@pytest.fixture
def bank(config: Config, root: Path) -> Bank:
    return open_bank(config, root.parent / "cache")


def test_epoch_means_are_means_over_steps(config: Config, bank: Bank) -> None:
    config = override(config, {"loss.r1_interval": 3, "training.epochs": 1})
    (progress,) = Trainer(config, bank).run()
    state = TrainState.create(config, "cpu")
    trainer = Trainer(config, bank, state=state)
    found = [train_step(state, trainer.data.batch(step), epoch=1, step=step) for step in range(1, 5)]
    for key in LOGGED:
        mean = sum(logs[key].item() for logs in found) / 4
        assert progress.metrics[f"train/{key}"] == pytest.approx(mean, rel=1e-6), key
    # R1 ran in one step of four; its mean counts the others as zero.
    assert sum(logs["r1"].item() > 0 for logs in found) == 1


def test_metrics_are_the_published_ones(config: Config, bank: Bank) -> None:
    for progress in Trainer(config, bank, Ruler.build(bank, config), measure_at=[1]).run():
        system = {name: value for name, value in progress.metrics.items() if name.startswith("system/")}
        assert set(progress.metrics) - set(system) == set(QUALITY.metrics)
        assert set(system) == {
            "system/cpu_utilization_percentage", "system/system_memory_usage_percentage",
            "system/process_cpu_percentage", "system/process_memory_megabytes",
        }  # fmt: skip
        assert system["system/process_cpu_percentage"] > 0
        assert all(math.isfinite(value) for value in progress.metrics.values())
    assert progress.metrics["train/lambda_ds"] == pytest.approx(0.95)


def test_resume_is_bitwise(config: Config, bank: Bank, tmp_path: Path) -> None:
    config = override(config, {"training.epochs": 4, "loss.r1_interval": 2})
    whole = [(p.metrics, p.checkpoint) for p in Trainer(config, bank).run()]
    for progress in Trainer(override(config, {"training.epochs": 2}), bank).run():
        checkpoints.save(tmp_path / "c.pt", progress.checkpoint)
    resumed = list(Trainer(config, bank, checkpoint=checkpoints.load(tmp_path / "c.pt")).run())
    assert [p.epoch for p in resumed] == [3, 4]
    for progress, (metrics, _) in zip(resumed, whole[2:], strict=True):
        for key in LOGGED:
            assert progress.metrics[f"train/{key}"] == metrics[f"train/{key}"]
    _assert_equal(resumed[-1].checkpoint, whole[-1][1])


GO_ON = """
import json, sys
from pathlib import Path
from raystar.model import checkpoint as checkpoints
from raystar.config.load import from_mapping
from raystar.data.bank import open_bank
from raystar.model.device import bf16_as_asked
from raystar.training.trainer import Trainer
for folder in map(Path, sys.argv[1:]):
    config = from_mapping(json.loads((folder / "config.json").read_text()), "config.json")
    trainer = Trainer(config, open_bank(config, folder / "cache"), checkpoint=checkpoints.load(folder / "half.pt"))
    with bf16_as_asked():
        for progress in trainer.run():
            print(json.dumps(progress.metrics), flush=True)
    checkpoints.save(folder / "end.pt", progress.checkpoint)
"""


@pytest.mark.usefixtures("bf16")
def test_resume_in_a_fresh_process_is_bitwise(config: Config, bank: Bank, tmp_path: Path) -> None:
    """In float32 and bf16, with R1 in some steps and not in others, and an incomplete last batch."""
    keys = {"training.epochs": 3, "loss.r1_interval": 2, "training.epoch_size": 18, "training.drop_last": False}
    wholes: dict[Path, list[Progress]] = {}
    for use_amp in (False, True):
        folder = tmp_path / f"amp {use_amp}"
        folder.mkdir()
        config = override(config, keys | {"training.use_amp": use_amp, "training.ema_epochs": 0.5})
        wholes[folder] = list(Trainer(config, bank).run())
        (half,) = Trainer(override(config, {"training.epochs": 1}), bank).run()
        checkpoints.save(folder / "half.pt", half.checkpoint)
        (folder / "config.json").write_text(json.dumps(to_mapping(config)))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number adds in another order
    command = [sys.executable, "-c", GO_ON, *map(str, wholes)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = [progress.metrics for whole in wholes.values() for progress in whole[1:]]
    for key in LOGGED:
        key = f"train/{key}"
        assert [metrics[key] for metrics in found] == [metrics[key] for metrics in wanted], key
    assert found[0]["train/r1"] > 0
    assert found[0]["train/g_loss"] != found[2]["train/g_loss"]  # float32 and bf16
    for folder, whole in wholes.items():
        end = checkpoints.load(folder / "end.pt")
        assert end["epoch"] == 3
        for part in ("G", "F", "E", "D", "opt_g", "opt_d", "ema"):
            _assert_equal(end[part], whole[-1].checkpoint[part])


def _assert_equal(a: Any, b: Any) -> None:
    left, right = dict(checkpoints.leaves("", a)), dict(checkpoints.leaves("", b))
    assert left.keys() == right.keys()
    tensors = 0
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right[key]), key
            tensors += 1
    assert tensors > 5


def test_seeds(config: Config, bank: Bank) -> None:
    def losses(seed: int) -> list[float]:
        runs = Trainer(override(config, {"training.seed": seed}), bank).run()
        return [p.metrics["train/g_loss"] for p in runs]

    assert losses(1) == losses(1) != losses(2)


@pytest.mark.parametrize("display", [2, 100])
def test_an_exploding_loss_ends_the_run(
    config: Config, bank: Bank, monkeypatch: pytest.MonkeyPatch, display: int
) -> None:
    """Finite, but beyond what any GAN comes back from; seen at the next display, or at the end of the epoch."""

    def step(state: TrainState, batch: Any, *, epoch: int, step: int) -> dict[str, torch.Tensor]:
        return dict.fromkeys(LOGGED, torch.tensor(1.0)) | {"cyc": torch.tensor(1e9 if step >= 2 else 1.0)}

    monkeypatch.setattr(trainer_module, "train_step", step)
    config = override(config, {"training.display_interval": display})
    by, value = (2, "1e+09") if display == 2 else (4, "7.5e+08")
    with pytest.raises(TrialDiverged, match=re.escape(f"losses exploded in epoch 1, by step {by}: cyc {value}")):
        list(Trainer(config, bank).run())


def test_divergence_stops_before_the_weights_move(config: Config, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(override(config, {"training.display_interval": 1}), bank)
    real_step = trainer_module.train_step

    def poisoned(state: TrainState, batch: Any, *, epoch: int, step: int) -> dict[str, torch.Tensor]:
        if step == 3:
            batch = batch._replace(content=batch.content * float("nan"))
        return real_step(state, batch, epoch=epoch, step=step)

    monkeypatch.setattr(trainer_module, "train_step", poisoned)
    with pytest.raises(TrialDiverged, match=r"d_loss.*became NaN or infinite in epoch 1, by step 3"):
        list(trainer.run())
    for _, net in trainer.state.nets.items():
        assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize(("failing", "fails"), [({2}, False), ({2, 5, 9}, True)])
def test_out_of_memory(
    config: Config, bank: Bank, monkeypatch: pytest.MonkeyPatch, failing: set[int], fails: bool
) -> None:
    """A batch that does not fit is left out and counted; more than a tenth of an epoch fails the run."""
    config = override(config, {"training.epochs": 1, "training.epoch_size": 80})
    real_step = trainer_module.train_step

    def starved(state: TrainState, batch: Any, *, epoch: int, step: int) -> dict[str, torch.Tensor]:
        if step in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real_step(state, batch, epoch=epoch, step=step)

    monkeypatch.setattr(trainer_module, "train_step", starved)
    if fails:
        with pytest.raises(TrialOutOfMemory, match=r"3 of 20 batches.*training\.batch_size"):
            list(Trainer(config, bank).run())
    else:
        (progress,) = Trainer(config, bank).run()
        assert progress.metrics["perf/skipped_batches"] == 1


def test_other_runtime_errors_are_not_swallowed(config: Config, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trainer_module, "train_step", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(Trainer(config, bank).run())


@pytest.mark.parametrize(
    ("keys", "drawn"),
    [
        ({"visualization.every_epochs": 2}, [2, 4, 5]),
        ({"training.eval_interval": 3}, [3, 5]),
        ({"visualization.every_epochs": 2, "training.eval_interval": 3}, [2, 4, 5]),
        ({"visualization.every_epochs": 0}, []),
    ],
)
def test_when_grids_are_drawn(config: Config, bank: Bank, keys: dict[str, int], drawn: list[int]) -> None:
    config = override(config, {"training.epochs": 5, **keys})
    found = [(p.epoch, set(p.images)) for p in Trainer(config, bank, codec=PreviewCodec()).run()]
    assert [epoch for epoch, images in found if images] == drawn
    assert all(images in (set(), {"grid_ref", "grid_noise"}) for _, images in found)


GRIDS = "visualization.every_epochs"


@pytest.mark.parametrize(
    ("keys", "measure_at", "measured"),
    [
        ({}, None, [5, 6]),  # with the grids, every five epochs, and at the end
        ({GRIDS: 2}, None, [2, 4, 6]),
        ({GRIDS: 0}, None, [6]),
        ({GRIDS: 1}, [2, 3], [2, 3, 6]),
        ({GRIDS: 1}, [], [6]),
        ({GRIDS: 1}, range(1, 7), [1, 2, 3, 4, 5, 6]),
        ({GRIDS: 1, "ruler.every_epochs": 4}, None, [4, 6]),
        ({GRIDS: 1, "ruler.every_epochs": 4}, {1, 5}, [1, 4, 5, 6]),
        ({GRIDS: 1, "ruler.every_epochs": 99}, None, [6]),
    ],
    ids=str,
)
def test_when_the_ruler_measures(
    config: Config, bank: Bank, keys: dict[str, int], measure_at: Collection[int] | None, measured: list[int]
) -> None:
    config = override(config, {"training.epochs": 6, "training.epoch_size": 4, **keys})
    trainer = Trainer(config, bank, Ruler.build(bank, config), measure_at=measure_at)
    found = {p.epoch: {key for key in p.metrics if key.startswith("eval/")} for p in trainer.run()}
    assert [epoch for epoch, metrics in found.items() if metrics] == measured
    assert len({frozenset(metrics) for metrics in found.values()}) == 2 - (measured == [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("size", [(8, 8), (36, 20), (8, 12), (12, 8)], ids=str)
@pytest.mark.parametrize("amp", [False, True])
def test_latents_of_every_size_are_trained_measured_and_drawn(tmp_path: Path, size: tuple[int, int], amp: bool) -> None:
    config = tiny_config(
        write_latents(tmp_path / "data", count=16, size=size), training__epochs=1, training__use_amp=amp,
        data__max_samples=[2, 3, 4],
    )  # fmt: skip
    bank = open_bank(config, tmp_path / "cache")
    codec, _ = open_codec(config)
    (progress,) = Trainer(config, bank, Ruler.build(bank, config, tmp_path / "cache"), codec).run()
    assert np.isfinite(list(progress.metrics.values())).all()
    assert {f"eval/{name}" for name in RULER} <= progress.metrics.keys()
    assert set(progress.images) == {"grid_ref", "grid_noise"}


def test_an_epoch_without_a_step_is_refused(config: Config, bank: Bank) -> None:
    few = override(config, {"training.epoch_size": None, "data.max_samples": 1})
    with pytest.raises(RaystarError, match=r"training\.batch_size 4 is more than an epoch's 3 samples"):
        Trainer(few, bank)
    *_, last = Trainer(override(few, {"data.max_samples": 2}), bank).run()
    assert last.epoch == few.training.epochs


def test_json_lines(config: Config, bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    config = override(config, {"training.log_json": True, "training.log_interval": 2, "training.epochs": 1})
    before = time.time()
    list(Trainer(config, bank).run())
    *steps, _ = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in steps]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 2), (1, 4)]
    assert set(LOGGED) | {"lambda_ds", "lr_g"} <= set(lines[0])
    assert before <= lines[0]["time"] <= lines[1]["time"] <= time.time()


def test_epoch_summaries(config: Config, bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    """A line an epoch, whatever `log_interval` is: means, settings at its end, and the score where it was measured."""
    keys = {"training.log_json": True, "training.log_interval": 999, "training.lr_schedule": "linear"}
    config = override(config, keys | {"training.epochs": 2, "visualization.every_epochs": 0})
    found = list(Trainer(config, bank, Ruler.build(bank, config)).run())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for progress, line in zip(found, lines, strict=True):
        assert line.startswith("[Epoch Summary] {")
        values = json.loads(line.removeprefix("[Epoch Summary] "))
        assert abs(values.pop("time") - time.time()) < 60
        metrics = progress.metrics
        assert values.pop("epoch") == progress.epoch
        assert values.pop("global_step") == progress.step == 4 * progress.epoch
        assert values.pop("seconds") == metrics["perf/train_s"]
        assert values.pop("samples_per_s") == metrics["perf/samples_per_s"]
        assert values.pop("score", None) == metrics.get("eval/score")
        assert values == {
            name: metrics[f"train/{name}"] for name in (*LOGGED, "lambda_ds", "lr_g", "lr_d", "lr_mapping")
        }
    assert ["score" in line for line in lines] == [False, True]
    assert found[0].metrics["train/lr_g"] == config.training.lr_g / 2  # of two epochs, one has passed


@pytest.mark.parametrize(("style", "expected"), [("percent", True), ("bar", True), ("off", False)])
def test_displays(config: Config, bank: Bank, capsys: pytest.CaptureFixture[str], style: str, expected: bool) -> None:
    config = override(config, {"training.progress_style": style, "training.display_interval": 1})
    list(Trainer(config, bank).run())
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("epoch 2/2" in shown.err) == expected
    assert bool(shown.err) == expected
