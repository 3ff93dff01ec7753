"""Checkpoints of the trainer that users come from: read, continued, mapped to other domains, and written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from raystar.base.errors import RaystarError
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.batches import Batch
from raystar.model import checkpoint as checkpoints
from raystar.model.layers import SpectralConv
from raystar.model.networks import NAMES
from raystar.model.users import as_theirs, config_of
from raystar.training.resume import initial_state, restore, snapshot
from raystar.training.schedule import set_rates
from raystar.training.state import TrainState
from raystar.training.step import train_step
from tests.kit import theirs
from tests.kit.support import SHARED

BRANCHES = list(theirs.BRANCHES)
NORMS = {
    "before branches": ("adain", "none", None),
    "baseline_AdaIN": ("adain", "spectral", None),
    "AdaGN_with_SN": ("adagn", "spectral", None),
    "AdaGN_no_SN": ("adagn", "none", None),
    "unmarked": ("adagn", "spectral", theirs.MODEL["base_dim"]),
}
BEFORE_A_NORM = ("encoder.0.bias", "encoder.3.bias", ".conv1.bias")
"""Biases that a norm takes away again: their gradients are all rounding."""
FILES = ("adain_first", "adain", "adain_sn", "adagn_sn", "adagn_sn_unmarked")


def batch(seed: int, domains: int = 3, rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x, x_ref = (5 * torch.randn(rows, 4, 8, 8, generator=generator) for _ in range(2))
    y = torch.randint(domains, (rows,), generator=generator)
    noise = (torch.randn(rows, theirs.MODEL["latent_dim"], generator=generator) for _ in range(3))
    return Batch(x, x_ref, y, (y + 1) % domains, *noise)


def trained(branch: str, path: Path, prefix: str = "") -> theirs.Trainer:
    """Two steps, after which D's power iterations have converged, and the file of that."""
    trainer = theirs.Trainer(branch)
    with torch.no_grad():  # away from 0, where the hinge's gradients of this bias cancel but for rounding
        trainer.D.main[-1].bias.copy_(torch.tensor([2.0, -2.0, 1.5]))
    for number in (1, 2):
        trainer.step(batch(number), 1, number)
    with torch.no_grad():
        for _ in range(60):
            trainer.D(torch.randn(1, 4, 8, 8), torch.zeros(1, dtype=torch.long))
    trainer.epoch = 1
    trainer.save(path, prefix)
    return trainer


def restored(path: Path, **changed: Any) -> TrainState:
    checkpoint = checkpoints.load(path)
    values = {"training.use_amp": False, "training.device": "cpu"}
    values |= {key.replace("__", "."): value for key, value in changed.items()}
    state = TrainState.create(override(config_of(checkpoint, str(path)), values), "cpu")
    restore(state, checkpoint, str(path))
    return state


def outputs(nets: Any, given: Batch) -> list[Tensor]:
    x, y = given.content * 0.18215, given.y_trg
    for name in NAMES:
        getattr(nets, name).eval()
    with torch.no_grad():
        s = nets.E(given.x_ref * 0.18215, y)
        found = [s, nets.F(given.z_trg, y), nets.G(x, s), nets.D(x, y)]
    for name in NAMES:
        getattr(nets, name).train()
    return found


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_networks_and_next_steps_are_theirs(tmp_path: Path, branch: str, prefix: str) -> None:
    """Both go on from the file. As many power iterations, but before D's calls."""
    trainer = trained(branch, tmp_path / "latest.pt", prefix)
    state = restored(tmp_path / "latest.pt")
    model = state.config.model
    assert (model.norm, model.discriminator_norm, model.encoder_groups) == NORMS[branch]
    for ours, wanted in zip(outputs(state.nets, batch(9)), outputs(trainer, batch(9)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    set_rates(state, 1.0)
    for number in (1, 2, 3):
        ours = train_step(state, batch(10 + number), epoch=2, step=number)
        for name, wanted_loss in trainer.step(batch(10 + number), 2, number).items():
            assert float(ours[name]) == pytest.approx(wanted_loss, rel=2e-3, abs=2e-4), name


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_file_goes_back_as_it_came(tmp_path: Path, branch: str) -> None:
    """Networks, names, their order, numbers and moments bit for bit; that trainer's loader takes it."""
    trainer = trained(branch, tmp_path / "latest.pt", "_orig_mod.")
    came = trainer.save(tmp_path / "bare.pt")
    went = as_theirs(checkpoints.load(tmp_path / "latest.pt"), "latest.pt")
    for part in ("epoch", "global_step", *NAMES, "opt_g", "opt_d"):
        assert_same(went[part], came[part], part)
    assert went["config"]["model"] == came["config"]["model"]
    for section in ("loss", "training"):
        given = came["config"][section]
        assert {key: went["config"][section][key] for key in given} == given
    torch.save(went, tmp_path / "back.pt")
    fresh = theirs.Trainer(branch, seed=1)
    fresh.load(tmp_path / "back.pt")
    assert_same(fresh.named_moments(), trainer.named_moments(), "moments")


@pytest.mark.parametrize("branch", [name for name in BRANCHES if name != "unmarked"])
@pytest.mark.parametrize("rewritten", [False, True], ids=["as raystar saves it", "--legacy-pt"])
def test_what_raystar_saves_loads_there(tmp_path: Path, branch: str, rewritten: bool) -> None:
    trained(branch, tmp_path / "latest.pt")
    state = restored(tmp_path / "latest.pt")
    train_step(state, batch(4), epoch=2, step=1)
    saved = snapshot(state, 2, {}, steps=7)
    torch.save(as_theirs(saved, "own") if rewritten else saved, tmp_path / "own.pt")
    trainer = theirs.Trainer(branch, seed=1)
    trainer.load(tmp_path / "own.pt")
    assert (trainer.epoch, trainer.global_step) == (2, 14)
    for ours, wanted in zip(outputs(state.nets, batch(9)), outputs(trainer, batch(9)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    for name, moments in trainer.named_moments().items():
        net, _, key = name.partition(".")
        parameter = dict(getattr(state.nets, net).named_parameters())[key]
        optimizer = state.opt_d if net == "D" else state.opt_g
        assert_same(dict(moments), {k: optimizer.state[parameter][k] for k in moments}, name)


def test_moments_lie_in_memory_as_their_weights_do(tmp_path: Path) -> None:
    """The file's are contiguous, the weights channels last: the fused AdamW would pair other numbers."""
    trained("baseline_AdaIN", tmp_path / "latest.pt")
    ends = []
    for channels_last in (False, True):
        state = restored(tmp_path / "latest.pt", training__channels_last=channels_last)
        for optimizer in (state.opt_g, state.opt_d):
            for parameter, moments in optimizer.state.items():
                assert moments["exp_avg_sq"].stride() == parameter.stride()
        set_rates(state, 1.0)
        train_step(state, batch(4), epoch=2, step=1)
        ends.append(state.nets.state_dict())
    for net in NAMES:
        for key, value in ends[0][net].items():
            if not key.endswith(BEFORE_A_NORM):
                assert (ends[1][net][key] - value).abs().mean() < 1e-5, key


def assert_same(found: Any, wanted: Any, where: str) -> None:
    """Equal bit for bit, keys in the same order."""
    if isinstance(wanted, Tensor):
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{where}.{number}")
    else:
        assert found == wanted, where


# -- what cannot be told, or differs ---------------------------------------------------------------


def refused(path: Path, **changed: Any) -> str:
    with pytest.raises(RaystarError) as caught:
        restored(path, **changed)
    return str(caught.value)


def test_groups_without_a_branch_and_without_spectral_norm_are_no_file_that_can_be_read(tmp_path: Path) -> None:
    trainer = theirs.Trainer("AdaGN_no_SN")
    del trainer.config["model"]["exp_branch"]
    trainer.save(tmp_path / "latest.pt")
    with pytest.raises(RaystarError, match=r"latest\.pt: config: model\.num_groups without model\.exp_branch .* add"):
        checkpoints.load(tmp_path / "latest.pt")


def test_two_names_of_one_parameter_are_refused(tmp_path: Path) -> None:
    content = theirs.Trainer("before branches").save(tmp_path / "latest.pt")
    content["G"]["module.encoder.0.bias"] = torch.zeros(8)
    torch.save(content, tmp_path / "latest.pt")
    with pytest.raises(RaystarError, match=r"network G: encoder\.0\.bias is there twice"):
        checkpoints.load(tmp_path / "latest.pt")


@pytest.mark.parametrize(
    ("branch", "changed", "words"),
    [
        ("AdaGN_with_SN", {"model__norm": "adain"}, ["model.norm adagn there, adain now; set model.norm=adagn"]),
        ("AdaGN_with_SN", {"model__num_groups": 2}, ["model.num_groups 4 there, 2 now; set model.num_groups=4"]),
        ("unmarked", {"model__encoder_groups": None}, ["model.encoder_groups 8 there, null now"]),
        ("baseline_AdaIN", {"model__discriminator_norm": "none"}, ["model.discriminator_norm spectral there, none"]),
        ("before branches", {"model__residual": True}, ["model.residual false there, true now"]),
        (
            "before branches",
            {"data__domains": ["monet", "photo", "Hayao"], "training__latent_scale": 0.5},
            [
                "data.domains [photo, Hayao, monet] there, [monet, photo, Hayao] now",
                "training.latent_scale 0.18215 there, 0.5 now",
                "set training.latent_scale=0.18215 and data.domains=[photo, Hayao, monet]",
                "--map-domains",
                "checkpoint.other_latent_scale=true",
            ],
        ),
    ],
)
def test_another_function_is_refused(tmp_path: Path, branch: str, changed: dict[str, Any], words: list[str]) -> None:
    trained(branch, tmp_path / "latest.pt")
    message = refused(tmp_path / "latest.pt", **changed)
    for each in words:
        assert each in message


def test_another_scale_may_be_meant(tmp_path: Path) -> None:
    trained("before branches", tmp_path / "latest.pt")
    state = restored(tmp_path / "latest.pt", training__latent_scale=0.5, checkpoint__other_latent_scale=True)
    assert state.config.training.latent_scale == 0.5


# -- other domains ---------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["before branches", "AdaGN_with_SN"])
def test_each_domain_takes_what_is_its_own(tmp_path: Path, branch: str) -> None:
    """In another order everything is the same function, and so is the next step with the moments."""
    trained(branch, tmp_path / "latest.pt")
    order = [2, 0, 1]
    there = restored(tmp_path / "latest.pt")
    here = restored(
        tmp_path / "latest.pt", data__domains=[theirs.DOMAINS[k] for k in order], checkpoint__map_domains=True
    )
    given = batch(5)
    new = torch.tensor([order.index(k) for k in range(3)])
    renamed = given._replace(y_src=new[given.y_src], y_trg=new[given.y_trg])
    for state in (there, here):
        set_rates(state, 1.0)
    for number in (1, 2):
        found = train_step(here, renamed, epoch=2, step=number)
        wanted = train_step(there, given, epoch=2, step=number)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    for one, other in zip(outputs(here.nets, renamed), outputs(there.nets, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_run_continues_with_fewer_domains_and_not_with_new_ones(tmp_path: Path) -> None:
    trained("AdaGN_with_SN", tmp_path / "latest.pt")
    state = restored(
        tmp_path / "latest.pt", data__domains=["monet", "photo"], model__num_domains=2, checkpoint__map_domains=True
    )
    whole = restored(tmp_path / "latest.pt")
    given = batch(5, domains=2)
    as_before = given._replace(y_src=2 - 2 * given.y_src, y_trg=2 - 2 * given.y_trg)
    for one, other in zip(outputs(state.nets, given)[:3], outputs(whole.nets, as_before)[:3], strict=True):
        torch.testing.assert_close(one, other)
    message = refused(tmp_path / "latest.pt", data__domains=["monet", "photo", "vangogh"], checkpoint__map_domains=True)
    assert "has no domain vangogh, only photo, Hayao, monet" in message


def test_a_file_that_names_other_domains_than_it_has_is_one_line(tmp_path: Path) -> None:
    content = theirs.Trainer("before branches").save(tmp_path / "latest.pt")
    content["config"]["data"]["domains"] = [*theirs.DOMAINS, "vangogh"]
    del content["config"]["model"]["num_domains"]
    torch.save(content, tmp_path / "latest.pt")
    message = refused(tmp_path / "latest.pt", data__domains=["monet", "photo"], checkpoint__map_domains=True)
    assert message.endswith("latest.pt: its configuration names 4 domains, its networks have 3")
    content["config"]["data"]["domains"] = theirs.DOMAINS
    torch.save(content, tmp_path / "latest.pt")
    wider = {"data__domains": ["monet", "photo"], "checkpoint__map_domains": True, "model__base_dim": 16}
    assert "does not fit the configuration: " in refused(tmp_path / "latest.pt", **wider)


def test_groups_that_are_written_out_are_those_that_are_left_out(tmp_path: Path) -> None:
    trained("AdaGN_with_SN", tmp_path / "latest.pt")
    assert restored(tmp_path / "latest.pt", model__encoder_groups=4).config.model.encoder_groups == 4


def test_new_domains_start_fresh_from_a_files_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained("AdaGN_with_SN", tmp_path / "latest.pt")
    base = config_of(checkpoints.load(tmp_path / "latest.pt"), "latest.pt")
    config = override(
        base,
        {
            "data.domains": ["vangogh", "monet"], "model.num_domains": 2, "checkpoint.map_domains": True,
            "checkpoint.init_from": str(tmp_path / "latest.pt"),
        },
    )  # fmt: skip
    state = initial_state(config, "cpu")
    saved, fresh = checkpoints.load(tmp_path / "latest.pt"), TrainState.create(config, "cpu")
    for net in ("E", "F"):
        heads = getattr(state.nets, net).unshared
        assert torch.equal(heads[1].weight, saved[net]["unshared.2.weight"])
        assert torch.equal(heads[0].weight, getattr(fresh.nets, net).unshared[0].weight)
    last = state.nets.D.main[-1]
    assert isinstance(last, SpectralConv)
    assert torch.equal(last.weight_orig[1], saved["D"]["main.6.weight_orig"][2])
    assert torch.equal(state.nets.G.encoder[0].weight, saved["G"]["encoder.0.weight"])
    assert "has no domain vangogh" in capsys.readouterr().err


# -- their own files -------------------------------------------------------------------------------


@pytest.mark.shared("users")
@pytest.mark.parametrize("name", FILES)
def test_what_their_code_computes(name: str) -> None:
    """Their trainer began its warm-up anew after loading a file: the first step has the file's rate."""
    place = SHARED / "users" / "checkpoints"
    numbers, record = load_file(place / f"{name}.safetensors"), json.loads((place / f"{name}.json").read_text())
    state = restored(place / f"{name}.pt")
    spectral = state.config.model.discriminator_norm == "spectral"
    batches = [
        Batch(*(numbers[f"step{number}.{part}"] for part in ("content", "x_ref", "y_src", "y_trg", "z_trg", *NOISES)))
        for number in (1, 2, 3)
    ]
    for net, found in zip("EFGD", outputs(state.nets, batches[0]), strict=True):
        torch.testing.assert_close(found, numbers[f"net.{net}"], rtol=1e-5, atol=1e-5)
    factors = [1.0] * 3 if state.config.training.lr_schedule == "none" else [0.045, 0.01, 0.015]
    for number, (given, losses, factor) in enumerate(zip(batches, record["losses"], factors, strict=True), start=1):
        set_rates(state, factor)
        found = train_step(state, given, epoch=record["epoch"], step=number)
        for key, wanted in losses.items():
            assert float(found[key]) == pytest.approx(wanted, rel=1e-2 if spectral else 1e-4), (number, key)
    weights = state.nets.state_dict()
    for key, wanted in ((key.split(".", 2), value) for key, value in numbers.items() if key.startswith("after.")):
        net, parameter = key[1], key[2]
        if parameter.endswith(BEFORE_A_NORM):
            continue
        ours = parameter.replace("adain", "adagn") if name == "adagn_sn_unmarked" else parameter
        assert (weights[net][ours] - wanted).abs().mean() < 1e-5, key


NOISES = ("z_1", "z_2")


@pytest.mark.shared("users")
@pytest.mark.parametrize("name", FILES)
def test_their_own_files_go_back_as_they_came(name: str) -> None:
    path = SHARED / "users" / "checkpoints" / f"{name}.pt"
    came = torch.load(path, weights_only=True)
    went = as_theirs(checkpoints.load(path), name)
    for part in ("epoch", *NAMES, "opt_g", "opt_d"):
        assert_same(went[part], came[part], part)
    assert went["global_step"] == came.get("global_step", 8)
    assert went["config"]["model"] == came["config"]["model"]


@pytest.mark.shared("users")
@pytest.mark.parametrize("name", FILES)
def test_their_configurations_inside_are_read(name: str) -> None:
    checkpoint = checkpoints.load(SHARED / "users" / "checkpoints" / f"{name}.pt")
    config = config_of(checkpoint, name)
    assert isinstance(config, Config)
    assert (config.training.epochs, config.training.lr_g) == (checkpoint["epoch"], 1e-3)
    assert config.loss.w_id == (0.0 if name == "adain_first" else 1.0)


def test_torchs_own_spectral_norm() -> None:
    """Bit for bit, values and gradients, in training and out of it."""
    torch.manual_seed(0)
    ours = SpectralConv(3, 5, 3, 2, 1)
    wanted = torch.nn.utils.spectral_norm(torch.nn.Conv2d(3, 5, 3, 2, 1))
    wanted.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    for training in (True, True, False):
        if training:
            ours.iterate()
        pair = [ours(x), wanted.train(training)(x)]
        gradients = (
            torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
            for y, layer in zip(pair, (ours, wanted), strict=True)
        )
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(*pair)
        assert_same(dict(ours.state_dict()), dict(wanted.state_dict()), "state")
