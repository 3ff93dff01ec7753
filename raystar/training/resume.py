"""A run's whole state, taken and put back: networks, optimisers, random numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raystar import __version__
from raystar.base.errors import RaystarError, show
from raystar.config.load import to_mapping
from raystar.config.schema import Config
from raystar.model import checkpoint as checkpoints
from raystar.model.checkpoint import check_function, networks_of
from raystar.model.domains import mapped_moments, mapped_weights
from raystar.model.networks import AVERAGED, NAMES
from raystar.model.users import OPTIMIZERS, Moments, functions_of, moments_of
from raystar.training.state import TrainState
from raystar.training.workers import ALONE, Group

logger = logging.getLogger(__name__)

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def snapshot(state: TrainState, epoch: int, metrics: Mapping[str, float], steps: int | None = None) -> dict[str, Any]:
    """The checkpoint of `state` after `epoch`. Its tensors are the live ones: save it before the next step.

    `steps` are those of an epoch, where they are known: `global_step` counts them.
    """
    return {
        "epoch": epoch,
        **({} if steps is None else {"global_step": epoch * steps}),
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
    `checkpoint` lacks start from its weights, others are left out, each with a note. With `checkpoint.map_domains` each
    domain takes what the file has of its name.

    Raises:
        RaystarError: weights or optimisers that do not fit the configuration.
    """
    check_function(checkpoint, state.config, source)
    networks, averages = networks_of(checkpoint, NAMES), checkpoint.get("ema")
    there, here = _other_domains(checkpoint, state.config)
    if there:
        if missing := [domain for domain in here if domain not in there]:
            raise RaystarError(
                f"{source}: has no domain {' or '.join(missing)}, only {', '.join(there)}; a run continues with "
                "domains that it had (checkpoint.init_from starts others from its networks)"
            )
        networks, averages = _mapped(networks, averages, there, state, source)
    state.load_networks(networks, source, averages)
    notes: list[str] = []
    for name in OPTIMIZERS:
        try:
            moments = moments_of(checkpoint, name)
            if there:
                moments = mapped_moments(moments, there, here, state.nets.state_dict())
            notes += _restore_optimizer(state, name, moments, checkpoint[name]["param_groups"])
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


def initial_state(
    config: Config, device: torch.device | str, group: Group = ALONE, *, init_from: Path | None = None
) -> TrainState:
    """Fresh networks, or those of `checkpoint.init_from`, without their averages.

    Args:
        init_from: where the file lies on this machine, if not where the configuration says.

    Raises:
        RaystarError: the file cannot be read, or does not fit the configuration.
    """
    if config.checkpoint.init_from is None:
        return TrainState.create(config, device, group)
    checkpoint = checkpoints.load(init_from or Path(config.checkpoint.init_from).expanduser())
    weights = networks_of(checkpoint, NAMES)
    return state_of(config, device, {**checkpoint, "ema": weights}, config.checkpoint.init_from, group)


def state_of(
    config: Config, device: torch.device | str, checkpoint: Mapping[str, Any], source: str, group: Group = ALONE
) -> TrainState:
    """The networks of a checkpoint, and their averages where the configuration wants any, with fresh optimisers.

    With `checkpoint.map_domains` each domain takes what the file has of its name; one that it has not starts fresh.

    Raises:
        RaystarError: the networks do not fit the configuration.
    """
    check_function(checkpoint, config, source)
    state = TrainState.create(config, device, group)
    networks, averages = networks_of(checkpoint, NAMES), checkpoint.get("ema")
    there, here = _other_domains(checkpoint, config)
    if there:
        networks, averages = _mapped(networks, averages, there, state, source)
        if missing := [domain for domain in here if domain not in there]:
            logger.warning(f"{source}: has no domain {' or '.join(missing)}; what is theirs alone starts fresh")
    state.load_networks(networks, source, averages)
    return state


def _mapped(
    networks: Mapping[str, Any], averages: Any, there: Sequence[str], state: TrainState, source: str
) -> tuple[dict[str, Any], Any]:
    """Weights, and averages where there are any, of the domains `there`, for those of `state`."""
    here, fresh = state.config.data.domains, state.nets.state_dict()
    heads = {int(name.split(".")[1]) for name in networks["E"] if name.startswith("unshared.")}
    if len(heads) != len(there):
        raise RaystarError(f"{source}: its configuration names {len(there)} domains, its networks have {len(heads)}")
    try:
        mapped = mapped_weights(networks, there, here, fresh)
        return mapped, averages and mapped_weights(networks_of(averages, AVERAGED), there, here, fresh)
    except (KeyError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise RaystarError(f"{source}: does not fit the configuration: {str(error).splitlines()[0]}") from None


def _other_domains(checkpoint: Mapping[str, Any], config: Config) -> tuple[Sequence[str], Sequence[str]]:
    """The domains of a checkpoint and of the configuration, where they differ; `check_function` has let them pass."""
    there, here = functions_of(checkpoint).get("data.domains", ()), config.data.domains
    return (there, here) if there and there != here else ((), ())


def _restore_optimizer(state: TrainState, name: str, moments: Moments, saved: Sequence[Mapping[str, Any]]) -> list[str]:
    """Takes over moments and step counts; returns what else differs. ValueError if they are of other parameters."""
    optimizer: torch.optim.AdamW = getattr(state, name)
    kept, number = {}, 0
    for net in OPTIMIZERS[name]:
        for parameter_name, parameter in getattr(state.nets, net).named_parameters():
            full = f"{net}.{parameter_name}"
            if full in moments:
                _check_moments(full, moments[full], parameter)
                kept[number] = {key: _like(moments[full][key], parameter) for key in _MOMENTS}
            number += 1
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
    notes = []
    # A schedule's factor is the step's, not the run's: what counts is what it multiplies.
    for group, current in zip(_each(saved, len(optimizer.param_groups)), optimizer.param_groups, strict=True):
        before, now = ({**g, "lr": g.get("initial_lr", g.get("lr"))} for g in (group, current))
        notes += [
            f"{key} {before[key]} there, {now[key]} now"
            for key in ("lr", "betas", "weight_decay")
            if key in group and before[key] != now[key]
        ]
    return list(dict.fromkeys(notes))


def _like(moment: Any, parameter: Tensor) -> Any:
    """A moment laid out in memory as its parameter: the fused AdamW pairs the two number by number as they lie."""
    if not isinstance(moment, Tensor) or moment.shape != parameter.shape:
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _each(saved: Sequence[Mapping[str, Any]], groups: int) -> Sequence[Mapping[str, Any]]:
    """The saved group of each network; raystar 0.1 had one for G and E."""
    return saved if len(saved) == groups else [saved[0], *saved]


def _check_moments(name: str, moments: Mapping[str, Any], parameter: Tensor) -> None:
    if not moments.keys() >= set(_MOMENTS):
        raise ValueError(f"expected {', '.join(_MOMENTS)} of AdamW, found {', '.join(sorted(moments)) or 'none'}")
    if not all(isinstance(moments[key], Tensor) for key in _MOMENTS[1:]):
        raise ValueError(f"expected tensors as {', '.join(_MOMENTS[1:])} of {name}")
    if torch.as_tensor(moments["step"]).numel() != 1:
        raise ValueError(f"expected one step of {name}, found {show(moments['step'])}")
    for key in _MOMENTS[1:]:
        if moments[key].shape != parameter.shape:
            raise ValueError(
                f"its parameters come in another order: {key} of {name} is {list(moments[key].shape)}, "
                f"expected {list(parameter.shape)}"
            )
