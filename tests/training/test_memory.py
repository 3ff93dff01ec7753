"""What a step takes of memory, foretold on tensors without data and counted in a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.batches import Batch
from raystar.training import memory
from raystar.training.memory import advice, step_bytes
from raystar.training.state import TrainState
from raystar.training.step import train_step
from tests.kit.support import tiny_config
from tests.training.test_step import make_batch

SHAPE = (4, 16, 16)


def counted(config: Config) -> int:
    """Bytes that a real step has saved when it keeps most, in float32 on a CPU."""
    state = TrainState.create(config, "cpu")
    given = make_batch(config.training.batch_size, config.model.latent_dim)
    batch = Batch(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in given))
    weights = {p.untyped_storage().data_ptr() for _, net in state.nets.items() for p in net.parameters()}
    held: dict[int, Tensor] = {}
    most = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal most
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
            most = max(most, sum(t.untyped_storage().nbytes() for t in held.values()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train_step(state, batch, epoch=1, step=1)
    return most


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"loss__w_id": 0.0},
        {"training__recompute": True},
        {"model__norm": "adagn", "model__num_groups": 4, "model__discriminator_norm": "spectral"},
        {"model__residual": True, "training__batch_size": 7},
    ],
    ids=str,
)
def test_what_is_foretold_is_what_a_step_keeps(changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("unused", model__base_dim=32, model__n_res_blocks=3, **changed)
    monkeypatch.setattr(memory, "_ROOM", 1.0)
    nets = TrainState.create(config, "meta").nets
    weights = 16 * sum(p.numel() for _, net in nets.items() for p in net.parameters())
    # A step also holds what D's update has kept, until that is freed.
    assert step_bytes(config, SHAPE) - weights == pytest.approx(counted(config), rel=0.2)


def test_more_of_anything_takes_more_and_recomputing_less() -> None:
    config = tiny_config("unused", model__base_dim=64, model__n_res_blocks=4)
    base = step_bytes(config, SHAPE)
    sizes: list[dict[str, Any]] = [{"training.batch_size": 8}, {"model.base_dim": 128}, {"model.n_res_blocks": 6}]
    for more in sizes:
        assert step_bytes(override(config, more), SHAPE) > 1.2 * base
    assert step_bytes(config, (4, 32, 32)) > 2 * base
    assert step_bytes(override(config, {"training.recompute": True}), SHAPE) < 0.6 * base
    assert step_bytes(override(config, {"training.use_amp": True}), SHAPE) < base


def test_the_full_size_of_the_specification() -> None:
    """At B = 64 the generator alone keeps 11.3 GB in bf16, counted by hand; recomputed it fits a laptop's card."""
    config = override(Config(), {"training.batch_size": 64})
    assert 11.3e9 < step_bytes(config, (4, 32, 32)) < 1.6 * 11.3e9
    assert step_bytes(override(config, {"training.recompute": True}), (4, 32, 32)) < 6e9


def test_advice_names_what_fits_and_by_how_much() -> None:
    config = override(Config(), {"training.batch_size": 64})
    found = advice(config, (4, 32, 32), 8 * 2**30)
    assert found.startswith("a step takes about 1")
    assert " of 8.0 GiB; training.recompute=true takes about " in found
    assert "training.batch_size=32 takes about " in found
    assert advice(config, (4, 32, 32), 2**20).endswith("; lower training.batch_size or model.base_dim")
    again = override(config, {"training.recompute": True})
    assert "recompute" not in advice(again, (4, 32, 32), 2 * 2**30)


@pytest.mark.parametrize("amp", [False, True])
def test_recomputing_changes_no_bit(amp: bool) -> None:
    ends = []
    for again in (False, True):
        config = tiny_config(
            "unused", model__base_dim=32, model__n_res_blocks=2, training__recompute=again, training__use_amp=amp
        )
        state = TrainState.create(config, "cpu")
        given = make_batch(4, config.model.latent_dim)
        batch = Batch(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in given))
        for step in (1, 2):
            train_step(state, batch, epoch=1, step=step)
        ends.append(state.nets.state_dict())
    for net, weights in ends[0].items():
        for key, value in weights.items():
            assert torch.equal(value, ends[1][net][key]), (net, key)
