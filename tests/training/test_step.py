"""`train_step` against the textbook in float64: every loss and every gradient to 1e-9."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.batches import Batch
from raystar.training import losses
from raystar.training.state import TrainState
from raystar.training.step import LOGGED, train_step
from tests.kit import textbook
from tests.kit.support import tiny_config

pytestmark = pytest.mark.usefixtures("bf16")

N = 3


def make_state(config: Config) -> TrainState:
    state = TrainState.create(config, "cpu")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, net in state.nets.items():
            net.double()
            for name, parameter in net.named_parameters():
                if ".fc." in name:  # zero at the start; every path must matter here
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return state


def make_batch(size: int, latent_dim: int, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    latents = [5 * torch.randn(size, 4, 16, 16, generator=g, dtype=torch.float64) for _ in range(2)]
    y_src = torch.randint(N, (size,), generator=g)
    y_trg = (y_src + torch.randint(1, N, (size,), generator=g)) % N
    noise = [torch.randn(size, latent_dim, generator=g, dtype=torch.float64) for _ in range(3)]
    return Batch(*latents, y_src, y_trg, *noise)


CASES = list(itertools.product([0.0, 0.7], [None, 1e-4, 50.0], [1, 4], [4, 3]))


@pytest.mark.parametrize(("w_id", "margin", "step", "size"), CASES)
@pytest.mark.parametrize("epoch", [6, 21], ids=["", "no diversity any more"])
def test_losses_and_gradients_equal_the_textbook(
    w_id: float, margin: float | None, step: int, size: int, epoch: int
) -> None:
    """Identity on and off, diversity margin absent, hit and missed, R1 step or not, whole and odd batch."""
    config = tiny_config(
        "unused", loss__w_id=w_id, loss__ds_margin=margin, loss__r1_interval=4, loss__w_adv=0.8, loss__w_sty=1.3,
        loss__w_cyc=1.7, loss__w_ds=0.9, loss__w_r1=2.5, training__lr_d=1e-2, training__lr_g=1e-2,
    )  # fmt: skip
    state, batch = make_state(config), make_batch(size, config.model.latent_dim)
    expected_nets = copy.deepcopy(state.nets)
    logs = train_step(state, batch, epoch=epoch, step=step)

    d = textbook.d_terms(expected_nets, batch, config, step)
    d["d_loss"].backward()
    for (name, found), (_, wanted) in zip(
        state.nets.D.named_parameters(), expected_nets.D.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-9, msg=f"D.{name}")
    expected_nets.D.load_state_dict(state.nets.D.state_dict())  # the generator's losses use the updated D
    expected_nets.D.zero_grad()
    g = textbook.g_terms(expected_nets, batch, config, epoch=epoch)
    g["g_loss"].backward()
    for net in "GFE":
        pairs = zip(
            getattr(state.nets, net).named_parameters(), getattr(expected_nets, net).named_parameters(), strict=True
        )
        for (name, found), (_, wanted) in pairs:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-9, msg=f"{net}.{name}")
    assert set(logs) == set(LOGGED)
    for key, wanted in (d | g).items():
        assert logs[key].item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-9), key
    assert (logs["r1"].item() > 0) == (step == 4)
    assert (logs["id"].item() > 0) == (w_id > 0)


def test_the_discriminators_gradients_are_only_its_own() -> None:
    config = tiny_config("unused")
    state = make_state(config)
    train_step(state, make_batch(4, config.model.latent_dim), epoch=1, step=1)
    d_gradients = [p.grad.clone() for p in state.nets.D.parameters()]
    expected = make_state(config)
    textbook.d_terms(expected.nets, make_batch(4, config.model.latent_dim), config, 1)["d_loss"].backward()
    for found, parameter in zip(d_gradients, expected.nets.D.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-9, atol=1e-9)
    assert all(p.requires_grad for p in state.nets.D.parameters())


@pytest.mark.parametrize("bad", ["content", "x_ref", "z_trg"])
def test_a_loss_that_is_not_finite_moves_nothing_that_depends_on_it(bad: str) -> None:
    config = tiny_config("unused")
    state = make_state(config)
    batch = make_batch(4, config.model.latent_dim)
    poisoned = getattr(batch, bad).clone()
    poisoned[0] = float("nan")
    before = copy.deepcopy(state.nets.state_dict())
    logs = train_step(state, batch._replace(**{bad: poisoned}), epoch=1, step=1)
    assert not torch.isfinite(logs["g_loss"])
    for net in "GFED":
        for name, value in getattr(state.nets, net).state_dict().items():
            assert torch.equal(value, before[net][name]), (net, name)
    train_step(state, batch, epoch=1, step=2)  # and the next good batch trains on
    assert not torch.equal(state.nets.state_dict()["G"]["decoder.2.weight"], before["G"]["decoder.2.weight"])


@pytest.mark.parametrize("base_dim", [16, 32], ids=["PyTorch's kernels", "native kernels where there are any"])
def test_bf16_autocast_follows_float32(base_dim: int) -> None:
    config = tiny_config("unused", model__base_dim=base_dim)
    runs = {}
    for amp in (False, True):
        state = TrainState.create(override(config, {"training.use_amp": amp}), "cpu")
        # As in training: AdaIN starts at zero, and until it has left it `ds` is all rounding.
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in state.nets.G.named_parameters():
                if ".fc." in name:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        found = []
        for step in range(1, 51):
            batch = make_batch(4, config.model.latent_dim, step)
            batch = Batch(*(t.float() if t.is_floating_point() else t for t in batch))
            found.append(train_step(state, batch, epoch=1, step=step))
        runs[amp] = found
        assert all(p.dtype == torch.float32 for p in state.nets.G.parameters())
    for key in LOGGED:
        wide, narrow = (torch.stack([logs[key] for logs in runs[amp]]).mean().item() for amp in (False, True))
        assert narrow == pytest.approx(wide, rel=0.02), key


def test_losses_by_hand() -> None:
    t = torch.tensor
    assert losses.d_hinge_loss(t([2.0, 0.0]), t([-3.0, 1.0])).item() == pytest.approx(0.5 + 1.0)
    assert losses.g_adversarial_loss(t([1.0, 3.0])).item() == -2.0
    assert losses.diversity_sensitive_loss(t([0.0, 4.0]), t([0.0, 0.0])).item() == 2.0
    assert losses.diversity_sensitive_loss(t([0.0, 4.0]), t([0.0, 0.0]), 1.5).item() == 1.5
    # R1 of a linear D is its squared weight norm.
    weight = torch.randn(3, 8)
    x = torch.randn(5, 3, 8, requires_grad=True)
    penalty = losses.r1_penalty((x * weight).flatten(1).sum(1), x)
    assert penalty.item() == pytest.approx(weight.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("decay", "epochs", "epoch", "weight"),
    [
        (20, 100, 1, 2.0), (20, 100, 2, 1.9), (20, 100, 11, 1.0), (20, 100, 20, 0.1), (20, 100, 21, 0.0),
        (20, 100, 500, 0.0), (20, 8, 8, 1.3),
        (1, 8, 1, 2.0), (1, 8, 2, 0.0),  # one epoch, not the whole run
        (0.5, 40, 1, 2.0), (0.5, 40, 11, 1.0), (0.5, 40, 20, 0.1), (0.5, 40, 21, 0.0),
        (0.5, 5, 3, 0.4), (0.5, 5, 4, 0.0),  # two and a half epochs
        (0.01, 8, 1, 2.0), (0.01, 8, 2, 0.0),
    ],
)  # fmt: skip
def test_lambda_ds(decay: float, epochs: int, epoch: int, weight: float) -> None:
    config = tiny_config("unused", loss__ds_decay_epochs=decay, training__epochs=epochs)
    assert losses.lambda_ds(epoch, 2.0, config.ds_decay) == pytest.approx(weight)


def test_a_step_weighs_diversity_by_a_share_of_the_run() -> None:
    """Half of ten epochs is five."""
    found = []
    for changed in ({"loss.ds_decay_epochs": 0.5, "training.epochs": 10}, {"loss.ds_decay_epochs": 5}):
        state = make_state(override(tiny_config("unused"), changed))
        batch = make_batch(4, state.config.model.latent_dim)
        found.append([train_step(state, batch, epoch=epoch, step=1)["g_loss"].item() for epoch in (1, 3, 6)])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ["loss.ds_decay_epochs 20 outlasts training.epochs 8", "falls from 1 to 0.65", "at most 7 epochs"]),
        ({"loss.w_ds": 2, "loss.ds_decay_epochs": 8}, ["ds_decay_epochs 8", "from 2 to 0.25"]),
        ({"loss.ds_decay_epochs": 0.9}, ["ds_decay_epochs 0.9", "to 0.0278", "share of the run, for example 0.5"]),
        ({"loss.ds_decay_epochs": 7}, None),
        ({"loss.ds_decay_epochs": 0.875}, None),
        ({"loss.ds_decay_epochs": 0.5}, None),
        ({"loss.w_ds": 0}, None),
        ({"training.epochs": 21}, None),
        ({"training.epochs": 1}, None),
    ],
    ids=str,
)
def test_a_schedule_that_outlasts_the_run(changed: dict[str, float], words: list[str] | None) -> None:
    found = losses.outlasting(override(tiny_config("unused", training__epochs=8), changed))
    assert (found is None) == (words is None)
    for word in words or ():
        assert word in str(found)
