"""Commands that are printed to be run: each word as a shell reads it back."""

from __future__ import annotations

import shlex
from pathlib import Path


def command(verb: str, *options: tuple[str, object]) -> str:
    """`python -m raystar.VERB` with its options, to be pasted into a shell.

    Args:
        options: a flag with its value each. One that begins with a dash is joined to its flag, which else takes none.
    """
    return shlex.join(["python", "-m", f"raystar.{verb}", *(word for option in options for word in _words(*option))])


def below(flag: str, runs: Path) -> list[tuple[str, object]]:
    """The option that names the folder of runs, where it is not the commands' default."""
    return [] if runs == Path("runs") else [(flag, runs)]


def _words(flag: str, value: object) -> list[str]:
    text = str(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]
