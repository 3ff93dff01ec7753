"""A training step against recorded numbers: those that ship (`tests/kit/golden.py`), and an older implementation's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raystar.config.load import from_mapping
from raystar.config.schema import Config
from raystar.data.batches import Batch
from raystar.training.losses import lambda_ds
from raystar.training.state import TrainState
from raystar.training.step import train_step
from tests.kit import golden
from tests.kit.support import SHARED
from tests.kit.textbook import Weights

Case = tuple[dict[str, Any], dict[str, Tensor]]

SHIPPED = [pytest.param(golden.FOLDER, name, id=name) for name in golden.CASES]
OTHERS = [
    pytest.param(SHARED / "golden", name, id=f"shared {name}", marks=pytest.mark.shared("golden"))
    for name in ("step_full", "step_no_identity")
]
RUNS = [
    pytest.param(*case.values, dtype, id=f"{case.id} {str(dtype).removeprefix('torch.')}", marks=case.marks)
    for dtype, cases in ((torch.float32, SHIPPED + OTHERS), (torch.float64, SHIPPED))
    for case in cases
]
"""The other implementation's numbers have no more digits than float32."""


def config_of(record: dict[str, Any], name: str) -> Config:
    domains = [f"d{i}" for i in range(record["model"]["num_domains"])]
    training = record["training"] | {"use_amp": False, "device": "cpu"}
    return from_mapping(
        {"model": record["model"], "loss": record["loss"], "training": training, "data": {"domains": domains}}, name
    )


def state_of(case: Case, name: str, dtype: torch.dtype) -> TrainState:
    record, tensors = case
    state = TrainState.create(config_of(record, name), "cpu")
    for _, net in state.nets.items():
        net.to(dtype)
    state.nets.load_state_dict(golden.weights_of(tensors, "init", dtype), name)
    return state


def batch_of(tensors: dict[str, Tensor], step: int, dtype: torch.dtype) -> Batch:
    return Batch(**vars(golden.batch_of(tensors, step, dtype)))


def assert_losses_follow(losses: list[dict[str, float]], record: dict[str, Any]) -> None:
    """What one precision makes of another's numbers: tight before D's first update, wider after it.

    Adam's first update is lr * sign(gradient), and some of D's gradients cancel to rounding noise, so any other order
    of sums moves single weights by up to lr, and with them what G is told by D.
    """
    for k, (recorded, logged) in enumerate(zip(record["steps"], losses, strict=True), start=1):
        for key, value in recorded.items():
            of_moved_d = key in ("g_adv", "g_loss")
            if k == 1:
                tolerance = {"abs": 2e-3} if of_moved_d else {"rel": 1e-5, "abs": 1e-7}
            else:
                tolerance = {"rel": 1e-2, "abs": 2e-3 if of_moved_d else 1e-7}
            assert logged[key] == pytest.approx(value, **tolerance), (k, key)
    for key, value in record["epoch_mean"].items():
        mean = sum(logged[key] for logged in losses) / len(losses)
        assert mean == pytest.approx(value, rel=1e-2, abs=2e-3), key


def assert_weights_follow(final: Weights, tensors: dict[str, Tensor]) -> None:
    """Over all elements of a network: convolution biases in front of an instance norm have gradients that are exactly
    zero but for rounding, and Adam turns rounding into whole steps of lr."""
    recorded = golden.weights_of(tensors, "final", torch.float64)
    for net, parameters in recorded.items():
        difference = torch.cat([(final[net][name] - value).abs().flatten() for name, value in parameters.items()])
        assert difference.mean() < 5e-6, net
        assert (difference < 2e-5).double().mean() > 0.98, net


def assert_equal_numbers(found: Any, recorded: Any, what: str) -> None:
    """Two float64 calculations of one number."""
    torch.testing.assert_close(found, recorded, rtol=1e-9, atol=1e-10, msg=lambda words: f"{what}: {words}")


@pytest.mark.parametrize(("folder", "name", "dtype"), RUNS)
def test_forward_passes(folder: Path, name: str, dtype: torch.dtype) -> None:
    record, tensors = golden.read(folder, name)
    state = state_of((record, tensors), name, dtype)
    found = golden.forward(state.nets, batch_of(tensors, 1, dtype), record["training"]["latent_scale"])
    for key, value in found.items():
        torch.testing.assert_close(value.float(), tensors[key].float(), rtol=1e-4, atol=1e-5, msg=key)
        if dtype == torch.float64:
            assert_equal_numbers(value, tensors[key], key)


@pytest.mark.parametrize(("folder", "name", "dtype"), RUNS)
def test_losses_and_weights(folder: Path, name: str, dtype: torch.dtype) -> None:
    """In float32 as it trains; in float64, where the recorded numbers have the digits, every one of them."""
    record, tensors = golden.read(folder, name)
    state = state_of((record, tensors), name, dtype)
    config = state.config
    assert lambda_ds(record["epoch"], config.loss.w_ds, config.ds_decay) == pytest.approx(record["lambda_ds"])
    losses = []
    for k in range(1, len(record["steps"]) + 1):
        logs = train_step(state, batch_of(tensors, k, dtype), epoch=record["epoch"], step=k)
        losses.append({key: value.item() for key, value in logs.items()})
    assert_losses_follow(losses, record)
    final = state.nets.state_dict()
    assert_weights_follow(final, tensors)
    if dtype == torch.float64:
        for logged, recorded in zip(losses, record["steps"], strict=True):
            assert_equal_numbers(logged, recorded, "losses")
        for net, parameters in golden.weights_of(tensors, "final", dtype).items():
            for parameter, value in parameters.items():
                assert_equal_numbers(final[net][parameter], value, f"{net}.{parameter}")


@pytest.mark.parametrize("name", golden.CASES)
def test_the_textbook_still_gives_what_ships(name: str) -> None:
    """All of it: what is drawn to the bit, what is calculated to rounding."""
    assert (golden.FOLDER / f"{name}.safetensors").stat().st_size < 300_000
    record, tensors = golden.record_of(name)
    shipped_record, shipped = golden.read(golden.FOLDER, name)
    assert set(tensors) == set(shipped)
    for key, value in shipped.items():
        assert value.dtype == tensors[key].dtype, key
        if key.startswith(("init.", "step")):
            assert torch.equal(tensors[key], value), key
        else:
            assert_equal_numbers(tensors[key], value, key)
    calculated = ("steps", "epoch_mean", "lambda_ds")
    for key in set(record) | set(shipped_record):
        if key in calculated:
            assert_equal_numbers(record[key], shipped_record[key], key)
        else:
            assert record[key] == shipped_record[key], key


@pytest.mark.parametrize(("folder", "name"), SHIPPED + OTHERS)
def test_the_textbook_gives_the_recorded_numbers(folder: Path, name: str) -> None:
    """Of what ships, and of an implementation that neither raystar nor the textbook has anything in common with."""
    record, tensors = golden.read(folder, name)
    losses, outputs = golden.train(record, tensors, len(record["steps"]))
    for key in ("forward.s_ref", "forward.s_lat", "forward.fake_ref", "forward.logits"):
        torch.testing.assert_close(outputs[key].float(), tensors[key].float(), rtol=1e-4, atol=1e-5, msg=key)
    assert_losses_follow(losses, record)
    assert_weights_follow(golden.weights_of(outputs, "final", torch.float64), tensors)


def test_what_ships_reaches_every_term() -> None:
    """A term that is zero, or a margin that is never reached, would be no evidence of anything."""
    records = {name: golden.read(golden.FOLDER, name)[0] for name in golden.CASES}
    full, bare, residual = (records[name]["steps"] for name in ("step_full", "step_no_identity", "step_residual"))
    assert [losses["r1"] > 0 for losses in full] == [False, True, False]
    assert all(losses["r1"] > 0 for losses in residual)
    assert all(losses["id"] > 0 for losses in full + residual)
    assert all(losses["id"] == losses["r1"] == 0 for losses in bare)
    assert all(0 < losses["ds"] < 1.5 for losses in full)
    assert all(losses["ds"] == 1e-3 for losses in residual)
    assert 0 < records["step_no_identity"]["lambda_ds"] < 0.9
    assert all(losses[key] != 0 for losses in full for key in ("d_loss", "g_loss", "g_adv", "sty", "cyc"))
