"""YAML that raystar writes is YAML that it reads: nothing is written as an alias."""

from __future__ import annotations

from raystar.config.strict_yaml import dump_yaml, parse_yaml


def test_what_stands_twice_is_written_twice() -> None:
    values = ["a", "ü # 1", "1999", "\u2028"]
    content = {"b": values, "a": {"again": values, "none": None}}
    text = dump_yaml(content)
    assert "*" not in text
    assert parse_yaml(text) == content
    assert list(parse_yaml(text)) == ["b", "a"]
