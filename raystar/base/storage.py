"""Where trials keep their files: a folder, or anything that fsspec reaches (`s3://bucket/sweeps`).

A file is there whole or not at all: on a file system it is written under another name, flushed to the disk and
renamed; object stores show an upload only once it is complete. A disk that is full makes a write wait.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from raystar.base.errors import RaystarError
from raystar.base.files import found_in
from raystar.base.secrets import redact


class Storage:
    """A folder; names are relative to it, with `/` between their parts.

    Args:
        uri: a path, made absolute, or an fsspec URI.

    Raises:
        RaystarError: a kind of storage that is unknown, or whose package is missing.
    """

    def __init__(self, uri: str) -> None:
        try:
            self._fs, root = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError, OSError) as error:
            raise RaystarError(
                f"--storage {redact(uri)}: expected a path or an fsspec URI whose package is installed: {error}"
            ) from None
        self.path: Path | None = Path(root) if isinstance(self._fs, LocalFileSystem) else None
        """The folder, where it lies on a file system."""
        self.uri = str(self.path) if self.path is not None else uri.rstrip("/")
        self._root = root.rstrip("/")

    def child(self, name: str) -> Storage:
        """A folder inside this one."""
        return Storage(f"{self.uri}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, replacing one of the same name."""

        def fill(path: Path) -> None:
            path.write_bytes(data)

        self.fill(name, fill)

    def fill(self, name: str, write: Callable[[Path], None]) -> None:
        """Has `write` make the file, at a path that it is given."""
        if self.path is None:
            with tempfile.TemporaryDirectory(prefix="raystar-") as folder:
                local = Path(folder) / PurePosixPath(name).name
                write(local)
                self._fs.makedirs(str(PurePosixPath(self._at(name)).parent), exist_ok=True)
                self._fs.put_file(str(local), self._at(name))
            return
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        """A file's content. FileNotFoundError where there is none."""
        return bytes(self._fs.cat_file(self._at(name)))

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A file as a path: its own, or that of a copy that is gone afterwards."""
        if self.path is not None:
            yield self.path / name
            return
        with tempfile.TemporaryDirectory(prefix="raystar-") as folder:
            copy = Path(folder) / PurePosixPath(name).name
            self._fs.get_file(self._at(name), str(copy))
            yield copy

    def list(self, folder: str = "") -> list[str]:
        """Names of the files in `folder`, sorted and without it; empty where there is no such folder."""
        self._fs.invalidate_cache()  # object stores remember listings, and others write here too
        try:
            paths: list[Any] = self._fs.ls(self._at(folder), detail=False)
        except FileNotFoundError:
            return []
        names = (PurePosixPath(path).name for path in paths)
        return sorted(name for name in names if not name.startswith("."))

    def delete(self, name: str) -> None:
        """Removes a file, if it is there."""
        try:
            self._fs.rm_file(self._at(name))
        except FileNotFoundError:
            return

    def tidy(self, folder: str) -> None:
        """Removes what processes that were killed had not written whole."""
        if self.path is not None:
            for remnant in (self.path / folder).glob(".*.part*"):
                remnant.unlink(missing_ok=True)

    def at(self, name: str) -> str:
        """A file's path or URI, for whoever opens it elsewhere."""
        return f"{self.uri}/{name}"

    def names(self, places: Mapping[str, str]) -> dict[str, str]:
        """Files of this folder by their names, given what `at` said of each; others as they are."""
        return {key: place.removeprefix(f"{self.uri}/") for key, place in places.items()}

    def places(self, names: Mapping[str, str]) -> dict[str, str]:
        """The paths or URIs of what `names` gave. Earlier versions recorded paths, and the folder may have moved."""
        return {key: self._place(name) for key, name in names.items()}

    def _place(self, name: str) -> str:
        if "://" in name:
            return name
        if PurePosixPath(name).is_absolute():
            return found_in(name, self.path) if self.path is not None else name
        return self.at(name)

    def free_bytes(self) -> int | None:
        """Room that is left; None where it cannot be known."""
        if self.path is None:
            return None
        folder = self.path
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root
