"""Two real workers against one process with the whole batch: every loss, every gradient, every weight, in float64.

Last a whole sweep whose trials are groups of two workers.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from raystar.base.errors import TrialDiverged, TrialOutOfMemory, WorkerLost
from raystar.base.machine import usable_cpus
from raystar.config.load import from_mapping, override
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.data.batches import Batch, LatentDataset, share
from raystar.exported import model
from raystar.model import checkpoint as checkpoints
from raystar.training import trainer as trainer_module
from raystar.training.state import TrainState
from raystar.training.step import LOGGED, train_step
from raystar.training.trainer import Trainer
from raystar.training.workers import ALONE, Group
from tests.kit.support import tiny_config, write_latents
from tests.sweep.test_sweep import Store, request, run, summary_of
from tests.training.test_step import make_batch, make_state

WORKERS = 2
STEPS = 3
SIZES = [4, 5, 1]  # whole, odd, and fewer rows than workers


def step_config(**changed: Any) -> Config:
    """Every loss has a weight of its own; R1 in the second step of three; rates at which weights move far."""
    weights = {"w_adv": 0.8, "w_sty": 1.3, "w_cyc": 1.7, "w_ds": 0.9, "w_r1": 2.5, "w_id": 0.7, "r1_interval": 2}
    rates = {"training__lr_d": 1e-3, "training__lr_g": 1e-3, "training__lr_mapping": 1e-3}
    return tiny_config("unused", **{f"loss__{key}": value for key, value in weights.items()} | rates | changed)


def diversity(part: slice = slice(None)) -> float:
    """The diversity term's distance in the first step of four rows, over all or some of them."""
    state = make_state(step_config())
    batch = Batch(*(tensor[part] for tensor in make_batch(4, 5, seed=1)))
    return train_step(state, batch, epoch=6, step=1)["ds"].item()


def step_cases() -> dict[str, tuple[Config, int]]:
    """Configuration and batch size by name."""
    first, second = sorted((diversity(slice(0, 2)), diversity(slice(2, 4))))
    whole = (first + second) / 2
    cases = {f"size {size}": (step_config(), size) for size in SIZES}
    cases["no identity"] = (step_config(loss__w_id=0.0), 5)
    margins = {
        "hit by both": first / 2,
        "missed by both": 2 * second,
        # One worker's own rows say otherwise than the whole batch, which decides.
        "hit, but not by one": (first + whole) / 2,
        "missed, but not by one": (whole + second) / 2,
    }
    cases |= {f"margin {name}": (step_config(loss__ds_margin=margin), 4) for name, margin in margins.items()}
    return cases


def run_steps(config: Config, size: int, group: Group, poisoned: int | None = None) -> dict[str, Any]:
    """Losses (over all workers), gradients and weights of a few steps; step `poisoned` has a NaN in its last row."""
    state = make_state(config)
    state.group = group
    logs, gradients, moved = [], [], []
    for step in range(1, STEPS + 1):
        batch = make_batch(size, config.model.latent_dim, seed=step)
        if step == poisoned:
            batch.content[-1, 0, 0, 0] = float("nan")
        own = share(size, group.rank, group.size)
        rows = own.stop - own.start
        before = copy.deepcopy(state.nets.state_dict())
        found = train_step(state, Batch(*(tensor[own] for tensor in batch)), epoch=6, step=step)
        logs.append({name: group.mean(value, rows).item() for name, value in found.items()})
        gradients.append(
            {f"{n}.{k}": p.grad.clone() for n, net in state.nets.items() for k, p in net.named_parameters()}
        )
        after = state.nets.state_dict()
        moved.append(any(not torch.equal(after[net][key], before[net][key]) for net in "GFED" for key in after[net]))
    weights = {f"{net}.{key}": value for net in "GFED" for key, value in state.nets.state_dict()[net].items()}
    return {"logs": logs, "gradients": gradients, "weights": weights, "moved": moved}


def scaled_steps(group: Group, poisoned: int | None) -> dict[str, Any]:
    """A few steps with a gradient scaler, as fp16 has one: what it scales by after each, and the last weights."""
    config = step_config()
    state = make_state(config)
    state.group = group
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for step in range(1, STEPS + 1):
        batch = make_batch(4, config.model.latent_dim, seed=step)
        if step == poisoned:
            batch.content[-1, 0, 0, 0] = float("nan")
        train_step(state, Batch(*(t[share(4, group.rank, group.size)] for t in batch)), epoch=6, step=step)
        scales.append(state.scaler.get_scale())
    return {"scales": scales, "weights": state.nets.state_dict()["G"]}


def loop_config(root: Path) -> Config:
    """An epoch of four whole batches and one of a single row, which is less than there are workers."""
    changed = {"epoch_size": 21, "batch_size": 5, "drop_last": False, "display_interval": 2, "epochs": 3}
    return tiny_config(root, **{f"training__{key}": value for key, value in changed.items()}, loss__r1_interval=2)


def in_float64(trainer: Trainer) -> Trainer:
    """The same trainer with weights and batches in float64."""
    for _, net in trainer.state.nets.items():
        net.double()
    batch = trainer.data.batch
    trainer.data.batch = lambda step: Batch(*(t.double() if t.is_floating_point() else t for t in batch(step)))  # type: ignore[method-assign]
    return trainer


def run_loop(config: Config, bank: Bank, group: Group, wide: bool, checkpoint: Any = None) -> list[dict[str, Any]]:
    """Metrics and checkpoint of every epoch."""
    trainer = Trainer(config, bank, checkpoint=checkpoint, group=group)
    progress = (in_float64(trainer) if wide else trainer).run()
    return [{"metrics": p.metrics, "checkpoint": copy.deepcopy(p.checkpoint)} for p in progress]


def diverged(config: Config, bank: Bank, group: Group) -> str:
    """How a run ends whose third step has a NaN in the last worker's rows."""
    trainer = Trainer(config, bank, group=group)
    batch = trainer.data.batch

    def poisoned(step: int) -> Batch:
        found = batch(step)
        if step == 3 and group.rank == group.size - 1:
            found.content[-1] = float("nan")
        return found

    trainer.data.batch = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrialDiverged) as caught:
        list(trainer.run())
    assert all(torch.isfinite(p).all() for _, net in trainer.state.nets.items() for p in net.parameters())
    return str(caught.value)


def worker(rank: int, folder: Path, cases: dict[str, tuple[Config, int]], config: Config) -> None:
    """Everything that the tests ask of two workers, in one pair of processes: starting one takes seconds."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORKERS)
    group = Group.current()
    found: dict[str, Any] = {"group": group}
    found["steps"] = {name: run_steps(*case, group) for name, case in cases.items()}
    found["poisoned"] = run_steps(step_config(), 4, group, poisoned=2)
    found["scaled"] = {poisoned: scaled_steps(group, poisoned) for poisoned in (None, 2)}
    bank = open_bank(config, folder / "cache")
    found["loop"] = run_loop(config, bank, group, wide=True)
    averaging = override(config, {"training.ema_epochs": 0.5})
    whole = run_loop(averaging, bank, group, wide=False)
    resumed = run_loop(averaging, bank, group, wide=False, checkpoint=whole[1]["checkpoint"])
    found["whole"], found["resumed"] = whole[2:], resumed
    found["diverged"] = diverged(config, bank, group)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2) if rank else None
    failed = group.average_gradients([parameter], 3 if rank else 1, torch.zeros(()))
    found["absent"] = (parameter.grad, failed)
    if rank == 0:  # the other is gone
        with pytest.raises(WorkerLost, match="lost touch"):
            group.sum(torch.zeros(()))
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture(scope="module")
def bank(root: Path) -> Bank:
    return open_bank(loop_config(root), root.parent / "cache")


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[Config, int]]:
    return step_cases()


@pytest.fixture(scope="module")
def workers(root: Path, bank: Bank, cases: dict[str, tuple[Config, int]]) -> list[dict[str, Any]]:
    """What each of two workers found."""
    multiprocessing.spawn(worker, (root.parent, cases, loop_config(root)), WORKERS)
    # What the workers above wrote themselves, exceptions among it.
    return [torch.load(root.parent / f"{rank}.pt", weights_only=False) for rank in range(WORKERS)]


def close(found: Any, wanted: Any, name: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, msg=lambda text: f"{name}: {text}")


NAMES = [
    *(f"size {size}" for size in SIZES), "no identity", "margin hit by both", "margin missed by both",
    "margin hit, but not by one", "margin missed, but not by one",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_two_workers_equal_one_process(workers: list[Any], cases: dict[str, tuple[Config, int]], name: str) -> None:
    config, size = cases[name]
    alone = run_steps(config, size, ALONE)
    assert alone["logs"][1]["r1"] > 0 == alone["logs"][0]["r1"] == alone["logs"][2]["r1"]
    if config.loss.ds_margin is not None:
        assert (alone["logs"][0]["ds"] == config.loss.ds_margin) == ("hit" in name)
    for rank, found in enumerate(worker["steps"][name] for worker in workers):
        for step in range(STEPS):
            for key in LOGGED:
                close(found["logs"][step][key], alone["logs"][step][key], f"{key} on {rank}")
            for key, gradient in alone["gradients"][step].items():
                assert gradient.abs().max() < 1e6
                close(found["gradients"][step][key], gradient, f"gradient of {key} on {rank} in step {step + 1}")
        for key, weight in alone["weights"].items():
            assert weight.dtype == torch.float64
            close(found["weights"][key], weight, f"{key} on {rank}")
            assert torch.equal(found["weights"][key], workers[0]["steps"][name]["weights"][key]), key


def test_the_cases_are_those_that_ran(cases: dict[str, tuple[Config, int]]) -> None:
    assert set(cases) == set(NAMES)


def test_a_loss_that_is_not_finite_on_one_worker_moves_nothing_on_either(workers: list[Any]) -> None:
    alone = run_steps(step_config(), 4, ALONE, poisoned=2)
    assert alone["moved"] == [True, False, True]
    for found in (worker["poisoned"] for worker in workers):
        assert found["moved"] == [True, False, True]
        for key, weight in alone["weights"].items():
            close(found["weights"][key], weight, key)


@pytest.mark.parametrize("poisoned", [None, 2])
def test_the_gradient_scaler_skips_together(workers: list[Any], poisoned: int | None) -> None:
    alone = scaled_steps(ALONE, poisoned)
    for found in (worker["scaled"][poisoned] for worker in workers):
        assert found["scales"] == alone["scales"]
        for key, weight in alone["weights"].items():
            close(found["weights"][key], weight, key)
    assert (alone["scales"][-1] < 1024) == (poisoned is not None)


def test_a_whole_run_equals_one_process(workers: list[Any], root: Path, bank: Bank) -> None:
    alone = run_loop(loop_config(root), bank, ALONE, wide=True)
    for found in (worker["loop"] for worker in workers):
        for epoch, wanted in zip(found, alone, strict=True):
            for key in LOGGED:
                close(epoch["metrics"][f"train/{key}"], wanted["metrics"][f"train/{key}"], key)
            for key, weight in wanted["checkpoint"]["G"].items():
                close(epoch["checkpoint"]["G"][key], weight, key)


def test_resume_is_bitwise(workers: list[Any]) -> None:
    """Goes on from the first worker's checkpoint on all of them."""
    wanted = dict(checkpoints.leaves("", workers[0]["whole"][0]["checkpoint"]))
    for found in (worker["resumed"] for worker in workers):
        assert len(found) == 1
        leaves = dict(checkpoints.leaves("", found[0]["checkpoint"]))
        tensors = [key for key, value in leaves.items() if isinstance(value, torch.Tensor)]
        assert len(tensors) > 50
        for key in tensors:
            assert torch.equal(leaves[key], wanted[key]), key
        averages = [key for key in tensors if key.startswith(".ema.")]
        assert {key.split(".")[2] for key in averages} == set("GFE")
        assert not any(torch.equal(leaves[key], leaves[key.removeprefix(".ema")]) for key in averages)


def test_divergence_ends_all_workers_alike(workers: list[Any]) -> None:
    said = {found["diverged"] for found in workers}
    assert len(said) == 1
    assert "became NaN or infinite in epoch 1, by step 4" in said.pop()  # the first display after it


def test_a_missing_gradient_counts_as_zeros(workers: list[Any]) -> None:
    assert [found["group"] for found in workers] == [Group(0, 2), Group(1, 2)]
    for gradient, failed in (found["absent"] for found in workers):
        assert gradient.tolist() == [0.75, 0.75]  # three rows of one against one of zeros
        assert failed.item() == 0


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_make_up_the_batches_of_one_process(root: Path, bank: Bank, count: int) -> None:
    config = override(loop_config(root), {"training.epoch_size": 23})
    alone = LatentDataset(bank, config, torch.device("cpu"))
    parts = [LatentDataset(bank, config, torch.device("cpu"), rank, count) for rank in range(count)]
    assert alone.steps == 5
    for epoch in (1, 2):
        for data in (alone, *parts):
            data.set_epoch(epoch)
        for step in range(1, alone.steps + 1):
            wanted, found = alone.batch(step), [part.batch(step) for part in parts]
            assert {part.rows(step) for part in parts} == {len(wanted.content)}
            assert sum(part.weight(step) for part in parts) == pytest.approx(1)
            for name in Batch._fields:
                shares = [getattr(batch, name) for batch in found]
                if len(wanted.content) < count:  # too few to go round: everyone has all
                    assert all(torch.equal(own, getattr(wanted, name)) for own in shares)
                else:
                    assert torch.equal(torch.cat(shares), getattr(wanted, name)), name
            for part, batch in zip(parts, found, strict=True):
                assert part.weight(step) == len(batch.content) / sum(len(b.content) for b in found)


def test_several_workers_do_not_skip_what_does_not_fit(root: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that skipped would leave the others waiting for its gradients; it ends, and says why."""

    def starved(state: TrainState, batch: Batch, *, epoch: int, step: int) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(trainer_module, "train_step", starved)
    with pytest.raises(
        TrialOutOfMemory, match=r"worker 1 was out of memory in step 1 of epoch 1.*training\.batch_size"
    ):
        list(Trainer(loop_config(root), bank, group=Group(1, 2)).run())


def test_one_process_is_left_alone() -> None:
    """No copy, no message: the very tensors that it gave."""
    value = torch.ones(())
    assert Group.current() == ALONE
    assert ALONE.sum(value) is ALONE.mean(value, 3) is ALONE.average_gradients([], 3, value) is value


@pytest.mark.slow
@pytest.mark.skipif(usable_cpus() < WORKERS, reason="needs two processors, one for each worker")
def test_a_sweep_whose_trials_have_two_workers_each(tmp_path: Path) -> None:
    """Five trials one after the other: stopped ones must make room for the next, or the sweep never ends.

    The metric is the weight of the diversity term, which the trials differ in and which falls from epoch to epoch:
    the second and the third trial are those that ASHA stops, and what their workers still save until they are
    stopped is better than what was heard of them.
    """
    space = {
        "metric": "lambda_ds",
        "mode": "min",
        "search": "grid",
        "scheduler": {"type": "asha", "grace_epochs": 1, "reduction_factor": 2},
        "resources": {"workers": 2},
        "finalists": 0,
        "collapse": {"epochs": 0},
        "space": {"loss.w_ds": {"choice": [1.0, 2.0, 2.5, 0.5, 0.25]}},
    }
    changed = {"training__epochs": 3, "training__batch_size": 5, "training__drop_last": False}
    done = run(request(tmp_path, space, **changed, loss__ds_decay_epochs=20))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["note"]  # that the schedule outlasts the run
    assert "Traceback" not in done.stdout
    summary = summary_of(tmp_path / "runs")
    found = [(t["params"]["loss.w_ds"], t["status"], t["epochs"], t["score_epoch"]) for t in summary["trials"]]
    stopped = [(2.0, "stopped", 1, 1), (2.5, "stopped", 1, 1)]
    assert found == [(1.0, "finished", 3, 3), *stopped, (0.5, "finished", 3, 3), (0.25, "finished", 3, 3)]

    store = Store(tmp_path / "runs")
    assert [status for (status,) in store.rows("select status from runs")] == ["FINISHED"] * 6
    query = "select step, value from metrics where run_uuid = ? and key = ? order by step"
    for trial in summary["trials"]:
        wanted = [trial["params"]["loss.w_ds"] * factor for factor in (1.0, 0.95, 0.9)][: trial["epochs"]]
        assert store.rows(query, trial["run_id"], "train/lambda_ds") == [
            (epoch, pytest.approx(value)) for epoch, value in enumerate(wanted, start=1)
        ]
        assert len(store.rows(query, trial["run_id"], "eval/score")) == trial["epochs"]
        images = list((store.artifacts / trial["run_id"] / "artifacts/images").glob("grid_ref*.png"))
        assert len(images) == trial["epochs"] + 1

        saved = checkpoints.load(tmp_path / "runs/s" / trial["checkpoint"])
        assert saved["epoch"] == trial["score_epoch"]

    best = summary["best"]
    assert (best["trial"], saved["config"]["loss"]["w_ds"]) == ("t04", 0.25)
    assert model.load(tmp_path / "runs/s/best", "cpu").domains == ("a", "b", "c")
    # What two workers trained is what one process trains, but for what float32 makes of it in three epochs.
    config = from_mapping(saved["config"], "saved")
    *_, alone = Trainer(config, open_bank(config, tmp_path / "cache")).run()
    for key in LOGGED:
        assert best["metrics"][f"train/{key}"] == pytest.approx(alone.metrics[f"train/{key}"], rel=0.02, abs=1e-3), key


def test_what_ended_a_group() -> None:
    """A trial's own reason is reported; a process that died is nobody's fault, and the trial continues."""
    trial = pytest.importorskip("raystar.backend.trial")
    rays = pytest.importorskip("ray.train.v2._internal.exceptions")
    died = trial.RayActorError()
    asked = rays.WorkerHealthCheckFailedError("A worker health check failed.", failure=died)
    unsendable = rays.WorkerHealthCheckFailedError("A worker health check failed.", failure=TypeError("no pickle"))
    hanging = rays.WorkerHealthCheckTimeoutError("hanging for 600 s")
    diverged, memory, broken = TrialDiverged("NaN"), TrialOutOfMemory("full"), ValueError("broken")
    for failures, wanted in [
        ({0: diverged, 1: diverged}, diverged),
        ({1: memory}, memory),
        ({0: WorkerLost("gone"), 1: memory}, memory),
        ({0: WorkerLost("gone"), 1: broken}, None),
        ({0: WorkerLost("gone"), 1: died}, None),
        ({0: WorkerLost("gone")}, None),
        ({1: died}, None),
        ({1: asked}, None),
        ({0: WorkerLost("gone"), 1: asked}, None),
        ({0: broken, 1: asked}, None),
        ({0: diverged, 1: asked}, diverged),
        ({0: hanging, 1: hanging}, None),
        ({1: unsendable}, unsendable),
        ({0: broken}, broken),
        ({0: broken, 1: memory}, memory),
    ]:
        assert trial._failure(failures) is wanted, failures
