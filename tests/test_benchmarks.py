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

from benchmarks import data, foresight, memory, recognised, resume
from benchmarks.measure import in_fresh_process, take_turns
from raystar.config.load import override, to_yaml
from raystar.data.bank import open_bank
from raystar.data.batches import LatentDataset
from raystar.pictures import decoder as decoders
from raystar.pictures.codec import BUILT_IN, BuiltInCodec
from raystar.training.state import TrainState
from raystar.training.step import train_step
from tests.kit.support import tiny_config, write_latents

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
    reused = memory.run_trials_apart(chosen, settings, tmp_path, 1)
    assert [each["status"] for each in reused] == ["finished", "finished", "failed", "out_of_memory", "finished"]
    assert reused[2]["reason"] == "ValueError: this trial was told to fail"
    assert "out of memory in 1 of 4 batches" in reused[3]["reason"]
    (fresh,) = memory.run_trials_apart(chosen[-1:], settings, tmp_path, 1)
    assert reused[-1]["losses"] == fresh["losses"] != []
    assert reused[-1]["score"] == fresh["score"]
    assert reused[-1]["losses"] != reused[0]["losses"]
    assert reused[-1]["resident"] < 1.05 * reused[1]["resident"]


def test_foresight_ranks_as_asha_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who has not moved is last, at the rung and at the end, however its score is rounded."""
    lively = {"movement": 0.5, "outlook": 0.9, "score": 1.3, "style": 1.2}
    still = {"movement": 0.001, "outlook": 1.0, "score": 1.0999, "style": 1.0}
    runs = [
        {"2": lively, "9": lively | {"score": 0.7}},
        {"2": lively | {"outlook": 0.95, "score": 1.2}, "9": lively | {"score": 0.8}},
        {"2": still, "9": still},
        {"2": still | {"score": 1.1001}, "9": still | {"score": 1.1002}},
    ]
    young = foresight.table(runs).splitlines()[1].split()
    assert young[:2] == ["2", "+1.00"]
    assert float(young[2]) < 1  # the score has the two that moved the other way round
    assert young[-1] == "2"
    # A real run of it, kept and not trained again.
    root = write_latents(tmp_path / "data", count=24)
    (tmp_path / "c.yaml").write_text(to_yaml(tiny_config(root, training__epochs=2)))
    (tmp_path / "s.yaml").write_text("space: {loss.w_adv: {uniform: [0.5, 2.0]}}")
    command = ["--space", str(tmp_path / "s.yaml"), "--config", str(tmp_path / "c.yaml"), "--trials", "3"]
    command += ["--seeds", "1", "--out", str(tmp_path / "kept.json")]
    assert foresight.main(command) == 0
    first = capsys.readouterr().out
    assert "3 seeds" not in first
    assert "2 seeds of number" in first
    assert foresight.main(command) == 0
    again = capsys.readouterr().out
    assert "score" not in again.replace("   score", "")  # the column's name; a line a run otherwise
    assert set(again.splitlines()) < set(first.splitlines())


def test_a_stranger_tells_real_pictures_of_the_domains_apart(tmp_path: Path) -> None:
    config = override(recognised.from_mapping({}, ""), {
        "data.data_root": "raystar:demo", "data.holdout": 0.15, "data.domains": ["photo", "woodcut", "stained_glass"],
    })  # fmt: skip
    bank = open_bank(config, tmp_path)
    codec = BuiltInCodec(decoders.load(), BUILT_IN)
    classifier = recognised.train(bank, codec)
    held = [bank.rows(rows) for rows in bank.held]
    assert np.mean(recognised.share(classifier, codec, held)) > 0.9
    assert np.mean(recognised.share(classifier, codec, [*held[1:], held[0]])) < 0.1
