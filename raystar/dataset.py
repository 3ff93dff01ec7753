"""Latents on disk -> checked, packed, memory-mapped bank -> batches that are a pure function of (seed, epoch, step).

A dataset is `<root>/<domain>/*.pt|*.npy`, one unscaled latent [C,H,W] (or [1,C,H,W]) a file, or one packed
`.safetensors` file with a tensor [n,C,H,W] per domain. Every file is read and checked once; the good ones are
packed into a single memory-mapped file below the cache folder, which every process of the node then shares.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystar.config import Config, DataConfig
from raystar.errors import RaystarError, nearest

SUFFIXES = (".npy", ".pt")
DEMO_ROOT = "raystar:demo"
"""`data.data_root` of the painted demo latents that ship with the package."""

_CROP = re.compile(r"_\d+$")
_MAX_LISTED = 10
_PROGRESS_AFTER_S = 2.0


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

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        return tuple(self.latents.shape[1:])  # type: ignore[return-value]

    def rows(self, rows: NDArray[np.int64]) -> Tensor:
        """[len(rows),C,H,W] float32 unscaled latents."""
        return self.latents[torch.from_numpy(rows)].float()


# -- opening ---------------------------------------------------------------------------------------


class _Item(NamedTuple):
    domain: int
    held: bool  # from data.eval_data_root
    name: str
    path: Path
    row: int  # row of a packed file, -1 for a file of one latent


def data_root(root: str) -> Path:
    """The folder or packed file behind `data.data_root`."""
    if root == DEMO_ROOT:
        from raystar import demo

        return demo.latents_path()
    return Path(root).expanduser()


def open_bank(config: Config, cache_dir: str | Path, *, verbose: bool = True) -> Bank:
    """Opens the dataset of `config.data`, checking and packing it the first time.

    Args:
        cache_dir: where the packed file lies or will lie.
        verbose: say on stderr what takes longer than two seconds.

    Raises:
        RaystarError: a missing or empty folder, or all bad files with their reasons.
    """
    data = config.data
    items = _list_items(data.data_root, data.domains, "data.data_root", held=False)
    if data.eval_data_root is not None:
        if data_root(data.eval_data_root).resolve() == data_root(data.data_root).resolve():
            raise RaystarError("data.eval_data_root: is data.data_root itself; held-out latents must be others")
        items += _list_items(data.eval_data_root, data.domains, "data.eval_data_root", held=True)
    key = _stat_digest(items, data.domains, config.model.latent_channels)
    cache = Path(cache_dir)
    array_path, index_path = cache / f"latents-{key}.npy", cache / f"latents-{key}.json"
    packed = _open_packed(array_path, index_path)
    if packed is None:
        _pack(items, config.model.latent_channels, array_path, index_path, verbose)
        packed = _open_packed(array_path, index_path)
    if packed is None:
        raise RaystarError(f"{array_path}: cannot be read back after it was written; is the disk sound?")
    latents, digest = packed
    return _split(torch.from_numpy(latents), items, digest, data)


def _open_packed(array_path: Path, index_path: Path) -> tuple[NDArray[Any], str] | None:
    """The packed latents and their digest; None if they are not there, or damaged and to be made again."""
    try:
        digest = str(json.loads(index_path.read_text())["digest"])
        # Copy-on-write: pages stay shared between processes, and torch wants memory that may be written to.
        return np.load(array_path, mmap_mode="c", allow_pickle=False), digest
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _list_items(root: str, domains: Sequence[str], key: str, held: bool) -> list[_Item]:
    path = data_root(root)
    if path.is_file():
        return _list_packed(path, domains, key, held)
    if not path.is_dir():
        raise RaystarError(
            f"{key}: {path}: expected a folder with one folder per domain ({', '.join(domains)}), found nothing"
        )
    items = []
    for number, domain in enumerate(domains):
        folder = path / domain
        if not folder.is_dir():
            present = sorted(p.name for p in path.iterdir() if p.is_dir())
            raise RaystarError(
                f"{key}: {path}: no folder for domain '{domain}'{nearest(domain, present)}; "
                f"folders there: {', '.join(present) or 'none'}; choose with --set data.domains=[...]"
            )
        files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith("."))
        if not files:
            raise RaystarError(f"{key}: {folder}: expected latents (*.pt or *.npy), found none")
        items += [_Item(number, held, f"{domain}/{p.name}", p, -1) for p in files]
    return items


def _list_packed(path: Path, domains: Sequence[str], key: str, held: bool) -> list[_Item]:
    import safetensors

    if path.suffix != ".safetensors":
        raise RaystarError(f"{key}: {path}: expected a folder of domains or a packed .safetensors file")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            present = sorted(file.keys())
            counts = {d: file.get_slice(d).get_shape()[0] for d in domains if d in present}
    except (safetensors.SafetensorError, OSError, IndexError) as error:
        raise RaystarError(f"{key}: {path}: not a readable packed file: {error}") from None
    for domain in domains:
        if not counts.get(domain):
            raise RaystarError(
                f"{key}: {path}: holds no domain '{domain}'{nearest(domain, present)}; it has {', '.join(present)}"
            )
    return [
        _Item(number, held, f"{domain}/{row:03d}", path, row)
        for number, domain in enumerate(domains)
        for row in range(counts[domain])
    ]


def _stat_digest(items: Iterable[_Item], domains: Sequence[str], channels: int) -> str:
    """Names the packed file: any added, removed, resized or rewritten latent makes another one."""
    digest = hashlib.sha256(json.dumps([list(domains), channels, "raystar-bank-1"]).encode())
    stats: dict[Path, os.stat_result] = {}
    for item in items:
        stat = stats.get(item.path) or stats.setdefault(item.path, _stat(item.path))
        digest.update(f"{item.held}|{item.name}|{item.path}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _stat(path: Path) -> os.stat_result:
    """Of the link itself where it points nowhere: reading it will say so, together with all other bad files."""
    return path.stat() if path.exists() else path.lstat()


def _pack(items: list[_Item], channels: int, array_path: Path, index_path: Path, verbose: bool) -> None:
    """Reads and checks every latent, then writes the packed array and, last, its index."""
    good: list[tuple[_Item, NDArray[Any]]] = []
    bad: list[str] = []
    packed_files: dict[tuple[Path, str], NDArray[Any]] = {}
    started = shown = time.monotonic()
    for number, item in enumerate(items):
        try:
            good.append((item, _read(item, channels, packed_files)))
        except ValueError as error:
            bad.append(f"{_where(item)}: {error}")
        now = time.monotonic()
        if verbose and now - started > _PROGRESS_AFTER_S and now - shown > 1.0:
            print(f"\rreading latents {number + 1}/{len(items)}", end="", file=sys.stderr, flush=True)
            shown = now
    if shown != started:
        print(f"\rread {len(items)} latents in {time.monotonic() - started:.0f} s", file=sys.stderr)
    sizes = Counter(latent.shape for _, latent in good)
    if len(sizes) > 1:
        usual, _ = sizes.most_common(1)[0]
        bad += [
            f"{_where(item)}: expected {list(usual)} like most of the others, found {list(latent.shape)}"
            for item, latent in good
            if latent.shape != usual
        ]
    if bad:
        more = f"\n  ... and {len(bad) - _MAX_LISTED} more" if len(bad) > _MAX_LISTED else ""
        listed = "\n  ".join(bad[:_MAX_LISTED])
        raise RaystarError(f"{len(bad)} of {len(items)} latents cannot be used; mend or remove them:\n  {listed}{more}")

    latents = [latent for _, latent in good]
    dtype = np.float16 if all(latent.dtype == np.float16 for latent in latents) else np.float32
    array = np.stack([latent.astype(dtype, copy=False) for latent in latents])
    _warn_if_scaled(array, verbose)
    array_path.parent.mkdir(parents=True, exist_ok=True)
    # Both are written beside their final names and renamed, the index last: a half-written bank is never opened.
    temporary = array_path.with_name(f".{array_path.name}.{os.getpid()}.npy")
    try:
        np.save(temporary, array)
        os.replace(temporary, array_path)
    finally:
        temporary.unlink(missing_ok=True)
    temporary = index_path.with_name(f".{index_path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"digest": hashlib.sha256(array.tobytes()).hexdigest()}))
    os.replace(temporary, index_path)


def _where(item: _Item) -> str:
    return str(item.path) if item.row < 0 else f"{item.path}[{item.name}]"


def _read(item: _Item, channels: int, packed_files: dict[tuple[Path, str], NDArray[Any]]) -> NDArray[Any]:
    """One latent [C,H,W] as fp16 or fp32; ValueError with the reason if it cannot be used."""
    if item.row >= 0:
        domain = item.name.partition("/")[0]
        if (item.path, domain) not in packed_files:
            import safetensors

            with safetensors.safe_open(item.path, framework="pt") as file:
                packed_files[item.path, domain] = _as_array(file.get_tensor(domain))
        return check_latent(packed_files[item.path, domain][item.row], channels)
    return read_latent(item.path, channels)


def read_latent(path: Path, channels: int = 4) -> NDArray[Any]:
    """Reads one latent file [C,H,W], unscaled, without ever running code from it.

    Raises:
        ValueError: why the file cannot be used.
    """
    try:
        if path.suffix == ".npy":
            value = np.load(path, allow_pickle=False)
        else:
            with warnings.catch_warnings():  # of pickle protocols, just before it refuses them
                warnings.simplefilter("ignore")
                value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("a pickle that holds more than tensors; it was not opened, since it could run code") from None
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise ValueError("holds pickled objects; they were not opened, since they could run code") from None
        raise ValueError(f"truncated or damaged ({error})") from None
    # A damaged file can make the readers raise nearly anything, and all of it means the same.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"truncated or damaged ({reason})") from None
    if isinstance(value, dict):
        value = next((value[k] for k in ("latent", "x") if k in value), None)
        if value is None:
            raise ValueError("expected a tensor, or a dictionary with 'latent' or 'x'; found neither key")
    if isinstance(value, Tensor):
        value = _as_array(value)
    return check_latent(value, channels)


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


def _split(latents: Tensor, items: list[_Item], content: str, data: DataConfig) -> Bank:
    train: list[NDArray[np.int64]] = []
    held: list[NDArray[np.int64]] = []
    for number, domain in enumerate(data.domains):
        rows = [i for i, item in enumerate(items) if item.domain == number]
        if data.eval_data_root is not None:
            held_rows = [i for i in rows if items[i].held]
        else:
            held_rows = _hold_out(domain, rows, items, data.holdout)
        kept = set(held_rows)
        train.append(np.array([i for i in rows if i not in kept], np.int64))
        held.append(np.array(held_rows, np.int64))
        if not len(train[-1]):
            raise RaystarError(f"data: domain '{domain}' has {len(rows)} latents, and none is left for training")
    digest = hashlib.sha256(json.dumps([content, [h.tolist() for h in held]]).encode()).hexdigest()[:16]
    names = tuple(item.name for item in items)
    return Bank(latents, data.domains, names, tuple(train), tuple(held), digest, data.data_root)


def _hold_out(domain: str, rows: list[int], items: list[_Item], share: float) -> list[int]:
    """About `share` of a domain's rows, whole pictures only; depends on names alone, never on a seed."""
    if share == 0:
        return []
    groups = picture_of([Path(items[i].name).stem for i in rows])
    # Hashing spreads the choice evenly over any naming scheme, and adding files moves few others.
    order = sorted(set(groups), key=lambda g: hashlib.sha256(f"{domain}/{g}".encode()).digest())
    members: dict[str, list[int]] = {}
    for group, row in zip(groups, rows, strict=True):
        members.setdefault(group, []).append(row)
    wanted = max(1, round(share * len(rows)))
    held: list[int] = []
    for group in order[:-1]:  # one picture at least stays for training
        if len(held) >= wanted:
            break
        held += members[group]
    return sorted(held)


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
        self._plan: dict[str, NDArray[np.int64]] = {}
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
        self._plan = {
            "y_src": source,
            "y_trg": target,
            "content": self._rows[self._starts[source] + (u[0] * lengths[source]).astype(np.int64)],
            "x_ref": self._rows[self._starts[target] + (u[1] * lengths[target]).astype(np.int64)],
        }
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
        plan = {name: torch.from_numpy(values[chosen]) for name, values in self._plan.items()}
        rng = np.random.default_rng([self.training.seed, self.epoch, step])
        # Drawn for the whole batch, whoever asks: a row's noise does not depend on the number of workers.
        noise = rng.standard_normal((3, rows, self.latent_dim), dtype=np.float32)[:, own]
        where = self.storage.device
        return Batch(
            self.storage[plan["content"].to(where)].float(),
            self.storage[plan["x_ref"].to(where)].float(),
            plan["y_src"].to(where),
            plan["y_trg"].to(where),
            *torch.from_numpy(noise).to(where),
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
