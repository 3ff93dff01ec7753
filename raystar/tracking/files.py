"""The files that records name, for a store that takes them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raystar.base.secrets import in_a_line, redact
from raystar.tracking.relay import Refused


@contextlib.contextmanager
def local_file(place: str, name: str = "picture") -> Iterator[Path]:
    """The file at `place` on this machine; what an fsspec URI means is fetched, under `name`."""
    if "://" not in place:
        if not Path(place).is_file():
            raise Refused(f"{place}: no such file")
        yield Path(place)
        return
    import fsspec

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        try:
            with fsspec.open(place, "rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        except (FileNotFoundError, ImportError, ValueError) as error:  # not there, or nothing here can read it
            raise Refused(f"{redact(place)}: {in_a_line(error)}") from None
        yield path
