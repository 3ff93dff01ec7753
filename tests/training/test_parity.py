"""The parity gate: what is only rounding passes, what computes something else does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raystar.base.errors import WrongResults
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import open_bank
from raystar.data.batches import LatentDataset
from raystar.training import parity
from raystar.training.parity import check_parity
from raystar.training.state import TrainState
from tests.kit.support import tiny_config, write_latents

pytestmark = pytest.mark.usefixtures("bf16")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


def gate(config: Config, root: Path) -> tuple[TrainState, LatentDataset]:
    bank = open_bank(config, root.parent / "cache")
    return TrainState.create(config, "cpu"), LatentDataset(bank, config, torch.device("cpu"))


@pytest.mark.parametrize("settings", [{}, {"training.use_amp": True}, {"training.channels_last": True}], ids=str)
@pytest.mark.parametrize("base_dim", [8, 32])
def test_rounding_passes_and_leaves_no_trace(root: Path, settings: dict[str, Any], base_dim: int) -> None:
    config = override(tiny_config(root), {**settings, "model.base_dim": base_dim})
    state, data = gate(config, root)
    before = copy.deepcopy(state.nets.state_dict())
    check_parity(state, data)
    for net, tensors in state.nets.state_dict().items():
        assert all(torch.equal(value, before[net][name]) for name, value in tensors.items()), net
    assert not state.opt_g.state
    assert not state.opt_d.state


class _WrongGradient(torch.autograd.Function):
    """The right value, half the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 0.5 * grad


WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    "G scaled": ("G", lambda net, x, s: 1.3 * net(x, s), "wrong results: "),
    "G forgets the style": ("G", lambda net, x, s: net(x, 0 * s), "wrong results: "),
    "F for another domain": ("F", lambda net, z, y: net(z, (y + 1) % 3), "wrong results: the gradient of "),
    "E's gradient": ("E", lambda net, x, y: _WrongGradient.apply(net(x, y)), "wrong results: the gradient of "),
    "D shifted": ("D", lambda net, x, y: net(x, y) + 0.2, "wrong results: "),
    "D returns NaN": ("D", lambda net, x, y: net(x, y) * float("nan"), "wrong results: d_loss of step 1 is nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_module_made_wrong_is_caught(root: Path, name: str) -> None:
    config = override(tiny_config(root), {"model.base_dim": 32})
    net, wrong, reason = WRONG[name]
    state, data = gate(config, root)
    original = getattr(state.nets, net)
    state.calls[net] = lambda *inputs: wrong(original, *inputs)
    before = copy.deepcopy(state.nets.state_dict())
    with pytest.raises(WrongResults) as caught:
        check_parity(state, data)
    assert str(caught.value).startswith(reason), caught.value
    assert all(torch.equal(v, before[n][k]) for n, found in state.nets.state_dict().items() for k, v in found.items())


def test_the_limit_follows_what_bf16_rounds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 against itself passes by a factor of two; a limit below its rounding is a limit that it trips."""
    config = override(tiny_config(root), {"training.use_amp": True, "model.base_dim": 32})
    monkeypatch.setattr(parity, "_TIMES_BF16", 1.5)
    check_parity(*gate(config, root))
    monkeypatch.setattr(parity, "_AT_MOST", 1e-4)
    with pytest.raises(WrongResults, match="wrong results: "):
        check_parity(*gate(config, root))


def test_a_scale_that_is_too_large_at_first_is_no_wrong_gradient(root: Path) -> None:
    """As fp16's is: its first updates overflow and are left out, until the scale has come down."""
    state, data = gate(override(tiny_config(root), {"training.use_amp": True, "model.base_dim": 32}), root)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    check_parity(state, data)
    assert state.scaler.get_scale() == 2.0**126
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=0.999)  # never small enough
    with pytest.raises(WrongResults, match="the gradient of "):
        check_parity(state, data)
