"""Names and values in Markdown: shown as they are, never taken for markup."""

from __future__ import annotations

import re
from collections.abc import Iterable

from raystar.base.names import shown

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# In the middle of a word an underscore means nothing, and names are full of them.
_MARKUP = re.compile(r"[\\`*\[\]#|~]|(?<![^\W_])_|_(?![^\W_])|[&<>]|(?<=www)\.|(?<=:)//", re.IGNORECASE)


def escaped(text: str) -> str:
    """A text within a paragraph, a heading or a table: the same characters when it is shown, on one line."""
    return _MARKUP.sub(_escape, _line(text))


def _escape(match: re.Match[str]) -> str:
    return _ENTITIES.get(match[0], "\\/\\/" if match[0] == "//" else f"\\{match[0]}")


def paragraphs(text: str) -> str:
    """A text of several lines, with its lines kept apart."""
    return "\n".join(map(escaped, text.splitlines()))


def code(text: str) -> str:
    """A text as a code span."""
    text = _line(text)
    marks = "`" * (_longest_run([text]) + 1)
    pad = " " if text[:1] in ("`", " ", "") or text[-1:] in ("`", " ") else ""
    return f"{marks}{pad}{text}{pad}{marks}"


def fence(texts: Iterable[str]) -> str:
    """What a block of code begins and ends with that holds such texts."""
    return "`" * max(3, _longest_run(texts) + 1)


def _longest_run(texts: Iterable[str]) -> int:
    return max((len(run) for text in texts for run in re.findall("`+", text)), default=0)


def _line(text: str) -> str:
    return " ".join(shown(text).splitlines())
