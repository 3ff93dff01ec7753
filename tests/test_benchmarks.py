"""The benchmarks at a small size: they run, and the claims that do not need a quiet machine hold."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from benchmarks import data, memory, resume
from benchmarks.measure import in_fresh_process, take_turns
from raystar.config import override
from raystar.dataset import LatentDataset, open_bank
from raystar.step import TrainState, train_step

CPU = torch.device("cpu")


def test_a_second_process_adds_little_private_memory(tmp_path: Path) -> None:
    """Under a tenth of the bank's size, having read every latent of it."""
    rng = np.random.default_rng(0)
    rows = {d: rng.standard_normal((1600, 4, 32, 32), dtype=np.float32).astype(np.float16) for d in data.DOMAINS}
    save_file(rows, tmp_path / "data.safetensors")
    config = data.configuration(tmp_path / "data.safetensors")
    size = open_bank(config, tmp_path / "cache").latents.nbytes
    assert size == 8000 * 8192
    anonymous, dirty = in_fresh_process(data.private_memory, config, tmp_path / "cache")
    assert anonymous < 0.1 * size
    assert dirty < 0.1 * size


def test_reopening_costs_little_more_than_asking_for_the_files_times(tmp_path: Path) -> None:
    """The rest, of listing, naming and splitting, stays below two more such rounds (it took ten before)."""
    root, cache = tmp_path / "latents", tmp_path / "cache"
    data.write_files(root, 3000, "npy")
    config = data.configuration(root)
    open_bank(config, cache)
    opening, reopening, stat = data.reopening(config, cache, times=9)
    assert opening < 3 * stat
    assert reopening < 0.05


def test_drawing_a_batch_is_under_a_hundredth_of_a_step(tmp_path: Path) -> None:
    data.write_files(tmp_path / "latents", 100, "npy")
    config = data.configuration(tmp_path / "latents")
    dataset = LatentDataset(open_bank(config, tmp_path / "cache"), config, CPU)
    state = TrainState.create(config, CPU)
    batch = dataset.batch(1)
    draw = take_turns({"draw": lambda i: dataset.batch(i % dataset.steps + 1)}, 50, CPU)["draw"]
    step = take_turns({"step": lambda i: train_step(state, batch, epoch=1, step=i)}, 3, CPU, warmup=1)["step"]
    assert draw < 0.01 * step


def test_reading_a_file_twice_as_large_as_progress_needs_is_not_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packing that takes its time says how far it is: here every look at the clock is a second later."""
    data.write_files(tmp_path / "latents", 50, "npy")
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    open_bank(data.configuration(tmp_path / "latents"), tmp_path / "cache")
    shown = capsys.readouterr().err
    counts = [int(count) for count in re.findall(r"reading latents (\d+)/50", shown)]
    assert len(counts) > 10
    assert counts == sorted(counts)
    assert re.search(r"read 50 latents in \d+ s\n", shown)


def here(function: Any, *args: Any) -> Any:
    """Stands for a fresh process where that it is one does not matter."""
    return function(*args)


def test_the_data_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(data, "in_fresh_process", here)
    assert data.main(["--files", "100", "--formats", "pt", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^\.pt +\d+ +1 +\d+ ", shown, re.MULTILINE)
    assert re.search(r"drawing a batch [\d.]+ ms, [\d.]+% of a step", shown)


def test_the_resume_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(resume, "in_fresh_process", here)
    small = ["--epochs", "2", "--first", "1", "--epoch-size", "20", "--base-dim", "8", "--precisions", "bf16"]
    assert resume.main(small) == 0
    assert re.search(r"^bf16 +2\d\d +", capsys.readouterr().out, re.MULTILINE)


def test_the_resume_benchmark_notices_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second half runs with another seed, the comparison must fail."""
    config = resume.configuration("cpu", "fp32", training__epochs=2, model__base_dim=8, training__epoch_size=8)

    def another(function: object, config: object, folder: Path, start: Path | None, end: Path, threads: int) -> object:
        seed = 0 if start is None else 1
        return resume.train(override(config, {"training.seed": seed}), folder, start, end, threads)  # type: ignore[arg-type]

    monkeypatch.setattr(resume, "in_fresh_process", another)
    with pytest.raises(AssertionError, match=r"epoch 2: train/\w+ is .* in one go, .* resumed"):
        resume.compare(config, 1, tmp_path, torch.get_num_threads())


@pytest.mark.slow
def test_a_trial_after_failed_ones_is_as_in_a_fresh_process(tmp_path: Path) -> None:
    """Bit for bit, after one that raised and one out of memory; and memory stays."""
    settings = memory.configuration("cpu") | {"model.base_dim": 8, "training.epoch_size": 32, "training.epochs": 1}
    chosen = [memory.trials(8)[number] for number in (0, 1, 3, 6, 7)]
    reused = in_fresh_process(memory.run_trials, chosen, settings, tmp_path, 1)
    assert [each["status"] for each in reused] == ["finished", "finished", "failed", "out_of_memory", "finished"]
    assert reused[2]["reason"] == "ValueError: this trial was told to fail"
    assert "out of memory in 1 of 4 batches" in reused[3]["reason"]
    (fresh,) = in_fresh_process(memory.run_trials, chosen[-1:], settings, tmp_path, 1)
    assert reused[-1]["losses"] == fresh["losses"] != []
    assert reused[-1]["score"] == fresh["score"]
    assert reused[-1]["losses"] != reused[0]["losses"]
    assert reused[-1]["resident"] < 1.05 * reused[1]["resident"]
