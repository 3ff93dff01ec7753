"""Named experiments of a space file: each one is a set of overrides, and a trial under its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raystar.base.errors import RaystarError, key_text, misspelt, show
from raystar.config.folders import check_plain
from raystar.config.load import get_value, override
from raystar.config.schema import SECTIONS, Config
from raystar.config.users import translate
from raystar.search.comparable import why_alike

_FORM = "{name: cyc10, overrides: {loss.w_cyc: 10}}"
_KEYS = ("name", "overrides")
_MOST = 10_000  # as of drawn trials
_LISTED = 1500  # characters of faults in one message
_BASELINE = "baseline"
_DRAWN = re.compile(r"t\d+", re.IGNORECASE)
_REPEAT = re.compile(r"(.+)-s\d+", re.IGNORECASE)
# Of training's keys, a sweep sets some itself: when it is resumed, the configuration would have another value.
_SAME_IS_NO_DIFFERENCE = ("data", "ruler", "checkpoint", "visualization", "model")


@dataclass(frozen=True)
class Experiment:
    """A trial that the space file names."""

    name: str
    overrides: Mapping[str, Any]
    """Dotted keys and their checked values."""


def read_experiments(content: Any, config: Config, source: str) -> tuple[Experiment, ...]:
    """The experiments of a space file, in its order, checked against `config`.

    Args:
        content: a list of `{name, overrides}`, or a mapping of names to overrides. Keys are dotted, or nested in their
            sections, or both, in raystar's spelling or in that of the trainer that users come from.

    Raises:
        RaystarError: what is wrong with every one of them, in one message.
    """
    where = f"{source}: experiments"
    if isinstance(content, Mapping):
        content = [{"name": name, "overrides": overrides} for name, overrides in content.items()]
    if not isinstance(content, list) or not content:
        raise RaystarError(f"{where}: expected a list of experiments such as {_FORM}, found {show(content)}")
    if len(content) > _MOST:
        raise RaystarError(f"{where}: expected at most {_MOST}, found {len(content)}")
    experiments: list[Experiment] = []
    faults: list[str] = []
    taken: dict[str, str] = {}
    for number, entry in enumerate(content, start=1):
        try:
            experiments.append(_read(entry, number, taken, config, where))
        except RaystarError as fault:
            faults.append(str(fault))
    for experiment in experiments:
        repeat = _REPEAT.fullmatch(experiment.name)
        if repeat and repeat[1].casefold() in taken:
            faults.append(
                f"{where}: {experiment.name}: the finals train {taken[repeat[1].casefold()]} again under such names; "
                "choose another"
            )
    if faults:
        raise RaystarError(faults[0] if len(faults) == 1 else _together(faults, where))
    return tuple(experiments)


def _together(faults: Sequence[str], where: str) -> str:
    """All faults in one message, a line each; of more than anybody reads, the first."""
    lines: list[str] = []
    for fault in faults:
        lines.append(f"\n  {fault.removeprefix(f'{where}: ')}")
        if sum(map(len, lines)) > _LISTED:
            break
    more = f"\n  ... and {len(faults) - len(lines)} more" if len(lines) < len(faults) else ""
    return f"{where}: {len(faults)} faults:{''.join(lines)}{more}"


def _read(entry: Any, number: int, taken: dict[str, str], config: Config, where: str) -> Experiment:
    """One entry; its name goes into `taken`, by what a file system may not tell apart."""
    at = f"{where}: entry {number}"
    if not isinstance(entry, Mapping):
        raise RaystarError(f"{at}: expected {_FORM}, found {show(entry)}")
    name = entry.get("name", _inner_name(entry.get("overrides")))
    if not isinstance(name, str):
        raise RaystarError(f"{at}: name: expected text, found {show(name)}")
    check_plain(name, f"{at}: name")
    for key in entry:
        if key not in _KEYS:
            raise RaystarError(f"{at} ({name}): unknown key {misspelt(key, _KEYS)}; expected {_FORM}")
    if (other := taken.get(name.casefold())) is not None:
        same = "another entry has it" if other == name else f"it differs from {other} in case alone"
        raise RaystarError(f"{at}: name {name}: {same}; choose another")
    taken[name.casefold()] = name
    if _DRAWN.fullmatch(name) or (_REPEAT.fullmatch(name) and _DRAWN.fullmatch(name.rpartition("-")[0])):
        raise RaystarError(f"{at}: name {name}: drawn trials and their repeats have such names; choose another")
    overrides = _overrides(entry.get("overrides"), config, f"{where}: {name}")
    changed = [key for key, value in overrides.items() if value != get_value(config, key)]
    if name.casefold() == _BASELINE and changed:
        raise RaystarError(
            f"{where}: {name}: the baseline is the configuration as it stands, but this one sets {', '.join(changed)}; "
            "choose another name"
        )
    return Experiment(name, overrides)


def _inner_name(overrides: Any) -> Any:
    """What a set of overrides calls the experiment itself, as in the configurations that users come with."""
    if not isinstance(overrides, Mapping):
        return None
    section = overrides.get("experiment")
    return overrides.get("experiment.name", section.get("name") if isinstance(section, Mapping) else None)


def _overrides(content: Any, config: Config, where: str) -> dict[str, Any]:
    """Overrides by dotted keys, without those that must be alike and are."""
    if content is not None and not isinstance(content, Mapping):
        raise RaystarError(f"{where}: overrides: expected keys and values, found {show(content)}")
    flat = _flat(content or {}, where)
    checked = override(config, flat, where)
    # A trial has its experiment's name, and its folder in the sweep's.
    values = {key: get_value(checked, key) for key in flat if not key.startswith("experiment.")}
    for key, value in list(values.items()):
        if (reason := why_alike(key, where)) is None:
            continue
        if key.partition(".")[0] not in _SAME_IS_NO_DIFFERENCE or value != get_value(config, key):
            raise RaystarError(f"{where}: {key}: cannot differ between trials, found {show(flat[key])}: {reason}")
        del values[key]
    return values


def _flat(content: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Dotted keys of raystar's. What lies in no section stays as it is, to be refused with the other unknown keys."""
    sections: dict[str, dict[str, Any]] = {}
    strangers: dict[str, Any] = {}
    for key, value in content.items():
        section, dot, name = key_text(key).partition(".")
        if not dot and not isinstance(value, Mapping):
            if section in SECTIONS:
                raise RaystarError(f"{where}: {section}: expected a section of keys, found {show(value)}")
            strangers[section] = value
            continue
        of = sections.setdefault(section, {})
        for inner, leaf in {name: value}.items() if dot else value.items():
            if key_text(inner) in of:
                raise RaystarError(f"{where}: {section}.{key_text(inner)} is written twice")
            of[key_text(inner)] = leaf
    ours = translate(sections, where, whole=False)
    return {f"{section}.{name}": value for section, keys in ours.items() for name, value in keys.items()} | strangers
