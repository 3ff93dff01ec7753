"""Names of files, folders and domains, as people and other systems leave them."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from pathlib import Path

LONGEST = 255
"""Bytes of a name that file systems take."""

_SYSTEMS = frozenset(["@eadir", "__macosx", ".ipynb_checkpoints", "thumbs.db", "ehthumbs.db", "desktop.ini"])

_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that change the direction of what follows, and so could show another name."""


def composed(name: str) -> str:
    """A name with its accents composed (NFC): macOS writes é as two characters, and means the same name."""
    return unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """Equal for names that some file system takes for one: those that differ in capitals or composition alone."""
    return composed(composed(name).casefold())


def is_systems(name: str) -> bool:
    """Whether a file or folder holds what a system keeps beside its user's files: thumbnails, forks, old versions."""
    return name.casefold() in _SYSTEMS


def alike(folder: Path, name: str) -> list[str]:
    """What is there under a name, however it is composed; as a rule one entry or none.

    Raises:
        OSError: the folder cannot be read.
    """
    if name.isascii():
        return [name] if os.path.lexists(folder / name) else []
    return sorted(entry for entry in os.listdir(folder) if composed(entry) == composed(name))


def as_text(name: str) -> str:
    """A file's name as text that every program can read and write: composed, and `%E9` for a byte that is no UTF-8."""
    return composed("".join(f"%{ord(c) - 0xDC00:02X}" if "\udc80" <= c <= "\udcff" else c for c in name))


def shortened(name: str, longest: int) -> str:
    """A name of at most `longest` bytes: cut, with a mark of the whole at its end, where it has more."""
    raw = os.fsencode(name)
    if len(raw) <= longest:
        return name
    mark = f"~{hashlib.sha256(raw).hexdigest()[:8]}"
    return raw[: longest - len(mark)].decode(errors="ignore") + mark


def shown(text: str) -> str:
    """Text that a terminal shows and does not obey: `\\x1b` for a control character, `\\xe9` for a byte of no UTF-8.

    Line ends and tabs stay: messages have them.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(c: str) -> str:
    if "\udc80" <= c <= "\udcff":
        return f"\\x{ord(c) - 0xDC00:02x}"
    if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t") or c in _TURNS:
        return f"\\x{ord(c):02x}" if c <= "\xff" else f"\\u{ord(c):04x}"
    return c
