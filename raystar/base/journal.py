"""Append-only JSON lines that outlive their process, and what waits while the disk is full."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raystar.base.files import sync_folder, wait_for_space

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16


class Journal:
    """Append-only JSON lines: a record is with the operating system once `append` returns, on the disk after `sync`.

    A line that a killed process left unfinished is not read, and is cut off before the next one is written. On a full
    disk, writing waits. Threads may share a journal; of the processes, one writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._lock = threading.Lock()

    def append(self, record: Mapping[str, Any]) -> int:
        """Writes one record, whole or not at all; returns the offset behind it."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            return wait_for_space(self.path, lambda: self._write(line))

    def sync(self) -> None:
        """Returns once what was appended survives a power cut."""
        if not self.path.exists():
            return
        with self._lock:
            file = os.dup(wait_for_space(self.path, self._opened))
        try:  # without the lock: a slow disk holds up who syncs, not who appends
            wait_for_space(self.path, lambda: os.fsync(file))
        finally:
            os.close(file)

    def close(self) -> None:
        """Gives the file back; the next `append` opens it again."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records, oldest first."""
        return (record for record, _ in self.read())

    def read(self, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """The records from the offset `start` on, each with the offset behind it; none where there is no file.

        A damaged line between whole ones (a power cut may leave one) is logged and left out.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                start += len(line)
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict):
                        yield record, start
                        continue
                logger.warning(f"{self.path}: the line that ends at byte {start} is damaged and left out")

    def _opened(self) -> int:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(file, _end_of_lines(file))
            if new:
                sync_folder(self.path.parent)
            self._file = file
        return self._file

    def _write(self, line: bytes) -> int:
        file = self._opened()
        end = os.lseek(file, 0, os.SEEK_END)
        try:
            remaining = memoryview(line)
            while remaining:  # a disk that fills up takes a part first
                remaining = remaining[os.write(file, remaining) :]
        except BaseException:
            os.ftruncate(file, end)
            raise
        return end + len(line)


def _end_of_lines(file: int) -> int:
    """The offset behind the last line that was written whole."""
    end = os.lseek(file, 0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
