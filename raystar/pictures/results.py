"""Where translated pictures go: every path is planned, and looked at, before the first is written."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from raystar.base.errors import RaystarError
from raystar.base.files import is_folder
from raystar.base.names import LONGEST, folded, shortened

_LONGEST_PATH = 4095  # bytes that Linux takes


class Task(NamedTuple):
    """One input and where its results go, one for each seed."""

    source: Path
    results: list[Path]
    strip: Path | None
    """Where the strip for comparing them goes."""

    @property
    def paths(self) -> list[Path]:
        """All that is written for the input."""
        return [*self.results, *([self.strip] if self.strip is not None else [])]


def into_folder(
    out: Path, sources: Sequence[Path], names: Sequence[str], ends: Sequence[str], kind: str, strips: bool
) -> list[Task]:
    """`<out>/<path below the input><end><kind>` for each input and end; no path twice, also not in other capitals.

    `a.jpg` becomes `a.png`. Where two inputs would come to one result, or to another's strip, they keep their suffixes
    (`a.jpg.png`), or get a mark. A name that is too long is cut and gets a mark.

    Args:
        names: of the inputs, below theirs; with `/` between their parts.
        ends: what tells results of one input from each other, such as `_seed1`.
        kind: suffix of the results.
        strips: whether there is a strip beside each input's results.
    """
    bare = [str(PurePosixPath(name).with_suffix("")) for name in names]
    counts = Counter(map(folded, bare))
    taken = {folded(str(folder)) for name in names for folder in PurePosixPath(name).parents}  # no file is called so
    tails = [f"{end}{kind}" for end in ends] + (["_compare.png"] if strips else [])
    tasks = []
    for source, name, stem in zip(sources, names, bare, strict=True):
        for candidate in _candidates(name, None if counts[folded(stem)] > 1 else stem):
            path = PurePosixPath(candidate)
            last = shortened(path.name, LONGEST - max(map(len, tails)))
            planned = [str(path.with_name(last)) + tail for tail in tails]
            keys = set(map(folded, planned))
            if len(keys) == len(planned) and not keys & taken:
                break
        taken |= keys
        paths = [out / place for place in planned]
        tasks.append(Task(source, paths[: len(ends)], paths[-1] if strips else None))
    return tasks


def _candidates(name: str, stem: str | None) -> Iterator[str]:
    """What an input's results may be called, the simplest first; one of them is free."""
    if stem is not None:
        yield stem
    yield name
    yield from (f"{name}~{number}" for number in itertools.count(2))


def check_places(out: Path, paths: Iterable[Path]) -> None:
    """Refuses results that cannot be written.

    Raises:
        RaystarError: what is in the way.
    """
    folders = set[Path]()
    for path in paths:
        if len(os.fsencode(path)) > _LONGEST_PATH or len(os.fsencode(path.name)) > LONGEST:
            raise RaystarError(f"--out {out}: {path} is a longer path than the system takes; choose a shorter one")
        if is_folder(path):
            raise RaystarError(f"--out {out}: {path} would be a result, and is a folder; choose another place")
        folders.add(path.parent)
    for folder in sorted(folders):
        there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
        if not is_folder(there):
            raise RaystarError(f"--out {out}: {there} is no folder, and results would be in it; choose another place")
        if not os.access(there, os.W_OK | os.X_OK):
            raise RaystarError(f"--out {out}: {there} may not be written to; choose another place")
