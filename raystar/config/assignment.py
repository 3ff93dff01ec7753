"""`--set key=value`: what a value means by its key's type, and how a value is spelled so that it is read back equal."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

import yaml

from raystar.base.errors import RaystarError, key_text
from raystar.config.schema import HINTS, SECTIONS
from raystar.config.strict_yaml import dump_yaml, parse_yaml

SET_HELP = "override a configuration key: text as it is written, names as [photo, monet], the rest as YAML"
"""Of the commands that take `--set`."""

_QUOTED = r""""(?:[^"\\]|\\.)*"|'(?:[^']|'')*'"""
_ITEM = re.compile(rf"\s*(?:({_QUOTED})|([^\s,\[\]{{}}\"'][^,\[\]{{}}]*?))\s*(?:,|\Z)", re.DOTALL)
_TEXT, _NAMES = "text", "names"


def parse_assignment(text: str) -> tuple[str, Any]:
    """Splits a `--set` argument `key=value` and reads the value as its key's type has it.

    - Text is what is written, to the letter; but `null` or nothing is None for a key that may be null, and a value in
      quotes as a whole is what the quotes enclose, as in YAML.
    - Names are `[one, two words, 'one, with a comma']`: each is what is written, without the spaces around it, or what
      its quotes enclose. Those with `,`, `[`, `]`, `{`, `}` or a quote at their beginning need quotes.
    - Everything else is read as YAML.

    Raises:
        RaystarError: no `key=value`, or a value that cannot be read.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RaystarError(f"--set {key_text(text)}: expected key=value, for example --set loss.w_cyc=2.0")
    kind, nullable = _kind(key)
    if kind == _TEXT:
        return key, None if nullable and value in ("", "null") else _unquoted(value)
    if kind == _NAMES and (names := _names(value.strip())) is not None:
        return key, names
    try:
        return key, parse_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        listed = "" if kind != _NAMES else " as a list of names, [one, two, 'three, with a comma']"
        raise RaystarError(f"--set {key_text(text)}: the value cannot be read{listed or ' as YAML'}") from None


def assignment(key: str, value: Any) -> str:
    """`key=value` as `--set` takes it, in one line of printable characters.

    Args:
        key: a dotted key that is known.
        value: one that the key may have.
    """
    kind, _ = _kind(key)
    if kind == _TEXT and isinstance(value, str):
        plain = f"{key}={value}"
        return plain if value.isprintable() and parse_assignment(plain)[1] == value else f"{key}={_quoted(value)}"
    if kind == _NAMES:
        return f"{key}=[{', '.join(map(_item, value))}]"
    value = list(value) if isinstance(value, tuple) else value
    text = dump_yaml(value, default_flow_style=True, width=10**9)
    return f"{key}={text.strip().removesuffix('...').strip()}"


def _kind(key: str) -> tuple[str, bool]:
    """Whether a key's values are text or names, or something else; and whether it may be null."""
    section, _, name = key.partition(".")
    hint = HINTS[SECTIONS[section]].get(name) if section in SECTIONS else None
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    nullable = types.NoneType in options
    if any(option is str or typing.get_origin(option) is Literal for option in options):
        return _TEXT, nullable
    return (_NAMES if tuple[str, ...] in options else ""), nullable


def _names(text: str) -> list[str] | None:
    """The names of `[one, two]`; None if this is no such list."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    inner, place, names = text[1:-1].strip(), 0, []
    while place < len(inner):
        item = _ITEM.match(inner, place)
        if item is None:
            return None
        names.append(_unquoted(item[1]) if item[1] is not None else item[2])
        place = item.end()
    return names


def _unquoted(text: str) -> str:
    """What quotes around the whole of a text enclose, or the text as it is."""
    if not re.fullmatch(_QUOTED, text, re.DOTALL):
        return text
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    try:
        return str(json.loads(text, strict=False))
    except ValueError:
        pass
    try:
        return str(parse_yaml(text))  # which knows more escapes
    except (yaml.YAMLError, ValueError):
        return text


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _item(name: str) -> str:
    alone: Sequence[str] | None = _names(f"[{name}]") if name.isprintable() else None
    return name if alone == [name] else _quoted(name)
