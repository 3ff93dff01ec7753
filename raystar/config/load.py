"""The configuration tree: every key of the specification, what raystar adds, and a loader that forgives nothing.

A configuration is a tree of frozen dataclasses. Reading a file, a `--set key=value` and a value drawn by the
search all go through the same check, so a misspelt key or an impossible value never reaches a trial.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from raystar.base.errors import RaystarError, key_text, misspelt, show
from raystar.base.names import composed
from raystar.config.assignment import parse_assignment
from raystar.config.problems import check_limits, convert
from raystar.config.schema import HINTS, SECTIONS, Config, key_field, known_keys
from raystar.config.strict_yaml import (
    dump_yaml,
    find_shipped,
    read_mapping,
)
from raystar.config.users import FILE, translate

logger = logging.getLogger(__name__)

_LISTED = 1500  # characters of unknown names of a kind in one message


Origins = dict[str, str]
"""By dotted key, where its value comes from, in words; a key that is not among them has raystar's default."""


def load_config(path: str | Path, base: Config | None = None, origins: Origins | None = None) -> Config:
    """Reads a configuration file; keys that it leaves out keep those of `base`, by default the defaults.

    Args:
        origins: takes where each key's value comes from.

    Raises:
        RaystarError: file, dotted key, what was found, what was expected and the nearest known key.
    """
    mapping = translate(read_mapping(path), str(path), whole=base is None, origins=origins)
    return from_mapping(mapping, str(path), base)


def request_config(
    path: str | Path | None,
    overlays: Sequence[str],
    assignments: Sequence[str],
    *,
    base: Config | None = None,
    origins: Origins | None = None,
) -> Config:
    """A command line's configuration: `--config`, then each `--overlay` file, then each `--set key=value`.

    Args:
        path: `--config`; None for `base`.
        base: the configuration inside of a checkpoint, where no file is named.
        origins: takes where each key's value comes from.
    """
    origins = {} if origins is None else origins
    config = load_config(find_shipped(path), origins=origins) if path is not None else base or Config()
    for overlay in overlays:
        told: Origins = {}
        config = load_config(find_shipped(overlay), config, told)
        origins.update(dict.fromkeys(told, str(overlay)))
    assigned = dict(parse_assignment(text) for text in assignments)
    origins.update(dict.fromkeys(assigned, "--set"))
    config = assign(config, assigned, "--set")
    root = config.data.eval_data_root
    moved = origins.get("data.data_root", FILE) != FILE and origins.get("data.eval_data_root", FILE) == FILE
    if moved and root is not None and not Path(root).expanduser().exists():
        logger.warning(
            f"data.eval_data_root: {root} is not there, and other latents than the file's are used: held out is a "
            "share of these (data.holdout)"
        )
        config = override(config, {"data.eval_data_root": None})
        origins["data.eval_data_root"] = f"none, since {root} is not there and data.data_root is another"
    return config


def assign(config: Config, values: Mapping[str, Any], source: str) -> Config:
    """`config` with dotted keys replaced, which may be spelt as that trainer's files spell them; see `override`."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if not dot:
            return override(config, values, source)  # which refuses it
        sections.setdefault(section, {})[name] = value
    return from_mapping(translate(sections, source, whole=False), source, config)


def from_mapping(mapping: Mapping[Any, Any], source: str, base: Config | None = None) -> Config:
    """`base` (by default the defaults) with nested sections, as read from `source`, the name that errors give."""
    flat: dict[str, Any] = {}
    strangers = [section for section in mapping if section not in SECTIONS]
    for section, content in mapping.items():
        if content is None or section in strangers:
            continue
        if not isinstance(content, Mapping):
            raise RaystarError(f"{source}: {section}: expected a section of keys, found {show(content)}")
        flat.update({f"{section}.{key_text(name)}": value for name, value in content.items()})
    _check_names(strangers, flat, source)
    return override(Config() if base is None else base, flat, source)


def _check_names(sections: Sequence[Any], values: Collection[Any], source: str) -> None:
    """Refuses unknown sections and keys, all in one message, so that a file is corrected once."""
    known = known_keys()
    faults = [("section", sections, SECTIONS), ("key", [k for k in map(key_text, values) if k not in known], known)]
    if texts := [_listed(what, names, among) for what, names, among in faults if names]:
        raise RaystarError(f"{source}: unknown {'; unknown '.join(texts)}")


def _listed(what: str, names: Sequence[Any], known: Collection[str]) -> str:
    """`keys 'a', 'b' (did you mean 'c'?)`; of more than anybody reads, the first."""
    texts: list[str] = []
    for name in names:
        texts.append(misspelt(name, known))
        if sum(map(len, texts)) > _LISTED:
            break
    more = f" and {len(names) - len(texts)} more" if len(texts) < len(names) else ""
    return f"{what}{'s' if len(names) > 1 else ''} {', '.join(texts)}{more}"


def override(config: Config, values: Mapping[str, Any], source: str = "override") -> Config:
    """`config` with dotted keys replaced, each value checked.

    Args:
        values: for example `{"loss.w_cyc": 2.0}`.
        source: where the values came from, named in errors.

    Raises:
        RaystarError: an unknown key, a wrong type, an impossible value, or values that contradict each other.
    """
    _check_names([], values, source)
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        key = key_text(key)
        checked = check_value(key, value, source)
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = checked
    changed = {name: dataclasses.replace(getattr(config, name), **new) for name, new in sections.items()}
    config = dataclasses.replace(config, **changed)
    _check_whole(config, source)
    return config


def _check_whole(config: Config, source: str) -> None:
    n = config.model.num_domains
    if n is not None and n != config.num_domains:
        raise RaystarError(
            f"{source}: model.num_domains is {n}, but data.domains names {config.num_domains}: "
            f"{', '.join(config.data.domains)}"
        )
    model = config.model
    for key, groups in (("num_groups", model.num_groups), ("encoder_groups", model.encoder_groups)):
        if model.norm == "adagn" and groups is not None and model.base_dim % groups:
            raise RaystarError(
                f"{source}: model.{key} {groups} does not divide model.base_dim {model.base_dim}, as model.norm adagn "
                "needs; change one of them"
            )
    samples = config.data.max_samples
    if isinstance(samples, tuple) and len(samples) != config.num_domains:
        raise RaystarError(
            f"{source}: data.max_samples: expected one number, or one for each of the {config.num_domains} domains "
            f"({', '.join(config.data.domains)}), found {len(samples)}"
        )
    training = config.training
    if training.drop_last and training.epoch_size is not None and training.epoch_size < training.batch_size:
        raise RaystarError(
            f"{source}: training.epoch_size {training.epoch_size} is below training.batch_size "
            f"{training.batch_size}, so an epoch would have no step; raise it or set training.drop_last=false"
        )


# -- checking one value ----------------------------------------------------------------------------


def check_value(key: str, value: Any, source: str) -> Any:
    """`value` converted to the type of `key`; `RaystarError` with what was expected if it cannot be."""
    spec = key_field(key, source)
    section = key.partition(".")[0]
    hint = HINTS[SECTIONS[section]][spec.name]
    if key == "visualization.vae_subfolder" and value == "":
        value = None
    try:
        checked = convert(hint, value)
        check_limits(checked, spec.metadata["limits"])
        if key == "data.domains":
            checked = tuple(map(composed, checked))
            _check_domains(checked)
        if key == "loss.ds_decay_epochs" and isinstance(checked, float) and checked > 1:
            raise ValueError("expected a whole number of epochs, or a share of the run below 1")
    except ValueError as error:
        raise RaystarError(f"{source}: {key}: {error}, found {show(value)} ({spec.metadata['meaning']})") from None
    return checked


def _check_domains(domains: tuple[str, ...]) -> None:
    if len(domains) < 2:
        raise ValueError("expected at least two domains")
    if len(set(domains)) < len(domains):
        raise ValueError("expected each domain once")
    for name in domains:
        if not name.strip() or name in (".", "..") or re.search(r"[/\0]", name):
            raise ValueError(f"expected names of folders directly below data.data_root, not {name!r}")


# -- writing ---------------------------------------------------------------------------------------


def to_mapping(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain dictionaries, lists and scalars: what `from_mapping` reads."""
    return {
        section: {key: plain(value) for key, value in content.items()}
        for section, content in dataclasses.asdict(config).items()
    }


def plain(value: Any) -> Any:
    """A key's value as files have it: a list where the configuration, which never changes, has a tuple."""
    return list(value) if isinstance(value, tuple) else value


def to_yaml(config: Config) -> str:
    """The configuration as a YAML file that `load_config` reads back equal."""
    return dump_yaml(to_mapping(config))


def overlay_yaml(values: Mapping[str, Any]) -> str:
    """Dotted keys as a YAML file for `--overlay`."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return dump_yaml(sections)


def get_value(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def signature(config: Config) -> str:
    """Twelve hex digits over every key that changes the result (not display, logging or paths)."""
    kept = {key: get_value(config, key) for key in known_keys() if key_field(key, "").metadata["result"]}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
