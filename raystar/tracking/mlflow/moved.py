"""A SQLite store that was moved or copied with its runs folder: it names the old place of its artifacts, whole.

MLflow has no call that changes where an experiment, a run or a model keeps its files, so this writes to the tables. It
happens while the store is opened, in one transaction, and to nothing but what provably lay in this very folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from raystar.base.errors import RaystarError
from raystar.base.secrets import redact
from raystar.tracking.tracker import CHECKPOINT

logger = logging.getLogger(__name__)

ARTIFACTS = "artifacts"
"""Name of the folder of a local store's files, in the runs folder."""

_WAIT_S = 20.0
_PLACES = (
    ("runs", "run_uuid", "artifact_uri"),
    ("logged_models", "model_id", "artifact_location"),
    ("model_versions", "rowid", "source"),
    ("model_versions", "rowid", "storage_location"),
)
"""Tables, their keys, and the columns that hold places."""


def settle(file: Path, artifacts: Path) -> None:
    """Has a store name the places where its files lie now.

    An experiment that keeps its files elsewhere began in this folder when that lay there if a store at the old place
    has it as well (this one is a copy), or if files of its runs are here. It goes on here then, and its runs and models
    are found here; what is only at the old place stays there.

    Args:
        file: the store; nothing happens to one that does not lie in the runs folder, beside `artifacts` or deeper.

    Raises:
        sqlite3.Error: the store cannot be read or written, or another process keeps it locked.
    """
    here, store = artifacts.resolve(), file.resolve()
    if not store.is_file() or not store.is_relative_to(here.parent):
        return
    with contextlib.closing(sqlite3.connect(store, timeout=_WAIT_S, isolation_level=None)) as database:
        if not _moved(database, store, here):
            return
        database.execute("BEGIN IMMEDIATE")
        olds = _moved(database, store, here)  # another process may have been faster
        for old in olds:
            _rewrite(database, old, here)
        database.execute("COMMIT")
    for old in olds:
        logger.warning(f"{here.parent} lay in {Path(_path(old)).parent} before; its MLflow store names this place now")


def check_place(uri: str, experiment: Any) -> None:
    """Refuses an experiment of a local store whose files would make a folder anew that is gone.

    Raises:
        RaystarError: where they are to lie, and what to do.
    """
    place = Path(_path(experiment.artifact_location or ""))
    if uri.startswith("sqlite") and place.is_absolute() and not place.parent.is_dir():
        raise RaystarError(
            f"the MLflow store at {redact(uri)}: experiment {experiment.name} keeps its files in {place}, and "
            f"{place.parent} is not there; put it back, or choose another experiment with MLFLOW_EXPERIMENT_NAME"
        )


def _moved(database: sqlite3.Connection, store: Path, here: Path) -> list[str]:
    """The old locations, of experiments that lay in this folder when it was elsewhere."""
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables >= {"experiments", "tags", *(table for table, _, _ in _PLACES)}:
        return []  # of a version that MLflow brings up to date first, or does not know
    rows = database.execute("SELECT experiment_id, name, creation_time, artifact_location FROM experiments").fetchall()
    found = []
    for number, name, created, location in rows:
        old = Path(_path(location or ""))
        if old.name != here.name or not old.is_absolute() or old == here:
            continue
        if _is_old(database, store, here, old, (number, name, created, location)):
            found.append(location)
    return list(dict.fromkeys(found))


def _is_old(
    database: sqlite3.Connection, store: Path, here: Path, old: Path, experiment: tuple[int, str, int, str]
) -> bool:
    """Whether `old` was the folder `here` when this store lay beside it."""
    original = old.parent / store.relative_to(here.parent)
    if original.is_file():
        return not original.samefile(store) and _has(original, experiment)
    uris = [
        uri for (uri,) in database.execute("SELECT artifact_uri FROM runs WHERE experiment_id = ?", (experiment[0],))
    ]
    if uris:
        return any(new.is_dir() for uri in uris if (new := _here(uri or "", experiment[3], here)) is not None)
    return not old.exists()


def _has(original: Path, experiment: tuple[int, str, int, str]) -> bool:
    """Whether a store at the old place has the same experiment, so that this one is its copy."""
    query = "SELECT experiment_id, name, creation_time, artifact_location FROM experiments WHERE experiment_id = ?"
    with contextlib.closing(sqlite3.connect(f"{original.as_uri()}?mode=ro", uri=True, timeout=_WAIT_S)) as database:
        try:
            return bool(database.execute(query, (experiment[0],)).fetchone() == experiment)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise
            return False  # another kind of file


def _rewrite(database: sqlite3.Connection, old: str, here: Path) -> None:
    for table, key, column in _PLACES:
        for row, place in list(_below(database, table, key, column, f"{old}/")):
            new = _here(place, old, here)
            if new is not None and _is_here(new, Path(_path(place))):
                value = here.as_uri() + place[len(old) :]
                database.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (value, row))
    runs, before = here.parent, Path(_path(old)).parent
    if all(map(_is_text, (runs, before))):
        for row, place in list(_below(database, "tags", "rowid", "value", f"{before}/")):
            new = runs / Path(place).relative_to(before)
            if _is_here(new, Path(place)):
                database.execute("UPDATE tags SET value = ? WHERE rowid = ? AND key = ?", (str(new), row, CHECKPOINT))
    database.execute(
        "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (here.as_uri(), old)
    )  # fmt: skip


def _below(
    database: sqlite3.Connection, table: str, key: str, column: str, prefix: str
) -> Iterator[tuple[str | int, str]]:
    """Keys and places of a table that begin with `prefix`."""
    query = f"SELECT {key}, {column} FROM {table} WHERE substr({column}, 1, ?) = ?"
    yield from database.execute(query, (len(prefix), prefix))


def _is_text(path: Path) -> bool:
    """Whether a table can hold a path; one that is no UTF-8 stands in none."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_here(new: Path, old: Path) -> bool:
    """What is nowhere yet is to be written here."""
    return new.exists() or not old.exists()


def _here(place: str, old: str, here: Path) -> Path | None:
    """Where the files of a place below the location `old` lie now; None for another place."""
    if not place.startswith(f"{old}/"):
        return None
    return here / os.fsdecode(unquote_to_bytes(place[len(old) + 1 :]))


def _path(location: str) -> str:
    """The path of a `file:` location; empty for any other."""
    parts = urlsplit(location)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        return ""
    return os.fsdecode(unquote_to_bytes(parts.path))
