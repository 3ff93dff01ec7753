"""Checkpoints of the trainer that raystar's users come from: read as raystar's own, and written as that trainer's.

Such a file is `{epoch, [global_step], G, F, E, D, opt_g, opt_d, config}`. `opt_g` has three groups: G, E and F. States
are numbered in the order in which the modules registered their parameters, which is that of the networks' own
dictionaries. raystar 0.1 had two groups, G with E and F: names tell the two apart and make them one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from raystar.base.errors import RaystarError, key_text, show
from raystar.base.names import composed
from raystar.config.load import from_mapping
from raystar.config.schema import SECTIONS, Config, known_keys
from raystar.config.users import is_unmarked, to_theirs, translate, unmarked_networks
from raystar.model.networks import NAMES, Nets

logger = logging.getLogger(__name__)

Moments = dict[str, dict[str, Any]]
"""What an optimiser keeps of each parameter, `step`, `exp_avg` and `exp_avg_sq`, by `<network>.<parameter>`."""
OPTIMIZERS: Mapping[str, tuple[str, ...]] = {"opt_g": ("G", "E", "F"), "opt_d": ("D",)}
"""The networks of each optimiser, a group each."""
_WRAPPERS = ("_orig_mod.", "module.")  # torch.compile's and DistributedDataParallel's
_BUFFERS = (".weight_u", ".weight_v")


def without_wrappers(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights under the names of the bare network, whatever it was wrapped in when it was saved.

    Raises:
        RaystarError: two of them then have one name.
    """
    bare: dict[str, Tensor] = {}
    for name, value in weights.items():
        short = name.replace(_WRAPPERS[0], "")
        while short.startswith(_WRAPPERS[1]):
            short = short.removeprefix(_WRAPPERS[1])
        if short in bare:
            raise RaystarError(f"{where}: {short} is there twice, once as {name}")
        bare[short] = value
    return bare


def adopt(checkpoint: dict[str, Any], source: str) -> None:
    """Gives a file of that trainer raystar's names: those of its configuration's keys, and of its parameters.

    Files named AdaGN's parameters as AdaIN's for a while. Such a file says how many groups there are and no more, its D
    is spectrally normalised, and the norms before its residual blocks are AdaIN's: there were no other networks then.

    Raises:
        RaystarError: its configuration cannot be read, or does not tell which networks the weights are of.
    """
    config = checkpoint.get("config")
    if not isinstance(config, Mapping):
        return
    model = config.get("model")
    model = model if isinstance(model, Mapping) else {}
    unmarked = "num_groups" in model and "norm" not in model and model.get("exp_branch") in (None, "")
    if unmarked and not any(name.endswith(".weight_orig") for name in checkpoint["D"]):
        raise RaystarError(
            f"{source}: config: model.num_groups without model.exp_branch is of AdaGN with spectral norm, and network "
            "D has none: whether G's normalisation is AdaIN or AdaGN cannot be told; add exp_branch to its config"
        )
    if unmarked:
        width = checkpoint["G"].get("encoder.0.bias")
        networks = unmarked_networks(len(width) if isinstance(width, Tensor) else model.get("base_dim"))
        named = {key.partition(".")[2]: value for key, value in networks.items()}
        config = {**config, "model": {**model, **named, "exp_branch": None}}
        checkpoint["G"] = {name.replace(".adain", ".adagn"): value for name, value in checkpoint["G"].items()}
    checkpoint["config"] = translate(config, f"{source}: config", whole=True, quiet=True)


def functions_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What decides on the function that a checkpoint's weights are and that no shape tells, by key, where it is known.

    Norms are told by the names of the weights. One whose configuration says nothing of `model.residual` was trained
    without.
    """
    config = checkpoint.get("config")
    parts = {
        name: part
        for name in ("model", "training", "data")
        if isinstance(part := config.get(name) if isinstance(config, Mapping) else None, Mapping)
    }
    model = parts.get("model", {})
    names = {net: [*weights] if isinstance(weights := checkpoint.get(net), Mapping) else [] for net in ("G", "D")}
    norm = next((kind for kind in ("adagn", "adain") if any(f".{kind}1." in name for name in names["G"])), None)
    known: dict[str, Any] = {
        "model.residual": model.get("residual", False),
        "model.norm": norm or model.get("norm", "adain"),  # without residual blocks no name tells
        "model.discriminator_norm": "spectral" if any(".weight_orig" in name for name in names["D"]) else "none",
    }
    if known["model.norm"] == "adagn" and "num_groups" in model:
        groups = model["num_groups"]
        known["model.num_groups"] = groups
        known["model.encoder_groups"] = None if (other := model.get("encoder_groups")) == groups else other
    if "latent_scale" in parts.get("training", {}):
        known["training.latent_scale"] = parts["training"]["latent_scale"]
    domains = parts.get("data", {}).get("domains")
    if isinstance(domains, list | tuple) and all(isinstance(domain, str) for domain in domains):
        known["data.domains"] = tuple(map(composed, domains))
    return known


def config_of(checkpoint: Mapping[str, Any], source: str) -> Config:
    """The configuration inside of a checkpoint. Keys that raystar does not know are left out, with a note.

    Raises:
        RaystarError: it holds none, or one that raystar cannot read, or whose networks it does not build.
    """
    config = checkpoint.get("config")
    if not isinstance(config, Mapping):
        raise RaystarError(f"{source}: holds no configuration, so the networks' sizes are unknown")
    known = known_keys()
    kept: dict[Any, Any] = {}
    for section, content in config.items():
        # A network's unknown key may be of another network: that is for from_mapping to refuse.
        if not isinstance(content, Mapping) or section == "model":
            kept |= {section: content} if section in SECTIONS else {}
        elif section in SECTIONS:
            kept[section] = {name: value for name, value in content.items() if f"{section}.{name}" in known}
    strangers = [section for section in config if section not in kept]
    strangers += [
        f"{s}.{name}" for s in kept if isinstance(kept[s], Mapping) for name in config[s].keys() - kept[s].keys()
    ]
    if strangers:
        logger.warning(f"{source}: config: {', '.join(map(key_text, strangers))}: not known, and left out")
    return from_mapping(kept, f"{source}: config")


# -- optimisers ------------------------------------------------------------------------------------


def moments_of(checkpoint: Mapping[str, Any], optimizer: str) -> Moments:
    """What `opt_g` or `opt_d` of a checkpoint keeps, by the names in the checkpoint's own networks.

    Raises:
        ValueError: it is not there, or its groups are of other parameters.
    """
    saved = checkpoint.get(optimizer)
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise ValueError("it is not there" if saved is None else "it has no state and param_groups")
    groups = [group["params"] for group in saved["param_groups"]]
    networks = OPTIMIZERS[optimizer]
    names = [[f"{net}.{name}" for name in parameters(checkpoint[net])] for net in networks]
    if optimizer == "opt_g" and len(groups) == 2:  # raystar 0.1
        names = [names[0] + names[1], names[2]]
    sizes, expected = list(map(len, groups)), list(map(len, names))
    if sizes != expected:
        raise ValueError(f"its groups have {_listed(sizes)} parameters, expected {_listed(expected)}")
    numbered = zip((n for group in groups for n in group), (n for group in names for n in group), strict=True)
    return {name: dict(saved["state"][number]) for number, name in numbered if saved["state"].get(number)}


def parameters(weights: Mapping[str, Any]) -> list[str]:
    """The names of a network's parameters, in the order in which optimisers number them."""
    return [name for name in weights if not name.endswith(_BUFFERS)]


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values)) or "none"


# -- back to that trainer --------------------------------------------------------------------------


def as_theirs(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A checkpoint as that trainer writes it and goes on from it.

    Averages (`training.ema_epochs`) have no place there and are left out.

    Raises:
        RaystarError: it has networks that are not built there, or no optimisers to go on with.
    """
    config = config_of(checkpoint, source)
    nets = Nets.of(config.model, config.num_domains, {name: checkpoint[name] for name in NAMES}, source)
    epoch = checkpoint.get("epoch")
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise RaystarError(f"{source}: expected the number of its epoch, found {show(epoch)}")
    theirs: dict[str, Any] = {"epoch": epoch}
    optimizers, steps = {}, 0
    for optimizer in OPTIMIZERS:
        try:
            moments = moments_of(checkpoint, optimizer)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RaystarError(f"{source}: optimiser {optimizer} cannot be read: {error}") from None
        optimizers[optimizer] = _numbered(moments, checkpoint[optimizer]["param_groups"], OPTIMIZERS[optimizer], nets)
        steps = max([steps, *(int(moment["step"]) for moment in moments.values())])
    theirs["global_step"] = checkpoint.get("global_step", steps)
    theirs |= {name: dict(weights) for name, weights in nets.state_dict().items()}
    if is_unmarked(config.model):
        theirs["G"] = {name.replace(".adagn", ".adain"): value for name, value in theirs["G"].items()}
    return {**theirs, **optimizers, "config": to_theirs(config, source)}


def _numbered(moments: Moments, saved: list[dict[str, Any]], networks: tuple[str, ...], nets: Nets) -> dict[str, Any]:
    """An optimiser's state in one group a network, with the settings of the saved groups that held them."""
    if len(saved) < len(networks):  # raystar 0.1: G with E
        saved = [saved[0], *saved]
    state: dict[int, Any] = {}
    groups, first = [], 0
    for net, group in zip(networks, saved, strict=True):
        names = [f"{net}.{name}" for name, _ in getattr(nets, net).named_parameters()]
        state |= {first + number: moments[name] for number, name in enumerate(names) if name in moments}
        groups.append({**group, "params": list(range(first, first + len(names)))})
        first += len(names)
    return {"state": state, "param_groups": groups}
