"""The parity gate: settings that are to change speed must leave losses and gradients what eager float32 gives."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from raystar.config import override
from raystar.dataset import LatentDataset
from raystar.errors import WrongResults
from raystar.model import NAMES
from raystar.step import LOGGED, TrainState, train_step

GRADIENT_TOLERANCE = 0.25
"""Largest |difference| / |gradient| of one network. bf16 autocast differs by up to 0.08 at the sizes that were
measured (base_dim 16 to 64); a network that computes something else by about 1."""
LOSS_TOLERANCE = 0.02
"""Largest relative difference of a loss, and the absolute one below which it does not count: losses near zero
(`ds` of a fresh generator) are all rounding."""


def check_parity(state: TrainState, data: LatentDataset) -> None:
    """Compares the first steps of `state`, as it would train, with eager float32, and leaves it as it was.

    Every step starts from the same weights and sees a real batch; one of them computes R1.

    Raises:
        WrongResults: which loss, or the gradients of which network, differ and by how much.
    """
    settings = {"training.use_amp": False, "training.use_compile": False, "training.channels_last": False}
    reference = TrainState.create(override(state.config, settings, "parity"), state.device)
    weights = copy.deepcopy(state.nets.state_dict())
    _wake(reference)
    try:
        for number, step in enumerate((1, state.config.loss.r1_interval), start=1):
            state.nets.load_state_dict(reference.nets.state_dict(), "parity")
            batch = data.batch(min(number, data.steps)).to(state.device)
            wanted = train_step(reference, batch, epoch=1, step=step)
            found = train_step(state, batch, epoch=1, step=step)
            _compare(wanted, found, reference, state, step)
    finally:
        state.nets.load_state_dict(weights, "parity")
        for optimizer in (state.opt_g, state.opt_d):
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()


def _wake(state: TrainState) -> None:
    """Gives parameters that start at zero (AdaIN's) values: what they multiply would go unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, net in state.nets.items():
            for parameter in net.parameters():
                if not parameter.any():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def _compare(
    wanted: dict[str, Tensor], found: dict[str, Tensor], reference: TrainState, state: TrainState, step: int
) -> None:
    for name in LOGGED:
        expected, value = float(wanted[name]), float(found[name])
        if not abs(value - expected) <= LOSS_TOLERANCE * (1 + abs(expected)):
            raise WrongResults(
                f"wrong results: {name} of step {step} is {value:.5g}, eager float32 gives {expected:.5g}"
            )
    for name in NAMES:
        expected_gradient = _flat(getattr(reference.nets, name).parameters())
        difference = (_flat(getattr(state.nets, name).parameters()) - expected_gradient).norm()
        share = float(difference / expected_gradient.norm().clamp_min(1e-12))
        if not share <= GRADIENT_TOLERANCE:
            raise WrongResults(
                f"wrong results: the gradients of {name} in step {step} differ from eager float32 by {share:.0%}; "
                f"at most {GRADIENT_TOLERANCE:.0%} is rounding"
            )


def _flat(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
