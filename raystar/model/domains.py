"""A checkpoint of other domains, or of another order of them: each domain takes what the file has of its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from raystar.model.users import Moments

Weights = Mapping[str, Mapping[str, Tensor]]
_HEAD = re.compile(r"unshared\.(\d+)\.(weight|bias)")
_ROWS = re.compile(r"main\.(\d+)\.(weight|weight_orig|weight_u|bias)")


def mapped_weights(saved: Weights, there: Sequence[str], here: Sequence[str], fresh: Weights) -> dict[str, Any]:
    """Weights by network, with the branches of F and E and the last convolution of D for the domains `here`.

    Args:
        saved: weights of some of the networks, by network, for the domains `there`.
        fresh: of untrained networks for the domains `here`; a domain that is not among `there` has its branches.
    """
    mapped: dict[str, Any] = {}
    for net, weights in saved.items():
        last = _last(weights)
        mapped[net] = {name: value for name, value in weights.items() if not _HEAD.fullmatch(name)}
        for name, value in fresh[net].items():
            if head := _HEAD.fullmatch(name):
                domain = here[int(head[1])]
                source = f"unshared.{there.index(domain)}.{head[2]}" if domain in there else None
                mapped[net][name] = weights[source] if source else value.clone()
            elif (row := _ROWS.fullmatch(name)) and int(row[1]) == last:
                mapped[net][name] = _rows(weights[name], there, here, value)
        # In the order of the networks' own dictionaries, by which optimisers number their states.
        mapped[net] = {name: mapped[net][name] for name in fresh[net] if name in mapped[net]}
    return mapped


def mapped_moments(saved: Moments, there: Sequence[str], here: Sequence[str], fresh: Weights) -> Moments:
    """What optimisers keep of each parameter, likewise. A domain that is not among `there` starts without."""
    mapped: Moments = {}
    last = _last(fresh["D"])
    for net, weights in fresh.items():
        for name, value in weights.items():
            if head := _HEAD.fullmatch(name):
                domain = here[int(head[1])]
                source = f"{net}.unshared.{there.index(domain)}.{head[2]}" if domain in there else ""
                if source in saved:
                    mapped[f"{net}.{name}"] = saved[source]
            elif (moments := saved.get(f"{net}.{name}")) is not None:
                row = _ROWS.fullmatch(name)
                if row and int(row[1]) == last and net == "D":
                    zeros = value.new_zeros(value.shape)
                    moments = moments | {
                        key: _rows(moments[key], there, here, zeros) for key in ("exp_avg", "exp_avg_sq")
                    }
                mapped[f"{net}.{name}"] = moments
    return mapped


def _last(weights: Mapping[str, Tensor]) -> int:
    """The number of D's last convolution, whose rows are the domains; -1 of another network."""
    return max((int(row[1]) for row in map(_ROWS.fullmatch, weights) if row), default=-1)


def _rows(value: Tensor, there: Sequence[str], here: Sequence[str], fresh: Tensor) -> Tensor:
    rows = fresh.to(value, copy=True)
    for number, domain in enumerate(here):
        if domain in there:
            rows[number] = value[there.index(domain)]
    return rows
