"""YAML and JSON read strictly: no key twice, nothing that grows beyond its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import yaml

import raystar
from raystar.base.errors import RaystarError, nearest, show
from raystar.base.files import is_file, is_folder

MAX_FILE_BYTES = 1_000_000
"""A configuration or space file is text written by hand; anything larger is the wrong file."""

MAX_NODES, MAX_DEPTH, MAX_SCALAR = 10_000, 32, 10_000
"""Values in one file; levels of them; characters of one."""


class StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, since the second would silently win, and files without measure.

    Aliases (`*name`) and merges (`<<`) are refused: with them a small file can claim more than the memory holds, and no
    file of this project's needs them.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node, counted."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            _refuse(f"*{event.anchor}: aliases are not read; write the value out", event.start_mark)
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        if self._nodes > MAX_NODES:
            _refuse(f"more than {MAX_NODES} values", event.start_mark)
        if self._depth > MAX_DEPTH:
            _refuse(f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR:
            _refuse(f"a value of over {MAX_SCALAR} characters", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; PyYAML raises nearly anything at a text that is not of its `!!type`."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            _refuse(f"no {kind} that can be read: {show(node.value)}", node.start_mark)


def _refuse(words: str, mark: Any) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, words, mark) from None


def _mapping_without_duplicates(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            _refuse("<<: merges are not read; write the keys out", key_node.start_mark)
        key = loader.construct_object(key_node, deep=True)
        try:
            repeated = key in mapping
        except TypeError:
            _refuse(f"a key must be text, found {show(key)}", key_node.start_mark)
        if repeated:
            _refuse(f"key {show(key)} is written twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


class _PlainDumper(yaml.SafeDumper):
    """Writes a value anew wherever it stands: `parse_yaml` reads no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_yaml(content: Any, **style: Any) -> str:
    """`content`, plain data, as YAML that `parse_yaml` reads back equal, keys in their order."""
    style = {"sort_keys": False, "allow_unicode": True} | style
    return str(yaml.dump(content, None, _PlainDumper, **style))


def parse_yaml(text: str) -> Any:
    """A YAML document; raises `yaml.YAMLError` for what is none, or says something twice."""
    return yaml.load(text, Loader=StrictLoader)


def _pairs_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"key {show(key)} is written twice")
        mapping[key] = value
    return mapping


def _parse_json(text: str) -> Any:
    """JSON is nearly YAML, but a YAML parser takes the two halves of an escaped emoji for two characters."""
    return json.loads(text, object_pairs_hook=_pairs_without_duplicates)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Reads a YAML or JSON file that holds one mapping.

    Raises:
        RaystarError: missing, unreadable, over a megabyte, not YAML, a key twice, or not a mapping.
    """
    path = Path(path)
    if not is_file(path):
        actual = "a folder" if is_folder(path) else "nothing"
        near = nearest(path.name, _names_in(path.parent)) if is_folder(path.parent) else ""
        raise RaystarError(f"{path}: expected a YAML or JSON file, found {actual}{near}")
    kind, parse = ("JSON", _parse_json) if path.suffix == ".json" else ("YAML", parse_yaml)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise RaystarError(f"{path}: {path.stat().st_size} bytes is no configuration (limit {MAX_FILE_BYTES})")
        content = parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RaystarError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RaystarError(f"{path}: not readable as text: {error}") from None
    except RecursionError:
        raise RaystarError(f"{path}: not readable as {kind}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RaystarError(f"{path}: not readable as {kind}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RaystarError(f"{path}: expected a mapping at the top, found {show(content)}")
    return content


def _names_in(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if is_file(path)]
    except OSError:
        return []


def find_shipped(path: str | Path) -> Path:
    """`path` itself, or the file of that name that ships with raystar when the working folder has none."""
    path = Path(path)
    if is_file(path) or is_folder(path) or path.is_absolute():
        return path
    package = Path(raystar.__file__).resolve().parent
    for root in (package.parent, package):  # a clone; an installed wheel
        if is_file(root / path):
            return root / path
    return path
