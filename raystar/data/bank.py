"""Latents on disk -> checked, packed, memory-mapped bank -> batches that are a pure function of (seed, epoch, step).

A dataset is `<root>/<domain>/*.pt|*.npy`, one unscaled latent [C,H,W] (or [1,C,H,W]) a file, or one packed
`.safetensors` file with a tensor [n,C,H,W] per domain. Every file is read and checked once; the good ones are
packed into a single memory-mapped file below the cache folder, which every process of the node then shares.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import re
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystar.base import torch_file as pt
from raystar.base.errors import RaystarError, nearest
from raystar.config.schema import Config, DataConfig

_SUFFIXES = (b".npy", b".pt")
_DOT = ord(".")
DEMO_ROOT = "raystar:demo"
"""`data.data_root` of the painted demo latents that ship with the package."""

_CROP = re.compile(r"_\d+$")
_MAX_LISTED = 10
_PROGRESS_AFTER_S = 2.0
_TEMPORARY = ".latents-"
_ABANDONED_AFTER_S = 3600.0


class Batch(NamedTuple):
    """What one training step consumes; the noise travels with it, so a step is a pure function of its arguments.

    B contents, C x H x W latents, Z `latent_dim`.
    """

    content: Tensor
    """[B,C,H,W] unscaled latents of the source domains."""
    x_ref: Tensor
    """[B,C,H,W] unscaled latents of the target domains, the style references."""
    y_src: Tensor
    """[B] int64, domain of each content."""
    y_trg: Tensor
    """[B] int64, target domain, never the source domain."""
    z_trg: Tensor
    """[B,Z] noise of the latent-guided path."""
    z_1: Tensor
    """[B,Z] first noise of the diversity term."""
    z_2: Tensor
    """[B,Z] second noise of the diversity term."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


@dataclass(frozen=True)
class Bank:
    """All latents of a dataset, packed, and who may see them.

    `latents` is a memory-mapped [n,C,H,W] tensor, unscaled, fp16 or fp32; a process that opens it adds no copy.
    """

    latents: Tensor
    domains: tuple[str, ...]
    names: tuple[str, ...]
    """Name of each row, `<domain>/<file>`."""
    train: tuple[NDArray[np.int64], ...]
    """Rows of each domain that training draws from."""
    held: tuple[NDArray[np.int64], ...]
    """Rows of each domain that only the ruler and the grids see."""
    digest: str
    """Hash of the latents' content and of the split."""
    root: str
    key: str
    """What `reopen_bank` opens it by."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        return tuple(self.latents.shape[1:])  # type: ignore[return-value]

    def rows(self, rows: NDArray[np.int64]) -> Tensor:
        """[len(rows),C,H,W] float32 unscaled latents."""
        return self.latents[torch.from_numpy(rows)].float()


# -- opening ---------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """The latents of one domain from one place; the parts' latents follow each other in the bank."""

    domain: int
    domain_name: str
    held: bool  # from data.eval_data_root
    place: Path  # folder of the files, or the packed file
    files: list[bytes]  # sorted; empty for a packed file. Bytes, as the system has them: cheaper by the thousand
    size: int  # latents

    @property
    def names(self) -> list[str]:
        """`<domain>/<file>`, or `<domain>/<row>` of a packed file."""
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


def open_bank(config: Config, cache_dir: str | Path, *, verbose: bool = True) -> Bank:
    """Opens the dataset of `config.data`, checking and packing it the first time.

    Args:
        cache_dir: where the packed file lies or will lie.
        verbose: say on stderr what takes longer than two seconds.

    Raises:
        RaystarError: a missing or empty folder, or all bad files with their reasons.
    """
    data = config.data
    parts = _list(data.data_root, data.domains, "data.data_root", held=False)
    if data.eval_data_root is not None:
        if data_root(data.eval_data_root).resolve() == data_root(data.data_root).resolve():
            raise RaystarError("data.eval_data_root: is data.data_root itself; held-out latents must be others")
        parts += _list(data.eval_data_root, data.domains, "data.eval_data_root", held=True)
    key = _stat_digest(parts, data.domains, config.model.latent_channels)
    cache = Path(cache_dir)
    array_path, index_path = cache / f"latents-{key}.npy", cache / f"latents-{key}.json"
    sizes = [part.size for part in parts]
    packed = _open_packed(cache, key, data)
    if packed is None or [len(part.names) for part in packed.parts] != sizes:
        _pack(parts, config.model.latent_channels, array_path, index_path, verbose)
        packed = _open_packed(cache, key, data)
    if packed is None:
        raise RaystarError(f"{array_path}: cannot be read back after it was written; is the disk sound?")
    return _split(packed, key, data)


def reopen_bank(config: Config, cache_dir: str | Path, key: str) -> Bank:
    """Opens the bank that `open_bank` gave as `Bank.key`, whatever has happened to its files since.

    All trials of a sweep see the latents that it began with, and none looks at thousands of files again.

    Raises:
        RaystarError: the packed file is gone or damaged.
    """
    packed = _open_packed(Path(cache_dir), key, config.data)
    if packed is None:
        raise RaystarError(
            f"{Path(cache_dir) / f'latents-{key}.npy'}: the packed latents are gone or damaged; start again"
        )
    return _split(packed, key, config.data)


class _PackedPart(NamedTuple):
    """What the index keeps of a `_Part`."""

    domain: int
    held: bool
    names: list[str]
    turns: list[int]
    """The turn in which each latent's picture would be held out."""


class _Packed(NamedTuple):
    latents: Tensor  # [n,C,H,W], memory-mapped
    digest: str
    parts: list[_PackedPart]


def _open_packed(cache: Path, key: str, data: DataConfig) -> _Packed | None:
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
        return _Packed(torch.from_numpy(latents), index["digest"], parts)
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


def _list(root: str, domains: Sequence[str], key: str, held: bool) -> list[_Part]:
    path = data_root(root)
    try:
        return _list_files(path, domains, key, held)
    except (OSError, UnicodeEncodeError) as error:  # a name that is too long, a folder that may not be read
        raise RaystarError(f"{key}: {path}: cannot be read: {pt.reason(error)}") from None


def _list_files(path: Path, domains: Sequence[str], key: str, held: bool) -> list[_Part]:
    if path.is_file():
        return _list_packed(path, domains, key, held)
    if not path.is_dir():
        raise RaystarError(
            f"{key}: {path}: expected a folder with one folder per domain ({', '.join(domains)}), found nothing"
        )
    parts = []
    for number, domain in enumerate(domains):
        folder = path / domain
        if not folder.is_dir():
            present = sorted(p.name for p in path.iterdir() if p.is_dir())
            raise RaystarError(
                f"{key}: {path}: no folder for domain '{domain}'{nearest(domain, present)}; "
                f"folders there: {', '.join(present) or 'none'}; choose with --set data.domains=[...]"
            )
        files = sorted([f for f in os.listdir(os.fsencode(folder)) if f.endswith(_SUFFIXES) and f[0] != _DOT])
        if not files:
            raise RaystarError(f"{key}: {folder}: expected latents (*.pt or *.npy), found none")
        parts.append(_Part(number, domain, held, folder, files, len(files)))
    return parts


def _list_packed(path: Path, domains: Sequence[str], key: str, held: bool) -> list[_Part]:
    import safetensors

    if path.suffix != ".safetensors":
        raise RaystarError(f"{key}: {path}: expected a folder of domains or a packed .safetensors file")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            present = sorted(file.keys())
            shapes = {d: list(file.get_slice(d).get_shape()) for d in domains if d in present}
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
    return [_Part(number, domain, held, path, [], counts[domain]) for number, domain in enumerate(domains)]


# -- what the packed file is named by --------------------------------------------------------------


def _stat_digest(parts: Iterable[_Part], domains: Sequence[str], channels: int) -> str:
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
    found = np.zeros((len(names), _STATX_BYTES // 8), np.int64)
    statx = _statx()
    if statx is not None:
        # os.stat makes twenty Python objects of every answer: for 20,000 files twice as slow as the files themselves.
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            places = range(found.ctypes.data, found.ctypes.data + found.nbytes, _STATX_BYTES)
            failed = list(map(statx, repeat(at), names, repeat(0), repeat(_STATX_SIZE_AND_MTIME), places))
        finally:
            os.close(at)
        stats = found[:, _STATX_FIELDS]
        stats[:, 2] &= 0xFFFFFFFF  # the upper half is padding
    else:
        failed, stats = [1] * len(names), found[:, :3]
    for number in np.flatnonzero(failed):
        stats[number] = _stat(os.path.join(os.fsencode(folder), names[number]))
    return stats


def _stat(path: bytes) -> tuple[int, int, int]:
    for look in (os.stat, os.lstat):
        try:
            found = look(path)
        except OSError:
            continue
        return found.st_size, *divmod(found.st_mtime_ns, 1_000_000_000)
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


# -- packing ---------------------------------------------------------------------------------------


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


def _pack(parts: list[_Part], channels: int, array_path: Path, index_path: Path, verbose: bool) -> None:
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
        listed = [_PackedPart(part.domain, part.held, part.names, _turns(part)) for part in parts]
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


def _read_all(parts: list[_Part], channels: int, writer: _Writer, verbose: bool) -> None:
    """Hands all latents to `writer`; RaystarError with all bad ones."""
    total = writer.rows
    shapes: dict[tuple[int, ...], list[str]] = {}
    bad: list[str] = []
    started = shown = time.monotonic()
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
        if verbose and now - started > _PROGRESS_AFTER_S and now - shown > 1.0:
            print(f"\rreading latents {number}/{total}", end="", file=sys.stderr, flush=True)
            shown = now
    if shown != started:
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


def _readers(parts: list[_Part], channels: int) -> Iterator[tuple[str, Callable[[], NDArray[Any]]]]:
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
            yield f"{part.place}[{name}]", partial(_check_row, row, channels)


def _check_row(row: Tensor, channels: int) -> NDArray[Any]:
    return check_latent(_as_array(row), channels)


def read_latent(path: str, channels: int) -> NDArray[Any]:
    """Reads one latent file [C,H,W], unscaled, without ever running code from it.

    Raises:
        ValueError: why the file cannot be used.
    """
    value = _read_npy(path) if path.endswith(".npy") else pt.read(path)
    if isinstance(value, dict):
        value = next((value[k] for k in ("latent", "x") if k in value), None)
        if value is None:
            raise ValueError("expected a tensor, or a dictionary with 'latent' or 'x'; found neither key")
    if isinstance(value, Tensor):
        value = _as_array(value)
    return check_latent(value, channels)


def _read_npy(path: str) -> Any:
    try:
        # A pipe would be waited for, and some devices never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("not a file")
        return np.load(path, allow_pickle=False)
    # A damaged file can make the reader raise nearly anything, and all of it means the same.
    except Exception as error:
        if "Object arrays cannot be loaded" in str(error):
            raise ValueError("holds pickled objects; they were not opened, since they could run code") from None
        if "contains pickled" in str(error):  # what numpy says of anything that it does not know
            raise ValueError("not an .npy file; it was not opened as a pickle, since it could run code") from None
        raise ValueError(f"truncated or damaged ({pt.reason(error)})") from None


def _as_array(tensor: Tensor) -> NDArray[Any]:
    """A dense CPU tensor as an array, bf16 as fp32; ValueError for any other tensor."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError("expected a dense tensor with data")
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"expected float16, bfloat16 or float32 numbers, found {tensor.dtype}")
        tensor = tensor.float()
    return tensor.detach().resolve_conj().resolve_neg().numpy()


def check_latent(value: Any, channels: int) -> NDArray[Any]:
    """`value` as a [C,H,W] fp16 or fp32 array; ValueError if its type, shape or numbers are wrong."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"expected an array of floating-point numbers, found {kind}")
    if value.ndim == 4 and value.shape[0] == 1:
        value = value[0]
    if value.ndim != 3 or value.shape[0] != channels or min(value.shape) < 1:
        raise ValueError(f"expected shape [{channels},H,W], found {list(value.shape)}")
    if min(value.shape[1:]) < 8 or value.shape[1] % 4 or value.shape[2] % 4:
        raise ValueError(f"expected H and W of at least 8 and divisible by 4, found {list(value.shape)}")
    if not np.isfinite(value).all():
        raise ValueError("holds NaN or infinite numbers")
    value = value if value.dtype == np.float16 else value.astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError("holds numbers beyond float32")
    return value


def _warn_if_scaled(array: NDArray[Any], verbose: bool) -> None:
    """SD1.5's unscaled latents have a standard deviation of about 1 / 0.18215 = 5.5; scaled ones about 1."""
    deviation = float(array[:: max(1, len(array) // 256)].astype(np.float32).std())
    if verbose and deviation < 2.0:
        print(
            f"note: these latents have a standard deviation of {deviation:.2f}, unscaled SD1.5 latents about 5; "
            "if they were already multiplied by 0.18215, set training.latent_scale=1.0",
            file=sys.stderr,
        )


# -- the split -------------------------------------------------------------------------------------


def picture_of(stems: Sequence[str]) -> list[str]:
    """The picture that each latent of one domain belongs to: crops `name_0`, `name_1` share one.

    Numbered files (`photo_001`, `photo_002`, ...) look like crops of one picture too. So where dropping the
    number would put more than a fifth of the domain into one group, the number is taken to count pictures.
    """
    groups = [_CROP.sub("", stem) for stem in stems]
    largest = Counter(groups).most_common(1)[0][1]
    return groups if largest <= max(2, len(stems) // 5) else list(stems)


def _turns(part: _Part) -> list[int]:
    """The turn in which each latent's picture would be held out: depends on names alone, never on a seed."""
    groups = picture_of([Path(name).stem for name in part.names])
    # Hashing spreads the choice evenly over any naming scheme, and adding files moves few others.
    digests = {g: hashlib.sha256(os.fsencode(f"{part.domain_name}/{g}")).digest() for g in set(groups)}
    turn = {group: number for number, group in enumerate(sorted(digests, key=digests.__getitem__))}
    return [turn[group] for group in groups]


def _split(packed: _Packed, key: str, data: DataConfig) -> Bank:
    train: list[NDArray[np.int64]] = []
    held: list[NDArray[np.int64]] = []
    names: list[str] = []
    for part in packed.parts:
        rows = np.arange(len(part.names)) + len(names)
        names += part.names
        if part.held:
            held.append(rows)
            continue
        turns = np.array(part.turns, np.int64)
        kept = turns < (0 if data.eval_data_root is not None else _pictures_held(turns, data.holdout))
        train.append(rows[~kept])
        if data.eval_data_root is None:
            held.append(rows[kept])
        if not len(train[-1]):
            domain = data.domains[part.domain]
            raise RaystarError(f"data: domain '{domain}' has {len(rows)} latents, none left for training")
    digest = hashlib.sha256(json.dumps([packed.digest, [h.tolist() for h in held]]).encode()).hexdigest()[:16]
    return Bank(packed.latents, data.domains, tuple(names), tuple(train), tuple(held), digest, data.data_root, key)


def _pictures_held(turns: NDArray[np.int64], share: float) -> int:
    """How many pictures make about `share` of a domain's latents; one at least stays for training."""
    if share == 0:
        return 0
    wanted = max(1, round(share * len(turns)))
    latents = np.cumsum(np.bincount(turns))  # of the first picture, the first two, ...
    return min(int(np.searchsorted(latents, wanted)) + 1, len(latents) - 1)


# -- drawing batches -------------------------------------------------------------------------------


def share(rows: int, rank: int, workers: int) -> slice:
    """The contiguous part of a batch of `rows` that worker `rank` takes; parts differ by one row at most.

    With fewer rows than workers everyone takes all of them: averaged over all workers' rows the losses and gradients
    are the same, and no worker is left with nothing to run.
    """
    if rows < workers:
        return slice(0, rows)
    return slice(rank * rows // workers, (rank + 1) * rows // workers)


class LatentDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Two uniform stages (source domain, another target domain, then a latent in each), batched by index.

    Every draw is a pure function of (`training.seed`, epoch, step), so a resumed run sees the same batches, and
    several workers (`rank` of `workers`) see the shares of the batches that one process would see.
    """

    def __init__(self, bank: Bank, config: Config, device: torch.device, rank: int = 0, workers: int = 1) -> None:
        self.bank = bank
        self.device = device
        self.training = config.training
        self.latent_dim = config.model.latent_dim
        self.rank, self.workers = rank, workers
        self.size = config.training.epoch_size or max(map(len, bank.train)) * len(bank.domains)
        self.storage, self.preloaded = _place(bank, config.data.preload_to_gpu, device)
        self._starts = np.cumsum([0, *map(len, bank.train)])
        self._rows = np.concatenate(bank.train)
        self._plan: dict[str, Tensor] = {}
        self.epoch = 0
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        """Draws the indices of a whole epoch (from 1)."""
        if epoch == self.epoch:
            return
        rng = np.random.default_rng([self.training.seed, epoch, 0])
        n = len(self.bank.domains)
        source = rng.integers(n, size=self.size)
        target = (source + rng.integers(1, n, size=self.size)) % n  # any domain but the source
        lengths = np.diff(self._starts)
        # A uniform number times a domain's length picks in domains of different lengths without a loop.
        u = rng.random((2, self.size))
        plan = {
            "y_src": source,
            "y_trg": target,
            "content": self._rows[self._starts[source] + (u[0] * lengths[source]).astype(np.int64)],
            "x_ref": self._rows[self._starts[target] + (u[1] * lengths[target]).astype(np.int64)],
        }
        # Once an epoch to where the latents are: a copy of a few numbers costs a GPU as much as a gather.
        self._plan = {name: torch.from_numpy(values).to(self.storage.device) for name, values in plan.items()}
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    @property
    def steps(self) -> int:
        """Steps of an epoch, with or without its incomplete last batch (`training.drop_last`)."""
        whole, rest = divmod(self.size, self.training.batch_size)
        return whole + (1 if rest and not self.training.drop_last else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample of the current epoch: `content`, `target_style` [C,H,W], and their domain ids."""
        plan = self._plan
        return {
            "content": self.storage[plan["content"][index]].float(),
            "target_style": self.storage[plan["x_ref"][index]].float(),
            "target_style_id": int(plan["y_trg"][index]),
            "source_style_id": int(plan["y_src"][index]),
        }

    def rows(self, step: int) -> int:
        """Rows of the whole batch of `step` (from 1): `training.batch_size`, or less in an incomplete last one."""
        return min(self.training.batch_size, self.size - (step - 1) * self.training.batch_size)

    def weight(self, step: int) -> float:
        """What this worker's means over its rows of `step` count for in the means over all workers' rows."""
        counts = [
            part.stop - part.start for part in (share(self.rows(step), r, self.workers) for r in range(self.workers))
        ]
        return counts[self.rank] / sum(counts)

    def batch(self, step: int) -> Batch:
        """This worker's share of the batch of `step` (from 1), on the storage's device, float32."""
        first, rows = (step - 1) * self.training.batch_size, self.rows(step)
        own = share(rows, self.rank, self.workers)
        chosen = slice(first + own.start, first + own.stop)
        plan = {name: values[chosen] for name, values in self._plan.items()}
        rng = np.random.default_rng([self.training.seed, self.epoch, step])
        # Drawn for the whole batch, whoever asks: a row's noise does not depend on the number of workers.
        noise = rng.standard_normal((3, rows, self.latent_dim), dtype=np.float32)[:, own]
        return Batch(
            self.storage.index_select(0, plan["content"]).float(),
            self.storage.index_select(0, plan["x_ref"]).float(),
            plan["y_src"],
            plan["y_trg"],
            *torch.from_numpy(noise).to(self.storage.device).unbind(),
        )

    def batches(self) -> Iterable[Batch]:
        """The current epoch's batches on the training device, gathered ahead when they must travel there."""
        if self.storage.device.type == self.device.type:
            for step in range(1, self.steps + 1):
                yield self.batch(step)
            return
        workers = self.training.num_workers
        pin = self.training.pin_memory
        if workers == 0:
            for step in range(1, self.steps + 1):
                yield _sent(self.batch(step), self.device, pin)
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="raystar-batch") as pool:
            ahead: list[Future[Batch]] = []
            for step in range(1, self.steps + 1):
                while len(ahead) < 2 * workers and step + len(ahead) <= self.steps:
                    ahead.append(pool.submit(self._gathered, step + len(ahead), pin))
                yield ahead.pop(0).result().to(self.device, non_blocking=pin)

    def _gathered(self, step: int, pin: bool) -> Batch:
        batch = self.batch(step)
        return Batch(*(tensor.pin_memory() for tensor in batch)) if pin else batch


def _sent(batch: Batch, device: torch.device, pin: bool) -> Batch:
    if pin:
        batch = Batch(*(tensor.pin_memory() for tensor in batch))
    return batch.to(device, non_blocking=pin)


def _place(bank: Bank, preload: bool, device: torch.device) -> tuple[Tensor, bool]:
    """The latents where batches are gathered: GPU memory when asked for and half of what is free holds them."""
    if device.type != "cuda" or not preload:
        return bank.latents, False
    free, _ = torch.cuda.mem_get_info(device)
    if bank.latents.nbytes > free // 2:
        print(
            f"note: {bank.latents.nbytes / 2**30:.1f} GiB of latents stay in CPU memory, "
            f"{free / 2**30:.1f} GiB are free on the GPU",
            file=sys.stderr,
        )
        return bank.latents, False
    return bank.latents.to(device), True
