"""What only a GPU can show: `make gpu`. With RAYSTAR_GPU_TESTS=cpu the same tests run on a CPU, where they can.

Numbers of a GPU are held against this process's CPU in float32, without TF32.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from raystar.base.errors import TrialOutOfMemory
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.data.batches import LatentDataset
from raystar.demo import DOMAINS
from raystar.model import checkpoint as checkpoints
from raystar.model.device import set_backends
from raystar.model.networks import NAMES
from raystar.ruler.ruler import Ruler
from raystar.training.compile import compile_networks
from raystar.training.memory import step_bytes
from raystar.training.parity import check_parity
from raystar.training.resume import restore, snapshot
from raystar.training.state import TrainState
from raystar.training.step import LOGGED, train_step
from raystar.training.trainer import Trainer
from tests.kit.support import ROOT

WHERE = os.environ.get("RAYSTAR_GPU_TESTS", "cuda")
ON_GPU = WHERE == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a CPU shows nothing of it")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        ON_GPU and not torch.cuda.is_available(), reason="no GPU here; RAYSTAR_GPU_TESTS=cpu tries them"
    ),
]
DEVICE = torch.device(WHERE)
EXACT = {"training.use_amp": False, "training.tf32": False}
ADAGN = {"model.norm": "adagn", "model.num_groups": 8, "model.discriminator_norm": "spectral"}


def config_of(device: str = WHERE, **changed: Any) -> Config:
    values = {
        "model.base_dim": 32, "model.n_res_blocks": 2, "model.mapping_hidden_dim": 64, "training.batch_size": 8,
        "training.device": device, "training.progress_style": "off", "data.data_root": "raystar:demo",
        "data.domains": list(DOMAINS), "loss.r1_interval": 2, "training.epoch_size": 48, "training.epochs": 2,
        "visualization.every_epochs": 0,
    }  # fmt: skip
    return override(Config(), values | {key.replace("__", "."): value for key, value in changed.items()})


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return open_bank(config_of(), tmp_path_factory.mktemp("cache"))


def steps(config: Config, bank: Bank, count: int = 3) -> tuple[TrainState, list[dict[str, float]]]:
    """A fresh state after some steps, and their losses."""
    device = torch.device(config.training.device)
    set_backends(config, device)
    state, data = TrainState.create(config, device), LatentDataset(bank, config, device)
    losses = [train_step(state, data.batch(step).to(device), epoch=1, step=step) for step in range(1, count + 1)]
    return state, [{name: float(value) for name, value in each.items()} for each in losses]


@pytest.mark.parametrize("changed", [{}, ADAGN, {"model.residual": True}], ids=["AdaIN", "AdaGN, spectral", "residual"])
def test_a_gpus_losses_are_a_cpus(bank: Bank, changed: dict[str, Any]) -> None:
    here = steps(override(config_of(), EXACT | changed), bank)[1]
    there = steps(override(config_of("cpu"), EXACT | changed), bank)[1]
    for one, other in zip(here, there, strict=True):
        for name in LOGGED:
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=2e-3), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("changed", [{}, ADAGN, {"training.recompute": True}], ids=str)
def test_the_parity_gate_passes(bank: Bank, channels_last: bool, changed: dict[str, Any]) -> None:
    config = override(config_of(training__channels_last=channels_last), changed)
    set_backends(config, DEVICE)
    check_parity(TrainState.create(config, DEVICE), LatentDataset(bank, config, DEVICE))


@needs_gpu
def test_fp16_passes_the_gate_and_trains(bank: Bank) -> None:
    config = config_of(training__amp_dtype="fp16")
    check_parity(TrainState.create(config, DEVICE), LatentDataset(bank, config, DEVICE))
    *_, last = Trainer(config, bank).run()
    assert all(torch.isfinite(value).all() for value in last.checkpoint["G"].values())


@pytest.mark.parametrize("changed", [{}, ADAGN], ids=["AdaIN", "AdaGN, spectral"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(bank: Bank, tmp_path: Path, changed: dict[str, Any]) -> None:
    config = override(config_of(training__deterministic=True), changed)
    *_, whole = Trainer(config, bank).run()
    (half,) = Trainer(override(config, {"training.epochs": 1}), bank).run()
    checkpoints.save(tmp_path / "c.pt", half.checkpoint)
    *_, resumed = Trainer(config, bank, checkpoint=checkpoints.load(tmp_path / "c.pt")).run()
    for net in NAMES:
        for key, value in whole.checkpoint[net].items():
            assert torch.equal(value, resumed.checkpoint[net][key]), (net, key)


def test_moments_take_their_weights_layout(bank: Bank) -> None:
    """From a file of contiguous tensors into weights that are channels last, and back."""
    for there, here in ((False, True), (True, False)):
        state, _ = steps(config_of(training__channels_last=there), bank, 1)
        saved = snapshot(state, 1, {})
        other = TrainState.create(config_of(training__channels_last=here), DEVICE)
        restore(other, saved, "c.pt")
        for optimizer in (other.opt_g, other.opt_d):
            for parameter, moments in optimizer.state.items():
                assert moments["exp_avg_sq"].stride() == parameter.stride()


@needs_gpu
@pytest.mark.parametrize("preload", [False, True])
def test_batches_on_the_gpu_are_those_of_the_cpu(bank: Bank, preload: bool) -> None:
    config = config_of(data__preload_to_gpu=preload)
    here, there = LatentDataset(bank, config, DEVICE), LatentDataset(bank, config, torch.device("cpu"))
    assert (here.storage.device.type == "cuda") == preload
    for epoch in (1, 2):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        for one, other in zip(here.batches(), there.batches(), strict=True):
            for tensor, wanted in zip(one, other, strict=True):
                assert tensor.is_cuda
                assert torch.equal(tensor.cpu(), wanted)


@needs_gpu
def test_what_a_step_takes_is_as_foretold(bank: Bank) -> None:
    config = config_of(model__base_dim=128, model__n_res_blocks=4, training__batch_size=16)
    for changed in ({}, {"training.recompute": True}):
        tried = override(config, changed)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps(tried, bank, 3)
        taken = torch.cuda.max_memory_allocated() - before
        assert 0.5 < taken / step_bytes(tried, bank.shape) < 1.2, changed


@needs_gpu
def test_want_of_memory_is_said_with_what_would_fit(bank: Bank) -> None:
    total = torch.cuda.mem_get_info()[1]
    config = config_of(model__base_dim=128, training__batch_size=48, training__epoch_size=96)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 0.7 * 2**30) / total))
    try:
        with pytest.raises(TrialOutOfMemory, match="a step takes about"):
            list(Trainer(config, bank).run())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    *_, last = Trainer(config_of(), bank).run()  # the process goes on
    assert last.epoch == 2


@needs_gpu
@pytest.mark.parametrize("cudagraphs", [False, True])
def test_compiled_networks_give_what_eager_ones_do_in_a_thread_of_their_own(bank: Bank, cudagraphs: bool) -> None:
    """Tune runs each trial in a new thread; two of them, one after the other."""
    config = config_of(training__use_compile=True, training__compile_cudagraphs=cudagraphs)
    problems: list[BaseException | str] = []

    def trial() -> None:
        try:
            state = TrainState.create(config, DEVICE)
            done = compile_networks(state, bank.shape[1:])
            problems.extend(done.notes)
            check_parity(state, LatentDataset(bank, config, DEVICE))
        except BaseException as error:
            problems.append(error)

    for _ in range(2):
        thread = threading.Thread(target=trial)
        thread.start()
        thread.join()
    assert problems == []


def test_the_ruler_measures_on_the_gpu_what_it_measures_on_a_cpu(bank: Bank, tmp_path: Path) -> None:
    config = override(config_of(ruler__sources=8), EXACT)
    state = TrainState.create(config, DEVICE)
    here = Ruler.build(bank, config, tmp_path).to(DEVICE).measure(state.shown, config)
    there_config = override(config, {"training.device": "cpu"})
    nets = TrainState.create(there_config, "cpu").shown
    there = Ruler.build(bank, there_config, tmp_path).measure(nets, there_config)
    assert here == pytest.approx(there, rel=1e-2, abs=1e-2)


def test_a_sweep_of_two_trials_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("finalists: 0\nexperiments: {a: {loss.w_cyc: 2}, b: {loss.w_cyc: 3}}\n")
    command = [
        sys.executable, "-m", "raystar.tune", "--space", str(tmp_path / "space.yaml"), "--out", str(tmp_path / "runs"),
        "--name", "s", "--epochs", "2", "--set", "training.epoch_size=48", "--set", f"training.device={WHERE}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for trial in ("a", "b"):
        assert (tmp_path / f"runs/s/trials/{trial}/epoch_0002.pt").is_file()
