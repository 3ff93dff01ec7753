"""A copy of what a command prints, in a file, as lines."""

from __future__ import annotations

import contextlib
import sys
import threading
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from raystar.base.console import last_words
from raystar.base.errors import RaystarError


class Transcript:
    """Copies what this process prints on stdout and stderr, from its entering to its leaving; also what ends it.

    Lines are kept until `write_to` says where they go, and are written from then on as they end. Of a line that is
    rewritten in place, such as a progress bar, the copy has what stood there last.
    """

    def __init__(self) -> None:
        self._kept: list[str] = []
        self._wanted = True
        self._file: RawIOBase | None = None
        self._lock = threading.Lock()
        self._streams: tuple[_Copied, ...] = ()

    def __enter__(self) -> Transcript:
        self._streams = (_Copied(sys.stdout, self), _Copied(sys.stderr, self))
        sys.stdout, sys.stderr = self._streams
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        out, err = self._streams
        # Whoever has replaced them meanwhile puts back what there was.
        if sys.stdout is out:
            sys.stdout = out.stream
        if sys.stderr is err:
            sys.stderr = err.stream
        for stream in self._streams:
            stream.end_line()
        if error is not None and (text := last_words(error)):
            self.lines(text.splitlines())
        with self._lock:
            self._wanted = False
            if self._file is not None:
                self._file.close()
                self._file = None

    def write_to(self, path: str | None, key: str) -> None:
        """Appends the copy to the file from now on, with what was printed until now; without a path nothing is copied.

        Args:
            path: its folders are made.
            key: what named it, for errors.

        Raises:
            RaystarError: it cannot be written.
        """
        if not path:
            with self._lock:
                self._wanted = False
                self._kept.clear()
            return
        try:
            place = Path(path).expanduser()
            place.parent.mkdir(parents=True, exist_ok=True)
            self._file = place.open("ab", buffering=0)
        except (OSError, ValueError, RuntimeError) as error:
            raise RaystarError(f"{key}: {path} cannot be written: {error}; name another file, or none") from None
        kept, self._kept = self._kept, []
        self.lines(kept)

    def lines(self, lines: list[str]) -> None:
        """Takes in whole lines. One that finds no room, as on a full disk, is lost and costs no work."""
        with self._lock:
            if self._file is not None:
                text = "".join(f"{line.rstrip()}\n" for line in lines)
                with contextlib.suppress(OSError):
                    self._file.write(text.encode(errors="backslashreplace"))
            elif self._wanted:
                self._kept += lines


class _Copied:
    """A stream that also hands the lines that it is given to a transcript."""

    def __init__(self, stream: TextIO, transcript: Transcript) -> None:
        self.stream = stream
        self._transcript = transcript
        self._begun = ""  # of the current line, what stands there
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Prints the text, and copies the lines that it ends."""
        written = self.stream.write(text)
        with self._lock:
            *lines, begun = (self._begun + text).split("\n")
            self._begun = _standing(begun)
            if lines:
                self._transcript.lines([_standing(line).rstrip("\r") for line in lines])
        return written

    def end_line(self) -> None:
        """Copies the line that nothing has ended."""
        if begun := self._begun.strip():
            self._transcript.lines([begun])
        self._begun = ""


def _standing(line: str) -> str:
    """What a line shows that is rewritten from its start at every carriage return; a last one is kept."""
    shown = line.rstrip("\r")
    return shown.rpartition("\r")[2] + line[len(shown) :][:1]
