"""Many small files become one that is mapped into memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystar.base import torch_file as pt
from raystar.base.console import shows
from raystar.base.errors import RaystarError
from raystar.config.schema import DataConfig
from raystar.data.holdout import turns
from raystar.data.latent import check_row, read_latent
from raystar.data.listing import Part

logger = logging.getLogger(__name__)

_MAX_LISTED = 10
_PROGRESS_AFTER_S = 2.0
_TEMPORARY = ".latents-"
_ABANDONED_AFTER_S = 3600.0


class _PackedPart(NamedTuple):
    """What the index keeps of a `Part`."""

    domain: int
    held: bool
    names: list[str]
    turns: list[int]
    """The turn in which each latent's picture would be held out."""


class Packed(NamedTuple):
    """A packed bank, opened."""

    latents: Tensor  # [n,C,H,W], memory-mapped
    digest: str
    parts: list[_PackedPart]


def open_packed(cache: Path, key: str, data: DataConfig) -> Packed | None:
    """The packed latents; None if they are not there, or damaged and to be made again."""
    array = cache / f"latents-{key}.npy"
    try:
        index = json.loads((cache / f"latents-{key}.json").read_text())
        parts = [_PackedPart(**part) for part in index["parts"]]
        # Copy-on-write: pages stay shared between processes, and torch wants memory that may be written to.
        latents = np.load(array, mmap_mode="c", allow_pickle=False)
        rows = sum(len(part.names) for part in parts)
        sides = [False, True] if data.eval_data_root is not None else [False]
        if (
            [(part.held, part.domain) for part in parts] != list(itertools.product(sides, range(len(data.domains))))
            or not all(_sound(part) for part in parts)
            or not re.fullmatch(r"[0-9a-f]{64}", index["digest"])
            or latents.dtype not in (np.float16, np.float32)
            or latents.ndim != 4
            or len(latents) != rows
            or latents.offset + latents.nbytes != array.stat().st_size
        ):
            return None
        return Packed(torch.from_numpy(latents), index["digest"], parts)
    # Whatever a damaged index or array makes its reader raise, both are made again.
    except Exception:
        return None


def _sound(part: _PackedPart) -> bool:
    """Whether names and turns are such that nothing goes wrong, or grows without limit, in splitting them."""
    turns = np.array(part.turns)
    return (
        len(part.names) == len(part.turns) > 0
        and all(isinstance(name, str) for name in part.names)
        and turns.dtype == np.int64
        and 0 <= int(turns.min()) <= int(turns.max()) < len(turns)
    )


class _Writer:
    """A [n,C,H,W] `.npy` file written row by row, so that a bank larger than the memory can be packed.

    It is fp16 until the first row that is not; from there on, and from its beginning, fp32.
    """

    def __init__(self, path: Path, rows: int) -> None:
        self.path = path
        self.rows = rows
        self.shape: tuple[int, ...] | None = None
        self.dtype: np.dtype[Any] = np.dtype(np.float16)
        self.written = 0
        self.digest = hashlib.sha256()
        self._file: IO[bytes] | None = None

    def append(self, latent: NDArray[Any]) -> None:
        """Takes the next row, [C,H,W] fp16 or fp32; every row has the shape of the first."""
        if self._file is None:
            self.shape, self.dtype = latent.shape, latent.dtype
            self._open()
        elif latent.dtype != np.float16 and self.dtype == np.float16:
            self._widen()
        self._write(latent.astype(self.dtype, copy=False))
        self.written += 1

    def close(self) -> None:
        """Ends the file, on the disk: after a power cut, an index must not name an array that is not there."""
        if self._file is not None and not self._file.closed:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())

    def _open(self) -> None:
        self._file = self.path.open("wb", buffering=1 << 20)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, *(self.shape or ()))}
        np.lib.format.write_array_header_1_0(self._file, header)
        self.digest = hashlib.sha256()

    def _write(self, array: NDArray[Any]) -> None:
        assert self._file is not None
        content = np.ascontiguousarray(array).data
        self._file.write(content)
        self.digest.update(content)

    def _widen(self) -> None:
        assert self._file is not None
        self._file.close()
        narrow = self.path.with_suffix(".fp16")
        os.replace(self.path, narrow)
        try:
            with narrow.open("rb") as source:
                np.lib.format.read_magic(source)
                np.lib.format.read_array_header_1_0(source)
                self.dtype = np.dtype(np.float32)
                self._open()
                for _ in range(self.written):
                    row = np.frombuffer(source.read(2 * math.prod(self.shape or ())), np.float16)
                    self._write(row.astype(np.float32))
        finally:
            narrow.unlink()


def pack(parts: list[Part], channels: int, array_path: Path, index_path: Path, verbose: bool) -> None:
    """Reads and checks every latent on its way into the packed array; writes, last, the array's index."""
    array_path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(array_path.parent)
    # Both are written beside their final names and renamed, the index last: a half-written bank is never opened.
    mark = f"{os.getpid()}-{os.urandom(4).hex()}"
    temporary = array_path.with_name(f"{_TEMPORARY}{mark}.npy")
    temporary_index = index_path.with_name(f"{_TEMPORARY}{mark}.json")
    writer = _Writer(temporary, sum(part.size for part in parts))
    try:
        try:
            _read_all(parts, channels, writer, verbose)
        finally:
            writer.close()
        _warn_if_scaled(np.load(temporary, mmap_mode="r", allow_pickle=False), verbose)
        listed = [_PackedPart(part.domain, part.held, part.names, turns(part)) for part in parts]
        index = {"digest": writer.digest.hexdigest(), "parts": [part._asdict() for part in listed]}
        temporary_index.write_text(json.dumps(index))
        os.replace(temporary, array_path)
        os.replace(temporary_index, index_path)
    finally:
        temporary.unlink(missing_ok=True)
        temporary_index.unlink(missing_ok=True)


def _remove_abandoned(cache: Path) -> None:
    """Removes what killed processes left half-written; a file that is being written changes every few seconds."""
    for path in cache.glob(f"{_TEMPORARY}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                path.unlink()


def _read_all(parts: list[Part], channels: int, writer: _Writer, verbose: bool) -> None:
    """Hands all latents to `writer`; RaystarError with all bad ones."""
    total = writer.rows
    shapes: dict[tuple[int, ...], list[str]] = {}
    bad: list[str] = []
    started = shown_at = time.monotonic()
    for number, (where, read) in enumerate(_readers(parts, channels), start=1):
        try:
            latent = read()
        except ValueError as error:
            bad.append(f"{where}: {error}")
        else:
            shapes.setdefault(latent.shape, []).append(where)
            # Once one is bad nothing is packed, but the others are still read: all bad ones are named together.
            if not bad and len(shapes) == 1:
                writer.append(latent)
        now = time.monotonic()
        if verbose and shows() and now - started > _PROGRESS_AFTER_S and now - shown_at > 1.0:
            print(f"\rreading latents {number}/{total}", end="", file=sys.stderr, flush=True)
            shown_at = now
    if shown_at != started:
        print(f"\rread {total} latents in {time.monotonic() - started:.0f} s", file=sys.stderr)
    usual = max(shapes, key=lambda shape: len(shapes[shape]), default=())
    bad += [
        f"{where}: expected {list(usual)} like most of the others, found {list(shape)}"
        for shape, places in shapes.items()
        if shape != usual
        for where in places
    ]
    if bad:
        more = f"\n  ... and {len(bad) - _MAX_LISTED} more" if len(bad) > _MAX_LISTED else ""
        listed = "\n  ".join(bad[:_MAX_LISTED])
        raise RaystarError(f"{len(bad)} of {total} latents cannot be used; mend or remove them:\n  {listed}{more}")


def _readers(parts: list[Part], channels: int) -> Iterator[tuple[str, Callable[[], NDArray[Any]]]]:
    """Where each latent lies, and what reads it: [C,H,W] as fp16 or fp32, or ValueError with the reason."""
    for part in parts:
        if part.files:
            folder = str(part.place)
            for file in part.files:
                path = f"{folder}{os.sep}{os.fsdecode(file)}"
                yield path, partial(read_latent, path, channels)
            continue
        import safetensors

        try:
            with safetensors.safe_open(part.place, framework="pt") as source:
                rows = source.get_tensor(part.domain_name)
        except Exception as error:  # a type that only the file knows; or it was damaged since it was listed
            raise RaystarError(f"{part.place}: {part.domain_name}: cannot be read: {pt.reason(error)}") from None
        for row, name in zip(rows, part.names, strict=True):
            yield f"{part.place}[{name}]", partial(check_row, row, channels)


def _warn_if_scaled(array: NDArray[Any], verbose: bool) -> None:
    """SD1.5's unscaled latents have a standard deviation of about 1 / 0.18215 = 5.5; scaled ones about 1."""
    deviation = float(array[:: max(1, len(array) // 256)].astype(np.float32).std())
    if verbose and deviation < 2.0:
        logger.warning(
            f"these latents have a standard deviation of {deviation:.2f}, unscaled SD1.5 latents about 5; "
            "if they were already multiplied by 0.18215, set training.latent_scale=1.0"
        )
