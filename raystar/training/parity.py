"""The parity gate: settings that are to change speed must leave losses and gradients what eager float32 gives.

How much rounding may change them depends on sizes and data, so it is measured: eager bf16 runs the same steps.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from raystar.base.errors import WrongResults
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.batches import Batch, LatentDataset
from raystar.model.device import bf16_as_asked
from raystar.model.networks import NAMES
from raystar.training.state import TrainState
from raystar.training.step import LOGGED, train_step

_TIMES_BF16 = 3.0  # the limit, in differences of eager bf16 from eager float32 ...
_LOSS_AT_LEAST, _GRADIENT_AT_LEAST = 0.02, 0.05  # ... but not below these: some of them are small by chance,
_AT_MOST = 0.5  # ... nor above this, where results are wrong in any precision
_FLOOR = 0.03
"""Share of its network's gradient that is added to a parameter's: some gradients (of a bias before a
normalisation) are exactly zero but for rounding."""
_FIRST_SCALES = 40
"""Halvings of a gradient scale after which it is the gradients that are wrong."""
_EAGER = {
    "training.use_compile": False,
    "training.channels_last": False,
    "training.recompute": False,
    "training.ema_epochs": 0,
}


def check_parity(state: TrainState, data: LatentDataset) -> None:
    """Compares the first steps of `state`, as it would train, with eager float32, and leaves it as it was.

    Every step starts from the same weights and sees a real batch; one of them computes R1.

    Raises:
        WrongResults: which loss, or the gradient of which parameter, differs and by how much.
    """
    reference = _eager(state, {"training.use_amp": False})
    rounded = _eager(state, {"training.use_amp": True, "training.amp_dtype": "bf16"})
    weights, scaler = copy.deepcopy(state.nets.state_dict()), state.scaler.state_dict()
    _wake(reference)
    try:
        for number, step in enumerate((1, state.config.loss.r1_interval), start=1):
            batch = data.batch(min(number, data.steps)).to(state.device)
            reference_weights = copy.deepcopy(reference.nets.state_dict())
            rounded.nets.load_state_dict(reference_weights, "parity")
            exact = train_step(reference, batch, epoch=1, step=step)
            with bf16_as_asked():
                usual = train_step(rounded, batch, epoch=1, step=step)
            losses = _taken(state, batch, step, reference_weights)
            for name in LOGGED:
                _compare_losses(name, step, float(exact[name]), float(usual[name]), float(losses[name]))
            for net in NAMES:
                _compare_gradients(net, step, *(getattr(s.nets, net) for s in (reference, rounded, state)))
    finally:
        state.nets.load_state_dict(weights, "parity")
        state.scaler.load_state_dict(scaler)
        for optimizer in (state.opt_g, state.opt_d):
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()


def _taken(state: TrainState, batch: Batch, step: int, weights: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A step from `weights` that both optimisers have taken: fp16's first scales are too large, and find their size."""
    for _ in range(_FIRST_SCALES):
        state.nets.load_state_dict(weights, "parity")
        scale = state.scaler.get_scale()
        losses = train_step(state, batch, epoch=1, step=step)
        if state.scaler.get_scale() >= scale:
            break
    return losses


def _eager(state: TrainState, settings: dict[str, object]) -> TrainState:
    config: Config = override(state.config, {**_EAGER, **settings}, "parity")
    return TrainState.create(config, state.device)


def _wake(state: TrainState) -> None:
    """Gives parameters that start at zero (AdaIN's) values: what they multiply, the style, would go unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, net in state.nets.items():
            for parameter in net.parameters():
                if not parameter.any():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))


def _compare_losses(name: str, step: int, exact: float, usual: float, loss: float) -> None:
    # Losses near zero are all rounding, hence the 1.
    scale = 1 + abs(exact)
    if not abs(loss - exact) / scale <= _limit(abs(usual - exact) / scale, _LOSS_AT_LEAST):
        raise WrongResults(f"wrong results: {name} of step {step} is {loss:.5g}, eager float32 gives {exact:.5g}")


def _compare_gradients(
    net: str, step: int, exact: torch.nn.Module, usual: torch.nn.Module, candidate: torch.nn.Module
) -> None:
    gradients = [_gradient(parameter) for parameter in exact.parameters()]
    floor = _FLOOR * torch.cat([gradient.flatten() for gradient in gradients]).norm().clamp_min(1e-12)
    named = zip(candidate.named_parameters(), usual.parameters(), gradients, strict=True)
    for (name, parameter), rounded, gradient in named:
        scale = gradient.norm() + floor
        difference, rounding = (float((_gradient(p) - gradient).norm() / scale) for p in (parameter, rounded))
        if not difference <= _limit(rounding, _GRADIENT_AT_LEAST):
            raise WrongResults(
                f"wrong results: the gradient of {net}.{name} in step {step} differs from eager float32 by "
                f"{difference:.0%}; bf16 alone makes {rounding:.0%}"
            )


def _limit(rounding: float, at_least: float) -> float:
    return min(max(_TIMES_BF16 * rounding, at_least), _AT_MOST)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
