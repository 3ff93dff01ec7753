"""`python -m raystar.config`: a configuration as raystar reads it, and where each value comes from."""

from __future__ import annotations

import argparse

from raystar.base.console import run_cli
from raystar.config.load import Origins, request_config, to_mapping
from raystar.config.strict_yaml import dump_yaml

_DEFAULT = "raystar's default"
_WIDEST = 60  # characters before the remarks of a section


def main(argv: list[str] | None = None) -> int:
    """`python -m raystar.config`."""
    parser = argparse.ArgumentParser(
        prog="python -m raystar.config",
        description="Prints a configuration as raystar reads it: every key, its value, and where that comes from. What "
        "is printed is a configuration itself.",
    )
    parser.add_argument("file", metavar="FILE", help="raystar's or latent_cyclegan's")
    parser.add_argument("--overlay", metavar="FILE", action="append", default=[], help="as for train; repeatable")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="as for train; repeatable")
    args = parser.parse_args(argv)
    origins: Origins = {}
    mapping = to_mapping(request_config(args.file, args.overlay, args.set, origins=origins))
    print(f"# {args.file}, as raystar reads it", end="")
    for section, content in mapping.items():
        print(f"\n{section}:")
        lines = {key: f"  {key}: {_value(value)}" for key, value in content.items()}
        width = min(_WIDEST, max(map(len, lines.values())))
        for key, line in lines.items():
            print(f"{line:{width}}  # {origins.get(f'{section}.{key}', _DEFAULT)}")
    return 0


def _value(value: object) -> str:
    """A value as YAML, on one line."""
    if isinstance(value, list):
        return dump_yaml(value, default_flow_style=True, width=10_000).strip()
    return dump_yaml({"key": value}, width=10_000).partition(": ")[2].strip()


if __name__ == "__main__":
    run_cli(main)
