"""Which latents there are: folders, packed files, the demo's; and whether they have changed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import heapq
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raystar.base import torch_file as pt
from raystar.base.errors import RaystarError, nearest
from raystar.base.files import looked_for
from raystar.base.names import alike, composed, is_systems

logger = logging.getLogger(__name__)

_SUFFIXES = (b".npy", b".pt")
_DOT = ord(".")
_PLAIN_SUFFIX = re.compile(rb"\.[a-z0-9_]{1,12}")
_MOST_KINDS = 6  # suffixes that the note on other files tells apart
DEMO_ROOT = "raystar:demo"
"""`data.data_root` of the painted demo latents that ship with the package."""


class Part(NamedTuple):
    """The latents of one domain from one place; the parts' latents follow each other in the bank."""

    domain: int
    domain_name: str
    held: bool  # from data.eval_data_root
    place: Path  # folder of the files, or the packed file
    files: list[bytes]  # paths below `place`, sorted; none of a packed file. Bytes: cheaper by the thousand
    size: int  # latents

    @property
    def names(self) -> list[str]:
        """`<domain>/<path below its folder>`, or `<domain>/<row>` of a packed file."""
        prefix = f"{self.domain_name}/"
        if not self.files:
            return [f"{prefix}{row:03d}" for row in range(self.size)]
        return [prefix + name for name in os.fsdecode(b"\0".join(self.files)).split("\0")]


def data_root(root: str) -> Path:
    """The folder or packed file behind `data.data_root`."""
    if root == DEMO_ROOT:
        from raystar import demo

        return demo.latents_path()
    try:
        return Path(root).expanduser()
    except RuntimeError:
        raise RaystarError(f"{root}: no home folder of that user is known; write the whole path") from None


def list_parts(root: str, domains: Sequence[str], key: str, held: bool, verbose: bool = True) -> list[Part]:
    """The latents of each domain below `root`, in order; `.pt` and `.npy` files at any depth below its folder.

    Args:
        key: where `root` was written, for messages.
        held: whether they are to be held out.
        verbose: log how many files of each domain are no latents and are passed over.

    Raises:
        RaystarError: the root or a domain is not there, holds no latents, or cannot be read.
    """
    path = data_root(root)
    try:
        return _list_files(path, domains, key, held, verbose)
    except (OSError, UnicodeEncodeError) as error:  # a name that is too long, a folder that may not be read
        raise RaystarError(f"{key}: {path}: cannot be read: {pt.reason(error)}") from None


def _list_files(path: Path, domains: Sequence[str], key: str, held: bool, verbose: bool) -> list[Part]:
    if path.is_file():
        return _list_packed(path, domains, key, held)
    if not path.is_dir():
        raise RaystarError(
            f"{key}: {path}: expected a folder with one folder per domain ({', '.join(domains)}), found nothing"
            f"{looked_for(path)}"
        )
    parts = []
    for number, domain in enumerate(domains):
        found = alike(path, domain)
        if len(found) > 1:
            raise RaystarError(
                f"{key}: {path}: {len(found)} folders are called {domain}, their accents composed and decomposed; put "
                "their latents into one"
            )
        folder = path / (found[0] if found else domain)
        if not folder.is_dir():
            present = sorted(p.name for p in path.iterdir() if p.is_dir() and not is_systems(p.name))
            raise RaystarError(
                f"{key}: {path}: no folder for domain '{domain}'{nearest(domain, present)}; "
                f"folders there: {', '.join(present) or 'none'}; choose with --set data.domains=[...]"
            )
        files, others = _walk(os.fsencode(folder))
        passed_over = _counted(others)
        if not files:
            raise RaystarError(
                f"{key}: {folder}: expected latents (*.pt or *.npy), found none{f'; {passed_over}' if others else ''}"
            )
        if others and verbose:
            logger.warning(f"{folder}: {passed_over}")
        parts.append(Part(number, domain, held, folder, files, len(files)))
    return parts


def _walk(top: bytes) -> tuple[list[bytes], Counter[str]]:
    """Latents at any depth below a folder, as sorted paths from there, and how many other files of each suffix.

    What is hidden is left out. A folder that several links lead to is entered once, by its own path where it has one
    here: a latent under two names could be on both sides of the split.
    """
    files: list[bytes] = []
    others: Counter[str] = Counter()
    entered: set[tuple[int, int]] = set()
    waiting = [(False, b"")]  # those behind links come last
    while waiting:
        linked, below = heapq.heappop(waiting)
        folder = os.path.join(top, below)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        names = os.listdir(folder)
        latents = [name for name in names if name.endswith(_SUFFIXES) and name[0] != _DOT]
        if len(latents) < len(names):  # only then is it asked what each of them is
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name[0] == _DOT or entry.name.endswith(_SUFFIXES):
                        continue
                    if entry.name.lower().endswith(_SUFFIXES):
                        latents.append(entry.name)
                    elif is_systems(os.fsdecode(entry.name)):
                        continue
                    elif entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                        heapq.heappush(waiting, (linked or entry.is_symlink(), below + entry.name + b"/"))
                    else:
                        others[_suffix(entry.name)] += 1
        files += [below + name for name in latents] if below else latents
    return sorted(files), others


def _suffix(name: bytes) -> str:
    suffix = os.path.splitext(name)[1].lower()
    return suffix.decode() if _PLAIN_SUFFIX.fullmatch(suffix) else "others" if suffix else "without suffix"


def _counted(others: Counter[str]) -> str:
    """What was passed over: `passed over 12 files that are no latents: .png 10, .txt 2`."""
    total = others.total()
    ranked = sorted(others.items(), key=lambda kind: (-kind[1], kind[0]))
    kinds = ", ".join(f"{suffix} {count}" for suffix, count in ranked[:_MOST_KINDS])
    more = ", ..." if len(others) > _MOST_KINDS else ""
    return f"passed over {total} file{'s that are no latents' if total != 1 else ' that is no latent'}: {kinds}{more}"


def _list_packed(path: Path, domains: Sequence[str], key: str, held: bool) -> list[Part]:
    import safetensors

    if path.suffix.lower() != ".safetensors":
        raise RaystarError(f"{key}: {path}: expected a folder of domains or a packed .safetensors file")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            present = sorted(file.keys())
            held_as = {composed(name): name for name in present}
            shapes = {d: list(file.get_slice(held_as[d]).get_shape()) for d in domains if d in held_as}
    # A damaged header can make the reader raise nearly anything, and all of it means the same.
    except Exception as error:
        raise RaystarError(f"{key}: {path}: not a readable packed file: {pt.reason(error)}") from None
    for domain in domains:
        if not shapes.get(domain, [0])[:1] > [0]:
            raise RaystarError(
                f"{key}: {path}: holds no domain '{domain}'{nearest(domain, present)}; it has {', '.join(present)}"
            )
        # Rows without numbers take no room, so a few bytes could claim any count of them.
        if 0 in shapes[domain]:
            raise RaystarError(f"{key}: {path}: {domain}: expected latents [n,C,H,W], found {shapes[domain]}")
    counts = {domain: shape[0] for domain, shape in shapes.items()}
    return [Part(number, held_as[domain], held, path, [], counts[domain]) for number, domain in enumerate(domains)]


def stat_digest(parts: Iterable[Part], domains: Sequence[str], channels: int) -> str:
    """Names the packed file: any added, removed, resized or rewritten latent makes another one."""
    digest = hashlib.sha256(json.dumps([list(domains), channels, "raystar-bank-3"]).encode())
    for part in parts:
        digest.update(json.dumps([part.domain, part.held, str(part.place), part.size]).encode())
        folder, files = (part.place, part.files) if part.files else (part.place.parent, [os.fsencode(part.place.name)])
        digest.update(b"\0".join(files))  # no file's name holds a NUL
        digest.update(_stats(folder, files).tobytes())
    return digest.hexdigest()[:16]


_STATX_BYTES = 256
_STATX_FIELDS = [5, 14, 15]
"""Size, and seconds and nanoseconds of the last change, as 64-bit words of `struct statx` (linux/stat.h)."""
_STATX_SIZE_AND_MTIME = 0x240


def _stats(folder: Path, names: list[bytes]) -> NDArray[np.int64]:
    """[n,3] size, and seconds and nanoseconds of the last change, of each file; -1 if it is gone.

    Of the link itself where it points nowhere: reading it will say so, together with all other bad files.
    """
    buffer = np.zeros((len(names), _STATX_BYTES // 8), np.int64)
    statx = _statx()
    if statx is not None:
        # os.stat makes twenty Python objects of every answer: for 20,000 files twice as slow as the files themselves.
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            places = range(buffer.ctypes.data, buffer.ctypes.data + buffer.nbytes, _STATX_BYTES)
            failed = list(map(statx, repeat(at), names, repeat(0), repeat(_STATX_SIZE_AND_MTIME), places))
        finally:
            os.close(at)
        stats = buffer[:, _STATX_FIELDS]
        stats[:, 2] &= 0xFFFFFFFF  # the upper half is padding
    else:
        failed, stats = [1] * len(names), buffer[:, :3]
    for number in np.flatnonzero(failed):
        stats[number] = _stat(os.path.join(os.fsencode(folder), names[number]))
    return stats


def _stat(path: bytes) -> tuple[int, int, int]:
    for look in (os.stat, os.lstat):
        try:
            status = look(path)
        except OSError:
            continue
        return status.st_size, *divmod(status.st_mtime_ns, 1_000_000_000)
    return -1, -1, -1


@functools.cache
def _statx() -> Callable[..., int] | None:
    """Linux's statx(2), whose answer has one layout on every processor; None where there is none."""
    if sys.platform != "linux" or sys.byteorder != "little":
        return None
    try:
        statx = ctypes.CDLL(None).statx
    except (AttributeError, OSError):
        return None
    statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    return statx
