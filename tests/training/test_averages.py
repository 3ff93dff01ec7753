"""Averaged weights: their formula, what they are of, where they go, and that a run which stops resumes with them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from raystar import export
from raystar.base.errors import RaystarError, TrialDiverged
from raystar.config.load import from_mapping, override
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.data.batches import Batch, LatentDataset
from raystar.exported import model
from raystar.model import checkpoint as checkpoints
from raystar.model.networks import AVERAGED, NAMES, Nets
from raystar.pictures import grid
from raystar.pictures.codec import PreviewCodec
from raystar.ruler.ruler import Ruler
from raystar.search import space
from raystar.sweep import finish as outcome
from raystar.sweep.disk import checkpoint_bytes
from raystar.sweep.plan import Plan
from raystar.train import initial_state
from raystar.training import resume
from raystar.training import trainer as trainer_module
from raystar.training.parity import check_parity
from raystar.training.state import TrainState
from raystar.training.step import train_step
from raystar.training.trainer import Trainer
from tests.kit.support import tiny_config, write_latents
from tests.sweep.test_sweep import request, run, summary_of

pytestmark = pytest.mark.usefixtures("bf16")

EPOCH_STEPS = 4
RATES = {"training__lr_d": 1e-2, "training__lr_g": 1e-2, "training__lr_mapping": 1e-2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture
def config(root: Path) -> Config:
    return tiny_config(root, training__ema_epochs=0.5, **RATES)


@pytest.fixture(scope="module")
def bank(root: Path) -> Bank:
    return open_bank(tiny_config(root), root.parent / "cache")


@pytest.fixture
def data(config: Config, bank: Bank) -> LatentDataset:
    return LatentDataset(bank, config, torch.device("cpu"))


def weights(nets: Nets) -> dict[str, Tensor]:
    """Copies in float64 of all parameters that are averaged."""
    return {
        f"{name}.{key}": value.detach().double().clone()
        for name in AVERAGED
        for key, value in getattr(nets, name).state_dict().items()
    }


def average_of(
    start: dict[str, Tensor], seen: list[dict[str, Tensor]], half_life: float, steps: Iterable[int] | None = None
) -> dict[str, Tensor]:
    """The formula: one beta a step, from a half-life that grows with the steps, by default 1, 2, ..."""
    average = start
    for t, after in zip(steps or range(1, len(seen) + 1), seen, strict=True):
        beta = 0.5 ** (1 / min(half_life, 0.2 * t))
        average = {key: beta * average[key] + (1 - beta) * value for key, value in after.items()}
    return average


def assert_close(state: TrainState, wanted: dict[str, Tensor]) -> None:
    assert state.averaged is not None
    for key, found in weights(state.averaged).items():
        torch.testing.assert_close(found, wanted[key], rtol=1e-5, atol=1e-7, msg=key)


# -- the formula -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ema_epochs", [0.3, 100.0], ids=["at its half-life from step 6 on", "still warming up"])
def test_averages_are_what_the_formula_says(config: Config, data: LatentDataset, ema_epochs: float) -> None:
    state = TrainState.create(override(config, {"training.ema_epochs": ema_epochs}), "cpu")
    start, seen = weights(state.nets), []
    for step in range(1, 11):
        train_step(state, data.batch(1 + step % 4), epoch=1, step=step)
        state.average(EPOCH_STEPS)
        seen.append(weights(state.nets))
        assert_close(state, average_of(start, seen, ema_epochs * EPOCH_STEPS))
    last = average_of(start, seen, 1e9 if ema_epochs < 1 else 0.3 * EPOCH_STEPS)
    with pytest.raises(AssertionError):  # another half-life is another average
        assert_close(state, last)


def test_the_first_step_is_nearly_all_of_the_average(config: Config, data: LatentDataset) -> None:
    """0.5 ** (1 / 0.2), a thirty-second, is left of the weights that nothing has trained."""
    state = TrainState.create(config, "cpu")
    start = weights(state.nets)
    train_step(state, data.batch(1), epoch=1, step=1)
    state.average(EPOCH_STEPS)
    now = weights(state.nets)
    assert_close(state, {key: start[key] / 32 + now[key] * 31 / 32 for key in now})


@pytest.mark.parametrize("amp", [False, True])
def test_they_are_float32_and_without_gradients_beside_the_same_discriminator(
    config: Config, bank: Bank, amp: bool
) -> None:
    trainer = Trainer(override(config, {"training.use_amp": amp, "training.channels_last": amp}), bank)
    list(trainer.run())
    state = trainer.state
    assert state.averaged is not None
    assert state.shown is state.averaged
    assert state.averaged.D is state.nets.D
    for name in AVERAGED:
        pairs = zip(getattr(state.averaged, name).parameters(), getattr(state.nets, name).parameters(), strict=True)
        for average, weight in pairs:
            assert average.dtype == torch.float32
            assert not average.requires_grad
            assert average.grad is None
            assert average.stride() == weight.stride()
            assert average.data_ptr() != weight.data_ptr()


def test_without_a_half_life_there_are_none(config: Config, bank: Bank) -> None:
    trainer = Trainer(override(config, {"training.ema_epochs": 0}), bank)
    *_, progress = trainer.run()
    assert trainer.state.averaged is None
    assert trainer.state.shown is trainer.state.nets
    assert "ema" not in progress.checkpoint


def test_averaging_changes_no_training(config: Config, bank: Bank) -> None:
    ends = [
        list(Trainer(override(config, {"training.ema_epochs": value}), bank).run())[-1].checkpoint
        for value in (0.0, 0.5)
    ]
    for part in (*NAMES, "opt_g", "opt_d"):
        assert_same(ends[0][part], ends[1][part])


def assert_same(left: Any, right: Any) -> None:
    a, b = dict(checkpoints.leaves("x", left)), dict(checkpoints.leaves("x", right))
    assert a.keys() == b.keys()
    assert a
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key], key


# -- steps that move nothing -----------------------------------------------------------------------


def test_a_step_that_was_left_out_is_in_no_average(config: Config, data: LatentDataset) -> None:
    """Neither is it counted: the next one is averaged as if it had not been."""
    state = TrainState.create(config, "cpu")
    start, seen = weights(state.nets), []
    for step in range(1, 7):
        batch = data.batch(1 + step % 4)
        if step in (1, 4):
            before = weights(cast(Nets, state.averaged))
            batch = batch._replace(content=batch.content * float("nan"))
        train_step(state, batch, epoch=1, step=step)
        state.average(EPOCH_STEPS)
        if step in (1, 4):
            assert all(torch.equal(value, before[key]) for key, value in weights(cast(Nets, state.averaged)).items())
        else:
            seen.append(weights(state.nets))
    assert len(seen) == 4
    assert_close(state, average_of(start, seen, 0.5 * EPOCH_STEPS))


def test_a_step_that_the_gradient_scaler_leaves_out_is_in_no_average(config: Config, data: LatentDataset) -> None:
    """As the first ones in fp16: the losses are finite, the scaled gradients are not."""
    state = TrainState.create(config, "cpu")
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    start, seen = weights(state.nets), []
    for step in range(1, 13):
        before = weights(state.nets)
        train_step(state, data.batch(1 + step % 4), epoch=1, step=step)
        state.average(EPOCH_STEPS)
        after = weights(state.nets)
        if any(not torch.equal(value, before[key]) for key, value in after.items()):
            seen.append(after)
    assert 0 < len(seen) < 12
    assert_close(state, average_of(start, seen, 0.5 * EPOCH_STEPS))


@pytest.mark.parametrize("starving", ["train_step", "average"])
def test_a_batch_that_did_not_fit_is_in_no_average(
    config: Config, bank: Bank, monkeypatch: pytest.MonkeyPatch, starving: str
) -> None:
    """Whether the step itself or the averaging after it finds no room; where it was the latter, it is counted."""
    config = override(config, {"training.epochs": 1, "training.epoch_size": 80})
    real_step, real_average, at = trainer_module.train_step, TrainState.average, [0]
    seen: list[dict[str, Tensor]] = []

    def starve(what: str) -> None:
        if (what, at[0]) == (starving, 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def stepping(state: TrainState, batch: Batch, *, epoch: int, step: int) -> dict[str, Tensor]:
        at[0] = step
        starve("train_step")
        return real_step(state, batch, epoch=epoch, step=step)

    def averaging(state: TrainState, epoch_steps: int) -> None:
        assert epoch_steps == 20
        starve("average")
        real_average(state, epoch_steps)
        seen.append(weights(state.nets))

    monkeypatch.setattr(trainer_module, "train_step", stepping)
    monkeypatch.setattr(TrainState, "average", averaging)
    trainer = Trainer(config, bank)
    start = weights(trainer.state.nets)
    (progress,) = trainer.run()
    assert progress.metrics["perf/skipped_batches"] == 1
    assert len(seen) == 19
    steps = [t for t in range(1, 21) if t != 3] if starving == "average" else range(1, 20)
    assert_close(trainer.state, average_of(start, seen, 0.5 * 20, steps))


def test_a_run_that_diverges_leaves_finite_averages(config: Config, bank: Bank) -> None:
    trainer = Trainer(config, bank)
    real = trainer.data.batch

    def poisoned(step: int) -> Batch:
        batch = real(step)
        return batch._replace(content=batch.content * float("nan")) if step == 3 else batch

    trainer.data.batch = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrialDiverged):
        list(trainer.run())
    assert all(value.isfinite().all() for value in weights(cast(Nets, trainer.state.averaged)).values())


def test_the_parity_gate_leaves_them_alone(config: Config, data: LatentDataset) -> None:
    state = TrainState.create(config, "cpu")
    before = weights(cast(Nets, state.averaged))
    check_parity(state, data)
    assert all(torch.equal(value, before[key]) for key, value in weights(cast(Nets, state.averaged)).items())


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def saved(config: Config, bank: Bank, tmp_path: Path) -> Path:
    """The checkpoint of a run of two epochs."""
    *_, progress = Trainer(config, bank).run()
    checkpoints.save(tmp_path / "epoch_0002.pt", progress.checkpoint)
    return tmp_path / "epoch_0002.pt"


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_stopped_resumes_bitwise(config: Config, bank: Bank, tmp_path: Path, stop: int) -> None:
    config = override(config, {"training.epochs": 4})
    *_, whole = Trainer(config, bank).run()
    *_, half = Trainer(override(config, {"training.epochs": stop}), bank).run()
    checkpoints.save(tmp_path / "c.pt", half.checkpoint)
    *_, resumed = Trainer(config, bank, checkpoint=checkpoints.load(tmp_path / "c.pt")).run()
    for part in (*NAMES, "opt_g", "opt_d", "ema"):
        assert_same(whole.checkpoint[part], resumed.checkpoint[part])


def test_a_step_left_out_just_after_going_on_is_in_no_average(config: Config, saved: Path, data: LatentDataset) -> None:
    state = TrainState.create(config, "cpu")
    resume.restore(state, checkpoints.load(saved), "c.pt")
    before = weights(cast(Nets, state.averaged))
    batch = data.batch(1)
    train_step(state, batch._replace(content=batch.content * float("nan")), epoch=3, step=1)
    state.average(EPOCH_STEPS)
    assert all(torch.equal(value, before[key]) for key, value in weights(cast(Nets, state.averaged)).items())


def test_a_checkpoint_holds_both(saved: Path) -> None:
    checkpoint = checkpoints.load(saved)
    assert checkpoint["ema"].keys() == set(AVERAGED)
    shown = checkpoints.shown_weights(checkpoint)
    assert list(shown) == list(NAMES)
    for name in NAMES:
        same = all(torch.equal(value, checkpoint[name][key]) for key, value in shown[name].items())
        assert same == (name == "D")
    plain = {key: value for key, value in checkpoint.items() if key != "ema"}
    assert_same(checkpoints.shown_weights(plain), {name: checkpoint[name] for name in NAMES})


def test_the_digest_covers_them(saved: Path) -> None:
    raw = torch.load(saved, weights_only=True)
    raw["ema"]["E"]["shared.0.weight"][0, 0, 0, 0] += 1e-3
    torch.save(raw, saved)
    with pytest.raises(RaystarError, match=r"damaged .*does not match its digest"):
        checkpoints.load(saved)


def test_wrappers_names_are_dropped(saved: Path) -> None:
    checkpoint = checkpoints.load(saved)
    wrapped = checkpoint | {
        "ema": {n: {f"_orig_mod.{k}": v for k, v in found.items()} for n, found in checkpoint["ema"].items()}
    }
    torch.save(wrapped, saved)
    assert_same(checkpoints.load(saved)["ema"], checkpoint["ema"])


@pytest.mark.parametrize(
    ("ema", "words"),
    [
        ({"G": {}, "F": {}}, "ema: expected the averages of G, F, E"),
        ({"G": {}, "F": {}, "E": {}, "D": {}}, "ema: expected the averages of G, F, E"),
        (0.999, "ema: expected the averages of G, F, E"),
        ({"G": {}, "F": 3, "E": {}}, "ema: network F holds no weights"),
    ],
    ids=str,
)
def test_what_are_no_averages(saved: Path, ema: Any, words: str) -> None:
    torch.save(checkpoints.load(saved) | {"ema": ema}, saved)
    with pytest.raises(RaystarError, match=words) as caught:
        checkpoints.load(saved)
    assert str(caught.value).startswith(f"{saved}: ")


def test_averages_that_do_not_fit(saved: Path, config: Config) -> None:
    checkpoint = checkpoints.load(saved)
    checkpoint["ema"]["F"]["shared.0.weight"] = torch.zeros(1, 1)
    with pytest.raises(RaystarError, match=r"c\.pt: ema: network F does not fit the configuration: size mismatch"):
        resume.restore(TrainState.create(config, "cpu"), checkpoint, "c.pt")


def test_going_on_with_and_without_them(saved: Path, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = checkpoints.load(saved)
    assert resume.restore(TrainState.create(config, "cpu"), checkpoint, "c.pt") == 2
    assert capsys.readouterr().err == ""

    without = {key: value for key, value in checkpoint.items() if key != "ema"}
    state = TrainState.create(config, "cpu")
    resume.restore(state, without, "c.pt")
    assert capsys.readouterr().err == "note: c.pt: holds no averages; they start from its weights\n"
    assert_same(cast(Nets, state.averaged).state_dict(), {name: checkpoint[name] for name in NAMES})

    state = TrainState.create(override(config, {"training.ema_epochs": 0}), "cpu")
    resume.restore(state, checkpoint, "c.pt")
    assert capsys.readouterr().err == "note: c.pt: its averages are left out, since training.ema_epochs is 0\n"
    assert "ema" not in resume.snapshot(state, 2, {})


def test_init_from_starts_from_the_networks_themselves(saved: Path, config: Config) -> None:
    state = initial_state(override(config, {"checkpoint.init_from": str(saved)}), torch.device("cpu"))
    checkpoint = checkpoints.load(saved)
    wanted = {name: checkpoint[name] for name in NAMES}
    assert_same(state.nets.state_dict(), wanted)
    assert_same(cast(Nets, state.averaged).state_dict(), wanted)


def test_the_room_that_they_take(config: Config, data: LatentDataset, tmp_path: Path) -> None:
    config = override(config, {"model.base_dim": 64})
    state = TrainState.create(config, "cpu")
    train_step(state, data.batch(1), epoch=1, step=1)
    checkpoints.save(tmp_path / "c.pt", resume.snapshot(state, 1, {}))
    assert checkpoint_bytes(config) == pytest.approx((tmp_path / "c.pt").stat().st_size, rel=0.05)
    extra = 4 * sum(p.numel() for name in AVERAGED for p in getattr(state.nets, name).parameters())
    assert checkpoint_bytes(config) == checkpoint_bytes(override(config, {"training.ema_epochs": 0})) + extra


# -- where they go ---------------------------------------------------------------------------------


def model_of(weights: dict[str, dict[str, Tensor]], config: Config) -> Nets:
    return Nets.of(config.model, config.num_domains, copy.deepcopy(weights), "c.pt")


def test_the_ruler_and_the_grids_see_them(config: Config, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(config, {"training.epochs": 1})
    ruler, codec = Ruler.build(bank, config), PreviewCodec()
    (progress,) = Trainer(config, bank, ruler, codec).run()
    averaged = model_of(checkpoints.shown_weights(progress.checkpoint), config)
    raw = model_of({name: progress.checkpoint[name] for name in NAMES}, config)
    wanted, other = (ruler.measure(nets, config) for nets in (averaged, raw))
    assert {key: progress.metrics[f"eval/{key}"] for key in wanted} == wanted
    assert wanted["score"] != other["score"]
    drawn, of_raw = (grid.draw(nets, config, grid.choose(bank, config, codec), codec) for nets in (averaged, raw))
    for key, picture in progress.images.items():
        assert picture.tobytes() == drawn[key].tobytes() != of_raw[key].tobytes()


def test_an_export_has_them_and_says_so(saved: Path, config: Config, tmp_path: Path) -> None:
    assert export.main(["--checkpoint", str(saved), "--out", str(tmp_path / "model")]) == 0
    shown = checkpoints.shown_weights(checkpoints.load(saved))
    tensors = load_file(tmp_path / "model/model.safetensors")
    wanted = {f"{name}.{key}": value for name, found in shown.items() for key, value in found.items()}
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], value) for key, value in wanted.items())
    card = (tmp_path / "model/README.md").read_text()
    assert "- Its weights are averages over training, with a half-life of up to 0.5 epochs.\n" in card


def test_an_export_without_them_says_nothing(config: Config, tmp_path: Path) -> None:
    state = TrainState.create(override(config, {"training.ema_epochs": 0}), "cpu")
    model.write(tmp_path / "model", resume.snapshot(state, 1, {}), {}, {})
    assert "averages" not in (tmp_path / "model/README.md").read_text()


def test_the_interpolation_shows_them(saved: Path, config: Config, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoints.load(saved)
    plan = cast(Plan, SimpleNamespace(config=config, bank=bank))
    monkeypatch.setattr(outcome, "need_codec", lambda config, device: (PreviewCodec(), None))
    codec = PreviewCodec()
    averaged, raw = (
        grid.interpolation(model_of(found, config), config, grid.choose(bank, config, codec), codec).tobytes()
        for found in (checkpoints.shown_weights(checkpoint), {name: checkpoint[name] for name in NAMES})
    )
    assert outcome._interpolation(plan, checkpoint).tobytes() == averaged != raw


def test_the_half_life_can_be_searched() -> None:
    content = {"trials": 6, "space": {"training.ema_epochs": {"uniform": [0, 2]}}}
    points = space.from_mapping(content, Config(), "s.yaml").points(Config(), torch.device("cpu"))
    assert points is not None
    assert points[0] == {"training.ema_epochs": 0.0}
    assert len({point["training.ema_epochs"] for point in points}) == 6
    with pytest.raises(RaystarError, match="at least 0"):
        override(Config(), {"training.ema_epochs": -1})


@pytest.mark.slow
def test_a_sweep_searches_them_and_exports_those_of_the_best(tmp_path: Path) -> None:
    """Beside ranges in which the baseline's values, null and 20, do not lie."""
    searched = {
        "training.ema_epochs": {"uniform": [0.3, 1.0]},
        "model.discriminator_dim": {"randint": [4, 9]},
        "model.residual": {"choice": [True]},
        "loss.ds_decay_epochs": {"uniform": [0.2, 0.7]},
    }
    content = {"trials": 2, "finalists": 1, "scheduler": {"type": "none"}, "space": searched, "collapse": {"epochs": 0}}
    done = run(request(tmp_path, content, training__epochs=3, loss__ds_decay_epochs=20))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("outlasts training.epochs 3") == 1
    summary = summary_of(tmp_path / "runs")
    assert [trial["status"] for trial in summary["trials"]] == ["finished", "finished"]
    averaged = next(trial for trial in summary["trials"] if trial["params"]["training.ema_epochs"])
    (path,) = (tmp_path / f"runs/s/trials/{averaged['trial']}").rglob(f"*{averaged['score_epoch']:04d}.pt")
    checkpoint = checkpoints.load(path)
    assert checkpoint["metrics"]["eval/score"] == averaged["score"]
    config = from_mapping(checkpoint["config"], str(path))
    bank = open_bank(config, tmp_path / "cache")
    nets = model_of(checkpoints.shown_weights(checkpoint), config)
    assert Ruler.build(bank, config, tmp_path / "runs/cache").measure(nets, config)["score"] == averaged["score"]
    best = next(trial for trial in summary["trials"] if trial["trial"] == summary["best"]["trial"])
    tensors = load_file(tmp_path / "runs/s/best/model.safetensors")
    (path,) = (tmp_path / f"runs/s/trials/{best['trial']}").rglob(f"*{best['score_epoch']:04d}.pt")
    for name, found in checkpoints.shown_weights(checkpoints.load(path)).items():
        assert all(torch.equal(value, tensors[f"{name}.{key}"]) for key, value in found.items())
