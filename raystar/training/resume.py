"""A run's whole state, taken and put back: networks, optimisers, random numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raystar import __version__
from raystar.base.errors import RaystarError, show
from raystar.config.load import to_mapping
from raystar.model.checkpoint import check_function, networks_of
from raystar.model.networks import AVERAGED, NAMES
from raystar.training.state import TrainState

logger = logging.getLogger(__name__)

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def snapshot(state: TrainState, epoch: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The checkpoint of `state` after `epoch`. Its tensors are the live ones: save it before the next step."""
    return {
        "epoch": epoch,
        **state.nets.state_dict(),
        "opt_g": state.opt_g.state_dict(),
        "opt_d": state.opt_d.state_dict(),
        "scaler": state.scaler.state_dict(),
        "config": to_mapping(state.config),
        "metrics": dict(metrics),
        "raystar": __version__,
        **({} if state.averaged is None else {"ema": networks_of(state.averaged.state_dict(), AVERAGED)}),
    }


def restore(state: TrainState, checkpoint: Mapping[str, Any], source: str) -> int:
    """Puts networks and optimisers of `checkpoint` into `state`; returns its epoch, the last that was finished.

    Of the optimisers only the moments and step counts are taken over. Learning rates, betas and weight decay
    are those of the configuration, so one that was changed takes effect, with a note on stderr; how the update
    is computed (`fused`, `foreach`) belongs to the process, not to the file. Averages that the configuration wants and
    `checkpoint` lacks start from its weights, others are left out, each with a note.

    Raises:
        RaystarError: weights or optimisers that do not fit the configuration.
    """
    check_function(checkpoint, state.config, source)
    averages = checkpoint.get("ema")
    state.load_networks(networks_of(checkpoint, NAMES), source, averages)
    notes: list[str] = []
    for name in ("opt_g", "opt_d"):
        try:
            notes += _restore_optimizer(getattr(state, name), checkpoint.get(name))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise RaystarError(
                f"{source}: optimiser {name} cannot be restored: {error}; "
                "checkpoint.init_from starts from its networks alone"
            ) from None
    scaler = checkpoint.get("scaler")
    if scaler is not None and scaler != {}:
        try:
            state.scaler.load_state_dict(scaler)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise RaystarError(f"{source}: the loss scale cannot be restored: {error}") from None
    state.count_steps()
    epoch = checkpoint.get("epoch")
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise RaystarError(f"{source}: expected the number of its epoch, found {show(epoch)}")
    if notes:
        logger.warning(f"{source}: {', '.join(notes)}; the configuration counts")
    if state.averaged is not None and averages is None:
        logger.warning(f"{source}: holds no averages; they start from its weights")
    if state.averaged is None and averages is not None:
        logger.warning(f"{source}: its averages are left out, since training.ema_epochs is 0")
    return epoch


def _restore_optimizer(optimizer: torch.optim.AdamW, saved: Any) -> list[str]:
    """Takes over moments and step counts; returns what else differs. ValueError if they are of other parameters."""
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise ValueError("it is not there" if saved is None else "it has no state and param_groups")
    groups, moments = saved["param_groups"], saved["state"]
    sizes, expected = ([len(group["params"]) for group in g] for g in (groups, optimizer.param_groups))
    if sizes != expected:
        raise ValueError(f"its groups have {_listed(sizes)} parameters, expected {_listed(expected)}")
    merged, notes = [], []
    for group, current in zip(groups, optimizer.param_groups, strict=True):
        for number, parameter in zip(group["params"], current["params"], strict=True):
            _check_moments(number, moments.get(number, {}), parameter)
        merged.append({**current, "params": group["params"]})
        # A schedule's factor is the step's, not the run's: what counts is what it multiplies.
        before, now = ({**g, "lr": g.get("initial_lr", g.get("lr"))} for g in (group, current))
        notes += [
            f"{key} {before[key]} there, {now[key]} now"
            for key in ("lr", "betas", "weight_decay")
            if key in group and before[key] != now[key]
        ]
    kept = {n: {key: moment[key] for key in _MOMENTS} for n, moment in moments.items() if moment}
    optimizer.load_state_dict({"state": kept, "param_groups": merged})
    return list(dict.fromkeys(notes))


def _check_moments(number: Any, moments: Mapping[str, Any], parameter: Tensor) -> None:
    if not moments:  # saved before this parameter's first step
        return
    if not moments.keys() >= set(_MOMENTS):
        raise ValueError(f"expected {_listed(_MOMENTS)} of AdamW, found {_listed(sorted(moments))}")
    if not all(isinstance(moments[key], Tensor) for key in _MOMENTS[1:]):
        raise ValueError(f"expected tensors as {_listed(_MOMENTS[1:])} of number {number}")
    if torch.as_tensor(moments["step"]).numel() != 1:
        raise ValueError(f"expected one step of number {number}, found {show(moments['step'])}")
    for key in _MOMENTS[1:]:
        if moments[key].shape != parameter.shape:
            raise ValueError(
                f"its parameters come in another order: {key} of number {number} is {list(moments[key].shape)}, "
                f"expected {list(parameter.shape)}"
            )


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values)) or "none"
